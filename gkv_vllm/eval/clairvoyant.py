# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""How much a cache of some size can hold: eviction by a policy that knows what will be asked.

`python -m gkv_vllm.eval.clairvoyant PLAN --out DIR` reads each document once with the whole cache,
notes what its questions look at, and reads it again with the cache that a server of the plan would
have had if it had evicted what they look at least from then on. When requests fall due, and how
much they keep, the engine's own planner says. No server runs: transformers reads, and every layer
and KV head sees its own survivors.

What is held that way can be held. What is not may be held all the same: the rule is greedy, and
takes what the whole cache looks at for what a smaller one needs."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gkv_vllm.config import ConfigError, KVPolicyConfig, RequestPolicy, unknown_key
from gkv_vllm.engine.plan import Selection, WorkerReport
from gkv_vllm.engine.planner import EvictionPlanner
from gkv_vllm.engine.spec import split_layers
from gkv_vllm.eval import report
from gkv_vllm.eval.ask import Prediction, predict
from gkv_vllm.eval.exams import EXAMS, Exam, Question
from gkv_vllm.eval.plan import Cell, Plan, ServerPlan
from gkv_vllm.eval.run import (
    FAR,
    Report,
    cell_metrics,
    check_model,
    open_store,
    progress,
    weights_hash,
)
from gkv_vllm.eval.store import Store, commit
from gkv_vllm.eval.vocabulary import decode, encode
from gkv_vllm.ops.topk import topk_keep
from gkv_vllm.policies.base import Needs

ATTENTION = "gkv_clairvoyant"
UNASKED = 1e-3
"""Weight of the attention of queries whose next word is no answer, beside 1 for the others: mostly
it decides among tokens that no answer looks at."""
Worth = Callable[[int], Tensor]
"""What each token is worth at a moment, given how many tokens are computed: float32
[layers, kv_heads, tokens]."""


# --- reading ---------------------------------------------------------------------------------


@dataclass
class Sight:
    """What the attention layers are told of one reading, and what they tell."""

    blind: Tensor | None
    """[layers, kv_heads, tokens] int64: the first query that does not see a token any more, as many
    as there are tokens where all do. None: nothing was evicted."""
    paid: list[Tensor] | None = None
    """Filled with each layer's attention, [kv_heads, queries, keys] float32: the most of a query
    group."""


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **given: Any
) -> tuple[Tensor, None]:
    """Attention for transformers, of one document, causal whatever `mask` says.

    query [1, heads, tokens, head_dim], key and value [1, kv_heads, tokens, head_dim]; returns
    [1, tokens, heads, head_dim], and no weights."""
    sight: Sight = given["sight"]
    tokens, heads, kv_heads = query.shape[2], query.shape[1], key.shape[1]
    at = torch.arange(tokens, device=query.device)
    visible = (at[None, :] <= at[:, None]).expand(kv_heads, tokens, tokens)
    if sight.blind is not None:
        blind = sight.blind[module.layer_idx].to(query.device)
        visible = visible & (at[None, :, None] < blind[:, None, :])
    each = visible.repeat_interleave(heads // kv_heads, 0)[None]
    if sight.paid is not None:
        grouped = query[0].unflatten(0, (kv_heads, -1)) @ key[0, :, None].transpose(-1, -2)
        logits = (grouped * scaling).masked_fill_(~visible[:, None], float("-inf"))
        sight.paid.append(logits.softmax(-1).amax(1))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=each, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


class Reader:
    """A model in transformers that reads documents with whatever each head still holds."""

    def __init__(self, model: str) -> None:
        """ConfigError if there is no such model."""
        check_model(model)
        from transformers import AttentionInterface, AutoModelForCausalLM

        AttentionInterface.register(ATTENTION, _attend)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation=ATTENTION
        ).eval()
        config = self.model.config
        self.layers, self.kv_heads = config.num_hidden_layers, config.num_key_value_heads

    @torch.inference_mode()
    def read(self, tokens: list[int], sight: Sight) -> Tensor:
        """Log-probabilities of what comes after each token: [tokens, vocabulary] float32, nats."""
        # No cache: there is nothing to go on from.
        logits = self.model(input_ids=torch.tensor([tokens]), use_cache=False, sight=sight).logits
        return logits[0].float().log_softmax(-1)


# --- evicting --------------------------------------------------------------------------------


