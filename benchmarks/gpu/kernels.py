# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Each kernel on a GPU, against a copy of the bytes it cannot avoid and against its torch oracle.

    python benchmarks/gpu/kernels.py             # results/DEVICE/kernels.json and .png
    python benchmarks/gpu/kernels.py --record    # also writes what `impl=auto` runs
    python benchmarks/gpu/kernels.py --quick --device cpu    # the same path, without numbers

Qwen3-8B's shape. Combinations that do not fit the device's memory are skipped, and named."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # this folder's kernels.py would hide the package of that name
    sys.path[0] = str(Path(__file__).parents[1])

import machine
from gpu import common

if TYPE_CHECKING:
    from gpu.operators import Case
    from gpu.pool import Pool

REQUESTS, LIVE_TOKENS = (1, 4, 16, 64, 256), (1024, 2048, 4096, 8192)
CHOICE = machine.ROOT / "gkv_vllm" / "ops" / "choice.json"
RESERVE = 24 * 2**30
"""Bytes left for scores, queries, oracles and copies."""
Combination = tuple[int, int]
"""Requests, and live tokens of each."""


def combinations(quick: bool) -> list[Combination]:
    if quick:
        return [(1, 96), (2, 64), (1, 64)]
    return [(n, live) for live in LIVE_TOKENS for n in REQUESTS]


# --- measuring -----------------------------------------------------------------------------------


class Bench:
    """Measures cases with one clock, on one device."""

    def __init__(self, device: str, model: common.Model, seconds: float) -> None:
        self.model, self.device = model, device
        self.clock = common.Clock(device, seconds)
        largest = common.Copies.LARGEST if device == "cuda" else 2**20
        self.copies = common.Copies(self.clock, device, largest)

    def row(self, case: Case, combination: Combination, with_oracle: bool) -> dict[str, Any]:
        """What the JSON holds of one case."""
        requests, live = combination
        took, copy = self.clock.on_device(case.run), self.copies.microseconds(case.traffic)
        row = {
            "operator": case.operator,
            "impl": case.impl,
            "requests": requests,
            "live_tokens": live,
            "microseconds": round(took, 2),
            "microseconds_per_request": round(took / requests, 2),
            "with_host_per_request": round(self.clock.with_host(case.run) / requests, 2),
            "least_bytes": case.traffic,
            "copy_microseconds": round(copy, 2),
            "share_of_copy": round(copy / took, 4),
            "oracle_microseconds": None,
            "largest_difference": None,
        }
        if with_oracle and case.oracle is not None:
            row |= self._against_oracle(case)
        return row

    def _against_oracle(self, case: Case) -> dict[str, Any]:
        import torch
        from gpu.operators import largest_difference

        assert case.oracle is not None
        try:
            took = round(self.clock.on_device(case.oracle), 2)
            apart = largest_difference(case)
        except torch.OutOfMemoryError:
            return {"oracle_microseconds": "out of memory"}
        return {"oracle_microseconds": took, "largest_difference": apart}

    def all_rows(self, pool: Pool, todo: list[Combination]) -> Iterator[dict[str, Any]]:
        from gpu import operators
        from gpu.pool import Batch

        impls = operators.implementations()
        pool.fill(spread=0.5)
        for combination in todo:
            batch = Batch(pool, *combination)
            for case in operators.all_cases(batch, impls):
                yield self.row(case, combination, with_oracle=combination[0] == 1)
        # Compaction has mixed the keys up, which all kernels are indifferent to but redundancy.
        pool.fill(spread=30.0)
        for combination in todo:
            case = operators.alike(operators.Scoring(Batch(pool, *combination)))
            yield self.row(case, combination, with_oracle=combination[0] == 1)


def measure(device: str, model: common.Model, quick: bool, seconds: float) -> dict[str, Any]:
    from gpu.operators import shape_of
    from gpu.pool import Pool, blocks_that_fit, most_blocks

    bench, todo = Bench(device, model, seconds), combinations(quick)
    fit = blocks_that_fit(model, device, RESERVE, most_blocks(model, todo))
    fits = [c for c in todo if most_blocks(model, [c]) <= fit]
    skipped = [c for c in todo if c not in fits]
    for requests, live in skipped:
        print(f"skipped: {requests} requests of {live} tokens do not fit the memory", flush=True)
    if not fits:
        sys.exit("nothing fits the memory of this device")
    rows = []
    for row in bench.all_rows(Pool(model, most_blocks(model, fits), device), fits):
        rows.append(row)
        print(line(row), flush=True)
    return {
        "machine": common.describe(device),
        "quick": quick,
        "shape": shape_of(model),
        "copy_gigabytes_per_second": round(bench.copies.gigabytes_per_second, 1),
        "skipped_for_memory": skipped,
        "rows": rows,
    }


