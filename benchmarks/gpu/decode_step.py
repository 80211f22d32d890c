# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""A decode step of Qwen3-8B's shape: stock, with a policy that has nothing to do, and evicting.

    python benchmarks/gpu/decode_step.py      # results/DEVICE/decode_step.json and .png
    python benchmarks/gpu/decode_step.py --quick --device cpu

The matrices of the model, vLLM's paged attention over a cache of the same live length in all three,
and our operators, under a CUDA graph. An event per request every `interval` steps."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # this folder's kernels.py would hide the package of that name
    sys.path[0] = str(Path(__file__).parents[1])

from gpu import common

if TYPE_CHECKING:
    from gpu.attention import Flash, Unified
    from gpu.decoder import Decoder, Weights
    from gpu.pool import Pool

    from gkv_vllm.ops.paged import PagedOps

CASES = ((1, 2048), (16, 2048), (64, 2048), (128, 2048), (64, 4096), (16, 8192))
"""Requests, and the budget of each."""
RESERVE = 12 * 2**30
SPREAD = 0.5


class Bench:
    """Measures all modes with one set of weights and one pool."""

    def __init__(
        self,
        args: Any,
        weights: Weights,
        pool: Pool,
        backend: type[Flash] | type[Unified],
        ops: PagedOps,
    ) -> None:
        self.args, self.weights, self.pool, self.backend = args, weights, pool, backend
        self.ops = ops
        self.attention = ""

    def case(self, requests: int, budget: int) -> dict[str, Any]:
        """Every mode of one case, and what comes of comparing them."""
        from gpu.decoder import EVICTING, IDLE, MODES, STOCK

        warm, steps = self._steps()
        modes, tokens = {}, {}
        for mode in MODES:
            self.pool.fill(SPREAD)
            decoder = self._decoder(mode, requests, budget, warm + steps)
            modes[mode] = self._run(decoder, warm, steps)
            tokens[mode] = decoder.tokens.tolist()
        stock = modes[STOCK]["step_microseconds"]
        return {
            "requests": requests,
            "budget": budget,
            "modes": modes,
            "idle_overhead": round(modes[IDLE]["step_microseconds"] / stock - 1, 4),
            "evicting_overhead": round(modes[EVICTING]["step_microseconds"] / stock - 1, 4),
            "share_of_eviction": round(1 - stock / modes[EVICTING]["step_microseconds"], 4),
            "idle_tokens_are_stocks": tokens[IDLE] == tokens[STOCK],
        }

    def _steps(self) -> tuple[int, int]:
        """To warm up, and to measure: whole intervals, so that every request has its events."""
        interval = self.pool.model.interval
        return (2, interval + 1) if self.args.quick else (interval, self.args.intervals * interval)

    def _decoder(self, mode: str, requests: int, budget: int, steps: int) -> Decoder:
        from gpu.decoder import Decoder
        from gpu.requests import Requests

        batch = Requests(self.pool, requests, budget, steps)
        device = self.pool.device.type
        attention = self.backend(self.pool.model, requests, batch.longest, device)
        self.attention = attention.name
        return Decoder(self.weights, batch, attention, self.ops, mode)

    def _run(self, decoder: Decoder, warm: int, steps: int) -> dict[str, Any]:
        clock = common.Clock(self.pool.device.type)
        for _ in range(warm):
            decoder.step()
        clock.wait()
        decoder.event_seconds.clear()
        decoder.events = 0
        submitted, start = [], time.perf_counter()
        for _ in range(steps):
            decoder.step()
            submitted.append(time.perf_counter())
        clock.wait()
        seconds = time.perf_counter() - start
        decoder.check()
        result: dict[str, Any] = {"step_microseconds": round(1e6 * seconds / steps, 1)}
        host = [b - a for a, b in zip([start, *submitted], submitted, strict=False)]
        result["host_microseconds_median"] = round(1e6 * statistics.median(host), 1)
        if decoder.evicts:
            result["events"] = decoder.events
            if decoder.event_seconds:
                in_events = sum(read() for read in decoder.event_seconds)
                result["microseconds_per_event"] = round(1e6 * in_events / decoder.events, 1)
                result["share_in_events"] = round(in_events / seconds, 4)
        return result


