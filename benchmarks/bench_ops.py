# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""`make bench-ops`: each C++ operator against its torch form and against one pass over the keys.

Times are medians of single calls. The three take turns, and every call reads another layer's
cache, so that nothing is found in a cache of the processor that a server would not find there."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import machine
import torch
from torch import Tensor

from gkv_vllm.ops.layout import CPULayout
from gkv_vllm.ops.paged import PagedOps, ReferenceOps, resolve

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """One layer of one request that falls due."""

    dtype: str = "bfloat16"
    live_tokens: int = 2048
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    window: int = 16
    block_size: int = 32
    layers: int = 12

    def name(self) -> str:
        return f"{self.dtype}, {self.group} query heads per KV head"


class Layers:
    """Caches of several layers, with the request's blocks scattered over each."""

    def __init__(self, shape: Shape, spread: float) -> None:
        """spread: keys lie around a few directions, the closer the smaller it is."""
        self.shape = shape
        draw = torch.Generator().manual_seed(0)
        dtype, blocks = DTYPES[shape.dtype], shape.live_tokens // shape.block_size
        size = (shape.kv_heads, shape.live_tokens, shape.head_dim)
        self.ids = torch.randperm(blocks + 8, generator=draw)[:blocks]
        self.caches, self.planes, self.plain, self.queries = [], [], [], []
        for _ in range(shape.layers):
            centres = torch.randn(shape.kv_heads, 8, shape.head_dim, generator=draw)
            chosen = torch.randint(8, (shape.live_tokens,), generator=draw)
            keys = (centres[:, chosen] + spread * torch.randn(size, generator=draw)).to(dtype)
            cache = torch.zeros(
                blocks + 8, shape.kv_heads, shape.block_size, 2 * shape.head_dim, dtype=dtype
            )
            CPULayout().write(cache, self.ids, keys, keys)
            self.caches.append(cache)
            self.planes.append(torch.zeros(cache.shape[:3]))
            self.plain.append(keys.contiguous().view(torch.float32))
            window = (shape.kv_heads * shape.group, shape.window, shape.head_dim)
            self.queries.append(torch.randn(window, generator=draw).to(dtype))
        self.scores = torch.rand(shape.kv_heads, shape.live_tokens, generator=draw)
        rows = [torch.randperm(shape.live_tokens, generator=draw) for _ in range(shape.kv_heads)]
        kept = shape.live_tokens - 4 * shape.block_size
        self.keep = torch.stack([row[:kept].sort().values for row in rows])
        self.one_token = torch.randn(1, shape.kv_heads * shape.group, shape.head_dim).to(dtype)
        table = torch.tensor([self.ids.tolist()] * 32, dtype=torch.int32) + 1
        self.holes = table.clone()
        self.holes[:, 3::7] = 0
        self.lens = torch.full((32,), shape.live_tokens, dtype=torch.int32)

    def plain_pass(self, layer: int) -> Tensor:
        """Reads the layer's keys once, and does next to nothing with them."""
        return self.plain[layer].sum()


Call = Callable[[PagedOps, int], Any]


