# SPDX-License-Identifier: Apache-2.0
"""Named plug-ins, found lazily, and the text in which methods are written.

A method string is ``name:key=value,...``; ``+`` composes policies, ``|`` pipes into a codec, ``;``
separates the methods of a grid: ``snapkv:budget=0.25+think:ratio=0.4 | int4:group=32``. The same
text works in constructors, on the command line, in connector configs and in evaluation grids.

A family keeps one literal table ``name -> "module:Class"`` (in its package's ``__init__``);
outsiders add entry points in the group ``kvlib.<family>``. Data never names a module to import.
"""

import difflib
import importlib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from importlib.metadata import entry_points
from threading import RLock
from typing import Any, Generic, TypeVar

from kvlib.errors import ConfigError, UnknownPluginError

__all__ = [
    "PLACE",
    "Method",
    "MethodCall",
    "Registry",
    "describe",
    "identity",
    "parse_grid",
    "parse_method",
    "suggest",
]

T = TypeVar("T")

_RESERVED = set("+|;:,= \t\n")

PLACE = {"kvlib": "place"}
"""Metadata of a field that says where something is found, which `identity` leaves out."""


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about `name`: near names, then all known ones."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
    return f"{hint} Known: {', '.join(names) if names else 'none'}."


@dataclass(frozen=True, slots=True)
class MethodCall:
    """One ``name:key=value,...``; values are still text."""

    name: str
    params: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """The text it was parsed from, without spaces."""
        return self.name + (
            ":" + ",".join(f"{k}={v}" for k, v in self.params) if self.params else ""
        )


@dataclass(frozen=True, slots=True)
class Method:
    """A parsed method string: policies applied in order, then a codec (either may be missing)."""

    policies: tuple[MethodCall, ...] = ()
    codec: MethodCall | None = None

    def __str__(self) -> str:
        """The text it was parsed from, in normal form."""
        left = "+".join(str(p) for p in self.policies)
        return left if self.codec is None else f"{left} | {self.codec}".lstrip()


def _parse_call(text: str, whole: str) -> MethodCall:
    name, colon, rest = text.strip().partition(":")
    name = name.strip()
    if not name or set(name) & _RESERVED:
        raise ConfigError(
            f"cannot read {text.strip()!r} in method {whole!r}: expected name:key=value,..."
        )
    params: dict[str, str] = {}
    if colon:
        for item in rest.split(","):
            key, equals, value = (part.strip() for part in item.partition("="))
            if not equals or not key or not value or (set(key) | set(value)) & _RESERVED:
                raise ConfigError(
                    f"cannot read {item.strip()!r} in method {whole!r}: expected key=value (every "
                    "value has a key; none of + | ; : , = or spaces inside)"
                )
            if key in params:
                raise ConfigError(f"{key!r} is given twice in {text.strip()!r}")
            params[key] = value
    return MethodCall(name, tuple(params.items()))


def parse_method(text: str) -> Method:
    """Read one method string.

    A string with ``|`` has policies on the left (possibly none) and a codec on the right. Without
    ``|`` everything is a policy; use `Registry.build` for a string that is known to be a codec.

    Raises:
        ConfigError: the text does not follow the grammar, or holds ``;`` (see `parse_grid`).
    """
    if ";" in text:
        raise ConfigError(f"{text!r} holds several methods separated by ';' where one is expected")
    left, pipe, right = text.partition("|")
    if "|" in right:
        raise ConfigError(f"{text!r} has more than one '|': a method ends in at most one codec")
    if "+" in right:
        raise ConfigError(f"codecs do not compose with '+' in {text!r}; '+' joins policies")
    if not text.strip() or (pipe and not right.strip()):
        raise ConfigError(
            f"method {text!r} is empty" if not text.strip() else f"{text!r} has nothing after '|'"
        )
    policies = tuple(_parse_call(part, text) for part in left.split("+")) if left.strip() else ()
    return Method(policies, _parse_call(right, text) if pipe else None)


def parse_grid(text: str) -> tuple[Method, ...]:
    """Read methods separated by ``;`` (empty ones are skipped)."""
    return tuple(parse_method(part) for part in text.split(";") if part.strip())


def _coerce(text: str, hint: Any, where: str) -> object:
    """Text to the type of a field; a number with a point or exponent is a float."""
    options = (
        typing.get_args(hint)
        if typing.get_origin(hint) in (typing.Union, types.UnionType)
        else (hint,)
    )
    lowered = text.lower()
    if bool in options and lowered in ("true", "false"):
        return lowered == "true"
    is_float = "." in text or "e" in lowered
    if int in options and not is_float:
        try:
            return int(text)
        except ValueError:
            pass
    if float in options and (is_float or int not in options):
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    if type(None) in options and lowered == "none":
        return None
    if str in options:
        return text
    expected = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ConfigError(f"{where} must be {expected}, got {text!r:.80}")


