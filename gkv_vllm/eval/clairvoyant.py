# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""How far any score could go: what a plan's exams lose when the future decides what is evicted.

`python -m gkv_vllm.eval.clairvoyant PLAN --out DIR` reads each document once with the whole cache,
notes which tokens its questions will look at, and reads it again with the cache that a server of
the plan would have had if it had kept just those: what goes is what is needed least from then on,
after Belady's rule. When requests fall due, and how much they keep, the engine's own planner says.
No server runs: transformers reads, and every layer and KV head sees its own survivors.

Tokens are worth the most attention that any answer still to come pays them, so this is not the best
that can be, but what can be had at least."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gkv_vllm.config import ConfigError, KVPolicyConfig, RequestPolicy
from gkv_vllm.engine.plan import Selection, WorkerReport
from gkv_vllm.engine.planner import EvictionPlanner
from gkv_vllm.engine.spec import split_layers
from gkv_vllm.eval import report
from gkv_vllm.eval.ask import Prediction, predict
from gkv_vllm.eval.exams import EXAMS, Question
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
"""What the attention of words counts for that answer nothing: among what no answer needs."""
Worth = Callable[[int], Tensor]
"""What each token is worth at a moment, given how many tokens are computed: float32
[layers, kv_heads, tokens]."""


# --- reading ---------------------------------------------------------------------------------


@dataclass
class Sight:
    """What the attention layers are told of one reading, and what they tell."""

    lives: Tensor | None
    """[layers, kv_heads, tokens] int64: the first query that does not see a token any more. None:
    all see all."""
    paid: list[Tensor] | None = None
    """Filled with each layer's attention, [kv_heads, queries, keys]: the most of a query group."""


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **given: Any
) -> tuple[Tensor, None]:
    """Attention for transformers, of one document: query [1, heads, tokens, head_dim]."""
    sight: Sight = given["sight"]
    tokens, heads, kv_heads = query.shape[2], query.shape[1], key.shape[1]
    at = torch.arange(tokens, device=query.device)
    visible = (at[None, :] <= at[:, None]).expand(kv_heads, tokens, tokens)
    if sight.lives is not None:
        lives = sight.lives[module.layer_idx].to(query.device)
        visible = visible & (at[None, :, None] < lives[:, None, :])
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
        """Log-probabilities of what comes after each token: [tokens, vocabulary] float32."""
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
) -> tuple[Tensor, int]:
    """When each of `tokens` leaves, if `worth` decides: `Sight.lives`, and how many evictions.

    The prompt is computed in one step, then a token in each. shape: layers and KV heads."""
    planner = EvictionPlanner(config, Needs(), block_size=block_size, num_slots=0)
    planner.add("", prompt_tokens=prompt, policy=policy)
    lives = torch.full((*shape, tokens), tokens)
    for computed in range(prompt, tokens):
        step = planner.plan([("", computed)])
        for chosen in planner.compactions().values():
            _evict_tokens(lives, worth(computed), chosen, config.scope, block_size)
            planner.compacted("", chosen.candidates[0][: chosen.keep], {})
        for observed in step.observe.values():
            selection = observed.selection
            groups = split_layers(shape[0], len(selection.candidates), config.layer_split)
            scores = _of_blocks(worth(computed), selection, groups, block_size)
            planner.accept(WorkerReport({"": (observed.epoch, scores)}, 0, 0.0))
        for victims in planner.evictions().values():
            groups = split_layers(shape[0], len(victims), config.layer_split)
            for layer, group in enumerate(groups):
                for block in victims[group]:
                    lives[layer, :, block * block_size : (block + 1) * block_size] = computed
    return lives, planner.stats.evictions


def _evict_tokens(
    lives: Tensor, worth: Tensor, chosen: Selection, scope: str, block_size: int
) -> None:
    """The candidates that are worth least leave; with a shared set, to whom they are worth most."""
    now, first = chosen.num_tokens, chosen.protected * block_size
    count = len(chosen.candidates[0]) * block_size
    shared = {"head": (), "layer": (1,), "all": (0, 1)}[scope]
    if shared:
        worth = worth.amax(shared, keepdim=True).expand_as(worth)
    live = (lives[..., :now] > now).nonzero()[:, -1].unflatten(0, (*lives.shape[:2], -1))
    candidates = live[..., first : first + count]
    stays = topk_keep(worth.gather(-1, candidates), chosen.keep * block_size)
    leaves = torch.ones_like(candidates, dtype=torch.bool).scatter_(-1, stays, False)
    gone = candidates[leaves].unflatten(0, (*lives.shape[:2], -1))
    lives.scatter_(-1, gone, now)


def _of_blocks(
    worth: Tensor, chosen: Selection, groups: list[int], block_size: int
) -> list[list[float]]:
    """Per layer group, the candidates by the token that is worth most to any layer and head."""
    found = []
    for group, blocks in enumerate(chosen.candidates):
        layers = [layer for layer, of in enumerate(groups) if of == group]
        best = worth[layers].amax((0, 1))
        found.append([float(best[b * block_size : (b + 1) * block_size].max()) for b in blocks])
    return found


