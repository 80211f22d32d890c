# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The C++ operators against their readable torch form, for every instruction set of the machine.

All memory that belongs to nobody is NaN: other blocks, and the unwritten slots of the last one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gkv_vllm.ops import paged, reference
from gkv_vllm.ops.layout import CPULayout
from gkv_vllm.ops.live_table import squeeze
from gkv_vllm.ops.paged import PagedOps, ReferenceOps

_cpu = pytest.importorskip("gkv_vllm.ops._cpu", reason="built without a C++ compiler")

NAN, EPS = float("nan"), torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REFERENCE = ReferenceOps()


@pytest.fixture(params=_cpu.supported_isas().split(","))
def ops(request: pytest.FixtureRequest) -> Iterator[PagedOps]:
    before = _cpu.isa()
    _cpu.use_isa(request.param)
    found = paged.resolve("cpu")
    assert found.name == f"cpu-{request.param}"
    yield found
    _cpu.use_isa(before)


@dataclass(frozen=True)
class Shape:
    tokens: int
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 64
    window: int = 16
    block_size: int = 32
    dtype: torch.dtype = torch.float32


SHAPES = {
    "one_token_over_the_window": Shape(17),
    "ragged_63_tokens_5_heads": Shape(63, kv_heads=5, group=1, window=7),
    "whole_blocks_gqa7": Shape(128, group=7, head_dim=128),
    "blocks_of_64": Shape(333, block_size=64, head_dim=32),
    "blocks_of_128_mha": Shape(500, kv_heads=3, group=1, block_size=128, head_dim=80),
    "window_over_many_blocks": Shape(300, window=130, group=3),
    "wide_group": Shape(70, kv_heads=1, group=71, window=2),
    "bf16": Shape(777, group=4, dtype=torch.bfloat16),
    "fp16_odd_head": Shape(95, head_dim=24, dtype=torch.float16),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def random(*size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Request:
    """Live tokens at scattered blocks of a cache that is NaN elsewhere."""

    def __init__(self, shape: Shape, seed: int = 0, keys: Tensor | None = None) -> None:
        self.shape = shape
        blocks = -(-shape.tokens // shape.block_size)
        self.ids = torch.randperm(2 * blocks, generator=torch.Generator().manual_seed(seed))[
            :blocks
        ]
        size = (shape.kv_heads, shape.tokens, shape.head_dim)
        self.keys = random(*size, seed=seed + 1, dtype=shape.dtype) if keys is None else keys
        self.values = random(*size, seed=seed + 2, dtype=shape.dtype)
        window = (shape.kv_heads * shape.group, shape.window, shape.head_dim)
        self.queries = random(*window, seed=seed + 3, dtype=shape.dtype)
        cache = (2 * blocks, shape.kv_heads, shape.block_size, 2 * shape.head_dim)
        self.cache = torch.full(cache, NAN, dtype=shape.dtype)
        CPULayout().write(self.cache, self.ids, self.keys, self.values)

    @property
    def scale(self) -> float:
        return self.shape.head_dim**-0.5

    def logit_error(self) -> float:
        """Two sums of products in other orders: eps times what their terms can add up to."""
        products = self.queries.float().norm(dim=-1).max() * self.keys.float().norm(dim=-1).max()
        return 4 * EPS * float(products) * self.scale


# ---- local scores


@shapes
@pytest.mark.parametrize("form", reference.LOCAL_SCORE_FORMS)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_local_scores(ops: PagedOps, shape: Shape, form: str, softcap: float) -> None:
    r = Request(shape)
    arguments = (r.queries, r.cache, r.ids, shape.tokens, r.scale, softcap, form)
    found, expected = ops.local_scores(*arguments), REFERENCE.local_scores(*arguments)
    assert found.shape == (shape.kv_heads, shape.tokens - shape.window)
    # An error of the logits is a relative error of the probabilities; exp and sums add some eps.
    torch.testing.assert_close(
        found, expected, rtol=2 * r.logit_error() + 16 * EPS, atol=torch.finfo(torch.float32).tiny
    )


def test_local_scores_of_large_logits_stay_finite(ops: PagedOps) -> None:
    r = Request(Shape(200))
    arguments = (40 * r.queries, r.cache, r.ids, 200, r.scale, 0.0, "max_probability")
    found, expected = ops.local_scores(*arguments), REFERENCE.local_scores(*arguments)
    assert found.isfinite().all()
    # Logits of hundreds: their rounding alone moves a probability by that many eps.
    torch.testing.assert_close(found, expected, rtol=80 * r.logit_error(), atol=1e-37)


def test_queries_may_be_strided_views(ops: PagedOps) -> None:
    r = Request(Shape(100))
    ring = r.queries.transpose(0, 1).contiguous()
    arguments = (r.cache, r.ids, 100, r.scale, 0.0, "max_probability")
    strided = ops.local_scores(ring.transpose(0, 1), *arguments)
    assert torch.equal(strided, ops.local_scores(r.queries, *arguments))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_do_not_depend_on_threads_or_on_where_blocks_lie(
    ops: PagedOps, threads: int
) -> None:
    shape = Shape(2500, window=40, group=3)
    keys = random(2, 2500, 64, seed=5)
    before, found = torch.get_num_threads(), []
    for seed, count in ((1, 1), (2, threads)):
        r = Request(shape, seed, keys)
        queries = random(6, 40, 64, seed=6)
        torch.set_num_threads(count)
        try:
            scores = ops.local_scores(
                queries, r.cache, r.ids, 2500, r.scale, 0.0, "max_probability"
            )
            similarity = ops.redundancy(r.cache, r.ids, 32, 2500, 0.5)
            newer = ops.superseded(r.cache, r.ids, 32, 2500)
        finally:
            torch.set_num_threads(before)
        found.append((scores, similarity, newer))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- redundancy and norms


def similar_keys(shape: Shape, spread: float, seed: int = 0) -> Tensor:
    """Keys around a few directions: the smaller the spread, the more lookalikes."""
    centres = random(shape.kv_heads, 6, shape.head_dim, seed=seed)
    chosen = torch.randint(6, (shape.tokens,), generator=torch.Generator().manual_seed(seed))
    noise = random(shape.kv_heads, shape.tokens, shape.head_dim, seed=seed + 1)
    return (centres[:, chosen] + spread * noise).to(shape.dtype)


def unambiguous(keys: Tensor, threshold: float) -> bool:
    """No cosine is so close to the threshold that rounding decides."""
    unit = torch.nn.functional.normalize(keys.double(), dim=-1)
    return bool(((unit @ unit.transpose(-1, -2) - threshold).abs() > 1e-6).all())


@shapes
@pytest.mark.parametrize("spread", [0.2, 0.7, 1.5, 20.0])
@pytest.mark.parametrize("within_blocks", [False, True])
@pytest.mark.parametrize("protected_blocks", [0, 1])
def test_redundancy(
    ops: PagedOps, shape: Shape, spread: float, within_blocks: bool, protected_blocks: int
) -> None:
    start = protected_blocks * shape.block_size
    if start >= shape.tokens:
        pytest.skip("nothing is left to compare")
    r = Request(shape, keys=similar_keys(shape, spread))
    threshold = next(t for t in (0.5, 0.5003, 0.4997) if unambiguous(r.keys, t))
    arguments = (r.cache, r.ids, start, shape.tokens, threshold)
    name = "redundancy_in_block" if within_blocks else "redundancy"
    found, expected = getattr(ops, name)(*arguments), getattr(REFERENCE, name)(*arguments)
    # A mean of cosines, each off by a few eps; sums of n of them drift as sqrt n.
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * EPS * shape.tokens**0.5)


def test_duplicates_and_zero_keys(ops: PagedOps) -> None:
    keys = random(1, 1, 64, seed=3).repeat(2, 90, 1)
    keys[1, 10:20] = 0
    r = Request(Shape(90), keys=keys)
    found = ops.redundancy(r.cache, r.ids, 0, 90, 0.5)
    # All alike: every column excuses the last row but the last one, which excuses the one before.
    expected = torch.full((90,), 89 / 90)
    expected[89], expected[88] = 0, 88 / 90
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)
    assert (found[1, 10:20] == 0).all()
    torch.testing.assert_close(
        found, REFERENCE.redundancy(r.cache, r.ids, 0, 90, 0.5), rtol=0, atol=1e-5
    )


@shapes
@pytest.mark.parametrize("spread", [0.2, 1.5, 20.0])
@pytest.mark.parametrize("protected_blocks", [0, 1])
def test_superseded(ops: PagedOps, shape: Shape, spread: float, protected_blocks: int) -> None:
    start = protected_blocks * shape.block_size
    if start >= shape.tokens:
        pytest.skip("nothing is left to compare")
    r = Request(shape, keys=similar_keys(shape, spread))
    found = ops.superseded(r.cache, r.ids, start, shape.tokens)
    expected = REFERENCE.superseded(r.cache, r.ids, start, shape.tokens)
    # Each cosine sums head_dim products whose magnitudes sum up to at most 1.
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * EPS * shape.head_dim**0.5)
    assert (found[:, -1] == 0).all()  # nothing is newer than the newest


