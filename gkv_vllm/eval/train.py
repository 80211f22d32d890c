# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Trains a small Qwen3 on the tasks by a curriculum of lengths; stops and goes on where it was.

`python -m gkv_vllm.eval.train OUT` writes checkpoints and a log into OUT and the finished model
into OUT/model. What makes it learn at all: embeddings of unit variance (with the usual 0.02 the
loss stays on its plateau), and short documents first.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from gkv_vllm.eval.tasks import TASKS, Document
from gkv_vllm.eval.vocabulary import IDS, PAD, SIZE, encode, tokenizer

WARM_UP = 100
SMOOTHING = 0.95
LOG_EVERY = 25
EARLIER_SHARE = 1 / 3
MAX_POSITIONS = 8192


@dataclass(frozen=True)
class Stage:
    """Documents of one length until the answers of every task are right, or the steps are over."""

    length: int
    most_steps: int
    enough: float


STAGES = (
    Stage(64, 3000, 0.95),
    Stage(96, 2200, 0.97),
    Stage(192, 2000, 0.98),
    Stage(384, 2500, 0.985),
    Stage(768, 1000, 0.99),
    Stage(1536, 400, 0.99),
    Stage(2304, 500, 1.01),
)


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, together with the code."""

    seed: int = 0
    layers: int = 2
    hidden: int = 128
    intermediate: int = 256
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    tokens_per_step: int = 3072
    learning_rate: float = 2e-3
    matrix_rate: float = 2e-2
    """Learning rate of Muon, which updates the matrices; AdamW has the rest."""
    tasks: tuple[str, ...] = tuple(TASKS)
    stages: tuple[Stage, ...] = STAGES


def build(recipe: Recipe) -> Any:
    """The untrained model, in float32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(recipe.seed)
    config = Qwen3Config(
        vocab_size=SIZE,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=IDS["<end>"],
        pad_token_id=IDS[PAD],
    )
    model = Qwen3ForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=1.0)
    return model