def follow(
    config: KVPolicyConfig,
    policy: RequestPolicy,
    worth: Worth,
    *,
    tokens: int,
    prompt: int,
    block_size: int,
    shape: tuple[int, int],
    of_block: str = "best",
) -> tuple[Tensor, int]:
    """When each of `tokens` leaves, if `worth` decides: `Sight.blind`, and how many evictions.

    The prompt is computed in one step, then a token in each; the last one is never computed, as
    nothing comes after it. shape: layers and KV heads. Layers and heads that share a kept set add
    up what each token is worth to them; a block is worth its `best` token, or the `total`."""
    planner = EvictionPlanner(config, Needs(), block_size=block_size, num_slots=0)
    planner.add("", prompt_tokens=prompt, policy=policy)
    blind = torch.full((*shape, tokens), tokens)
    for computed in range(prompt, tokens - 1):
        step = planner.plan([("", computed)])
        for chosen in planner.compactions().values():
            _evict_tokens(blind, worth(computed), chosen, config.scope, block_size)
            planner.compacted("", chosen.candidates[0][: chosen.keep], {})
        for observed in step.observe.values():
            selection = observed.selection
            groups = split_layers(shape[0], len(selection.candidates), config.layer_split)
            scores = _of_blocks(worth(computed), selection, groups, block_size, of_block)
            planner.accept(WorkerReport({"": (observed.epoch, scores)}, 0, 0.0))
        for victims in planner.evictions().values():
            groups = split_layers(shape[0], len(victims), config.layer_split)
            for layer, group in enumerate(groups):
                for block in victims[group]:
                    blind[layer, :, block * block_size : (block + 1) * block_size] = computed
    return blind, planner.stats.evictions


def _evict_tokens(
    blind: Tensor, worth: Tensor, chosen: Selection, scope: str, block_size: int
) -> None:
    """The candidates that are worth least leave."""
    now, first = chosen.num_tokens, chosen.protected * block_size
    count = len(chosen.candidates[0]) * block_size
    shared = {"head": (), "layer": (1,), "all": (0, 1)}[scope]
    if shared:
        worth = worth.sum(shared, keepdim=True).expand_as(worth)
    live = (blind[..., :now] > now).nonzero()[:, -1].unflatten(0, (*blind.shape[:2], -1))
    candidates = live[..., first : first + count]
    stays = topk_keep(worth.gather(-1, candidates), chosen.keep * block_size)
    leaves = torch.ones_like(candidates, dtype=torch.bool).scatter_(-1, stays, False)
    gone = candidates[leaves].unflatten(0, (*blind.shape[:2], -1))
    blind.scatter_(-1, gone, now)


def _of_blocks(
    worth: Tensor, chosen: Selection, groups: list[int], block_size: int, of_block: str
) -> list[list[float]]:
    """Per layer group, what each candidate is worth to all its layers and heads."""
    found = []
    for group, blocks in enumerate(chosen.candidates):
        layers = [layer for layer, of in enumerate(groups) if of == group]
        each = worth[layers].sum((0, 1))
        parts = [each[block * block_size : (block + 1) * block_size] for block in blocks]
        found.append([float(x.max() if of_block == "best" else x.sum()) for x in parts])
    return found


def foresight(paid: Tensor, asked: Tensor) -> Worth:
    """Worth by the most attention that any one query still to come pays.

    paid [layers, kv_heads, queries, keys] float32; asked [queries] bool, of `Text.asked`."""
    weighed = torch.where(asked[:, None], paid, UNASKED * paid).numpy()
    to_come = np.maximum.accumulate(weighed[..., ::-1, :], axis=-2)[..., ::-1, :]
    return lambda computed: torch.from_numpy(to_come[..., computed, :].copy())


# --- measuring -------------------------------------------------------------------------------


@dataclass
class Text:
    """A question and the model that reads it; all of it in words, a token each."""

    reader: Reader
    exam: Exam
    question: Question

    @cached_property
    def asked(self) -> Tensor:
        """The queries whose next word is an answer's: [tokens] bool."""
        prompt = len(self.question.prompt)
        asked = torch.zeros(prompt + len(self.question.document), dtype=torch.bool)
        asked[[prompt + at - 1 for at in self.question.own]] = True
        return asked

    @cached_property
    def worth(self) -> Worth:
        """By what the document's own words look at with the whole cache."""
        sight = Sight(blind=None, paid=[])
        self.reader.read(encode([*self.question.prompt, *self.question.document]), sight)
        assert sight.paid is not None
        return foresight(torch.stack(sight.paid), self.asked)

    def predict(self, blind: Tensor | None) -> Prediction:
        """What the model answers if it goes blind like that, graded.

        Where the exam leaves answers in the text, right or wrong, it is read again with them until
        it reads its own: each time one more of them stands, so that it ends."""
        said = list(self.question.document)
        for _ in range(len(self.question.document)):
            given = said if self.exam.mode == "answers" else list(self.question.document)
            tokens = encode([*self.question.prompt, *given])
            after = self.reader.read(tokens, Sight(blind))
            best = decode(after[self.asked].argmax(-1).tolist())
            before, said = said, list(self.question.document)
            for at, word in zip(self.question.own, best, strict=True):
                said[at] = word
            if self.exam.mode != "answers" or said == before:
                break
        graded = predict(self.exam, self.question, " ".join(said), "length", FAR)
        first = len(self.question.prompt)
        each = after[first - 1 : -1].gather(-1, torch.tensor(tokens[first:])[:, None])
        return replace(graded, loss=None if self.exam.mode == "answers" else -float(each.mean()))


