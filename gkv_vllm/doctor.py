# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Says whether this installation and a command line would work; it reports and changes nothing.

Each section yields findings; the exit status is 1 when one of them is wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    ok: bool
    text: str


def run(command: Sequence[str] = ()) -> int:
    """Print the whole report; `command` is a `vllm serve ...` command line. Returns the status."""
    # Only our own lines are of interest here; an explicit level stays.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    sections: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("versions", versions),
        ("touches on vLLM", touches),
        ("policies", policies),
        ("operators", operators),
        ("command line", lambda: command_line(command)),
        ("self-test", self_test),
    ]
    wrong = 0
    for title, section in sections:
        print(title)
        for finding in section():
            wrong += not finding.ok
            print(f"  {'ok     ' if finding.ok else 'PROBLEM'}  {finding.text}", flush=True)
    print("all is well" if not wrong else f"{wrong} problem(s)")
    return 1 if wrong else 0


def versions() -> Iterator[Finding]:
    """What is installed, and whether this vLLM is supported."""
    from gkv_vllm import __version__, refusals
    from gkv_vllm.compat import SUPPORTED_VLLM

    yield Finding(True, f"gkv_vllm {__version__}")
    try:
        vllm = refusals.vllm_version()
    except ImportError as error:
        yield Finding(False, f"vLLM cannot be imported ({error}); install gkv-vllm[vllm]")
        return
    supported = refusals.version_supported(vllm)
    yield Finding(supported, f"vllm {vllm} (supported: {SUPPORTED_VLLM})")
    for package in ("torch", "transformers"):
        try:
            yield Finding(True, f"{package} {version(package)}")
        except PackageNotFoundError:
            yield Finding(False, f"{package} is not installed")


def touches() -> Iterator[Finding]:
    """Whether every part of vLLM we depend on is still there, with the parameters we rely on."""
    from gkv_vllm.compat import TOUCHES, check_touch

    for touch in TOUCHES:
        problem = check_touch(touch)
        how = "patched" if touch.patched else "relied on"
        yield Finding(problem is None, problem or f"{touch.target} ({how}: {touch.why})")


def policies() -> Iterator[Finding]:
    """Every registered policy, and whether it loads with its default parameters."""
    from gkv_vllm.policies import registry

    for name in registry.names():
        try:
            yield Finding(True, f"{name}: {registry.create(name, {})!r}")
        except Exception as error:  # a third party's module may raise anything
            yield Finding(False, f"{name}: {error}")


def operators() -> Iterator[Finding]:
    """What would compute scores and move tokens on the device that vLLM would use here."""
    from vllm.platforms import current_platform

    from gkv_vllm.ops import paged
    from gkv_vllm.refusals import BACKENDS

    device = current_platform.device_type or "cpu"  # vLLM found none: the model runs nowhere
    if device not in BACKENDS:
        usable = " or ".join(BACKENDS)
        yield Finding(False, f"vLLM runs on {device} here; a KV policy needs {usable}")
        return
    try:
        yield Finding(True, paged.describe(device))
    except ImportError as error:
        yield Finding(False, f"operators on {device}: none, since Triton is not there ({error})")


# --- a command line ------------------------------------------------------------------------------


def command_line(command: Sequence[str]) -> Iterator[Finding]:
    """What `vllm serve` with these arguments would refuse; starts no engine."""
    arguments = [*command]
    for word in ("vllm", "serve"):
        if arguments[:1] == [word]:
            arguments.pop(0)
    if not arguments:
        yield Finding(True, "none given; append: -- vllm serve MODEL --kv-policy gkv ...")
        return
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard):
            problems, description = _problems(arguments)
    except SystemExit as exit_:
        # argparse prints its sentence and exits with a number; ours is the exit's own message.
        said = exit_.code if isinstance(exit_.code, str) else heard.getvalue()
        for line in said.strip().splitlines() or ["the command line was not understood"]:
            if not line.startswith("usage:"):
                yield Finding(False, line.removeprefix("gkv_vllm: error: "))
        return
    except Exception as error:  # vLLM raises many kinds for a config it cannot build
        yield Finding(False, f"vLLM itself refuses: {error}")
        return
    for problem in problems:
        yield Finding(False, problem)
    if not problems:
        yield Finding(True, description)


def _problems(arguments: list[str]) -> tuple[list[str], str]:
    from gkv_vllm import plugin

    engine_args = _engine_args(arguments)
    config = plugin.read_config(engine_args.additional_config)
    if not config.active:
        return [], "no policy asked for (--kv-policy): the plugin does nothing"
    vllm_config = _stock_config(engine_args)
    problems = plugin.problems_of(vllm_config, config)
    return problems, f"would serve with {config}"


