# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Makes a vLLM attention backend skip holes and show its queries; knows no particular backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from gkv_vllm.engine.spec import GKVSpec
from gkv_vllm.ops.live_table import LiveTable, squeeze


class QuerySink(Protocol):
    """Who sees the queries of one attention layer: [tokens, query_heads, head_dim], rotated."""

    def before_attention(self, queries: Tensor) -> None:
        """Must not keep a reference to them."""

    def after_attention(self, queries: Tensor) -> None:
        """The same queries, once the keys and values of the step are in the cache."""


Squeeze = Callable[[Tensor, Tensor, int], LiveTable]


def live_metadata(
    metadata: CommonAttentionMetadata, block_size: int, squeeze: Squeeze = squeeze
) -> CommonAttentionMetadata:
    """The same batch over live tables and live lengths; the very same object without holes."""
    live = squeeze(metadata.block_table_tensor, metadata.seq_lens, block_size)
    if live.seq_lens is metadata.seq_lens:
        return metadata
    return replace(
        metadata,
        block_table_tensor=live.block_table,
        seq_lens=live.seq_lens,
        seq_lens_cpu_upper_bound=live.seq_lens.cpu(),
        max_seq_len=int(live.seq_lens.max()),
        _num_computed_tokens_cache=None,
    )


Prepare = Callable[[CommonAttentionMetadata], CommonAttentionMetadata]
"""Called once per step and KV cache group: the batch over live tables and live lengths."""


class LiveTableBuilder(AttentionMetadataBuilder[Any]):
    """Metadata builder mixin: for evictable layers, attention sees the live table."""

    prepare: Prepare | None = None
    """Set once the caches are there. Before, batches only measure memory, and have no holes."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        if isinstance(self.kv_cache_spec, GKVSpec):
            live = self.prepare(common_attn_metadata) if self.prepare else common_attn_metadata
            if live is not common_attn_metadata:
                # What requests have in common may have holes; it is not worth a cascade then.
                common_prefix_len = 0
            common_attn_metadata = live
        return super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[safe-super]


class ObservedImpl(AttentionImpl[Any]):
    """Attention mixin: hands the step's queries to the layer's sink, if it has one."""

    query_sink: QuerySink | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self, "alibi_slopes", None) is not None:
            raise ValueError(
                "ALiBi derives positions from the block table, which holes would shift: "
                "serve this model without --kv-policy"
            )

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        # A dummy batch may come without metadata: then what the last batch left would be read.
        sink = self.query_sink if attn_metadata is not None else None
        if sink is not None:
            sink.before_attention(query)
        output = super().forward(  # type: ignore[safe-super]
            layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs
        )
        if sink is not None:
            sink.after_attention(query)
        return output


def wrap_backend(base: type[AttentionBackend]) -> type[AttentionBackend]:
    """A backend like `base`, with holes. It keeps the name, which vLLM compares."""
    builder = type(
        f"Live{base.get_builder_cls().__name__}", (LiveTableBuilder, base.get_builder_cls()), {}
    )
    impl = type(f"Observed{base.get_impl_cls().__name__}", (ObservedImpl, base.get_impl_cls()), {})
    methods = {
        "get_builder_cls": staticmethod(lambda: builder),
        "get_impl_cls": staticmethod(lambda: impl),
    }
    return type(f"GKV{base.__name__}", (base,), methods)
