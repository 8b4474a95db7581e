# SPDX-License-Identifier: Apache-2.0
"""Which leaves of a long context a step reads: recall at equal bytes, and what it does to the text.

SmolLM2 reads a text, and the methods see its real keys and queries, float32.

`recall`: for queries of tokens after the context, at equal bytes a step (abstracts, of which
all are read, plus leaves of keys and values): the attention on what was chosen, and the share of
each KV head's `--top` heaviest tokens (first and last ones aside) that is in it.

`steps`: the model goes on through the same text, each token seeing only the leaves chosen for it;
how often its most likely next token is the one of full attention, and the mean KL divergence.

A context of 8,000 tokens takes some minutes; `--kv` names a file to keep the model's keys in.
"""

import sys
import time
from collections import defaultdict
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import common
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from kvlib.smollm2 import load_smollm2
from kvlib.store.leaves import LEAF_TOKENS
from kvlib.store.selecting import SELECTORS, HeadShape, Selection

PIECE = 250
SINKS, RECENT = 16, 64


class Model:
    """SmolLM2 with an attention that can be looked into and replaced."""

    def __init__(self) -> None:
        self.model, self.tokenizer = load_smollm2()
        config = self.model.config
        self.layers = config.num_hidden_layers
        self.shape = HeadShape(
            config.num_attention_heads,
            config.num_key_value_heads,
            config.hidden_size // config.num_attention_heads,
            (config.hidden_size // config.num_attention_heads) ** -0.5,
        )
        self.attend: Any = None
        AttentionInterface.register("bench", self._attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register("bench", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        self.model.set_attn_implementation("bench")

    def _attention(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more):
        if self.attend is not None:
            out = self.attend(module.layer_idx, query[0], key[0], value[0])
            if out is not None:
                return out.transpose(0, 1)[None], None
        return sdpa_attention_forward(module, query, key, value, mask, **more)

    @torch.no_grad()
    def read(self, ids: Tensor) -> dict[str, Tensor]:
        """Keys, values and queries of all layers."""
        queries: dict[int, list[Tensor]] = defaultdict(list)

        def note(layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
            queries[layer].append(query.clone())

        self.attend = note
        cache = DynamicCache(config=self.model.config)
        for first in range(0, len(ids), PIECE):
            piece = ids[None, first : first + PIECE]
            self.model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
            print(f"read {first + piece.shape[1]} tokens", file=sys.stderr)
        kv = {"ids": ids}
        for layer, held in enumerate(cache.layers):
            kv[f"k{layer}"] = held.keys[0].contiguous()
            kv[f"v{layer}"] = held.values[0].contiguous()
            kv[f"q{layer}"] = torch.cat(queries[layer], 1)
        return kv

    @torch.no_grad()
    def go_on(self, kv: dict[str, Tensor], context: int, method: str) -> Tensor:
        """Logits of the tokens after the context, each attending to its own choice of leaves.

        All are computed at once: what a token sees depends on earlier ones only.
        """
        selection = Selection(SELECTORS.build(method), self.shape, self.layers)
        total = len(kv["ids"])
        group = self.shape.q_heads // self.shape.kv_heads
        self.read_share: list[float] = []
        self.nbytes = 0

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            feed(selection, layer, kv, context)
            seen = torch.zeros(self.shape.kv_heads, total - context, total, dtype=torch.bool)
            for i in range(total - context):
                at = slice(i, i + 1)
                selection.append(layer, key[:, at], query[:, at])
                leaves = selection.select(layer, query[:, at])
                tokens = (leaves[..., None] * LEAF_TOKENS + torch.arange(LEAF_TOKENS)).flatten(1)
                tokens = tokens[tokens <= context + i].view(len(tokens), -1)
                seen[:, i].scatter_(1, tokens.expand(self.shape.kv_heads, -1), True)
                self.read_share.append(leaves.shape[1] * LEAF_TOKENS / (context + i + 1))
            held = torch.cat([kv[f"k{layer}"][:, :context], key], 1)
            values = torch.cat([kv[f"v{layer}"][:, :context], value], 1)
            return torch.nn.functional.scaled_dot_product_attention(
                query,
                held.repeat_interleave(group, 0),
                values.repeat_interleave(group, 0),
                attn_mask=seen.repeat_interleave(group, 0),
            )

        self.attend = attend
        positions = torch.arange(context, total)[None]
        out = self.model(
            kv["ids"][None, context:],
            past_key_values=DynamicCache(config=self.model.config),
            position_ids=positions,
            use_cache=True,
        )
        self.nbytes = selection.nbytes
        return out.logits[0]


def feed(selection: Selection, layer: int, kv: dict[str, Tensor], context: int) -> None:
    """Append the context to a layer, in pieces as a prefill would."""
    for first in range(0, context, PIECE):
        some = slice(first, min(first + PIECE, context))
        selection.append(layer, kv[f"k{layer}"][:, some], kv[f"q{layer}"][:, some])


def recall(model: Model, kv: dict[str, Tensor], context: int, args: Any) -> list[dict[str, Any]]:
    """Attention and heavy tokens caught, of each method, leaf size and number of bytes."""
    shape, total = model.shape, len(kv["ids"])
    group = shape.q_heads // shape.kv_heads
    token_bytes = shape.kv_heads * shape.dim * 2 * 4
    whole = context * token_bytes
    chosen = torch.linspace(context, total - 1, args.queries).long()
    found: dict[tuple[str, int, float], list[tuple[float, float, float]]] = defaultdict(list)
    for layer in range(0, model.layers, args.every):
        keys, queries = kv[f"k{layer}"], kv[f"q{layer}"][:, chosen]
        logits = queries.unflatten(0, (-1, group)) @ keys[:, None].transpose(2, 3) * shape.scale
        later = torch.arange(total) > chosen[:, None]
        weights = logits.masked_fill(later, -torch.inf).softmax(-1)
        own = weights[..., context:].sum(-1)  # tokens after the context are in memory anyway
        heavy = weights[..., :context].sum(1)
        heavy[..., :SINKS] = 0
        heavy[..., context - RECENT :] = 0
        top = heavy.topk(args.top, -1).indices
        for name in args.methods.split(";"):
            for leaf in args.leaves:
                join = "," if ":" in name else ":"
                text = f"{name}{join}leaf={leaf},sinks={SINKS},recent={RECENT}"
                method = SELECTORS.build(text)
                # Of one layer, with the summary's fixed parts counted in full.
                state = method.open_layers(shape, model.layers)[layer]
                for first in range(0, context, PIECE):
                    some = slice(first, min(first + PIECE, context))
                    state.append(keys[:, some], kv[f"q{layer}"][:, some])
                relevance = [state.relevance(queries[:, i : i + 1]) for i in range(len(chosen))]
                for share in args.bytes:
                    left = share * whole - state.nbytes
                    tokens = int(left // token_bytes // leaf * leaf)
                    if tokens < leaf:
                        continue
                    exact = SELECTORS.build(f"{text},budget={tokens}")
                    mass = hit = 0.0
                    for i, asked in enumerate(relevance):
                        leaves = exact.choose(asked, context)
                        mask = torch.zeros(
                            len(leaves), -(-context // LEAF_TOKENS), dtype=torch.bool
                        )
                        mask.scatter_(1, leaves, True)
                        mask = mask.repeat_interleave(LEAF_TOKENS, 1)[:, :context]
                        mask = mask.expand(shape.kv_heads, -1)
                        caught = (weights[:, :, i, :context] * mask[:, None]).sum(-1)
                        mass += float((caught + own[:, :, i]).mean())
                        hit += float(mask.gather(1, top[:, i]).float().mean())
                    number = len(relevance)
                    found[name, leaf, share].append(
                        (mass / number, hit / number, state.nbytes / whole)
                    )
        print(f"recall: layer {layer}", file=sys.stderr)
    rows = []
    for (name, leaf, share), layers in found.items():
        mass, hit, held = (sum(x) / len(layers) for x in zip(*layers, strict=True))
        rows.append(
            {
                "method": name,
                "leaf": leaf,
                "bytes_share": share,
                "attention": mass,
                "top_tokens": hit,
                "abstracts_share": held,
                "layers": len(layers),
            }
        )
        print(f"{name} leaf {leaf} at {share}: {mass:.4f} {hit:.4f}", file=sys.stderr)
    return rows


def steps(model: Model, kv: dict[str, Tensor], context: int, args: Any) -> list[dict[str, Any]]:
    """Agreement with full attention over the tokens after the context."""
    rows = []
    full = model.go_on(kv, context, "full").log_softmax(-1)
    for method in args.steps.split(";"):
        begun = time.perf_counter()
        got = model.go_on(kv, context, method).log_softmax(-1)
        same = (got.argmax(-1) == full.argmax(-1)).float()
        rows.append(
            {
                "method": method,
                "tokens": len(same),
                "agreement": float(same.mean()),
                "kl": float((full.exp() * (full - got)).sum(-1).mean()),
                "read_share": sum(model.read_share) / len(model.read_share),
                "abstracts_bytes": model.nbytes,
                "seconds": time.perf_counter() - begun,
            }
        )
        print(f"{rows[-1]}", file=sys.stderr)
    return rows


def main() -> None:
    """Run and report."""
    parser = common.parser(__doc__, repeats=1)
    parser.add_argument("--context", type=int, default=8000)
    parser.add_argument("--tokens", type=int, default=128, help="after the context")
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--every", type=int, default=1, help="recall: every so many layers")
    parser.add_argument("--top", type=int, default=64)
    parser.add_argument("--leaves", type=int, nargs="*", default=[16, 32, 64, 128])
    parser.add_argument("--bytes", type=float, nargs="*", default=[0.1, 0.15])
    parser.add_argument(
        "--methods",
        default="quest;leoam;leoam:codes=8;infllm;quest:heads=each;leoam:heads=each;"
        "leoam:heads=each,codes=8",
    )
    parser.add_argument("--steps", default="")
    parser.add_argument("--kv", type=Path, default=None, help="of this context or a longer one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = Model()
    if args.kv is not None and args.kv.exists():
        kv = load_file(args.kv)
    else:
        text = "\n".join(topics[name] for name in sorted(topics))
        ids = model.tokenizer(text, return_tensors="pt").input_ids[0]
        kv = model.read(ids[: args.context + args.tokens])
        if args.kv is not None:
            save_file(kv, args.kv)
    total = args.context + args.tokens
    kv = {name: x[..., :total, :] if x.dim() == 3 else x[:total] for name, x in kv.items()}
    result: dict[str, Any] = {"context": args.context, "tokens": args.tokens}
    with torch.no_grad():
        if args.methods:
            result["recall"] = recall(model, kv, args.context, args)
        if args.steps:
            result["steps"] = steps(model, kv, args.context, args)
    common.finish("selection", result, args.json)


if __name__ == "__main__":
    main()
