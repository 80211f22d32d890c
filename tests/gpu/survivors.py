# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Batches whose block tables have holes, and dense attention over exactly what survived.

Whatever is not a surviving token's key or value is NaN: evicted blocks, free ones, the null block,
and what follows a request's last token. The oracle knows logical positions and no table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from gkv_vllm.ops.layout import GPULayout

NAN = float("nan")
Row = tuple[int, int, float]
"""Tokens of a request, how many of them are the step's queries, and the share of its old blocks
that is gone."""
MIXED: tuple[Row, ...] = (
    (97, 1, 0.5),
    (150, 9, 0.4),
    (63, 1, 0.0),
    (19, 19, 0.0),
    (33, 1, 1.0),
    (177, 6, 1.0),
    (256, 1, 0.7),
)
"""Decoding requests, chunks of prompts with and without holes before them, whole blocks at the end
or not."""


@dataclass(frozen=True)
class Shape:
    """A layer of a model, and its cache."""

    kv_heads: int
    group: int
    head_dim: int
    block_size: int = 16

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def tolerance(self, dtype: torch.dtype) -> float:
        """Probabilities and outputs are rounded to `dtype`; a logit adds up `head_dim` products in
        float32, and twice that is a probability's relative error. Values are below 5."""
        eps = torch.finfo(dtype).eps + 2 * self.head_dim * torch.finfo(torch.float32).eps
        return 5 * eps


SHAPES = {
    "mha": Shape(kv_heads=3, group=1, head_dim=64),
    "gqa4": Shape(kv_heads=2, group=4, head_dim=128),
    "gqa7": Shape(kv_heads=2, group=7, head_dim=64, block_size=32),
    "gqa8": Shape(kv_heads=1, group=8, head_dim=128),
    "ragged": Shape(kv_heads=5, group=3, head_dim=80),
}
NUM_BLOCKS = 90
"""More than `MIXED` takes."""