def foresight(paid: Tensor, asked: Tensor) -> Worth:
    """Worth by the attention still to come; paid [layers, kv_heads, queries, keys] float32.

    asked [queries] bool: the queries whose next word is an answer's."""
    weighed = torch.where(asked[:, None], paid, UNASKED * paid).numpy()
    to_come = np.maximum.accumulate(weighed[..., ::-1, :], axis=-2)[..., ::-1, :]
    return lambda computed: torch.from_numpy(to_come[..., computed, :].copy())


# --- measuring -------------------------------------------------------------------------------


@dataclass
class Text:
    """A question with what its document pays attention to, read with the whole cache."""

    question: Question
    tokens: list[int]
    whole: Tensor
    """Log-probabilities with the whole cache."""
    worth: Worth

    @classmethod
    def of(cls, reader: Reader, question: Question) -> Text:
        tokens = encode([*question.prompt, *question.document])
        sight = Sight(lives=None, paid=[])
        whole = reader.read(tokens, sight)
        assert sight.paid is not None
        asked = torch.zeros(len(tokens), dtype=torch.bool)
        for answer in question.asked:
            own = question.owned(answer)
            asked[len(question.prompt) + own.start - 1 : len(question.prompt) + own.stop - 1] = True
        return cls(question, tokens, whole, foresight(torch.stack(sight.paid), asked))

    def predict(self, exam: str, after: Tensor) -> Prediction:
        """Graded like a text that a server read: answers are the model's top choices."""
        prompt, words = len(self.question.prompt), list(self.question.document)
        said = decode(after.argmax(-1).tolist())
        for answer in self.question.asked:
            for at in self.question.owned(answer):
                words[at] = said[prompt + at - 1]
        graded = predict(EXAMS[exam], self.question, " ".join(words), "length", FAR)
        right = torch.tensor(self.tokens[prompt:])[:, None]
        loss = -after[prompt - 1 : -1].gather(-1, right).mean()
        return Prediction(**{**graded.as_json(), "loss": float(loss)})


class Clairvoyant:
    """A plan's cells, each under its server's settings but for who decides."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self.plan, self.store = plan, store
        self.reader = Reader(plan.model)
        self.weights = weights_hash(Path(plan.model))

    def run(self, tell: Report) -> None:
        """Measure what the store lacks, exam by exam; `tell` hears of each text."""
        self.store.write_environment()
        cells = [(server, cell) for server in self.plan.server_plans() for cell in server.cells]
        for server, cell in cells:
            if self.store.has(cell.name):
                self.store.check(cell, self._config(server, cell))
        for exam in dict.fromkeys(cell.exam for _, cell in cells):
            due = [x for x in cells if x[1].exam == exam and not self.store.has(x[1].name)]
            if not due:
                continue
            texts = [Text.of(self.reader, question) for question in self._questions(exam)]
            for server, cell in due:
                self._cell(server, cell, texts, tell)

    def _questions(self, exam: str) -> list[Question]:
        if EXAMS[exam].mode == "writes":
            raise ConfigError(f"exam {exam} is the model's own text: there is no future to know")
        first, count = self.plan.first_seed, self.plan.samples
        return [
            EXAMS[exam].question(seed, self.plan.length) for seed in range(first, first + count)
        ]

    def _cell(self, server: ServerPlan, cell: Cell, texts: list[Text], tell: Report) -> None:
        started, found, evictions = time.perf_counter(), [], 0
        for text in texts:
            after = text.whole
            if cell.budget is not None:
                lives, events = self._lives(server, cell, text)
                after = self.reader.read(text.tokens, Sight(lives))
                evictions += events
            found.append(text.predict(cell.exam, after))
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
            "kv_policy": {**server.kv_policy, "policy": "clairvoyant"},
            "block_size": server.block_size,
            "length": plan.length,
            "far": FAR,
            "model": plan.model,
            "weights": self.weights,
            "dtype": "float32",
            "samples": plan.samples,
            "first_seed": plan.first_seed,
            "mode": "reads",
        }

    def _lives(self, server: ServerPlan, cell: Cell, text: Text) -> tuple[Tensor, int]:
        config = KVPolicyConfig.from_mapping(server.settings)
        return follow(
            config,
            config.for_request(cell.xargs, server.block_size),
            text.worth,
            tokens=len(text.tokens),
            prompt=len(text.question.prompt),
            block_size=server.block_size,
            shape=(self.reader.layers, self.reader.kv_heads),
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gkv_vllm.eval.clairvoyant", description=__doc__
    )
    parser.add_argument("plan", type=Path, help="a plan of `python -m gkv_vllm.eval`")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the results; goes on there"
    )
    parser.add_argument("--baseline", help="the server to compare with; the plan's first")
    args = parser.parse_args(argv)
    try:
        plan = Plan.read(args.plan)
        store = open_store(args.out, args.plan)
        with progress() as tell:
            Clairvoyant(plan, store).run(tell)
        for path in report.write(store, args.baseline or next(iter(plan.servers))):
            print(path)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
