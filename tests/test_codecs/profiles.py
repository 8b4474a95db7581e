# SPDX-License-Identifier: Apache-2.0
"""Profiles for `kvlc` without a model: any invertible transforms will do to test the codec."""

import numpy as np
import torch

from kvlib.artefacts import model_identity, save_artefact

GROUP = 2


def random_profile(spec, path, presets="near balanced small archive", seed=0, unit=0.1):
    """A profile of made-up transforms for all layers of a spec."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for kind in "KV":
        widths = [x.k_head_dim if kind == "K" else x.v_head_dim for x in spec.layers]
        heads = [x.num_kv_heads for x in spec.layers]
        tensors[f"near.{kind}"] = torch.full((len(widths),), unit)
        for index, (h, d) in enumerate(zip(heads, widths, strict=True)):
            tensors[f"metric.{kind}.{index}"] = spd(rng, h * d)
            if d:
                each = [made(rng, d, d, unit) for _ in range(h)]
                name = f"balanced.{kind}.{index}"
                tensors[f"{name}.decode"] = torch.stack([x for x, _ in each])
                tensors[f"{name}.statistics"] = torch.stack([x for _, x in each], dim=1)
                name = f"small.{kind}.{index}"
                pair = made(rng, h * d, h * d, unit)
                tensors[f"{name}.decode"], tensors[f"{name}.statistics"] = pair
        for first in range(0, len(widths), GROUP):
            layers = range(first, min(first + GROUP, len(widths)))
            size = sum(heads[i] * widths[i] for i in layers)
            if size and len({spec.layers[i] for i in layers}) == 1:
                pair = made(rng, size, max(size * 3 // 4, 1), unit)
                name = f"archive.{kind}.{first}"
                tensors[f"{name}.decode"], tensors[f"{name}.statistics"] = pair
                tensors[f"{name}.offset"] = torch.from_numpy(rng.standard_normal(size)).float()
    for preset in presets.split():
        tensors[f"{preset}.levels"] = torch.tensor([0.5, 1.0, 2.0])
        tensors[f"{preset}.bits"] = torch.tensor([3.0, 2.0, 1.0])
        tensors[f"{preset}.kl"] = torch.tensor([0.001, 0.01, 0.1])
    settings = {"presets": presets, "group": GROUP, "layers": spec.num_layers}
    identity = model_identity(spec)
    return save_artefact(path, kind="codec", model=identity, tensors=tensors, settings=settings)


def spd(rng, n):
    """A symmetric positive definite matrix."""
    x = rng.standard_normal((n, n))
    return torch.from_numpy(x @ x.T / max(n, 1) + np.eye(n)).float()


def made(rng, width, rank, unit):
    """A decoding matrix [width, rank] and statistics [3, rank]."""
    axes, _ = np.linalg.qr(rng.standard_normal((width, width)))
    decode = axes[:, :rank] * unit * rng.uniform(0.5, 2, rank)
    statistics = np.stack([rng.standard_normal(rank), rng.uniform(1, 20, rank), np.ones(rank)])
    return torch.from_numpy(decode).half(), torch.from_numpy(statistics).float()
