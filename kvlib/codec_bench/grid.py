# SPDX-License-Identifier: Apache-2.0
"""Which codecs are measured, and what they are called.

Some codecs store the first tokens exactly, since attention leans on them so much that errors there
show everywhere; others, as published, do not. Each lossy one that does not is therefore measured
twice: as it is, and marked "+sinks" with those tokens exact. Where the codec has a parameter for
that, it is set; else the exact tokens are put back after decoding, and their bytes are added.
"""

from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from kvlib.artefacts import load_artefact
from kvlib.codecs import Codec, build_codec, describe_codec
from kvlib.codecs.transforms import load_profile
from kvlib.errors import ConfigError

__all__ = ["SINKS", "Entry", "default_methods", "make_grid", "profile_methods"]

SINKS = " +sinks"
"""Behind the names of methods and families whose first tokens are exact for fairness."""

_PLAIN = (
    "exact",
    "fp8",
    "int8",
    "int4",
    "kivi:bits=4",
    "kivi:bits=2",
    "hadamard:bits=4",
    "hadamard:bits=3",
    "hadamard:bits=2",
    "cachegen:variant=lmcache",
)
_NEAR_LEVELS = (0.35, 0.5, 0.7)
_LEVELS = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
_ORIGINS = ("profile", "digest")  # parameters that say where numbers come from


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the results.

    Attributes:
        codec: that is measured.
        method: its canonical string.
        label: what it is called.
        family: whose points make a curve.
        put_back: first tokens that are put back after decoding, as bytes beside the records.
    """

    codec: Codec
    method: str
    label: str
    family: str
    put_back: int = 0


def default_methods() -> list[str]:
    """Those that need no calibration."""
    return [*_PLAIN, *(f"kvlc:preset=near,level={level}" for level in _NEAR_LEVELS)]


def profile_methods(kvlc: str | None, cachegen: str | None) -> list[str]:
    """The methods of calibrated codecs: every preset, and every level.

    Args:
        kvlc: file from `kvlib calibrate codec`.
        cachegen: file from `kvlib calibrate cachegen`.

    Raises:
        ConfigError: a file is not what it should be.
    """
    methods = []
    if kvlc is not None:
        for preset in load_profile(kvlc).presets:
            methods += [f"kvlc:preset={preset},level={x},profile={kvlc}" for x in _LEVELS]
    if cachegen is not None:
        levels = load_artefact(cachegen, "cachegen").tensors.get("levels")
        if levels is None or not levels.numel():
            raise ConfigError(f"the cachegen profile {cachegen!r} has no levels")
        methods += [f"cachegen:level={x},profile={cachegen}" for x in levels.flatten().tolist()]
    return methods


def make_grid(methods: Iterable[str], sinks: int) -> list[Entry]:
    """The rows for some codecs; what is given twice is measured once.

    Args:
        methods: method strings of codecs.
        sinks: first tokens that are exact in the rows added for fairness; 0 for no such rows.

    Raises:
        UnknownPluginError, ConfigError: see `kvlib.codecs.build_codec`.
    """
    plain: dict[str, Codec] = {}
    for method in methods:
        codec = build_codec(method)
        plain.setdefault(describe_codec(codec), codec)
    if not plain:
        raise ConfigError("no methods are given: --methods takes codecs separated by ';'")
    shorts = [_label(codec) for codec in plain.values()]
    entries: dict[tuple[str, int], Entry] = {}
    for (method, codec), short in zip(plain.items(), shorts, strict=True):
        label = short if shorts.count(short) == 1 else _label(codec, origins=True)
        family = _family(codec)
        entries.setdefault((method, 0), Entry(codec, method, label, family))
        own = _own_sinks(codec)
        if not sinks or codec.lossless or (own is not None and any(own)):
            continue
        marked = (label + SINKS, family + SINKS)
        if own is None:
            entries[method, sinks] = Entry(codec, method, *marked, put_back=sinks)
        elif (fair := describe_codec(changed := _with_sinks(codec, sinks))) not in plain:
            entries[fair, 0] = Entry(changed, fair, *marked)
    return list(entries.values())


def _own_sinks(codec: Any) -> tuple[int, int] | None:
    """The parameter of first tokens that are exact, and its default; None without one."""
    for x in fields(codec):
        if x.name == "sinks":
            return codec.sinks, 0 if x.default is MISSING else x.default
    return None


def _with_sinks(codec: Any, sinks: int) -> Codec:
    changed: Codec = replace(codec, sinks=sinks)
    return changed


def _label(codec: Any, *, origins: bool = False) -> str:
    """The method without what has its default value, and without where its numbers come from."""
    parts = []
    for x in fields(codec):
        if not x.init or (x.name in _ORIGINS and not (origins and x.name == "digest")):
            continue
        value = getattr(codec, x.name)
        if value != (x.default if x.default is not MISSING else None):
            text = str(value).lower() if isinstance(value, bool) else f"{value}"
            parts.append(f"{x.name}={text}")
    return f"{codec.name}:{','.join(parts)}" if parts else str(codec.name)


def _family(codec: Any) -> str:
    name = str(codec.name)
    if name == "kvlc":
        name = f"kvlc {codec.preset}" + ("" if codec.digest else ", no profile")
    elif name == "cachegen" and codec.variant == "lmcache":
        name = "lmcache"
    elif name in ("int8", "int4"):
        name = "int"
    value, usual = _own_sinks(codec) or (0, 0)
    return name + SINKS if value and not usual else name