def optimizers(model: Any, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between the layers' streams, AdamW for embeddings, head and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@dataclass
class Batch:
    """Documents of several tasks, cut or padded to one length. All tensors are [rows, length]."""

    tokens: torch.Tensor
    weights: torch.Tensor
    task: list[str]


def draw(rng: random.Random, recipe: Recipe, length: int, shares: dict[str, float]) -> Batch:
    """The next documents, tasks in proportion to `shares`."""
    rows = max(len(recipe.tasks), recipe.tokens_per_step // length)
    names = rng.choices(list(shares), list(shares.values()), k=rows)
    documents: list[Document] = [TASKS[name].draw(rng, length) for name in names]
    tokens = torch.full((rows, length), IDS[PAD])
    weights = torch.zeros(rows, length)
    for row, document in enumerate(documents):
        count = min(length, len(document.words))
        tokens[row, :count] = torch.tensor(encode(document.words[:count]))
        weights[row, :count] = torch.tensor(document.weights[:count])
    return Batch(tokens, weights, names)


def losses(model: Any, batch: Batch, device: str) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss to minimise, and the share of right answers of each task in the batch."""
    tokens, weights = batch.tokens.to(device), batch.weights.to(device)[:, 1:]
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    targets = tokens[:, 1:]
    each = functional.cross_entropy(logits.mT, targets, reduction="none")
    loss = (each * weights).sum() / weights.sum()
    right, is_answer = logits.argmax(-1) == targets, weights >= 1.0
    accuracy = {}
    for name in set(batch.task):
        rows = torch.tensor([task == name for task in batch.task], device=device)
        asked = is_answer & rows[:, None]
        if asked.any():
            accuracy[name] = (right & asked).sum().item() / asked.sum().item()
    return loss, accuracy


class Trainer:
    """The state of a training run: everything that a checkpoint holds."""

    def __init__(self, recipe: Recipe, out: Path, device: str) -> None:
        self.recipe, self.out, self.device = recipe, out, device
        self.model = build(recipe).to(device)
        self.optimizers = optimizers(self.model, recipe)
        self.rng = random.Random(recipe.seed)
        self.stage = self.step_in_stage = self.step = self.tokens = 0
        self.seconds = 0.0
        self.accuracy: dict[str, float] = {}

    def save(self) -> None:
        state = {
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": self.rng.getstate(),
            "progress": {
                key: getattr(self, key)
                for key in ("stage", "step_in_stage", "step", "tokens", "seconds", "accuracy")
            },
        }
        self.out.mkdir(parents=True, exist_ok=True)
        partial = self.out / "checkpoint.partial"
        torch.save(state, partial)
        partial.replace(self.out / "checkpoint.pt")

    def resume(self) -> bool:
        """Load the checkpoint of `out`, if there is one of the same recipe."""
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=False, map_location=self.device)
        if state["recipe"] != asdict(self.recipe):
            raise SystemExit(
                f"{path} was made with another recipe: {state['recipe']}; name another folder"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.rng.setstate(state["rng"])
        for key, value in state["progress"].items():
            setattr(self, key, value)
        return True

    def _rate(self, stage: Stage) -> float:
        """Warm up, hold, and fall linearly in the last stage, which runs to its end."""
        left = 1.0
        if stage is self.recipe.stages[-1]:
            left = 1 - self.step_in_stage / stage.most_steps
        return min(1.0, (self.step + 1) / WARM_UP) * max(left, 0.01)

    def _length(self, stage: Stage) -> int:
        """That of the stage, but for one batch in three, which recalls an earlier one."""
        earlier = [s.length for s in self.recipe.stages if s.length < stage.length]
        if earlier and self.rng.random() < EARLIER_SHARE:
            return self.rng.choice(earlier)
        return stage.length

    def _shares(self) -> dict[str, float]:
        """More of what is not learned yet."""
        return {
            name: 0.15 + (1 - self.accuracy.get(name, 0.0)) ** 0.5 for name in self.recipe.tasks
        }

    def one_step(self, stage: Stage) -> float:
        rate = self._rate(stage)
        bases = (self.recipe.matrix_rate, self.recipe.learning_rate)
        for optimizer, base in zip(self.optimizers, bases, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * rate
            optimizer.zero_grad()
        batch = draw(self.rng, self.recipe, self._length(stage), self._shares())
        loss, accuracy = losses(self.model, batch, self.device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        for name, value in accuracy.items():
            past = self.accuracy.get(name, 0.0)
            self.accuracy[name] = SMOOTHING * past + (1 - SMOOTHING) * value
        self.step += 1
        self.step_in_stage += 1
        self.tokens += batch.tokens.numel()
        return loss.item()

    def run(self, minutes: float, report: Any) -> None:
        """Train on until the last stage is over or the minutes are; checkpoints once a minute."""
        started, saved, before = time.perf_counter(), time.perf_counter(), self.seconds
        while self.stage < len(self.recipe.stages):
            stage = self.recipe.stages[self.stage]
            loss = self.one_step(stage)
            now = time.perf_counter()
            self.seconds = before + now - started
            learned = min(self.accuracy.get(n, 0.0) for n in self.recipe.tasks) >= stage.enough
            over = learned or self.step_in_stage >= stage.most_steps
            report(self, stage, loss, over or self.step % LOG_EVERY == 0)
            if over:
                self.stage, self.step_in_stage = self.stage + 1, 0
                self.accuracy = {name: 0.9 * value for name, value in self.accuracy.items()}
            if over or now - saved > 60:
                self.save()
                saved = now
            if now - started > 60 * minutes:
                self.save()
                return


class Report:
    """A progress bar, and a line of JSON in `log.jsonl` now and then."""

    def __init__(self, out: Path, progress: Any) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.log, self.progress = out / "log.jsonl", progress
        self.bar = progress.add_task("", total=None)

    def __call__(self, trainer: Trainer, stage: Stage, loss: float, write: bool) -> None:
        shown = " ".join(f"{n} {a:.3f}" for n, a in sorted(trainer.accuracy.items()))
        self.progress.update(
            self.bar,
            total=stage.most_steps,
            completed=trainer.step_in_stage,
            description=f"length {stage.length} loss {loss:.3f} {shown}",
        )
        if write:
            line = {
                "length": stage.length,
                "step": trainer.step,
                "million_tokens": round(trainer.tokens / 1e6, 3),
                "seconds": round(trainer.seconds),
                "loss": round(loss, 4),
                "accuracy": {n: round(a, 4) for n, a in sorted(trainer.accuracy.items())},
            }
            with self.log.open("a") as out:
                out.write(json.dumps(line) + "\n")


def export(trainer: Trainer, out: Path) -> None:
    """The model and its tokenizer in Hugging Face format, bfloat16."""
    model = build(trainer.recipe)
    model.load_state_dict(trainer.model.state_dict())
    model.generation_config.update(temperature=1.0, do_sample=True, min_p=0.05)
    model.to(torch.bfloat16).eval().save_pretrained(out)
    tokenizer(MAX_POSITIONS).save_pretrained(out)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m gkv_vllm.eval.train", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=Recipe.layers)
    parser.add_argument("--hidden", type=int, default=Recipe.hidden)
    parser.add_argument("--intermediate", type=int, default=Recipe.intermediate)
    parser.add_argument("--tokens-per-step", type=int, default=Recipe.tokens_per_step)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--matrix-rate", type=float, default=Recipe.matrix_rate)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    args = parse_args(argv)
    recipe = Recipe(
        seed=args.seed,
        layers=args.layers,
        hidden=args.hidden,
        intermediate=args.intermediate,
        tokens_per_step=args.tokens_per_step,
        learning_rate=args.learning_rate,
        matrix_rate=args.matrix_rate,
        tasks=tuple(args.tasks),
    )
    trainer = Trainer(recipe, args.out, args.device)
    trainer.resume()
    columns = (TextColumn("{task.description} {task.completed}/{task.total}"), TimeElapsedColumn())
    with Progress(*columns) as progress:
        trainer.run(args.minutes, Report(args.out, progress))
    export(trainer, args.out / "model")


if __name__ == "__main__":
    main()