def test_what_only_the_opposite_or_nothing_follows_is_not_superseded(ops: PagedOps) -> None:
    right = torch.eye(64)[0]
    keys = torch.zeros(1, 70, 64)
    keys[0, 3], keys[0, 40], keys[0, 69] = right, -2 * right, 3 * right
    found = ops.superseded(*paged_keys(keys), 0, 70)
    expected = torch.zeros(1, 70)
    expected[0, 3] = 1  # by the last; the middle one has its opposite after it alone
    torch.testing.assert_close(found, expected, rtol=0, atol=EPS)


def paged_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """A cache that holds these keys [kv_heads, tokens, head_dim], and its blocks."""
    r = Request(Shape(keys.shape[1], kv_heads=keys.shape[0], head_dim=keys.shape[2]), keys=keys)
    return r.cache, r.ids


@shapes
def test_key_norms(ops: PagedOps, shape: Shape) -> None:
    r = Request(shape)
    found = ops.key_norms(r.cache, r.ids, shape.tokens)
    expected = REFERENCE.key_norms(r.cache, r.ids, shape.tokens)
    torch.testing.assert_close(found, expected, rtol=EPS * shape.head_dim**0.5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_numbers_are_converted_exactly(ops: PagedOps, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    largest = min(limits.max, 1e18)
    values = torch.tensor([0.0, 1.0, -1.0, largest, -largest, limits.tiny, -limits.tiny])
    if dtype == torch.float16:
        values = torch.cat([values, torch.tensor([2.0**-24, -(2.0**-20)])])  # subnormal
    shape = Shape(32, kv_heads=1, head_dim=1, dtype=dtype)
    keys = values.repeat(5)[:32].to(dtype).view(1, 32, 1)
    r = Request(shape, keys=keys)
    found = ops.key_norms(r.cache, r.ids, 32)
    torch.testing.assert_close(found, keys.float().abs().squeeze(-1), rtol=2 * EPS, atol=1e-22)


# ---- top-k, block maximum, compaction


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_topk_keep_equals_its_reference(data: st.DataObject) -> None:
    units = data.draw(st.integers(1, 60))
    count = data.draw(st.integers(0, units))
    levels = data.draw(st.integers(1, 9))  # few levels: many ties
    seed = data.draw(st.integers(0, 99))
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (3, 2, units), generator=draw).float()
    scores[1] = -scores[1]  # its zeros are -0.0 now, which ties with 0.0
    scores[1, :, ::2].abs_()
    scores[0, 0, 0] = float("-inf")
    found = paged.resolve("cpu").topk_keep(scores, count)
    assert torch.equal(found, REFERENCE.topk_keep(scores, count))


@pytest.mark.parametrize("size", [(64,), (3, 96), (2, 5, 32)])
def test_block_max(ops: PagedOps, size: tuple[int, ...]) -> None:
    scores = random(*size, seed=1)
    assert torch.equal(ops.block_max(scores, 32), REFERENCE.block_max(scores, 32))
    strided = scores.expand(2, *size)
    assert torch.equal(ops.block_max(strided, 16), REFERENCE.block_max(strided, 16))


def random_keep(rows: int, sources: int, count: int, seed: int, head_start: float) -> Tensor:
    """Ascending places; the larger `head_start`, the longer the run that stays in place."""
    keep = []
    for row in range(rows):
        draw = torch.Generator().manual_seed(100 * seed + row)
        fixed = int(head_start * count)
        rest = torch.randperm(sources - fixed, generator=draw)[: count - fixed].sort().values
        keep.append(torch.cat([torch.arange(fixed), rest + fixed]))
    return torch.stack(keep)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [32, 64, 96])
