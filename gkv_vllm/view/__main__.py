# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""`python -m gkv_vllm.view`: the command line of the pictures, and its sentences; draws nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gkv_vllm.record import RecordError, read_record
from gkv_vllm.view import forgot, keepmap
from gkv_vllm.view.fates import Fates, fates_of


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        args.draw(args)
    except (RecordError, OSError) as error:
        print(f"python -m gkv_vllm.view: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gkv_vllm.view",
        description="Pictures of what requests lost, from the records of --kv-record-positions.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("keepmap", help="layers and heads against positions")
    command.add_argument("record", type=Path, nargs="+", help="files of --kv-record-positions")
    command.add_argument("-o", "--out", type=Path, required=True, help="FILE.html or FILE.png")
    command.add_argument("--event", type=int, help="which event a PNG shows (default: the last)")
    command.set_defaults(draw=_keepmap)

    command = commands.add_parser("forgot", help="the text, with what was evicted faded")
    command.add_argument("record", type=Path, help="a file of --kv-record-positions")
    command.add_argument("-o", "--out", type=Path, required=True, help="FILE.html")
    command.add_argument(
        "--model", help="folder of the model, for its tokenizer (default: the one served)"
    )
    command.set_defaults(draw=_forgot)
    return parser


def _fates(path: Path) -> Fates:
    return fates_of(read_record(path))


def _keepmap(args: argparse.Namespace) -> None:
    kind = args.out.suffix.lower()
    if kind not in (".html", ".png"):
        raise RecordError(f"{args.out} must end in .html or .png")
    if args.event is not None and kind != ".png":
        raise RecordError("--event is for a PNG; a page has a slider over all events")
    all_fates = [_fates(path) for path in args.record]
    if kind == ".html":
        args.out.write_text(keepmap.html(all_fates), encoding="utf-8")
        return
    try:
        keepmap.png(all_fates, args.out, args.event)
    except ModuleNotFoundError as error:
        raise RecordError(f"a PNG needs {error.name}: pip install 'gkv-vllm[demo]'") from None


def _forgot(args: argparse.Namespace) -> None:
    fates = _fates(args.record)
    texts = forgot.texts_of(fates, args.model or fates.record.header.model)
    args.out.write_text(forgot.html(fates, texts), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
