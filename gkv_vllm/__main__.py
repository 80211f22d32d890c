# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""`python -m gkv_vllm`: the doctor, and the README's generated blocks; no logic of the engine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

README = Path("README.md")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    # argparse would read the flags of the command line that the doctor shall look at.
    command: list[str] = []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, command = arguments[:at], arguments[at + 1 :]
    args = _parser().parse_args(arguments)
    if args.command == "doctor":
        from gkv_vllm import doctor

        return doctor.run(command)
    return docs(args.readme, check=args.check)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gkv_vllm", description="gkv_vllm's own tools")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "doctor",
        help="check the installation, and a command line after --",
        usage="python -m gkv_vllm doctor [-- vllm serve MODEL ...]",
    )
    docs_parser = commands.add_parser("docs", help="regenerate the README's generated blocks")
    docs_parser.add_argument("--check", action="store_true", help="fail when a block is stale")
    docs_parser.add_argument("--readme", type=Path, default=README)
    return parser


def flags_table() -> str:
    """The README's table of flags, from the settings' own help."""
    from gkv_vllm.config import KVPolicyConfig
    from gkv_vllm.plugin import flag_name

    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for setting in dataclasses.fields(KVPolicyConfig):
        default = getattr(KVPolicyConfig(), setting.name)
        shown = "" if default is None else "`{}`" if default == {} else f"`{default}`"
        rows.append(f"| `{flag_name(setting.name)}` | {shown} | {setting.metadata['help']} |")
    return "\n".join(rows)


def policies_table() -> str:
    """The README's table of policies: the first sentence of each, and its parameters."""
    from gkv_vllm.policies import registry

    rows = ["| policy | idea | parameters |", "|---|---|---|"]
    for name in registry.built_in():
        policy = registry.load(name)
        idea = " ".join((policy.__doc__ or "").split("\n\n")[0].split())
        parameters = [
            f"`{field.name}` {shown_default(field.default)}" for field in dataclasses.fields(policy)
        ]
        rows.append(f"| `{name}` | {idea} | {', '.join(parameters)} |")
    return "\n".join(rows)


def shown_default(value: object) -> str:
    """A parameter's default as one would write it in JSON; None follows the variant."""
    return "by variant" if value is None else json.dumps(value)


def generated_blocks() -> Mapping[str, Callable[[], str]]:
    """Marker name -> what stands between its markers."""
    from gkv_vllm.refusals import support_matrix

    return {"flags": flags_table, "policies": policies_table, "support": support_matrix}


def docs(readme: Path, *, check: bool) -> int:
    """Rewrite the generated blocks of a README, or with `check` say which are stale."""
    text = readme.read_text()
    fresh = text
    for name, make in generated_blocks().items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if begin not in text or end not in text:
            print(f"{readme} has no block {begin} ... {end}", file=sys.stderr)
            return 1
        before, rest = fresh.split(begin, 1)
        fresh = f"{before}{begin}\n{make()}\n{end}{rest.split(end, 1)[1]}"
    if fresh == text:
        return 0
    if check:
        print(f"{readme} is stale; run: python -m gkv_vllm docs", file=sys.stderr)
        return 1
    readme.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