class Registry(Generic[T]):
    """The plug-ins of one family.

    Args:
        family: its plural, as in the entry-point group: ``codecs``, ``policies``, ``tiers``.
        table: name -> "module:attribute" of the built-in ones.
    """

    def __init__(self, family: str, table: Mapping[str, str]) -> None:
        self.family = family
        self._table = dict(table)
        self._outside: dict[str, Any] | None = None
        self._loaded: dict[str, type[T]] = {}
        self._singular = family[:-3] + "y" if family.endswith("ies") else family.removesuffix("s")
        self._lock = RLock()  # importing a plug-in may ask the registry for another

    def _entry_points(self) -> dict[str, Any]:
        if self._outside is None:
            found: dict[str, Any] = {}
            for point in entry_points(group=f"kvlib.{self.family}"):
                if point.name in self._table or point.name in found:
                    other = self._table.get(point.name) or found[point.name].value
                    raise ConfigError(
                        f"{point.value} registers {self._singular} {point.name!r}, which is taken "
                        f"by {other}; uninstall one of them"
                    )
                found[point.name] = point
            self._outside = found
        return self._outside

    def names(self) -> list[str]:
        """Sorted names, built-in and outside ones; imports none of them."""
        with self._lock:
            return sorted([*self._table, *self._entry_points()])

    def get(self, name: str) -> type[T]:
        """The class registered as `name`, imported now.

        Raises:
            UnknownPluginError: with the nearest names.
        """
        with self._lock:
            if name not in self._loaded:
                if name in self._table:
                    module, _, attribute = self._table[name].partition(":")
                    self._loaded[name] = getattr(importlib.import_module(module), attribute)
                elif name in self._entry_points():
                    self._loaded[name] = self._entry_points()[name].load()
                else:
                    known = [*self._table, *self._entry_points()]
                    raise UnknownPluginError(
                        f"no {self._singular} is named {name!r:.80}.{suggest(name, known)}"
                    )
            return self._loaded[name]

    def build(
        self,
        method: "str | MethodCall",
        pick: Callable[[type[T]], type[T]] = lambda registered: registered,
    ) -> T:
        """Make the plug-in that `method` (``name:key=value,...``) describes.

        Args:
            method: text, or what it was parsed to.
            pick: the class to make, given the registered one: an earlier version of it, say.

        Raises:
            UnknownPluginError: unknown name.
            ConfigError: unknown key (with the nearest one), wrong type, or a value the plug-in
                refuses.
        """
        call = _parse_call(method, method) if isinstance(method, str) else method
        cls = pick(self.get(call.name))
        if not is_dataclass(cls):
            raise ConfigError(
                f"{self._singular} {call.name!r} is not a dataclass; its parameters cannot be read"
            )
        hints = typing.get_type_hints(cls)
        known = [f.name for f in fields(cls) if f.init]
        arguments: dict[str, object] = {}
        for key, value in call.params:
            if key not in known:
                raise ConfigError(
                    f"{call.name!r} has no parameter {key!r:.80}.{suggest(key, known)}"
                )
            arguments[key] = _coerce(value, hints[key], f"{call.name}:{key}")
        required = {
            f.name
            for f in fields(cls)
            if f.init and f.default is MISSING and f.default_factory is MISSING
        }
        if absent := sorted(required - set(arguments)):
            raise ConfigError(f"{call.name!r} needs a value for {', '.join(absent)}")
        return cls(**arguments)


def describe(plugin: Any) -> str:
    """The canonical method string of a plug-in: every parameter given, in the order of its fields.

    Text is part of storage identities, so equal objects have equal text, and it can be read back.
    Of a composition, which has `parts`, it is theirs joined by ``+``.

    Raises:
        ConfigError: a value that no method string can hold.
    """
    if composed := getattr(plugin, "parts", ()):
        return "+".join(describe(part) for part in composed)
    return _text(plugin, [f for f in fields(plugin) if f.init])


def identity(plugin: Any) -> str:
    """`describe` without the fields marked as `PLACE`: equal wherever a file was read from."""
    return _text(plugin, [f for f in fields(plugin) if f.init and f.metadata != PLACE])


def _text(plugin: Any, parameters: "list[Field[Any]]") -> str:
    parts = [f"{f.name}={_value_text(plugin, f.name, f.type)}" for f in parameters]
    return f"{plugin.name}:{','.join(parts)}" if parts else str(plugin.name)


def _value_text(plugin: Any, name: str, hint: Any) -> str:
    value = getattr(plugin, name)
    if hint in (float, "float") and type(value) is int:
        value = float(value)  # equal to it
    if isinstance(value, bool | None):
        text = str(value).lower()
    elif isinstance(value, float) and math.isfinite(value):
        text = str(value + 0.0).replace("e+", "e")  # -0.0 is equal to 0.0; "+" composes methods
    else:
        text = str(value)
    if not text or set(text) & _RESERVED or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"{plugin.name}:{name} is {value!r:.80}, which method text cannot hold")
    return text