def measure(args: Any, model: common.Model) -> dict[str, Any]:
    from gpu import attention
    from gpu.decoder import Weights
    from gpu.operators import implementations, shape_of
    from gpu.pool import Pool, blocks_that_fit
    from gpu.requests import Requests

    from gkv_vllm.ops.paged import resolve

    try:
        backend = attention.choose(args.attention, args.device)
    except ImportError as error:
        sys.exit(str(error))
    on_gpu = args.device == "cuda"
    ops = resolve(args.impl, "cuda") if on_gpu else implementations()["triton"]
    todo = ((2, 64),) if args.quick else CASES
    weights = Weights(model, args.device)
    needed = {case: 1 + case[0] * Requests.blocks_each(model, case[1]) for case in todo}
    fit = blocks_that_fit(model, args.device, RESERVE, max(needed.values()))
    skipped = [case for case in todo if needed[case] > fit]
    for requests, budget in skipped:
        print(f"skipped: {requests} requests of {budget} tokens do not fit the memory", flush=True)
    fits = [case for case in todo if case not in skipped]
    if not fits:
        sys.exit("nothing fits the memory of this device")
    pool = Pool(model, max(needed[case] for case in fits), args.device)
    bench = Bench(args, weights, pool, backend, ops)
    cases = []
    for requests, budget in fits:
        cases.append(bench.case(requests, budget))
        print(line(cases[-1]), flush=True)
    return {
        "machine": common.describe(args.device),
        "quick": args.quick,
        "shape": shape_of(model),
        "attention": bench.attention,
        "operators": ops.name,
        "cuda_graph": on_gpu,
        "skipped_for_memory": skipped,
        "cases": cases,
    }


def line(case: dict[str, Any]) -> str:
    steps = ", ".join(
        f"{mode} {of['step_microseconds']:,.0f}" for mode, of in case["modes"].items()
    )
    per_event = case["modes"]["evicting"].get("microseconds_per_event")
    return (
        f"{case['requests']:>3} x {case['budget']:<5} us per step: {steps}; idle "
        f"{100 * case['idle_overhead']:+.2f} %, eviction {100 * case['share_of_eviction']:.2f} % "
        "of the step" + (f", {per_event:,.0f} us per event" if per_event else "")
    )


def draw(numbers: dict[str, Any], path: Path) -> None:
    """Step times side by side, and what the policy adds."""
    from gpu import plots

    cases = numbers["cases"]
    names = [f"{case['requests']} x {case['budget']:,}" for case in cases]
    heading = f"A decode step, {numbers['attention']}; {plots.title(numbers)}"
    with plots.figure(path, heading, 2) as axes:
        for k, mode in enumerate(("stock", "idle", "evicting")):
            heights = [case["modes"][mode]["step_microseconds"] / 1000 for case in cases]
            places = [i + 0.28 * (k - 1) for i in range(len(cases))]
            colour = (plots.STOCK, *plots.colours(2))[k]
            axes[0].bar(places, heights, 0.26, color=colour, label=mode)
        for k, key in enumerate(("idle_overhead", "evicting_overhead")):
            heights = [100 * case[key] for case in cases]
            places = [i + 0.3 * (k - 0.5) for i in range(len(cases))]
            bars = axes[1].bar(places, heights, 0.28, color=plots.colours(2)[k])
            axes[1].bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
        for one in axes:
            one.set_xticks(range(len(cases)), names)
            one.set_xlabel("requests x budget in tokens")
        axes[0].set_ylabel("ms per step")
        axes[1].set_ylabel("% more than stock")
        plots.legend(axes[0], 3)


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument(
        "--attention", choices=("auto", "FLASH_ATTN", "TRITON_ATTN"), default="auto"
    )
    parser.add_argument("--impl", choices=("auto", "triton", "cuda"), default="auto")
    parser.add_argument("--intervals", type=int, default=2, help="measured, of 128 steps each")
    args = parser.parse_args()
    if args.draw:
        common.redraw(args.draw, draw)
        return
    model = common.use(args)
    out = common.out_folder(args) / "decode_step.json"
    common.write(out, measure(args, model), draw)


if __name__ == "__main__":
    main()