@pytest.mark.parametrize("shared", [False, True], ids=["per_head", "one_list"])
@pytest.mark.parametrize(
    "targets",
    [[0, 1, 2, 3], [1, 3, 4, 6], [3, 4, 5, 6], [-1, 1, 2, 3], [-1, -2, 5, 6], [-1, -2, -3, -4]],
    ids=str,
)
@pytest.mark.parametrize("head_start", [0.0, 0.6, 1.0])
def test_compaction(
    ops: PagedOps,
    dtype: torch.dtype,
    block_size: int,
    shared: bool,
    targets: list[int],
    head_start: float,
) -> None:
    """Targets by place among the 7 sources; negative: a block from elsewhere."""
    shape = Shape(7 * block_size, kv_heads=3, head_dim=40, block_size=block_size, dtype=dtype)
    rows = 1 if shared else shape.kv_heads
    keep = random_keep(rows, shape.tokens, 4 * block_size, seed=len(targets), head_start=head_start)
    r = Request(shape)
    unused = [i for i in range(r.cache.shape[0]) if i not in r.ids.tolist()]
    target_ids = torch.tensor([r.ids[t] if t >= 0 else unused[-t] for t in targets])
    outcomes = []
    for implementation in (ops, REFERENCE):
        cache = r.cache.clone()
        plane = random(*cache.shape[:3], seed=9)
        implementation.compact(cache, plane, r.ids, target_ids, keep)
        outcomes.append((cache.float().nan_to_num(-7e4), plane))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])


