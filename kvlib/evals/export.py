# SPDX-License-Identifier: Apache-2.0
"""Prompts for other tools: the very token ids that kvlib's own methods are given.

A tool that answers them with lines like those of `kvlib.evals.samples` can be compared question by
question; `benchmarks/kvpress_side` does so for NVIDIA kvpress.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from kvlib.errors import ConfigError
from kvlib.evals.models import load_eval_model
from kvlib.evals.profiles import Cell
from kvlib.evals.samples import SCHEMA, sample_names
from kvlib.evals.tasks import build_task, make_sample

__all__ = ["export_prompts"]


def export_prompts(cells: Sequence[Cell], model: str, dtype: str, seed: int, out: Path) -> int:
    """Write a header and one line for each context; returns how many.

    Raises:
        ConfigError: the model or a task cannot be made.
    """
    if not out.parent.is_dir():
        raise ConfigError(f"there is no folder {out.parent} for {out.name}")
    loaded = load_eval_model(model, dtype)
    source = loaded.source
    num = 0
    with out.open("w", encoding="utf-8") as file:
        folder = str(getattr(loaded.model.config, "_name_or_path", "") or "")
        described = {**loaded.describe(), "folder": folder}
        header = {"schema": SCHEMA, "kind": "kvlib-prompts", "model": described}
        file.write(json.dumps(header) + "\n")
        for cell in cells:
            task = build_task(cell.task)
            for index in range(cell.contexts):
                sample = make_sample(task, source, cell.length, seed, index)
                line = {
                    "sample": sample_names(task, cell.length, seed, index, sample),
                    "mode": cell.mode,
                    "context": sample.context,
                    "questions": [
                        {"question": q.question, "prefix": q.prefix, "answer": q.answer}
                        for q in sample.questions
                    ],
                }
                file.write(json.dumps(line) + "\n")
                num += 1
    return num
