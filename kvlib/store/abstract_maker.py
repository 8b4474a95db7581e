# SPDX-License-Identifier: Apache-2.0
"""Abstracts made of blocks as they are put, whoever puts them: `KVStore(abstracts=...)`."""

from kvlib.artefacts import model_identity
from kvlib.blocks import KVBlock
from kvlib.errors import ConfigError
from kvlib.spec import KVSpec, LayerKind
from kvlib.store.abstract_records import Abstracts
from kvlib.store.selecting import SELECTORS, HeadShape, Selection

__all__ = ["AbstractMaker"]


class AbstractMaker:
    """Makes the abstracts of one method.

    Args:
        method: method string such as ``leoam`` or ``leoam:codes=8,profile=FILE``.

    Attributes:
        form: of what it makes.

    Raises:
        ConfigError: an unknown method, or one whose abstracts are not made of a block's keys alone.
    """

    def __init__(self, method: str) -> None:
        selector = SELECTORS.build(method)
        form = selector.form
        if form is None or selector.needs_queries:
            raise ConfigError(
                f"abstracts={method!r:.80}: its abstracts cannot be made of the keys of a block "
                "alone: use leoam, quest, or leoam:codes=8,profile=FILE"
            )
        self.form = form
        self._selector = selector

    def make(self, spec: KVSpec, block: KVBlock) -> Abstracts | None:
        """The abstracts of a block, None of a model that no `TieredCache` serves.

        Args:
            spec: what the numbers mean.
            block: dense KV of all layers and heads, on any device, whole blocks.

        Raises:
            ConfigError: the method's profile is of another model.
        """
        shapes = {(x.kind, x.num_kv_heads, x.k_head_dim) for x in spec.layers}
        (kind, heads, dim), *others = shapes
        if others or kind is not LayerKind.FULL:
            return None
        self._selector.check_model(model_identity(spec))
        # How many queries share a head, and their scale, matter to who asks alone.
        selection = Selection(self._selector, HeadShape(heads, heads, dim, 1.0), len(spec.layers))
        tokens = block.stop - block.start
        rows = []
        for index, layer in enumerate(block.layers):
            selection.append(index, layer.keys.detach().cpu())
            rows.append(selection.take(index, 0, tokens))
        return Abstracts(self.form, block.start, tuple(rows))
