# SPDX-License-Identifier: Apache-2.0
"""Codecs: how blocks become bytes. One file a codec; the table below is the only list of them."""

from importlib import import_module
from typing import TYPE_CHECKING

from kvlib.codecs.container import Container, Header, Section
from kvlib.errors import IncompatibleDataError, UnknownPluginError
from kvlib.registry import MethodCall, Registry

if TYPE_CHECKING:
    from kvlib.codecs.base import Codec, MatrixCodec, describe_codec
    from kvlib.codecs.pack import encode_block
    from kvlib.codecs.unpack import decode_block

__all__ = [
    "CODECS",
    "Codec",
    "Container",
    "Header",
    "MatrixCodec",
    "Section",
    "build_codec",
    "codec_from_canonical",
    "decode_block",
    "describe_codec",
    "encode_block",
]

_NEED_TORCH = {
    "Codec": "base",
    "MatrixCodec": "base",
    "decode_block": "unpack",
    "describe_codec": "base",
    "encode_block": "pack",
}

CODECS: "Registry[Codec]" = Registry(
    "codecs",
    {
        "cachegen": "kvlib.codecs.cachegen:CacheGenCodec",
        "exact": "kvlib.codecs.exact:ExactCodec",
        "fp8": "kvlib.codecs.fp8:Fp8Codec",
        "hadamard": "kvlib.codecs.hadamard:HadamardCodec",
        "int4": "kvlib.codecs.integer:Int4Codec",
        "int8": "kvlib.codecs.integer:Int8Codec",
        "kvlc": "kvlib.codecs.kvlc:KvlcCodec",
        "kivi": "kvlib.codecs.kivi:KiviCodec",
        "raw": "kvlib.codecs.raw:RawCodec",
    },
)


def __getattr__(name: str) -> object:
    if name in _NEED_TORCH:  # containers alone must be readable without torch
        value = getattr(import_module(f"kvlib.codecs.{_NEED_TORCH[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def build_codec(method: str | MethodCall) -> "Codec":
    """The codec of a method string such as ``int4:group=32``.

    Raises:
        UnknownPluginError, ConfigError: unknown name or key (with the nearest one), or a refused
            value.
    """
    return CODECS.build(method)


def codec_from_canonical(text: str) -> "Codec":
    """The codec that a canonical string (``int4@1:group=32``, as in headers) stands for.

    A class reads the versions before its own with the classes in its `older`; see `Codec`.

    Raises:
        IncompatibleDataError: this kvlib does not know that codec, version or parameter.
    """
    from kvlib.codecs.base import describe_codec, older_versions

    name, at, rest = text.partition("@")
    version, colon, params = rest.partition(":")

    def pick(newest: "type[Codec]") -> "type[Codec]":
        return {str(n): cls for n, cls in older_versions(newest).items()}.get(version, newest)

    try:
        codec = CODECS.build(f"{name}{colon}{params}", pick)
    except (UnknownPluginError, ValueError) as exc:
        raise IncompatibleDataError(
            f"the container was written by codec {text!r:.120}: {exc}"
        ) from exc
    if not at or describe_codec(codec) != text:
        older = "".join(f", and reads version {n}" for n in older_versions(type(codec)))
        raise IncompatibleDataError(
            f"the container was written by codec {text!r:.120}; this kvlib has "
            f"{describe_codec(codec)!r}{older}"
        )
    return codec
