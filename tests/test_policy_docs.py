# SPDX-License-Identifier: Apache-2.0
"""docs/policies.md says what the registry says."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from kvlib.eviction import POLICIES
from kvlib.policy_docs import policies_page

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
