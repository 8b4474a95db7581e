# SPDX-License-Identifier: Apache-2.0
"""docs/policies.md says what the registry says."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from kvlib import KVCache
from kvlib.errors import ConfigError
from kvlib.eviction import POLICIES
from kvlib.policy_docs import GIVEN, policies_page
from kvlib.testing.models import tiny_model

PAGE = Path(__file__).parents[1] / "docs" / "policies.md"


def test_the_page_is_up_to_date():
    """Made anew it is the same; python -m kvlib.policy_docs docs/policies.md makes it."""
    assert PAGE.read_text(encoding="utf-8") == policies_page()


@pytest.mark.parametrize("name", POLICIES.names())
def test_every_policy_is_described(name):
    """Three sentences, and a word on every parameter."""
    cls = POLICIES.get(name)
    assert len(re.findall(r"[.!?](?:\s|$)", cls.about.idea)) == 3, cls.about.idea
    section = policies_page().partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    for f in fields(cls):
        if f.init:
            row = re.search(rf"\| `{f.name}` \|.*\| (.*) \|\n", section)
            assert row, f.name
            assert row[1].strip(), f.name
    assert section.count("**") == 10


@pytest.mark.parametrize("name", POLICIES.names())
def test_what_a_policy_has_to_be_given_is_said(name):
    """Those that need more than the model, and no others, are refused without it."""
    needs = re.search(rf"\| \[{name}\]\(#{name}\) \| .* \| (.*) \|\n", policies_page())[1]
    if name in GIVEN or "a calibration" in needs.split(", "):
        assert name not in GIVEN or GIVEN[name] in needs
        with pytest.raises(ConfigError, match=name):
            KVCache(tiny_model(), name)
    else:
        KVCache(tiny_model(), name)
