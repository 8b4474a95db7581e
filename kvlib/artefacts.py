# SPDX-License-Identifier: Apache-2.0
"""What `kvlib calibrate` measures of a model and a policy reads: one safetensors file.

Its metadata say what kind of artefact it is and which model it was measured on; with another kind
or model it is refused. Nothing is ever downloaded.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.spec import KVSpec

__all__ = ["Artefact", "find_artefact", "load_artefact", "model_identity", "save_artefact"]

_FORMAT = "kvlib-artefact-1"
_MAX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, eq=False)
class Artefact:
    """A loaded artefact.

    Attributes:
        kind: name of the policy that it is for.
        model: `model_identity` of the model it was measured on.
        settings: how it was measured, by name.
        tensors: what was measured, by name.
        digest: BLAKE2b of the file, 16 hexadecimal digits.
    """

    kind: str
    model: str
    settings: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    digest: str

    def check_model(self, identity: str) -> None:
        """Refuse a model that it was not measured on.

        Raises:
            ConfigError: naming both.
        """
        if identity != self.model:
            raise ConfigError(
                f"the {self.kind} artefact {self.digest} was measured on model {self.model[:16]}, "
                f"this model is {identity[:16]}: run kvlib calibrate {self.kind} for it"
            )


def model_identity(spec: KVSpec) -> str:
    """What artefacts name a model by: its fingerprint, whatever the dtype of the KV, in hex."""
    return replace(spec, dtype="float32").fingerprint().hex()


def save_artefact(
    path: str | Path,
    *,
    kind: str,
    model: str,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, object],
) -> Artefact:
    """Write an artefact and return it as it will be loaded.

    Args:
        path: the file; one that is there is replaced.
        kind: name of the policy.
        model: see `model_identity`.
        tensors: what was measured.
        settings: how; values become text.
    """
    from safetensors.torch import save

    # One key: safetensors writes several in any order, and equal artefacts have equal digests.
    header = {
        "format": _FORMAT,
        "kind": kind,
        "model": model,
        "settings": {k: str(v) for k, v in settings.items()},
    }
    metadata = {"kvlib": json.dumps(header, sort_keys=True)}
    data = save({k: x.detach().cpu().contiguous() for k, x in tensors.items()}, metadata)
    Path(path).write_bytes(data)
    return load_artefact(path, kind)


def load_artefact(path: str | Path, kind: str, digest: str = "") -> Artefact:
    """Read an artefact.

    Args:
        path: from `kvlib calibrate`.
        kind: name of the policy that wants it.
        digest: what the file's digest has to be; empty for any.

    Raises:
        ConfigError: no such file, not an artefact, of another kind, or another digest.
    """
    place = Path(path).expanduser()
    try:
        status = place.stat()
        found = _load(str(place), status.st_size, status.st_mtime_ns)
    except OSError as exc:
        raise ConfigError(
            f"cannot read artefact {str(path)!r} ({exc.strerror}): make it with kvlib calibrate "
            f"{kind} --model MODEL -o {path}"
        ) from exc
    if found.kind != kind:
        raise ConfigError(f"{str(path)!r} is an artefact of {found.kind!r}; {kind!r} needs its own")
    if digest and digest != found.digest:
        raise ConfigError(
            f"artefact {str(path)!r} has the digest {found.digest}; the method says {digest}"
        )
    return found


def find_artefact(kind: str, digest: str) -> Artefact:
    """The artefact with that digest: the file ``DIGEST.safetensors`` in a folder of artefacts.

    The folders are those in the environment variable KVLIB_PROFILES, separated like PATH, or else
    ``~/.cache/kvlib/profiles``.

    Raises:
        ConfigError: it is nowhere, or damaged.
    """
    if not digest.isalnum():
        raise ConfigError(f"{digest!r:.40} is not the digest of an artefact")
    folders = os.environ.get("KVLIB_PROFILES") or str(Path("~/.cache/kvlib/profiles").expanduser())
    for folder in folders.split(os.pathsep):
        file = Path(folder) / f"{digest}.safetensors"
        if file.is_file():
            return load_artefact(file, kind, digest)
    raise ConfigError(
        f"the {kind} artefact {digest} is needed and was not read yet: pass profile=FILE, or put "
        f"it into {folders} as {digest}.safetensors"
    )


@lru_cache(maxsize=16)
def _load(path: str, size: int, mtime_ns: int) -> Artefact:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load

    if size > _MAX_BYTES:
        raise ConfigError(f"{path!r} has {size} bytes; an artefact has at most {_MAX_BYTES}")
    data = Path(path).read_bytes()
    try:
        tensors = load(data)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        header = json.loads(metadata["kvlib"])
        if header["format"] != _FORMAT or not isinstance(header["settings"], dict):
            raise ValueError(f"format {header['format']!r}")
        kind, model, settings = str(header["kind"]), str(header["model"]), header["settings"]
    except (SafetensorError, KeyError, TypeError, ValueError) as exc:
        raise ConfigError(
            f"{path!r} is not an artefact of this kvlib ({type(exc).__name__}: {exc!s:.100}); make "
            "one with kvlib calibrate"
        ) from exc
    return Artefact(kind, model, settings, tensors, blake2b(data, digest_size=8).hexdigest())
