# SPDX-License-Identifier: Apache-2.0
"""Method strings of kvlib, and what kvpress does for them.

A method is parts joined by ``+``, as in kvlib: what scores tokens, an allocator, and what prunes
channels. What a label leaves out has kvlib's default; what kvpress cannot follow is refused.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import kvpress
from kvpress.presses.base_press import BasePress
from transformers import PreTrainedModel

__all__ = ["InputError", "Method", "Shape", "parse_method"]

SLACK = 0.5
"""kvpress cuts fractions off: half an entry more is safe from float rounding."""


class InputError(Exception):
    """The prompts, the output file or a method cannot be used; the message says why."""


@dataclass(frozen=True)
class Shape:
    """What a press has to know: L layers of Hkv heads with keys of D channels, and the prompt.

    `kept` is the number of its tokens that stay, for each head on average.
    """

    layers: int
    heads: int
    width: int
    tokens: int = 0
    kept: int = 0

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Shape":
        """Without a prompt."""
        config = model.config
        return cls(config.num_hidden_layers, config.num_key_value_heads, model_width(model))

    @property
    def ratio(self) -> float:
        """The compression ratio that makes kvpress keep `kept`, head by head."""
        return 1 - (self.kept + SLACK) / self.tokens

    def joint_ratio(self, layers: int) -> float:
        """The same where all heads of so many layers compete: kvpress counts what goes."""
        rows = layers * self.heads
        return (rows * (self.tokens - self.kept) + SLACK) / (rows * self.tokens)


def model_width(model: PreTrainedModel) -> int:
    """Channels of a key."""
    return int(model.model.layers[0].self_attn.head_dim)


Build = Callable[[Shape], BasePress]
Share = Literal["head", "layer", "model", "pyramid"]


@dataclass(frozen=True)
class Method:
    """A label of kvlib, and what kvpress does for it.

    Attributes:
        label: as it was given.
        budget: of the tokens.
        seed: of RandomPress.
        tokens: builds the press that drops or masks tokens; None for all tokens.
        share: within what exactly the budget stays.
        line: of a pyramid: entries by layer before rounding.
        channels: builds the press that zeroes channels; None for all channels.
        pruned: how many channels of so many it zeroes.
    """

    label: str
    budget: str = "1.0"
    seed: int = 0
    tokens: Build | None = None
    share: Share = "head"
    line: Callable[[Shape], list[Fraction]] | None = None
    channels: Build | None = None
    pruned: Callable[[int], int] = lambda width: 0

    def kept(self, tokens: int) -> int:
        """Entries per head that stay, counted as kvlib does: fractions are rounded up."""
        exact = Fraction(self.budget)
        if "." in self.budget or "e" in self.budget.lower():
            return math.ceil(exact * tokens)
        return min(int(exact), tokens)

    def press(self, shape: Shape) -> BasePress | None:
        """The press for a prompt; None where everything stays."""
        presses = []
        if self.tokens is not None and shape.kept < shape.tokens:
            presses.append(self.tokens(shape))
        if self.channels is not None and self.pruned(shape.width):
            presses.append(self.channels(shape))
        if len(presses) > 1:
            return kvpress.ComposedPress(presses)
        return presses[0] if presses else None

    def check(self, counts: list[list[int]], pruned: set[int], shape: Shape) -> None:
        """Assert that kvpress kept what kvlib means: entries [L][Hkv], zeroed channels of heads."""
        layers = [sum(heads) for heads in counts]
        mean = shape.heads * shape.kept
        assert sum(layers) == shape.layers * mean, f"{self.label}: {sum(layers)} of {layers} stay"
        if self.share in ("head", "layer"):
            assert set(layers) == {mean}, f"{self.label}: layers keep {layers}, not {mean}"
        if self.share in ("head", "pyramid"):
            assert all(len(set(heads)) == 1 for heads in counts), f"{self.label}: uneven {counts}"
        if self.line is not None:
            for heads, exact in zip(counts, self.line(shape), strict=True):
                assert abs(heads[0] - exact) < SLACK + 1e-6, (
                    f"{self.label}: {heads[0]}, not {exact}"
                )
        if self.channels is not None:
            wanted = self.pruned(shape.width)
            assert pruned == {wanted}, f"{self.label}: {pruned} channels are zero, not {wanted}"


# Reading


@dataclass
class _Part:
    """One part of a label; what is read is taken out of `params`."""

    label: str
    name: str
    params: dict[str, str]

    def refuse(self, what: str, why: str) -> InputError:
        return InputError(f"{what} in method {self.label!r} is not supported: {why}")

    def integer(self, key: str, default: int, least: int = 0) -> int:
        text = self.params.pop(key, str(default))
        if not text.isdecimal() or int(text) < least:
            raise self.refuse(f"{key}={text}", f"it is a whole number from {least}")
        return int(text)

    def fraction(self, key: str, default: str) -> Fraction:
        text = self.params.pop(key, default)
        try:
            return Fraction(text)
        except (ValueError, ZeroDivisionError):
            raise self.refuse(f"{key}={text}", "it is a number") from None

    def boolean(self, key: str, default: bool) -> bool:
        text = self.params.pop(key, str(default)).lower()
        if text not in ("true", "false"):
            raise self.refuse(f"{key}={text}", "it is true or false")
        return text == "true"

    def only(self, key: str, value: str) -> None:
        given = self.params.pop(key, value)
        if given.lower() != value:
            raise self.refuse(f"{key}={given}", f"kvpress has {key}={value} only")

    def budget(self) -> str:
        text = self.params.pop("budget", "0.5")
        try:
            exact = Fraction(text)
        except (ValueError, ZeroDivisionError):
            raise self.refuse(f"budget={text}", "it is a number") from None
        ratio = "." in text or "e" in text.lower()
        if exact <= 0 or (exact > 1 if ratio else exact.denominator != 1):
            raise self.refuse(
                f"budget={text}",
                "kvpress keeps a fraction in (0, 1] (written with a point) or 1 and more tokens "
                "(without)",
            )
        return text

    def done(self) -> None:
        if self.params:
            raise InputError(
                f"{', '.join(self.params)} in method {self.label!r} is not supported here"
            )


def parse_method(label: str) -> Method:
    """Read one method string.

    Raises:
        InputError: naming what is not supported.
    """
    parts: dict[str, _Part] = {}
    for text in label.split("+"):
        part = _part(label, text)
        kind = next((kind for kind, known in _KINDS.items() if part.name in known), None)
        if kind is None:
            names = [name for known in _KINDS.values() for name in known]
            raise InputError(f"method {label!r} is not supported; known: {', '.join(names)}")
        if kind in parts:
            raise InputError(
                f"method {label!r} is not supported: {parts[kind].name} and {part.name} are of one "
                "kind"
            )
        parts[kind] = part
    allocator, channels = parts.get("allocator"), parts.get("channels")
    scorer = parts.get("scorer")
    if scorer is None and allocator is not None:  # alone it works with SnapKV, as in kvlib
        mine = {"beta", "floor"}
        theirs = {key: x for key, x in allocator.params.items() if key not in mine}
        allocator.params = {key: x for key, x in allocator.params.items() if key in mine}
        scorer = _Part(label, "snapkv", theirs)
    method = Method(label)
    if scorer is not None:
        method = _SCORERS[scorer.name](method, scorer)
    if allocator is not None:
        assert scorer is not None
        method = _ALLOCATORS[allocator.name](method, allocator, scorer.name)
    if channels is not None:
        if method.share in ("layer", "model"):
            raise channels.refuse(channels.name, "kvpress composes no presses that mask heads")
        method = _CHANNELS[channels.name](method, channels)
    for used in (scorer, allocator, channels):
        if used is not None:
            used.done()
    return method


def _part(label: str, text: str) -> _Part:
    name, _, rest = text.partition(":")
    params: dict[str, str] = {}
    for item in rest.split(",") if rest else ():
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key or not value or key in params:
            raise InputError(f"cannot read {item!r} in method {label!r}: expected key=value, once")
        params[key] = value
    return _Part(label, name.strip(), params)


# What scores tokens


def _full(method: Method, part: _Part) -> Method:
    return method


def _streaming(method: Method, part: _Part) -> Method:
    sinks = part.integer("sinks", 4)
    return replace(
        method,
        budget=part.budget(),
        tokens=lambda shape: kvpress.StreamingLLMPress(
            compression_ratio=shape.ratio,
            n_sink=min(sinks, shape.kept),  # with more sinks than may stay, ties would decide
        ),
    )


@dataclass(frozen=True)
class _SnapKV:
    window: int
    kernel: int
    pyramid_beta: Fraction | None = None

    def __call__(self, shape: Shape) -> kvpress.SnapKVPress:
        # A longer window fails on short prompts; one that may not stay whole is cut by ties.
        given = {"window_size": min(self.window, shape.kept), "kernel_size": self.kernel}
        if self.pyramid_beta is None:
            return kvpress.SnapKVPress(compression_ratio=shape.ratio, **given)
        # kvpress divides the whole budget by beta, kvlib (like the paper) what it has beyond the
        # window: another beta gives the same last layer, and so the same line.
        beta = float(shape.kept / self.line(shape)[-1])
        ratio = 1 - shape.kept / shape.tokens
        return kvpress.PyramidKVPress(compression_ratio=ratio, beta=max(beta, 1.0), **given)

    def line(self, shape: Shape) -> list[Fraction]:
        """Entries of each layer, before rounding."""
        assert self.pyramid_beta is not None
        window = min(self.window, shape.kept)
        last = window + (shape.kept - window) / self.pyramid_beta
        first = 2 * shape.kept - last
        if shape.layers > 1 and first > max(shape.tokens - window, shape.kept):
            raise InputError(
                f"the pyramid of {shape.kept} of {shape.tokens} tokens is not supported: its first "
                f"layer keeps {float(first):g}, and kvpress keeps no more than all but a window of "
                f"{window}"
            )
        step = (first - last) / max(shape.layers - 1, 1)
        return [first - step * index for index in range(shape.layers)]


def _snapkv(method: Method, part: _Part) -> Method:
    window = part.integer("window", 32, 1)
    kernel = part.integer("kernel", 5, 1)
    if kernel % 2 == 0:
        raise part.refuse(f"kernel={kernel}", "it must be odd")
    part.only("pool", "avg")
    part.only("group", "mean")
    return replace(method, budget=part.budget(), tokens=_SnapKV(window, kernel))


def _random(method: Method, part: _Part) -> Method:
    part.only("sinks", "0")
    part.only("window", "0")
    return replace(
        method,
        budget=part.budget(),
        seed=part.integer("seed", 0),
        # The press's own seed would give all layers the same draw; see `prefill`.
        tokens=lambda shape: kvpress.RandomPress(compression_ratio=shape.ratio),
    )


def _expected(method: Method, part: _Part) -> Method:
    sinks = part.integer("sinks", 4)
    given: dict[str, Any] = {
        "n_future_positions": part.integer("future", 512, 1),
        "n_sink": sinks,
        "epsilon": float(part.fraction("eps", "0.0")),
        "use_covariance": part.boolean("covariance", True),
        "use_vnorm": part.boolean("norm", True),
    }
    if given["epsilon"] < 0:
        raise part.refuse(f"eps={given['epsilon']}", "it is 0 or more")

    def build(shape: Shape) -> kvpress.ExpectedAttentionPress:
        _need_sinks(part, shape, sinks)
        return kvpress.ExpectedAttentionPress(compression_ratio=shape.ratio, **given)

    return replace(method, budget=part.budget(), tokens=build)


def _need_sinks(part: _Part, shape: Shape, sinks: int) -> None:
    """kvpress gives all sinks one score: which of them would stay is chance."""
    if shape.kept < sinks:
        raise part.refuse(f"sinks={sinks}", f"only {shape.kept} of {shape.tokens} tokens may stay")


class _KVzipPress(kvpress.KVzipPress):
    """KVzip on prompts that do not begin with a chat template.

    The press takes as many first tokens as the template has for the template's, whatever they are,
    and leaves them unscored: of a bare text it would evict the beginning.
    """

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        self.prefix_length = 0
        return super().prepare(*args, **kwargs)


def _kvzip(method: Method, part: _Part) -> Method:
    sinks = part.integer("sinks", 4)
    chunk = part.integer("chunk", 2048, 1)
    part.only("instruct", "true")

    def build(shape: Shape, layerwise: bool = False) -> kvpress.KVzipPress:
        _need_sinks(part, shape, sinks)
        ratio = shape.joint_ratio(1 if layerwise else shape.layers)
        return _KVzipPress(
            compression_ratio=ratio, layerwise=layerwise, n_sink=sinks, chunk_size=chunk
        )

    return replace(method, budget=part.budget(), tokens=build, share="model")


def _plain(press: type[kvpress.ScorerPress]) -> Callable[[Method, _Part], Method]:
    return lambda method, part: replace(
        method, budget=part.budget(), tokens=lambda shape: press(compression_ratio=shape.ratio)
    )


# Allocators, and what prunes channels


def _adakv(method: Method, part: _Part, scorer: str) -> Method:
    floor = part.fraction("floor", "0.2")
    if not 0 <= floor <= 1:
        raise part.refuse(f"floor={float(floor):g}", "it is a share in [0, 1]")
    build: Any = method.tokens
    if scorer == "kvzip":
        if floor:
            raise part.refuse(f"floor={float(floor):g}", "KVzipPress has no safeguard")
        return replace(method, tokens=lambda shape: build(shape, layerwise=True), share="layer")
    if scorer not in ("snapkv", "expected"):  # others' scores tie between heads or do not compare
        raise part.refuse("adakv", "here it works with snapkv, expected and kvzip")
    return replace(
        method,
        tokens=lambda shape: kvpress.AdaKVPress(build(shape), alpha_safeguard=float(floor)),
        share="layer",
    )


def _pyramid(method: Method, part: _Part, scorer: str) -> Method:
    beta = part.fraction("beta", "20")
    if beta < 1:
        raise part.refuse(f"beta={float(beta):g}", "it is 1 or more")
    if not isinstance(method.tokens, _SnapKV):
        raise part.refuse("pyramid", "PyramidKVPress works with snapkv only")
    build = replace(method.tokens, pyramid_beta=beta)
    return replace(method, tokens=build, line=build.line, share="pyramid")


def _think(method: Method, part: _Part) -> Method:
    ratio = part.fraction("ratio", "0.4")
    if not 0 <= ratio < 1:
        raise part.refuse(f"ratio={float(ratio):g}", "it is a share in [0, 1)")
    window = part.integer("window", 32, 1)
    part.only("recent", "0")

    def pruned(width: int) -> int:
        return int(ratio * width)

    def build(shape: Shape) -> kvpress.ThinKPress:
        share = (pruned(shape.width) + SLACK) / shape.width
        return kvpress.ThinKPress(key_channel_compression_ratio=share, window_size=window)

    return replace(method, channels=build, pruned=pruned)


_SCORERS: dict[str, Callable[[Method, _Part], Method]] = {
    "full": _full,
    "streaming": _streaming,
    "snapkv": _snapkv,
    "random": _random,
    "knorm": _plain(kvpress.KnormPress),
    "keydiff": _plain(kvpress.KeyDiffPress),
    "tova": _plain(kvpress.TOVAPress),
    "expected": _expected,
    "kvzip": _kvzip,
}
_ALLOCATORS: dict[str, Callable[[Method, _Part, str], Method]] = {
    "adakv": _adakv,
    "pyramid": _pyramid,
}
_CHANNELS: dict[str, Callable[[Method, _Part], Method]] = {"think": _think}
_KINDS: dict[str, Any] = {
    "scorer": _SCORERS,
    "allocator": _ALLOCATORS,
    "channels": _CHANNELS,
}