@dataclass
class Request:
    """What one row of the batch consists of: [tokens, heads, head_dim] each."""

    keys: Tensor
    values: Tensor
    queries: Tensor
    gone: list[int]
    """Logical blocks."""

    def survivors(self, block_size: int) -> Tensor:
        """Their logical positions."""
        position = torch.arange(len(self.keys))
        return position[~torch.isin(position // block_size, torch.tensor(self.gone))]

    def attended(self, shape: Shape) -> Tensor:
        """Dense float32 attention over the survivors that are not in a query's future."""
        alive = self.survivors(shape.block_size)
        position = torch.arange(len(self.keys) - len(self.queries), len(self.keys))
        heads_first = [x.float().transpose(0, 1) for x in (self.queries, self.keys, self.values)]
        queries, keys, values = heads_first
        attended = torch.nn.functional.scaled_dot_product_attention(
            queries,
            keys[:, alive].repeat_interleave(shape.group, 0),
            values[:, alive].repeat_interleave(shape.group, 0),
            attn_mask=alive <= position[:, None],
            scale=shape.scale,
        )
        return attended.transpose(0, 1)


class Batch:
    """Rows over one fragmented pool; on the CPU until `to`."""

    def __init__(
        self, shape: Shape, rows: Sequence[Row], dtype: torch.dtype, *, seed: int, num_blocks: int
    ) -> None:
        self.shape, self.dtype = shape, dtype
        rng, draw = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        size = shape.block_size
        # NHD in memory, as vLLM allocates it; the null block is nobody's.
        pool = (num_blocks, size, shape.kv_heads, 2 * shape.head_dim)
        self.cache = torch.full(pool, NAN, dtype=dtype).transpose(1, 2)
        free = iter((rng.permutation(num_blocks - 1) + 1).tolist())
        width = max(-(-tokens // size) for tokens, _, _ in rows) + 1
        self.table = torch.zeros(len(rows), width, dtype=torch.int32)
        self.stale_id = next(free)
        """A block that was somebody's once."""
        self.requests: list[Request] = []
        for row, (tokens, count, share) in enumerate(rows):

            def normal(*of: int) -> Tensor:
                return torch.randn(*of, shape.head_dim, generator=draw).to(dtype)

            old = (tokens - count) // size
            gone = sorted(rng.choice(old, round(share * old), replace=False).tolist())
            request = Request(
                normal(tokens, shape.kv_heads),
                normal(tokens, shape.kv_heads),
                normal(count, shape.heads),
                gone,
            )
            self.requests.append(request)
            for block in range(-(-tokens // size)):
                physical = next(free)  # evicted ones, too, lie between those of others
                if block not in gone:
                    self.table[row, block] = physical
                    self._write(request, block, physical)
        self.seq_lens = torch.tensor([tokens for tokens, _, _ in rows], dtype=torch.int32)
        starts = np.cumsum([0, *(count for _, count, _ in rows)])
        self.query_starts = torch.from_numpy(starts.astype(np.int32))
        self.queries = torch.cat([request.queries for request in self.requests])

    def _write(self, request: Request, block: int, physical: int) -> None:
        """A token's key, then its value, as vLLM's kernels for the cache write them."""
        size = self.shape.block_size
        tokens = torch.cat([request.keys, request.values], -1)
        stored = tokens[block * size : (block + 1) * size].transpose(0, 1)
        self.cache[physical, :, : stored.shape[1]] = stored

    @property
    def holes(self) -> list[int]:
        """How many each row has."""
        return [len(request.gone) for request in self.requests]

    def attended(self) -> Tensor:
        """[tokens, query_heads, head_dim] float32"""
        return torch.cat([request.attended(self.shape) for request in self.requests])

    def padded(self, rows: int) -> CommonAttentionMetadata:
        """What vLLM's runner says of the batch, padded to so many rows without a token."""
        padding = rows - len(self.requests)
        starts = torch.cat([self.query_starts, self.query_starts[-1:].expand(padding)])
        lens = torch.cat([self.seq_lens, torch.zeros(padding, dtype=torch.int32)])
        # A row that pads holds what its last request left there.
        stale = torch.full((padding, self.table.shape[1]), self.stale_id, dtype=torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lens,
            seq_lens_cpu_upper_bound=lens.clone(),
            num_reqs=rows,
            num_actual_tokens=len(self.queries),
            max_query_len=max(len(request.queries) for request in self.requests),
            max_seq_len=int(self.seq_lens.max()),
            block_table_tensor=torch.cat([self.table, stale]),
            slot_mapping=torch.zeros(len(self.queries), dtype=torch.int64),
        )


def check(attended: Tensor, batch: Batch) -> None:
    tolerance = batch.shape.tolerance(batch.dtype)
    torch.testing.assert_close(attended.cpu().float(), batch.attended(), rtol=0, atol=tolerance)


class Unified:
    """vLLM's TRITON_ATTN: one kernel for prefill and decode; it may split the keys of a decode."""

    def __init__(self, shape: Shape, *, max_tokens: int, segments: int | None = None) -> None:
        """segments: into how many parts the keys are split where all rows decode."""
        self.shape, self.segments, self.max_tokens = shape, segments, max_tokens
        self.parts: dict[str, Tensor] = {}

    def _parts(self, device: torch.device) -> dict[str, Tensor]:
        """Work space of the split kernel, at one address."""
        if self.segments is not None and not self.parts:
            size = (self.max_tokens, self.shape.heads, self.segments)
            padded = 1 << (self.shape.head_dim - 1).bit_length()
            self.parts = {
                "softmax_segm_output": torch.empty(*size, padded, device=device),
                "softmax_segm_max": torch.empty(size, device=device),
                "softmax_segm_expsum": torch.empty(size, device=device),
            }
        return self.parts

    def __call__(
        self,
        queries: Tensor,
        cache: Tensor,
        out: Tensor,
        *,
        table: Tensor,
        lens: Tensor,
        starts: Tensor,
        max_queries: int,
        max_len: int,
    ) -> None:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention

        layout = GPULayout()
        unified_attention(
            q=queries,
            k=layout.keys(cache).transpose(1, 2),
            v=layout.values(cache).transpose(1, 2),
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=max_queries,
            seqused_k=lens,
            max_seqlen_k=max_len,
            softmax_scale=self.shape.scale,
            causal=True,
            window_size=(-1, -1),
            block_table=table,
            softcap=0.0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            seq_threshold_3D=self.max_tokens if self.segments is not None else None,
            num_par_softmax_segments=self.segments,
            **self._parts(queries.device),
        )
