# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""vLLM's real CPU kernel over tables with holes, against dense attention over the survivors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa
from vllm.v1.kv_cache_interface import FullAttentionSpec

from gkv_vllm.attention.cpu import READABLE_LAYOUTS, GKVCPUAttentionBackend
from gkv_vllm.attention.wrap import live_metadata
from gkv_vllm.engine.spec import GKVSpec
from gkv_vllm.ops import paged
from gkv_vllm.ops.layout import CPULayout

LARGE = 1e4
"""In slots that no token was written to. Not NaN: the stock kernel multiplies the values behind a
row's last token by a weight of exactly 0, and 0 * NaN is NaN."""


def readable_isa(dtype: torch.dtype, block_size: int, head_dim: int) -> str:
    isa = _get_attn_isa(dtype, block_size, head_dim)
    return isa if isa in READABLE_LAYOUTS else "vec"


def kernel_views(cache: Tensor) -> tuple[Tensor, Tensor]:
    """The key and value caches as vLLM's CPU backend cuts them."""
    num_blocks, kv_heads, block_size, _ = cache.shape
    return cache.view(num_blocks, kv_heads, 2 * block_size, -1).chunk(2, dim=2)


@dataclass
class Row:
    """One request of a step: `tokens` after it, the last `queries` of them computed in it."""

    tokens: int
    queries: int
    holes: tuple[int, ...] = ()


@dataclass
class Heads:
    query_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