class Clairvoyant:
    """A plan's cells, each under its server's settings but for who decides."""

    def __init__(self, plan: Plan, store: Store, of_block: str = "best") -> None:
        """ConfigError for an exam whose words no document decides, or a model that is not there."""
        exams = {cell.exam for server in plan.server_plans() for cell in server.cells}
        for exam in sorted(exams):
            if EXAMS[exam].mode == "writes":
                raise ConfigError(f"exam {exam} is the model's own text: its future is not known")
        self.plan, self.store, self.of_block = plan, store, of_block
        self.reader = Reader(plan.model)
        self.weights = weights_hash(Path(plan.model))

    def run(self, tell: Report) -> None:
        """Measure what the store lacks, exam by exam; `tell` hears of each text."""
        self.store.write_environment()
        cells = [(server, cell) for server in self.plan.server_plans() for cell in server.cells]
        for server, cell in cells:
            if self.store.has(cell.name):
                self.store.check(cell, self._config(server, cell))
        for name in dict.fromkeys(cell.exam for _, cell in cells):
            due = [x for x in cells if x[1].exam == name and not self.store.has(x[1].name)]
            seeds = range(self.plan.first_seed, self.plan.first_seed + self.plan.samples)
            questions = [EXAMS[name].question(seed, self.plan.length) for seed in seeds]
            texts = [Text(self.reader, EXAMS[name], question) for question in questions]
            for server, cell in due:
                self._cell(server, cell, texts, tell)

    def _cell(self, server: ServerPlan, cell: Cell, texts: list[Text], tell: Report) -> None:
        started, found, evictions = time.perf_counter(), [], 0
        for text in texts:
            blind = None
            if cell.budget is not None:
                blind, events = self._blind(server, cell, text)
                evictions += events
            found.append(text.predict(blind))
            tell(cell.name, len(found), len(texts))
        seconds = round(time.perf_counter() - started, 2)
        measured = {"evictions": evictions, "seconds": seconds, "commit": commit()}
        metrics = cell_metrics(found, measured)
        self.store.write(cell.name, found, metrics, self._config(server, cell))

    def _config(self, server: ServerPlan, cell: Cell) -> dict[str, Any]:
        """All that decides a cell's numbers, besides code and machine."""
        plan = self.plan
        return {
            **asdict(cell),
            "kv_policy": {**server.kv_policy, "policy": "clairvoyant", "of_block": self.of_block},
            "block_size": server.block_size,
            "length": plan.length,
            "far": FAR,
            "model": plan.model,
            "weights": self.weights,
            "dtype": "float32",
            "samples": plan.samples,
            "first_seed": plan.first_seed,
            "mode": EXAMS[cell.exam].mode,
        }

    def _blind(self, server: ServerPlan, cell: Cell, text: Text) -> tuple[Tensor, int]:
        config = KVPolicyConfig.from_mapping(server.settings)
        return follow(
            config,
            config.for_request(cell.xargs, server.block_size),
            text.worth,
            tokens=len(text.asked),
            prompt=len(text.question.prompt),
            block_size=server.block_size,
            shape=(self.reader.layers, self.reader.kv_heads),
            of_block=self.of_block,
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gkv_vllm.eval.clairvoyant", description=__doc__
    )
    parser.add_argument("plan", type=Path, help="a plan of `python -m gkv_vllm.eval`")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the results; goes on there"
    )
    parser.add_argument(
        "--of-block",
        choices=("best", "total"),
        default="best",
        help="what a block is worth: its best token, or the total of all of them",
    )
    parser.add_argument("--baseline", help="the server to compare with; the plan's first")
    args = parser.parse_args(argv)
    try:
        plan = Plan.read(args.plan)
        baseline = args.baseline or next(iter(plan.servers))
        if baseline not in plan.servers:
            raise ConfigError(unknown_key("baseline", baseline, plan.servers))
        store = open_store(args.out, args.plan)
        with progress() as tell:
            Clairvoyant(plan, store, args.of_block).run(tell)
        for path in report.write(store, baseline):
            print(path)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
