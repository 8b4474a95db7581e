# SPDX-License-Identifier: Apache-2.0
"""What some policies need to know of a model, measured once: `kvlib calibrate`.

Each method is a module with a function ``calibrate(model, tokenizer, model_id, out, *, progress,
...)`` that measures, writes an artefact (`kvlib.artefacts`) and returns it. Its policy reads the
file (``razor:profile=FILE``) and refuses that of another model. Nothing is ever downloaded.
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias

from kvlib.errors import UnknownPluginError
from kvlib.registry import suggest

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from kvlib.artefacts import Artefact

__all__ = ["CALIBRATIONS", "Progress", "calibrate"]

CALIBRATIONS = {
    "epicache": "kvlib.calibration.epicache",
    "kvzap": "kvlib.calibration.kvzap",
    "lazy": "kvlib.calibration.lazy",
    "razor": "kvlib.calibration.razor",
}
"""Module of each policy that can be calibrated."""

Progress: TypeAlias = Callable[[int, int], None]
"""Told how much is done, and of how much."""


def calibrate(
    name: str,
    model: "PreTrainedModel",
    tokenizer: Any,
    model_id: str | None,
    out: "str | Path",
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
        out: the artefact; one that is there is replaced.
        progress: see `Progress`.
        **options: of the method, see its module.

    Raises:
        UnknownPluginError: nothing is measured for such a policy.
    """
    if name not in CALIBRATIONS:
        raise UnknownPluginError(
            f"no policy {name!r:.80} is calibrated.{suggest(name, CALIBRATIONS)}"
        )
    module = import_module(CALIBRATIONS[name])
    found: Artefact = module.calibrate(
        model, tokenizer, model_id, out, progress=progress, **options
    )
    return found
