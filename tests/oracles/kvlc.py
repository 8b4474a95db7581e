# SPDX-License-Identifier: Apache-2.0
"""The definition of `kvlc` in float64: what numbers come back, without any bytes."""

import math

import numpy as np


def turned(x, positions, rope, sign):
    """[heads, T, D] turned by sign * position; pairs (i, i + half) or neighbours."""
    out = np.array(x, dtype=np.float64)
    if rope is None:
        return out
    half = rope.rotary_dim // 2
    for t, position in enumerate(positions):
        for i in range(half):
            angle = sign * position * rope.theta ** (-2 * i / rope.rotary_dim)
            a, b = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + half)
            a, b = a + rope.first_channel, b + rope.first_channel
            u, v = out[:, t, a].copy(), out[:, t, b].copy()
            out[:, t, a] = u * math.cos(angle) - v * math.sin(angle)
            out[:, t, b] = v * math.cos(angle) + u * math.sin(angle)
    return out


def chunks(tokens, size):
    """As few as possible, nearly equal."""
    count = math.ceil(tokens / size)
    return [(tokens * i // count, tokens * (i + 1) // count) for i in range(count)]


def rounded(y, step):
    """To multiples of a step, and how far the nearest was from an edge, in steps."""
    q = np.rint(y / step)
    margin = 0.5 - np.abs(y / step - q).max() if y.size else 1.0
    return q * step, margin


def near(x, positions, level, chunk, sinks, rope):
    """Rows [heads, T, D] as decoded, and the margin of its decisions."""
    flat = turned(x, positions, rope, -1).transpose(1, 0, 2).reshape(x.shape[1], -1)
    kept = [t for t, p in enumerate(positions) if p >= sinks]
    rows = flat[kept]
    parts = chunks(len(rows), chunk) if kept else []
    spread = [rows[a:b] - rows[a:b].mean(0) for a, b in parts]
    total = sum((s**2).sum() for s in spread)
    count = sum(s.size for s in spread)
    step = float(np.float32(level * (math.sqrt(total / count) if total else 1.0)))
    margin = 1.0
    for a, b in parts:
        mean, one = rounded(rows[a:b].mean(0), step / 4)
        values, two = rounded(rows[a:b] - mean, step)
        margin = min(margin, one, two)
        flat[[kept[i] for i in range(a, b)]] = values + mean
    back = turned(flat.reshape(x.shape[1], x.shape[0], -1).transpose(1, 0, 2), positions, rope, 1)
    fixed = [t for t, p in enumerate(positions) if p < sinks]
    back[:, fixed] = x[:, fixed]
    return back, margin


def profiled(layers, positions, preset, kind, tensors, level, chunk, sinks, rope, group=2):
    """Rows [heads, T, D] of all layers as decoded with a profile, and the margin."""
    tokens = layers[0].shape[1]
    flat = [turned(x, positions, rope, -1).transpose(1, 0, 2).reshape(tokens, -1) for x in layers]
    kept = [t for t in range(tokens) if positions[t] >= sinks]
    step = float(np.float32(level))
    margin = 1.0
    if preset == "archive":
        sets = [list(range(a, min(a + group, len(layers)))) for a in range(0, len(layers), group)]
    else:
        sets = [[i] for i in range(len(layers))]
    for members in sets:
        alone = preset == "archive" and len(members) == 1
        name = f"{'small' if alone else preset}.{kind}.{members[0]}"
        metric = [tensors[f"metric.{kind}.{i}"] for i in members]
        if preset == "balanced":
            heads, width = tensors[f"{name}.decode"].shape[:2]
            parts = [
                (
                    tensors[f"{name}.decode"][h],
                    metric[0][h * width : (h + 1) * width, h * width : (h + 1) * width],
                    tensors[f"{name}.statistics"][0, h],
                    slice(h * width, (h + 1) * width),
                )
                for h in range(heads)
            ]
        else:
            size = sum(len(m) for m in metric)
            whole = np.zeros((size, size))
            at = 0
            for m in metric:
                whole[at : at + len(m), at : at + len(m)] = m
                at += len(m)
            parts = [
                (tensors[f"{name}.decode"], whole, tensors[f"{name}.statistics"][0], slice(None))
            ]
        rows = np.concatenate([flat[i] for i in members], axis=1)
        for decode, m, center, at in parts:
            # Least squares in the metric, through its Cholesky factor.
            root = np.linalg.cholesky(m).T
            for a, b in chunks(len(kept), chunk):
                index = [kept[i] for i in range(a, b)]
                y = np.linalg.lstsq(root @ decode, root @ rows[index][:, at].T, rcond=None)[0].T
                mean, one = rounded(y.mean(0) - center, step / 4)
                values, two = rounded(y - mean - center, step)
                margin = min(margin, one, two)
                piece = rows[index]
                offset = tensors.get(f"{name}.offset", 0.0)
                piece[:, at] = (values + mean + center) @ decode.T + offset
                rows[index] = piece
        at = 0
        for i in members:
            width = flat[i].shape[1]
            flat[i] = rows[:, at : at + width]
            at += width
    out = []
    for x, y in zip(layers, flat, strict=True):
        back = turned(y.reshape(tokens, x.shape[0], -1).transpose(1, 0, 2), positions, rope, 1)
        fixed = [t for t in range(tokens) if positions[t] < sinks]
        back[:, fixed] = x[:, fixed]
        out.append(back)
    return out, margin
