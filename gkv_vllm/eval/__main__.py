# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""`python -m gkv_vllm.eval`: run a plan, or make its tables and plots again."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from gkv_vllm.config import ConfigError
from gkv_vllm.eval import report
from gkv_vllm.eval.plan import Plan
from gkv_vllm.eval.run import Runner, open_store, progress, regrade
from gkv_vllm.eval.store import Store
from gkv_vllm.serving import ServerFailed


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m gkv_vllm.eval", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what a plan still lacks, then report")
    run.add_argument("plan", type=Path, help="a YAML file, such as configs/eval/policies.yaml")
    run.add_argument("--out", type=Path, required=True, help="folder of the results; goes on there")
    run.add_argument(
        "--minutes", type=_minutes, default=float("inf"), help="begin no cell after that"
    )
    run.add_argument("--url", help="a running server; without it, servers are started")
    run.add_argument("--only", help="the label of one server of the plan")
    listing = commands.add_parser("list", help="the cells of a plan, and which are done")
    listing.add_argument("plan", type=Path)
    listing.add_argument("--out", type=Path)
    again = commands.add_parser("report", help="tables and plots of a folder, measured before")
    anew = commands.add_parser(
        "regrade", help="grade stored texts by the present rules, and report"
    )
    for command in (again, anew):
        command.add_argument("out", type=Path)
    for command in (run, again, anew):
        command.add_argument("--baseline", default="gkv", help="the server to compare with")
    return parser.parse_args(argv)


def _minutes(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
    return value


def run(args: argparse.Namespace) -> int:
    from openai import OpenAIError

    plan, store = Plan.read(args.plan), open_store(args.out, args.plan)
    with progress() as tell:
        runner = Runner(plan, store, args.minutes, tell, args.url, args.only)
        try:
            missing = runner.run()
        except KeyboardInterrupt:
            print("Interrupted; run it again to go on.", file=sys.stderr)
            return 130
        except (ServerFailed, OpenAIError, OSError) as error:
            print(f"Failed: {error}", file=sys.stderr)
            return 1
    for path in report.write(store, args.baseline):
        print(path)
    if missing:
        print(f"{missing} cells are still to be measured; run it again to go on.")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.command == "run":
            # A terminated run stops its server the way Ctrl-C does.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            return run(args)
        if args.command == "list":
            store = Store(args.out) if args.out else None
            for server in Plan.read(args.plan).server_plans():
                for cell in server.cells:
                    mark = "done" if store and store.has(cell.name) else "due"
                    print(f"{mark}  {cell.name}")
            return 0
        if args.command == "regrade":
            print(f"{regrade(Store(args.out))} cells graded again")
        for path in report.write(Store(args.out), args.baseline):
            print(path)
        return 0
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
