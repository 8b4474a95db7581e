# SPDX-License-Identifier: Apache-2.0
"""What some policies need to know of a model, measured once: `kvlib calibrate`.

Each method is a module with a function ``calibrate(model, tokenizer, model_id, out, *, progress,
...)`` that measures, writes an artefact (`kvlib.artefacts`) and returns it. Its policy reads the
file (``razor:profile=FILE``) and refuses that of another model. Nothing is ever downloaded.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from kvlib.errors import ConfigError, UnknownPluginError
from kvlib.registry import suggest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvlib.artefacts import Artefact

__all__ = ["CALIBRATIONS", "Progress", "calibrate", "writable_file"]

_LARGEST_SEED = 2**62  # less than what torch takes: calibrations count on from it

CALIBRATIONS = {
    "abstracts": "kvlib.calibration.abstracts",
    "cachegen": "kvlib.calibration.cachegen",
    "codec": "kvlib.calibration.codec",
    "epicache": "kvlib.calibration.epicache",
    "kvzap": "kvlib.calibration.kvzap",
    "lazy": "kvlib.calibration.lazy",
    "razor": "kvlib.calibration.razor",
}
"""Module of each policy, codec or selector that can be calibrated: "codec" is `kvlc`, "abstracts"
are `leoam`'s."""

Progress: TypeAlias = Callable[[int, int], None]
"""Told how much is done, and of how much."""


def calibrate(
    name: str,
    model: "PreTrainedModel",
    tokenizer: Any,
    model_id: str | None,
    out: str | Path,
    *,
    progress: Progress = lambda done, total: None,
    **options: Any,
) -> "Artefact":
    """Measure what the policy `name` needs to know of a model, and write it to a file.

    Args:
        name: of the policy.
        model: in eval mode.
        tokenizer: its own; None for a model without text.
        model_id: identity of a model that came from no hub and no folder, as given to `KVCache`.
        out: the artefact; one that is there is replaced. Its folder is made if need be.
        progress: see `Progress`.
        **options: of the method, see its module.

    Raises:
        UnknownPluginError: nothing is measured for such a policy.
        ConfigError: a file that cannot be written, a seed without meaning, or what the method says.
    """
    if name not in CALIBRATIONS:
        raise UnknownPluginError(
            f"no policy {name!r:.80} is calibrated.{suggest(name, CALIBRATIONS)}"
        )
    seed = options.get("seed", 0)
    if not isinstance(seed, int) or abs(seed) > _LARGEST_SEED:
        raise ConfigError(f"seed is a whole number of at most 2**62, got {seed!r:.80}")
    out = writable_file(out)  # minutes of measuring must not end in a file that cannot be written
    module = import_module(CALIBRATIONS[name])
    found: Artefact = module.calibrate(
        model, tokenizer, model_id, out, progress=progress, **options
    )
    return found


def writable_file(out: str | Path) -> Path:
    """The place of a file that can be written, with its folder; what is there stays as it is.

    Raises:
        ConfigError: it is a folder, or nothing can be written there.
    """
    place = Path(out).expanduser()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        is_new = not place.exists()
        place.open("ab").close()
        if is_new:
            place.unlink()
    except OSError as exc:
        raise ConfigError(
            f"cannot write {str(out)!r} ({exc.strerror}): give a file in a folder of yours"
        ) from exc
    return place