def line(row: dict[str, Any]) -> str:
    oracle = row["oracle_microseconds"]
    return (
        f"{row['operator']:<22} {row['impl']:<6} {row['requests']:>3} x {row['live_tokens']:<5} "
        f"{row['microseconds']:>11,.1f} us  {row['microseconds_per_request']:>9,.1f} us/request  "
        f"{100 * row['share_of_copy']:>5.1f} % of copy"
        + (f"  oracle {oracle} us, differs by {row['largest_difference']}" if oracle else "")
    )


# --- what impl=auto runs -------------------------------------------------------------------------


def faster(rows: list[dict[str, Any]], operator: str) -> str:
    """The implementation with the smaller geometric mean of times over the combinations of both.

    Triton where CUDA C++ was not measured."""
    times: dict[str, dict[Combination, float]] = {}
    for row in rows:
        if row["operator"] == operator:
            combination = (row["requests"], row["live_tokens"])
            times.setdefault(row["impl"], {})[combination] = row["microseconds"]
    both = times.get("triton", {}).keys() & times.get("cuda", {}).keys()
    if not both:
        return "triton"
    means = {
        impl: statistics.geometric_mean(of[combination] for combination in both)
        for impl, of in times.items()
    }
    return min(means, key=lambda impl: (means[impl], impl != "triton"))


def choice(numbers: dict[str, Any], operators: list[str], file: str) -> dict[str, Any]:
    """The content of `choice.json`. ValueError where the numbers are no measurement of a GPU."""
    about = numbers["machine"]
    if numbers["quick"] or about["device"] == "cpu":
        raise ValueError("a smoke run is no evidence; measure on a GPU, without --quick")
    if not any(row["impl"] == "cuda" for row in numbers["rows"]):
        raise ValueError("CUDA operators were not measured; build them, with GKV_BUILD_CUDA=1")
    return {
        "ops": {operator: faster(numbers["rows"], operator) for operator in operators},
        "evidence": {"machine": about["device"], "commit": about["commit"], "file": file},
    }


def record(numbers: dict[str, Any], file: str) -> None:
    operators = list(json.loads(CHOICE.read_text())["ops"])
    chosen = choice(numbers, operators, file)
    CHOICE.write_text(json.dumps(chosen, indent=2) + "\n")
    print(f"Wrote {CHOICE.name}: {chosen['ops']}")


# --- the plot ------------------------------------------------------------------------------------


def draw(numbers: dict[str, Any], path: Path) -> None:
    """Share of the copy bandwidth, and time per request, by requests that are due; at 2k tokens."""
    from gpu import plots

    rows = numbers["rows"]
    lengths = sorted({row["live_tokens"] for row in rows})
    live = 2048 if 2048 in lengths else lengths[0]
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["live_tokens"] == live:
            name = row["operator"] + (", CUDA" if row["impl"] == "cuda" else "")
            lines.setdefault(name, []).append(row)
    with plots.figure(path, f"{live:,} live tokens per request; {plots.title(numbers)}", 2) as axes:
        for place, (key, label) in zip(
            axes,
            (
                ("share_of_copy", "share of the copy bandwidth"),
                ("microseconds_per_request", "microseconds per request"),
            ),
            strict=True,
        ):
            for colour, (name, points) in zip(
                plots.colours(len(lines)), lines.items(), strict=False
            ):
                points = sorted(points, key=lambda row: row["requests"])
                xs, ys = [p["requests"] for p in points], [p[key] for p in points]
                style = "--" if name.endswith("CUDA") else "-"
                place.plot(xs, ys, style, color=colour, marker="o", markersize=3, label=name)
            place.set_xscale("log", base=2)
            place.set_xlabel("requests due together")
            place.set_ylabel(label)
        axes[0].set_ylim(bottom=0)
        axes[1].set_yscale("log")
        plots.legend(axes[0], 4)


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.2, help="about, per measurement")
    parser.add_argument(
        "--record", action="store_true", help="write the faster of Triton and CUDA to choice.json"
    )
    args = parser.parse_args()
    if args.draw:
        common.redraw(args.draw, draw)
        return
    if args.record and args.quick:
        parser.error("--record needs a measurement; leave --quick out")
    model = common.use(args)
    out = common.out_folder(args) / "kernels.json"
    numbers = measure(args.device, model, args.quick, args.seconds)
    common.write(out, numbers, draw)
    if args.record:
        shown = out.relative_to(machine.ROOT) if out.is_relative_to(machine.ROOT) else out.name
        record(numbers, str(shown))


if __name__ == "__main__":
    main()
