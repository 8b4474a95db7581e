# SPDX-License-Identifier: Apache-2.0
"""Everything kvlib raises.

::

    KVLibError
    ├── ConfigError (ValueError)          an argument, spec string or environment is wrong
    ├── UnknownPluginError (LookupError)  no policy, codec, tier or task of that name
    ├── ShapeError (ValueError)           a tensor's shape, dtype or device is not what was declared
    ├── MissingSignalError                a policy needs a signal that was not provided
    ├── CapacityError                     a hard byte limit would be exceeded
    ├── CodecError
    │   ├── CorruptDataError              truncated, flipped or malformed bytes
    │   ├── IncompatibleDataError         well-formed bytes of another version, model, codec or key
    │   └── UnsupportedInputError         this codec cannot represent that block
    ├── StoreError
    │   ├── StoreClosedError
    │   ├── StoreReadOnlyError
    │   └── StoreTimeoutError (TimeoutError)
    └── ConnectorError
        └── EngineVersionError

A message says what was seen, what was expected, and what to do.
"""

__all__ = [
    "CapacityError",
    "CodecError",
    "ConfigError",
    "ConnectorError",
    "CorruptDataError",
    "EngineVersionError",
    "IncompatibleDataError",
    "KVLibError",
    "MissingSignalError",
    "ShapeError",
    "StoreClosedError",
    "StoreError",
    "StoreReadOnlyError",
    "StoreTimeoutError",
    "UnknownPluginError",
    "UnsupportedInputError",
]


class KVLibError(Exception):
    """Base of every error kvlib raises."""


class ConfigError(KVLibError, ValueError):
    """An argument, method string, file of settings or environment is wrong."""


class UnknownPluginError(KVLibError, LookupError):
    """No policy, codec, tier or task of that name is registered."""


class ShapeError(KVLibError, ValueError):
    """A tensor's shape, dtype or device is not what was declared."""


class MissingSignalError(KVLibError):
    """A policy needs a signal that the caller did not provide."""


class CapacityError(KVLibError):
    """A hard byte limit would be exceeded."""


class CodecError(KVLibError):
    """Base of what encoding and decoding raise."""


class CorruptDataError(CodecError):
    """Bytes are truncated, flipped or malformed; treat as a miss, never as data."""


class IncompatibleDataError(CodecError):
    """Bytes are well-formed but of another version, model, codec, profile or key."""


class UnsupportedInputError(CodecError):
    """The codec or component cannot represent that input."""


class StoreError(KVLibError):
    """Base of what stores and tiers raise; a miss is never an error."""


class StoreClosedError(StoreError):
    """The store was closed, or is used in a forked child."""


class StoreReadOnlyError(StoreError):
    """The store cannot be written."""


class StoreTimeoutError(StoreError, TimeoutError):
    """A deadline passed before the store could answer."""


class ConnectorError(KVLibError):
    """Base of what engine connectors raise at start-up; at run time they count and miss."""


class EngineVersionError(ConnectorError):
    """The installed engine is not one this connector was tested with."""
