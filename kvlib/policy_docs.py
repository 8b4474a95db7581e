# SPDX-License-Identifier: Apache-2.0
"""`docs/policies.md`, made from the registry: ``python -m kvlib.policy_docs docs/policies.md``."""

import inspect
import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch

from kvlib.errors import ConfigError
from kvlib.eviction import ALLOCATORS, POLICIES, PROTECTORS, Needs, Resources

__all__ = ["policies_page"]

_HEAD = """\
# Eviction policies

What each policy keeps, what it takes to run, and where it departs from the paper it comes from.
This page is made from the registry (`python -m kvlib.policy_docs docs/policies.md`); a test holds
it to that.

A method is written `name:key=value,...`. `budget=0.25` (with a point) is a fraction of the prompt,
fixed when the prompt ends; `budget=512` is a number of entries per KV head. Of entries with equal
scores the earlier one stays.

Policies are composed with `+`, in any order: a policy that scores entries, an allocator that shares
the budget between heads and layers, a protector, and a policy that prunes channels. All of them are
in `snapkv:budget=0.25+adakv+protect:sinks=4,window=32+think:ratio=0.4`. A method that begins with
an allocator and names no policy for tokens works with SnapKV: `pyramid:budget=0.25` is
`snapkv:budget=0.25+pyramid`. A codec behind `|` (`snapkv:budget=0.25 | int8`) is for storing.

What a policy evicts is freed, not masked: `KVCache.nbytes` counts keys, values, positions, weights,
channel lists, space to grow and the policy's own memory.

"""

_SIGNALS = {
    "prefill_column_sums": "column sums of the prompt's attention",
    "step_column_sums": "column sums of every step's attention",
    "prefill_local_sums": "column sums of the prompt's attention within a window",
    "query_window": "attention of the prompt's last {} queries",
    "step_query_window": "attention of every step's last {} queries",
    "step_maxima": "column maxima of every step's attention",
    "last_queries": "the prompt's last {} queries",
    "query_moments": "mean and covariance of the prompt's queries",
    "hidden": "hidden states",
    "probe": "extra tokens read behind the prompt and forgotten",
    "rerun": "a second pass over some of the prompt's tokens",
}

GIVEN = {
    "duo": "a file of trained gates",
    "epicache": "the tokenizer or a patched prompt",
    "kvzip": "the tokenizer",
    "speckv": "a draft model",
}
"""What else a policy, with its defaults, has to be given."""


def policies_page() -> str:
    """The whole page."""
    parts = [_HEAD, "| policy | decides | needs |\n|---|---|---|\n"]
    names = POLICIES.names()
    for name in names:
        cls: Any = POLICIES.get(name)
        parts.append(f"| [{name}](#{name}) | {cls.about.when} | {_needs(cls)} |\n")
    for name in names:
        cls = POLICIES.get(name)
        about = cls.about
        status = "" if cls.status == "stable" else " Experimental."
        parts.append(f"\n## {name}\n\n{about.idea}{status}\n\n")
        parts.append(_parameters(cls))
        parts.append(f"- **Decides**: {about.when}.\n- **Needs**: {_needs(cls)}.\n")
        parts.append(f"- **Cost**: {about.cost}.\n- **Source**: {about.paper}.\n")
        parts.append(f"- **Differs**: {about.differs.rstrip('.')}.\n")
    parts.append("\n# Allocators\n\nWhat shares a budget between heads and layers.\n")
    parts += [_part(name, ALLOCATORS.get(name)) for name in ALLOCATORS.names()]
    parts.append("\n# Protector\n")
    parts += [_part(name, PROTECTORS.get(name)) for name in PROTECTORS.names()]
    return "".join(parts)


def _part(name: str, cls: Any) -> str:
    module: Any = inspect.getmodule(cls)
    text = str(cls.__doc__ if name in PROTECTORS.names() else module.__doc__)
    text = re.sub(r"\n\n *Args:.*", "", text, flags=re.DOTALL)
    text = re.sub(r" *\n(?!\n)(?<!\n\n) *", " ", inspect.cleandoc(text)).strip()
    return f"\n## {name}\n\n{text}\n\n{_parameters(cls)}"


def _needs(cls: Any) -> str:
    needs: Needs = cls().needs
    found = []
    for name, text in _SIGNALS.items():
        value = getattr(needs, name)
        if value is not None and value is not False and (value is True or value != 0):
            found.append(text.format(value).replace("last 1 queries", "last query"))
    if "profile" in {f.name for f in fields(cls)}:
        found.append("a calibration" if _must_be_calibrated(cls) else "a calibration if given")
    if cls.name in GIVEN:
        found.append(GIVEN[cls.name])
    return ", ".join(found) or "nothing"


def _must_be_calibrated(cls: Any) -> bool:
    try:
        cls().check(Resources(tokenizer=object(), patch=torch.zeros(1, dtype=torch.int64)))
    except ConfigError as exc:
        return "kvlib calibrate" in str(exc)
    return False


def _parameters(cls: Any) -> str:
    described = _arguments(cls.__doc__)
    rows = []
    for f in fields(cls):
        if f.init:
            default = "" if f.default is MISSING else f"`{_text(f.default)}`"
            rows.append(f"| `{f.name}` | {default} | {described.get(f.name, '')} |\n")
    if not rows:
        return ""
    return "| parameter | default | |\n|---|---|---|\n" + "".join(rows) + "\n"


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool | None) else str(value) or "-"


def _arguments(docstring: str) -> dict[str, str]:
    """The Args section of a docstring, by name."""
    _, _, text = inspect.cleandoc(docstring).partition("Args:\n")
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name = start[1]
            found[name] = start[2]
        elif name and line.strip():
            found[name] += " " + line.strip()
        else:
            break
    return {key: text.replace("``", "`").replace("|", "\\|") for key, text in found.items()}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(policies_page(), encoding="utf-8")
