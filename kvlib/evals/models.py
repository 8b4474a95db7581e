# SPDX-License-Identifier: Apache-2.0
"""The models an evaluation can run: a folder, or one that needs nothing fetched."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvlib.errors import ConfigError
from kvlib.evals.tasks import Source
from kvlib.model_spec import spec_for_model
from kvlib.registry import parse_method

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["EvalModel", "load_eval_model", "prepare_eval_model"]


@dataclass(frozen=True)
class EvalModel:
    """A model with what identifies it.

    Attributes:
        name: as it was asked for.
        model: in eval mode.
        tokenizer: None for a model without text.
        model_id: identity for caches of a model that came from no folder.
    """

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"
    model_id: str | None

    @cached_property
    def source(self) -> Source:
        """Where tasks get their token ids."""
        return Source(self.tokenizer, int(self.model.config.vocab_size))

    def describe(self) -> dict[str, Any]:
        """What a run's results belong to, for its JSON."""
        spec = spec_for_model(self.model, model_id=self.model_id)
        return {
            "name": self.name,
            "dtype": spec.dtype,
            "device": self.model.device.type,
            "fingerprint": spec.fingerprint().hex(),
            "text": self.source.digest(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }


def prepare_eval_model(name: str) -> None:
    """Do once what would else be done in every process: convert the model that comes packed."""
    if name == "smollm2":
        from kvlib.smollm2 import smollm2_folder

        smollm2_folder()


def load_eval_model(name: str, dtype: str = "float32", device: str = "cpu") -> EvalModel:
    """Load a model.

    Args:
        name: ``smollm2`` (SmolLM2-135M-Instruct from its package), ``recall`` (the hand-set recall
            model, ``recall:vocab=8192``), or a model folder or hub name that transformers finds on
            this machine.
        dtype: float32, bfloat16 or float16.
        device: of torch.

    Raises:
        ConfigError: no such model, dtype or device.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype is float32, bfloat16 or float16, got {dtype!r}")
    numbers: torch.dtype = getattr(torch, dtype)
    if name.partition(":")[0] == "recall":
        loaded = _recall(name, numbers)
    else:
        from kvlib.smollm2 import load_folder, smollm2_folder

        place = smollm2_folder() if name == "smollm2" else Path(name).expanduser()
        try:
            model, tokenizer = load_folder(place, numbers)
        except (OSError, ValueError) as exc:
            raise ConfigError(
                f"cannot load model {name!r}: expected smollm2, recall, a model folder, or a hub "
                f"name in the local cache ({str(exc).splitlines()[0]:.200})"
            ) from exc
        loaded = EvalModel(name, model, tokenizer, None)
    try:
        torch.nn.Module.to(loaded.model, device)
    except (RuntimeError, AssertionError) as exc:
        raise ConfigError(f"cannot use device {device!r}: {exc}") from exc
    return loaded


def _recall(name: str, dtype: torch.dtype) -> EvalModel:
    from kvlib.testing.recall_model import recall_model

    (call,) = parse_method(name).policies
    params = dict(call.params)
    vocab = params.pop("vocab", "8192")
    if params or not vocab.isdecimal():
        raise ConfigError(f"a recall model is written recall:vocab=8192, got {name!r}")
    model = recall_model(int(vocab), dtype=dtype)
    return EvalModel(name, model, None, f"kvlib-recall-{vocab}")