def operators(data: Layers, lookalikes: Layers) -> dict[str, Call]:
    """By name: a call of one operator on one layer."""
    shape, ids, n = data.shape, data.ids, data.shape.live_tokens
    scale, targets = shape.head_dim**-0.5, data.ids[: data.keep.shape[1] // shape.block_size]
    ints = {"dtype": torch.int32}
    table = ids[None].int()
    batch = (
        torch.tensor([n], **ints),
        torch.tensor([0, 1], **ints),
        torch.tensor([0], **ints),
    )
    places = torch.arange(16, dtype=torch.int32)
    rings = [queries.transpose(0, 1).contiguous() for queries in data.queries]

    def local(form: str) -> Call:
        return lambda ops, i: ops.local_scores(
            data.queries[i], data.caches[i], ids, n, scale, 0.0, form
        )

    return {
        "local_scores": local("max_probability"),
        "local_scores (max_logit)": local("max_logit"),
        "redundancy, keys alike": lambda ops, i: ops.redundancy(
            lookalikes.caches[i], ids, 0, n, 0.5
        ),
        "redundancy, none alike": lambda ops, i: ops.redundancy(data.caches[i], ids, 0, n, 0.5),
        "redundancy_in_block": lambda ops, i: ops.redundancy_in_block(
            data.caches[i], ids, 0, n, 0.5
        ),
        "superseded": lambda ops, i: ops.superseded(data.caches[i], ids, 0, n),
        "key_norms": lambda ops, i: ops.key_norms(data.caches[i], ids, n),
        "attention_mass, one query": lambda ops, i: ops.attention_mass(
            data.one_token, data.caches[i], data.planes[i], table, *batch, scale, 0.0
        ),
        "compact (K, V, scores)": lambda ops, i: ops.compact(
            data.caches[i], data.planes[i], ids, targets, data.keep
        ),
        "compact, one list": lambda ops, i: ops.compact(
            data.caches[i], data.planes[i], ids, targets, data.keep[:1]
        ),
        "topk_keep": lambda ops, i: ops.topk_keep(data.scores, data.keep.shape[1]),
        "block_max": lambda ops, i: ops.block_max(data.scores, shape.block_size),
        "store_window_queries": lambda ops, i: ops.store_window_queries(
            rings[i], places, rings[i - 1]
        ),
        "squeeze_live_table, 32 rows": lambda ops, i: ops.squeeze_live_table(
            data.holes, data.lens, shape.block_size
        ),
    }


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(data: Layers, call: Call, rounds: int, ours: PagedOps) -> dict[str, float]:
    """Median microseconds of the C++ form, of the torch form and of the plain pass."""
    oracle, times = ReferenceOps(), {"cpp": [], "torch": [], "plain_pass": []}  # type: ignore[var-annotated]
    call(ours, 0)
    for round_ in range(rounds):
        layer = round_ % data.shape.layers
        # The neighbours' caches in between: none finds what another has just read.
        after, last = (layer + 4) % data.shape.layers, (layer + 8) % data.shape.layers
        times["cpp"].append(seconds(lambda: call(ours, layer)))  # noqa: B023
        times["torch"].append(seconds(lambda: call(oracle, after)))  # noqa: B023
        times["plain_pass"].append(seconds(lambda: data.plain_pass(last)))  # noqa: B023
    return {name: round(1e6 * statistics.median(of), 1) for name, of in times.items()}


def measure_all(shapes: list[Shape], rounds: int, only: str) -> Iterator[dict[str, Any]]:
    ours = resolve("cpu")
    for shape in shapes:
        data, lookalikes = Layers(shape, spread=30.0), Layers(shape, spread=0.5)
        for name, call in operators(data, lookalikes).items():
            if only not in name:
                continue
            times = measure(data, call, rounds, ours)
            yield {
                "shape": shape.name(),
                "operator": name,
                "microseconds": times,
                "speedup_over_torch": round(times["torch"] / times["cpp"], 1),
                "plain_passes": round(times["cpp"] / times["plain_pass"], 2),
            }


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    for shape in dict.fromkeys(row["shape"] for row in rows):
        table = Table(title=shape)
        for heading in ("operator", "C++ us", "torch us", "x torch", "in plain passes"):
            table.add_column(heading, justify="left" if heading == "operator" else "right")
        for row in rows:
            if row["shape"] == shape:
                times = row["microseconds"]
                table.add_row(
                    row["operator"],
                    f"{times['cpp']:,.0f}",
                    f"{times['torch']:,.0f}",
                    f"{row['speedup_over_torch']:.1f}",
                    f"{row['plain_passes']:.2f}",
                )
        Console(width=110).print(table)


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = list(dict.fromkeys(row["operator"] for row in rows))[::-1]
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(names) + 1.5), layout="constrained")
    height = 0.8 / len(shapes)
    for k, shape in enumerate(shapes):
        speedups = {r["operator"]: r["speedup_over_torch"] for r in rows if r["shape"] == shape}
        places = [i + 0.4 - height * (k + 0.5) for i in range(len(names))]
        bars = axes.barh(places, [speedups[name] for name in names], height, label=shape)
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times as fast as the torch form (one layer, one request)")
    axes.legend()
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=36)
    parser.add_argument("--threads", type=int, default=1, help="vLLM binds one on two cores")
    parser.add_argument("--live-tokens", type=int, default=2048)
    parser.add_argument("--only", default="", help="operators with this in their name")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "benchmarks/results/cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = Shape(live_tokens=args.live_tokens)
    shapes = [base, replace(base, group=1), replace(base, dtype="float32")]
    rows = []
    for row in measure_all(shapes, args.rounds, args.only):
        rows.append(row)
        print(f"{row['shape']:<40} {row['operator']:<30} {row['microseconds']}", flush=True)
    show(rows)
    if args.only:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {**asdict(base), "threads": args.threads, "rounds": args.rounds}
    document = {
        "machine": machine.describe(),
        "operators": resolve("cpu").name,
        "settings": settings,
        "rows": rows,
    }
    (args.out / "ops.json").write_text(json.dumps(document, indent=1) + "\n")
    draw(rows, args.out / "ops.png")
    print(f"Wrote ops.json and ops.png to {args.out}")


if __name__ == "__main__":
    main()