class Step:
    """A paged cache before one step: history written, holes punched, everything else NaN."""

    def __init__(self, rows: list[Row], heads: Heads, block_size: int, seed: int = 0) -> None:
        self.rows, self.heads, self.block_size = rows, heads, block_size
        self.isa = readable_isa(heads.dtype, block_size, heads.head_dim)
        generator = torch.Generator().manual_seed(seed)

        def random(tokens: int, count: int) -> Tensor:
            shape = (tokens, count, heads.head_dim)
            return torch.randn(shape, generator=generator).to(heads.dtype)

        self.keys = [random(row.tokens, heads.kv_heads) for row in rows]
        self.values = [random(row.tokens, heads.kv_heads) for row in rows]
        self.queries = [random(row.queries, heads.query_heads) for row in rows]
        self.survivors: dict[int, Tensor] = {}
        """Per row, [kv_heads, tokens]: which of its tokens are left; else all but its holes."""

        counts = [-(-row.tokens // block_size) for row in rows]
        pool = 2 * sum(counts) + 1
        ids = (1 + torch.randperm(pool - 1, generator=generator)).tolist()
        unused = ids[sum(counts) :]
        self.cache = torch.full(
            (pool, heads.kv_heads, block_size, 2 * heads.head_dim), float("nan"), dtype=heads.dtype
        )
        width = max(counts) + 2
        self.table = torch.full((len(rows), width), unused[0], dtype=torch.int32)
        for i, count in enumerate(counts):
            self.table[i, :count] = torch.tensor([ids.pop(0) for _ in range(count)])
            self.cache[self.table[i, count - 1]] = LARGE
        for i, row in enumerate(rows):
            self._write(i, 0, row.tokens - row.queries)
        for i, row in enumerate(rows):
            assert all((hole + 1) * block_size <= row.tokens - row.queries for hole in row.holes)
            for hole in row.holes:
                self.cache[self.table[i, hole]] = float("nan")
                self.table[i, hole] = 0

    def slots(self, i: int, start: int, end: int) -> Tensor:
        """Where logical positions go; from the runner's own table, as vLLM computes it."""
        positions = torch.arange(start, end)
        blocks = self.table[i, positions // self.block_size].long()
        return blocks * self.block_size + positions % self.block_size

    def _write(self, i: int, start: int, end: int) -> None:
        if start == end:
            return
        key_cache, value_cache = kernel_views(self.cache)
        ops.cpu_attn_reshape_and_cache(
            self.keys[i][start:end],
            self.values[i][start:end],
            key_cache,
            value_cache,
            self.slots(i, start, end),
            self.isa,
        )

    def step_part(self, per_request: list[Tensor]) -> Tensor:
        """What this step computes of the requests' keys or values, as one batch."""
        return torch.cat(
            [x[x.shape[0] - r.queries :] for x, r in zip(per_request, self.rows, strict=True)]
        )

    def metadata(self) -> CommonAttentionMetadata:
        lens = [row.queries for row in self.rows]
        starts = torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor([row.tokens for row in self.rows], dtype=torch.int32),
            num_reqs=len(self.rows),
            num_actual_tokens=sum(lens),
            max_query_len=max(lens),
            max_seq_len=max(row.tokens for row in self.rows),
            block_table_tensor=self.table,
            slot_mapping=torch.cat(
                [self.slots(i, r.tokens - r.queries, r.tokens) for i, r in enumerate(self.rows)]
            ),
        )

    def attend(self) -> Tensor:
        """The step through the real kernels: [tokens, query_heads, head_dim]."""
        for i, row in enumerate(self.rows):
            self._write(i, row.tokens - row.queries, row.tokens)
        live = live_metadata(self.metadata(), self.block_size)
        heads = self.heads
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=live.num_reqs,
            num_heads=heads.query_heads,
            num_kv_heads=heads.kv_heads,
            head_dim=heads.head_dim,
            seq_lens=live.seq_lens,
            dtype=heads.dtype,
            query_start_loc=live.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=True,
        )
        query = torch.cat(self.queries)
        output = torch.full_like(query, float("nan"))
        key_cache, value_cache = kernel_views(self.cache)
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=live.query_start_loc,
            seq_lens=live.seq_lens,
            scale=heads.head_dim**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=live.block_table_tensor,
            softcap=0.0,
            scheduler_metadata=schedule,
            s_aux=None,
        )
        return output

    def dense(self) -> tuple[Tensor, Tensor]:
        """Float64 attention over the survivors, causal by logical position; and its error."""
        rows = [self._dense_row(i) for i in range(len(self.rows))]
        return torch.cat([out for out, _ in rows]), torch.cat([error for _, error in rows])

    def _dense_row(self, i: int) -> tuple[Tensor, Tensor]:
        row, group = self.rows[i], self.heads.query_heads // self.heads.kv_heads
        position = torch.arange(row.tokens)
        survives = ~torch.isin(position // self.block_size, torch.tensor(row.holes))
        survives = self.survivors.get(i, survives.expand(self.heads.kv_heads, -1))
        query_position = position[row.tokens - row.queries :]
        visible = survives.repeat_interleave(group, 0)[:, None] & (
            position <= query_position[:, None]
        )
        keys, values = (
            x.double().repeat_interleave(group, 1).transpose(0, 1)
            for x in (self.keys[i], self.values[i])
        )
        queries = self.queries[i].double().transpose(0, 1)
        scale = self.heads.head_dim**-0.5
        logits = (queries @ keys.transpose(1, 2) * scale).masked_fill(~visible, float("-inf"))
        weights = logits.softmax(-1)
        out = weights @ values
        # Rounding, in the cache's dtype: each weight by eps / 2 and the sum by eps / 2; in float32:
        # a logit by eps times the products it sums (at most |q| |k| scale), which moves its weight
        # by that factor, and the softmax denominator as much again.
        eps, eps32 = torch.finfo(self.heads.dtype).eps, torch.finfo(torch.float32).eps
        products = queries.norm(dim=-1, keepdim=True) * keys.norm(dim=-1).amax() * scale
        magnitude = weights @ values.abs()
        error = eps / 2 * (magnitude + out.abs()) + 2 * eps32 * products * magnitude
        return out.transpose(0, 1), error.transpose(0, 1)

    def assert_exact(self, output: Tensor) -> None:
        """NaN, from any block that is not live, fails too."""
        expected, tolerance = self.dense()
        within = (output.double() - expected).abs() <= tolerance
        assert within.all(), f"{(~within).sum()} of {within.numel()} elements differ"


def batches(block_size: int) -> dict[str, list[Row]]:
    """Named batches for a block size `b`; each mixes decode rows with prefill chunks."""
    b = block_size
    return {
        "mixed": [
            Row(5 * b + 3, 1, holes=(1, 3)),
            Row(4 * b, 2 * b, holes=(0,)),
            Row(3 * b + 1, 1),
            Row(6 * b + 9, b + 9, holes=(0, 2, 4)),
        ],
        "ragged_63_tokens": [
            Row(63, 63),
            Row(63, 1),
            Row(9 * b + 63, 1, holes=tuple(range(9))),
            Row(7 * b + 1, 17, holes=(0, 1, 3, 5)),
            Row(1, 1),
        ],
        "tail_just_filled": [Row(4 * b, 1, holes=(1, 2)), Row(4 * b + 1, 1, holes=(0, 3))],
    }


BATCH_NAMES = list(batches(32))
GROUPS = {"gqa1_5_heads": (5, 5), "gqa4": (8, 2), "gqa7": (14, 2)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("batch", BATCH_NAMES)
def test_attention_over_a_table_with_holes_is_dense_attention_over_the_survivors(
    batch: str, head_dim: int, group: tuple[int, int], block_size: int, dtype: torch.dtype
) -> None:
    heads = Heads(*group, head_dim, dtype)
    step = Step(batches(block_size)[batch], heads, block_size)
    step.assert_exact(step.attend())


@pytest.mark.parametrize("seed", range(20))
def test_attention_is_exact_for_random_holes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(6):
        tokens = int(torch.randint(1, 400, (), generator=generator))
        queries = min(tokens, 1 + int(torch.randint(0, 40, (), generator=generator)) % 23)
        old = (tokens - queries) // 32
        holes = (torch.rand(old, generator=generator) < 0.5).nonzero().flatten().tolist()
        rows.append(Row(tokens, queries, tuple(holes)))
    step = Step(rows, Heads(8, 2, 32, torch.float32), 32, seed)
    step.assert_exact(step.attend())


def test_the_comparison_notices_one_missing_block() -> None:
    """Guards the tolerances: forgetting a block of 20 is outside them for most elements."""
    heads = Heads(8, 2, 64, torch.bfloat16)
    step = Step([Row(20 * 32 + 5, 1, holes=(1, 4))], heads, 32)
    expected, tolerance = step.dense()
    wrong, _ = Step([Row(20 * 32 + 5, 1, holes=(1, 4, 7))], heads, 32).dense()
    assert ((wrong - expected).abs() > tolerance).float().mean() > 0.5


def test_without_holes_the_output_is_bit_for_bit_the_stock_one() -> None:
    """The stock path: the runner's own table and lengths, which `live_metadata` hands through."""
    rows = [Row(129, 1), Row(70, 33)]
    heads = Heads(8, 2, 32, torch.bfloat16)
    step = Step(rows, heads, 32)
    logical = step.metadata()
    assert live_metadata(logical, 32) is logical
    assert torch.equal(step.attend(), Step(rows, heads, 32).attend())


# ---- after a compaction: every KV head has its own kept tokens


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("head_dim", [32, 128])
def test_attention_after_a_compaction_is_dense_attention_over_each_heads_kept_tokens(
    head_dim: int, group: tuple[int, int], block_size: int, dtype: torch.dtype, impl: str
) -> None:
    """Block 0 is protected, 1 to 4 compete, two of them stay, and the tail is not full."""
    heads = Heads(*group, head_dim, dtype)
    step = Step([Row(6 * block_size + 9, 3), Row(2 * block_size, 1)], heads, block_size)
    sources = step.table[0, 1:5].long()
    generator = torch.Generator().manual_seed(3)
    draws = torch.rand(heads.kv_heads, 4 * block_size, generator=generator)
    keep = draws.topk(2 * block_size).indices.sort(-1).values
    # Targets overlap their sources, which come in any order.
    paged.resolve(impl).compact(step.cache, None, sources, sources[:2], keep)
    for hole in (3, 4):
        step.cache[step.table[0, hole]] = float("nan")
        step.table[0, hole] = 0
    survives = torch.ones(heads.kv_heads, step.rows[0].tokens, dtype=torch.bool)
    survives[:, block_size : 5 * block_size] = False
    survives.scatter_(1, keep + block_size, True)
    step.survivors[0] = survives
    step.assert_exact(step.attend())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_order_of_tokens_within_a_head_does_not_matter(dtype: torch.dtype) -> None:
    """A different permutation of all old tokens for each head leaves attention as it was."""
    step = Step([Row(5 * 32 + 7, 1)], Heads(8, 2, 64, dtype), 32)
    blocks = step.table[0, :5].long()
    orders = torch.stack(
        [torch.randperm(160, generator=torch.Generator().manual_seed(h)) for h in range(2)]
    )
    paged.ReferenceOps().compact(step.cache, None, blocks, blocks, orders)
    step.assert_exact(step.attend())


# ---- reading keys back

GATHER_SHAPES = {"two_heads": (2, 4), "ragged_5_heads": (5, 3)}


@pytest.mark.parametrize("shape", GATHER_SHAPES.values(), ids=GATHER_SHAPES)
@pytest.mark.parametrize("block_size", [32, 64, 96])
@pytest.mark.parametrize("head_dim", CPUAttentionBackend.get_supported_head_sizes())
@pytest.mark.parametrize("dtype", CPUAttentionBackend.supported_dtypes, ids=str)
def test_gathered_keys_are_the_written_keys(
    dtype: torch.dtype, head_dim: int, block_size: int, shape: tuple[int, int]
) -> None:
    kv_heads, blocks = shape
    generator = torch.Generator().manual_seed(head_dim)
    tokens = blocks * block_size - 1
    keys = torch.randn(tokens, kv_heads, head_dim, generator=generator).to(dtype)
    cache = torch.full((2 * blocks, kv_heads, block_size, 2 * head_dim), float("nan"), dtype=dtype)
    ids = torch.randperm(2 * blocks, generator=generator)[:blocks]
    slots = (ids[:, None] * block_size + torch.arange(block_size)).flatten()[:tokens]
    ops.cpu_attn_reshape_and_cache(
        keys, keys + 1, *kernel_views(cache), slots, readable_isa(dtype, block_size, head_dim)
    )
    gathered, _ = CPULayout().read(cache, ids)
    assert gathered.shape == (kv_heads, blocks * block_size, head_dim)
    assert torch.equal(gathered[:, :tokens], keys.transpose(0, 1))

    order = torch.randperm(blocks, generator=generator)
    by_block = gathered.view(kv_heads, blocks, block_size, head_dim)
    shuffled = CPULayout().read(cache, ids[order])[0].view_as(by_block)
    assert torch.equal(shuffled.nan_to_num(), by_block[:, order].nan_to_num())


# ---- the wrapped backend, as vLLM builds it

TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "max_position_embeddings": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "dtype": "bfloat16",
    "vocab_size": 64,
}
TINY_HEADS = Heads(8, 2, 32, torch.bfloat16)


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    model = tmp_path_factory.mktemp("tiny")
    Path(model, "config.json").write_text(json.dumps(TINY))
    return EngineArgs(
        model=str(model), skip_tokenizer_init=True, block_size=32
    ).create_engine_config()


class Recorder:
    """What prepares a batch and a query sink, that keep what they were shown."""

    def __init__(self) -> None:
        self.logical: list[CommonAttentionMetadata] = []
        self.live: list[CommonAttentionMetadata] = []
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []

    def prepare(self, metadata: CommonAttentionMetadata) -> CommonAttentionMetadata:
        live = live_metadata(metadata, 32)
        self.logical.append(metadata)
        self.live.append(live)
        return live

    def before_attention(self, queries: Tensor) -> None:
        self.before.append(queries.clone())

    def after_attention(self, queries: Tensor) -> None:
        self.after.append(queries.clone())


def build(vllm_config: VllmConfig, spec_type: type[FullAttentionSpec]) -> Any:
    spec = spec_type(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.bfloat16)
    builder = GKVCPUAttentionBackend.get_builder_cls()(
        spec, ["layer"], vllm_config, torch.device("cpu")
    )
    builder.prepare = lambda metadata: live_metadata(metadata, 32)
    return builder


def forward(vllm_config: VllmConfig, builder: Any, step: Step, sink: Recorder | None) -> Tensor:
    with set_current_vllm_config(vllm_config):
        impl = GKVCPUAttentionBackend.get_impl_cls()(
            8, 32, 32**-0.5, 2, None, None, kv_cache_dtype="auto"
        )
    impl.query_sink = sink
    layer = SimpleNamespace(isa=builder.isa, _k_scale_float=1.0, _v_scale_float=1.0)
    keys, values = step.step_part(step.keys), step.step_part(step.values)
    metadata = builder.build(0, step.metadata())
    impl.do_kv_cache_update(layer, keys, values, step.cache, metadata.slot_mapping)
    query = torch.cat(step.queries)
    output = torch.full_like(query, float("nan"))
    return impl.forward(layer, query, keys, values, step.cache, metadata, output)


def test_a_batch_without_metadata_shows_no_queries(vllm_config: VllmConfig) -> None:
    """vLLM runs such ones, between steps too: what the last step left says nothing about them."""
    with set_current_vllm_config(vllm_config):
        impl = GKVCPUAttentionBackend.get_impl_cls()(
            8, 32, 32**-0.5, 2, None, None, kv_cache_dtype="auto"
        )
    impl.query_sink = sink = Recorder()
    queries = torch.ones(3, 8, 32)
    impl.forward(SimpleNamespace(), queries, queries, queries, queries, None, queries.clone())
    assert not sink.before
    assert not sink.after


@pytest.mark.parametrize("batch", BATCH_NAMES)
def test_the_wrapped_backend_attends_to_the_survivors(vllm_config: VllmConfig, batch: str) -> None:
    step = Step(batches(32)[batch], TINY_HEADS, 32)
    builder = build(vllm_config, GKVSpec)
    assert builder.isa in READABLE_LAYOUTS
    step.assert_exact(forward(vllm_config, builder, step, None))


def test_the_observer_sees_both_batches_and_the_sink_its_queries(vllm_config: VllmConfig) -> None:
    step = Step(batches(32)["mixed"], TINY_HEADS, 32)
    builder, recorder = build(vllm_config, GKVSpec), Recorder()
    builder.prepare = recorder.prepare
    forward(vllm_config, builder, step, recorder)
    (logical,), (live,) = recorder.logical, recorder.live
    assert logical.seq_lens.tolist() == [row.tokens for row in step.rows]
    assert logical.block_table_tensor is step.table
    assert live.seq_lens.tolist() == [row.tokens - 32 * len(row.holes) for row in step.rows]
    for seen in (recorder.before, recorder.after):
        assert torch.equal(seen[0], torch.cat(step.queries))


def test_layers_that_are_not_evictable_are_left_alone(vllm_config: VllmConfig) -> None:
    step = Step([Row(129, 1), Row(70, 33)], TINY_HEADS, 32)
    builder, recorder = build(vllm_config, FullAttentionSpec), Recorder()
    builder.prepare = recorder.prepare
    step.table[0, 0] = 0
    built = builder.build(0, step.metadata())
    assert built.block_table is step.table
    assert built.seq_lens.tolist() == [129, 70]
    assert recorder.logical == []


def test_alibi_is_refused_because_holes_would_shift_its_positions(vllm_config: VllmConfig) -> None:
    impl = GKVCPUAttentionBackend.get_impl_cls()
    with (
        set_current_vllm_config(vllm_config),
        pytest.raises(ValueError, match="ALiBi.*without --kv-policy"),
    ):
        impl(2, 32, 1.0, 2, [0.5, 0.25], None, kv_cache_dtype="auto")
