# SPDX-License-Identifier: Apache-2.0
"""Scores of an answer, from the logits that predict it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvlib.errors import ConfigError

__all__ = ["SCORES", "answer_scores", "divergence"]

SCORES = ("exact", "token_accuracy", "nll", "kl", "top1")
"""What every question gets: whether all tokens are the first choice, the share of them that are,
mean negative log-likelihood (nats), mean KL divergence from the full cache's distributions (nats),
and the share of tokens whose first choice is the full cache's."""


def divergence(reference: Tensor, logits: Tensor) -> dict[str, Any]:
    """KL divergence in nats, and agreement of the first choice, per token; both [T, V]."""
    full = reference.to(torch.float64).log_softmax(-1)
    ours = logits.to(torch.float64).log_softmax(-1)
    kl = (full.exp() * (full - ours)).sum(-1)
    return {
        "kl_per_token": kl.tolist(),
        "kl_mean": float(kl.mean()),
        "top1_agreement": (full.argmax(-1) == ours.argmax(-1)).double().mean().item(),
    }


def answer_scores(logits: Tensor, reference: Tensor, answer: Sequence[int]) -> dict[str, Any]:
    """`SCORES` of one answer.

    Args:
        logits: [T, V], one row for each token of the answer.
        reference: the same over the full cache.
        answer: T token ids.

    Raises:
        ConfigError: the model gives logits that are not finite.
    """
    if not bool(logits.isfinite().all()):
        raise ConfigError("the model's logits are not finite: nothing can be scored")
    right = torch.tensor(list(answer), device=logits.device)
    hits = logits.argmax(-1) == right
    away = divergence(reference, logits)
    return {
        "exact": int(hits.all()),
        "token_accuracy": hits.double().mean().item(),
        "nll": float(torch.nn.functional.cross_entropy(logits.double(), right)),
        "kl": max(away["kl_mean"], 0.0),  # rounding may take it below
        "top1": away["top1_agreement"],
    }