def _engine_args(arguments: list[str]) -> Any:
    """Parse as `vllm serve` does, plugin flags included."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from gkv_vllm import plugin

    plugin.register()
    parser = FlexibleArgumentParser(prog="vllm")
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(["serve", *arguments])
    if getattr(args, "model_tag", None) is not None:
        args.model = args.model_tag
    return AsyncEngineArgs.from_cli_args(args)


def _stock_config(engine_args: Any) -> Any:
    """The VllmConfig that vLLM builds before our wrapper activates anything."""
    create = type(engine_args).create_engine_config
    return getattr(create, "__wrapped__", create)(engine_args)


# --- self-test -----------------------------------------------------------------------------------


def self_test() -> Iterator[Finding]:
    """Run the planner and the reference scores on a toy table, in well under a second."""
    for test in (_test_planner, _test_scores, _test_operators, _test_live_table):
        try:
            yield Finding(True, test())
        except Exception as error:  # whatever it is, the report goes on
            yield Finding(False, f"{test.__name__.lstrip('_')}: {type(error).__name__}: {error}")


def _expect(condition: bool, sentence: str) -> None:
    # Not an assert: the report must mean the same under `python -O`.
    if not condition:
        raise RuntimeError(sentence)


def _toy() -> tuple[Any, Any]:
    """A planner over blocks of 4 tokens, budget 16, interval 8, window 4; and its config."""
    from gkv_vllm.config import KVPolicyConfig
    from gkv_vllm.engine.planner import EvictionPlanner
    from gkv_vllm.policies.base import Needs

    config = KVPolicyConfig(policy="toy", granularity="block", budget=16, interval=8, window=4)
    return EvictionPlanner(config, Needs(), block_size=4, num_slots=1), config


def _test_planner() -> str:
    """A request of 6 prompt tokens decodes to 200 and never holds more than its bound."""
    from gkv_vllm.config import blocks_for
    from gkv_vllm.engine.footprint import peak_blocks
    from gkv_vllm.engine.plan import WorkerReport

    planner, config = _toy()
    policy = config.for_request(None)
    planner.add("toy", prompt_tokens=6, policy=policy)
    bound = peak_blocks(
        policy, prompt_tokens=6, max_tokens=194, block_size=4, interval=8, in_flight_tokens=1
    )
    gone: set[int] = set()
    for num_tokens in range(6, 201):
        gone.update(*planner.evictions().get("toy", ()))
        for seen in planner.plan([("toy", num_tokens)]).observe.values():
            ranks = [float(block) for block in seen.selection.candidates[0]]
            planner.accept(WorkerReport({"toy": (seen.epoch, [ranks])}, events=1, seconds=0.0))
        held = blocks_for(num_tokens, 4) - len(gone)
        _expect(held <= bound, f"{held} blocks held at {num_tokens} tokens, bound {bound}")
    _expect(bool(gone) and min(gone) == 2, f"protected blocks 0 and 1 must stay, gone: {gone}")
    kept = sorted(set(range(50)) - gone)
    _expect(kept == [0, 1, *range(kept[2], 50)], f"the newest must stay, kept {kept}")
    return f"planner: 200 tokens, {len(gone)} of 50 blocks evicted, at most {bound} held"


def _test_scores() -> str:
    """The token that the window attends to survives G-KV."""
    import torch

    from gkv_vllm.ops import paged
    from gkv_vllm.ops.layers import LayerCaches
    from gkv_vllm.policies import registry
    from gkv_vllm.policies.view import View

    queries, keys = torch.zeros(1, 2, 4, 8), torch.zeros(1, 84, 8)
    queries[..., 0] = keys[0, 45, 0] = 4.0  # one token is what every query asks for
    cache, blocks = torch.zeros(3, 1, 32, 16), torch.arange(3)
    ops = paged.resolve("auto")
    ops.layout.write(cache, blocks, keys, torch.zeros_like(keys))
    view = View(
        ops=ops.bind(LayerCaches((cache,), ops.layout)),
        block_ids=blocks[None],
        queries=queries,
        history=torch.zeros(1, 1, 48),
        scale=1.0,
        softcap=0.0,
        window=4,
        live_tokens=84,
        protected=32,
        num_candidates=48,
        keep=32,
        remembered=0,
        block_size=32,
        unit=1,
        event=0,
        key=0,
    )
    policy = registry.create("gkv", {})
    scores = policy.score(dataclasses.replace(view, history=policy.update(view)))
    best = int(scores.argmax()) + view.protected
    _expect(best == 45, f"token 45 must score highest, got {scores.tolist()}")
    return "gkv: the attended token scores highest"


def _test_operators() -> str:
    """What runs here gives what the readable form gives."""
    import torch

    from gkv_vllm.ops import paged

    draw = torch.Generator().manual_seed(0)
    cache, blocks = torch.randn(4, 2, 32, 64, generator=draw), torch.tensor([3, 0, 2])
    queries = torch.randn(4, 8, 32, generator=draw)
    keep, found = torch.arange(0, 64, 2)[None], []
    fast = paged.resolve("auto")
    for ops in (fast, paged.ReferenceOps()):
        moved = cache.clone()
        ops.compact(moved, None, blocks, blocks[:1], keep)
        scores = ops.local_scores(queries, cache, blocks, 90, 0.2, 0.0, "max_probability")
        similar = ops.redundancy(cache, blocks, 32, 90, 0.5)
        found.append((scores, similar, ops.superseded(cache, blocks, 32, 90), moved))
    for ours, expected in zip(*found, strict=True):
        off = float((ours - expected).abs().max())
        _expect(off < 1e-5, f"{fast.name} is off by {off}")
    return f"operators: {fast.name} equals the torch reference"


def _test_live_table() -> str:
    """Holes leave the table that attention reads, and one block of the length for each."""
    import torch

    from gkv_vllm.ops.live_table import squeeze

    table = torch.tensor([[5, 0, 7, 0, 9], [1, 2, 0, 0, 0]], dtype=torch.int32)
    live = squeeze(table, torch.tensor([18, 8], dtype=torch.int32), block_size=4)
    rows, lengths = live.block_table[:, :3].tolist(), live.seq_lens.tolist()
    _expect(rows == [[5, 7, 9], [1, 2, 0]], f"live rows are {rows}")
    _expect(lengths == [10, 8], f"live lengths are {lengths}")
    return "live table: holes are squeezed out, lengths follow"