def test_compaction_needs_no_plane_and_copies_any_bits(ops: PagedOps) -> None:
    shape = Shape(96, kv_heads=1, head_dim=32, dtype=torch.bfloat16)
    r = Request(shape)
    bits = r.cache.view(torch.int16)
    bits.random_(generator=torch.Generator().manual_seed(1))
    keep = random_keep(1, 96, 32, seed=4, head_start=0)
    expected = bits.clone()  # as integers: torch may quieten a NaN that it copies as a float
    REFERENCE.compact(expected, None, r.ids, r.ids[:1], keep)
    ops.compact(r.cache, None, r.ids, r.ids[:1], keep)
    assert torch.equal(bits, expected)


# ---- attention mass


def mass_batch(
    shape: Shape, lens: list[int], counts: list[int], protected: list[int]
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Requests with tables of their own in one cache; NaN where no live token is."""
    blocks = [-(-n // shape.block_size) for n in lens]
    order = torch.randperm(2 * sum(blocks), generator=torch.Generator().manual_seed(1)) + 1
    cache_size = (2 * sum(blocks) + 1, shape.kv_heads, shape.block_size, 2 * shape.head_dim)
    cache = torch.full(cache_size, NAN, dtype=shape.dtype)
    table = torch.full((len(lens), max(blocks) + 2), 10**6, dtype=torch.int32)
    start = 0
    for row, (n, used) in enumerate(zip(lens, blocks, strict=True)):
        ids = order[start : start + used]
        start += used
        table[row, :used] = ids
        keys = random(shape.kv_heads, n, shape.head_dim, seed=10 + row, dtype=shape.dtype)
        CPULayout().write(cache, ids, keys, keys)
    queries = random(sum(counts), shape.kv_heads * shape.group, shape.head_dim, seed=2)
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    batch = (
        table,
        torch.tensor(lens, dtype=torch.int32),
        starts,
        torch.tensor(protected, dtype=torch.int32),
    )
    return batch, cache, queries.to(shape.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_attention_mass(
    ops: PagedOps, dtype: torch.dtype, softcap: float, block_size: int, group: int
) -> None:
    shape = Shape(0, kv_heads=2, group=group, head_dim=32, block_size=block_size, dtype=dtype)
    lens, counts = [97, 200, 33, 64, 150], [1, 130, 33, 1, 7]
    batch, cache, queries = mass_batch(shape, lens, counts, protected=[0, 64, 32, -1, 96])
    planes = []
    for implementation in (ops, REFERENCE):
        plane = random(*cache.shape[:3], seed=3).abs()
        implementation.attention_mass(queries, cache, plane, *batch, 32**-0.5, softcap)
        planes.append(plane)
    queries_norm = float(queries.float().norm(dim=-1).max())
    keys_norm = 32**0.5 * 1.6  # about the largest norm of 32 normal numbers
    rtol = 8 * EPS * queries_norm * keys_norm * 32**-0.5 + 64 * EPS
    torch.testing.assert_close(*planes, rtol=rtol, atol=EPS)


# ---- rings and live tables


@pytest.mark.parametrize("dtype", DTYPES)
def test_store_window_queries(ops: PagedOps, dtype: torch.dtype) -> None:
    projected = random(20, 3 * 4 * 16, seed=1, dtype=dtype)
    queries = projected[:, :64].unflatten(1, (4, 16))  # a view, as of a fused projection
    ring = torch.full((12, 4, 16), NAN, dtype=dtype)
    source, target = torch.tensor([19, 3, 7]), torch.tensor([0, 11, 5])
    places = torch.full((24,), -1, dtype=torch.int32)
    places[source] = target.int()
    ops.store_window_queries(queries, places, ring)
    assert torch.equal(ring[target], queries[source])
    assert ring[[1, 2, 3, 4, 6, 7, 8, 9, 10]].isnan().all()


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_live_tables_equal_their_reference(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([16, 32]))
    rows = data.draw(st.integers(0, 5))
    lens = data.draw(st.lists(st.integers(0, 9 * size), min_size=rows, max_size=rows))
    seed = data.draw(st.integers(0, 999))
    holes = data.draw(st.sampled_from([0.0, 0.1, 0.7]))
    draw = torch.Generator().manual_seed(seed)
    table = torch.randint(1, 99, (rows, 10), generator=draw, dtype=torch.int32)
    table[torch.rand(rows, 10, generator=draw) < holes] = 0
    for row, n in enumerate(lens):
        if n:
            table[row, -(-n // size) - 1] = 98  # a tail is never a hole
    seq_lens = torch.tensor(lens, dtype=torch.int32)
    found = paged.resolve("cpu").squeeze_live_table(table, seq_lens, size)
    expected = squeeze(table, seq_lens, size)
    assert (found.block_table is table) == (expected.block_table is table)
    assert torch.equal(found.block_table, expected.block_table)
    assert torch.equal(found.seq_lens, expected.seq_lens)


# ---- wrong arguments, schemas


def test_wrong_arguments_are_named(ops: PagedOps) -> None:
    r = Request(Shape(100))
    good = (r.queries, r.cache, r.ids, 100, r.scale, 0.0, "max_probability")
    for place, value, message in [
        (0, r.queries[:7], "7 query heads do not share 2 KV heads"),
        (0, r.queries.double(), "of the cache's type"),
        (1, r.cache.transpose(0, 1), "each block of kv_cache must be contiguous"),
        (1, r.cache[:, :, :16].contiguous(), "blocks of a multiple of 32 tokens, not 16"),
        (2, r.ids + 1000, "is not one of the cache's 8 blocks"),
        (2, r.ids.int(), "block_ids"),
        (3, 129, "129 live tokens do not fit 4 blocks"),
        (3, 15, "a window of 16 queries does not fit 15 tokens"),
        (6, "median", "unknown form 'median'"),
    ]:
        arguments = [*good[:place], value, *good[place + 1 :]]
        with pytest.raises(RuntimeError, match=message):
            ops.local_scores(*arguments)


def test_compaction_refuses_what_it_could_not_undo(ops: PagedOps) -> None:
    r = Request(Shape(128))
    before = r.cache.clone().nan_to_num()
    for keep in (
        torch.arange(31)[None],
        torch.arange(32).flip(0)[None],
        torch.arange(100, 132)[None],
    ):
        with pytest.raises(RuntimeError, match="compact: keep must"):
            ops.compact(r.cache, None, r.ids, r.ids[:1], keep)
    with pytest.raises(RuntimeError, match="plane does not fit"):
        plane = torch.zeros(1, 2, 32)
        ops.compact(r.cache, plane, r.ids, r.ids[:1], torch.arange(32)[None])
    assert torch.equal(r.cache.nan_to_num(), before)


def test_schemas_declare_what_is_written_and_fakes_fit() -> None:
    """torch's own checker runs each operator and compares it with its schema and its fake."""
    shape = Shape(100)
    r = Request(shape)
    r.cache.nan_to_num_(0.0)
    gkv = torch.ops.gkv
    batch, cache, queries = mass_batch(replace(shape, head_dim=32), [97, 40], [1, 5], [0, 32])
    cache.nan_to_num_(0.0)
    calls = [
        (gkv.local_scores, (r.queries, r.cache, r.ids, 100, 0.1, 0.0, "max_logit")),
        (gkv.redundancy, (r.cache, r.ids, 32, 100, 0.5, False)),
        (gkv.superseded, (r.cache, r.ids, 32, 100)),
        (gkv.key_norms, (r.cache, r.ids, 100)),
        (gkv.block_max, (random(2, 64, seed=1), 32)),
        (gkv.topk_keep, (random(2, 64, seed=1), 7)),
        (gkv.compact, (r.cache, None, r.ids, r.ids[:1], torch.arange(32)[None])),
        (gkv.attention_mass, (queries, cache, torch.zeros(cache.shape[:3]), *batch, 0.1, 0.0)),
        (
            gkv.store_window_queries,
            (
                r.queries.transpose(0, 1).contiguous(),
                torch.arange(16, dtype=torch.int32),
                r.queries.transpose(0, 1).contiguous(),
            ),
        ),
    ]
    checks = ("test_schema", "test_faketensor")
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=checks)
