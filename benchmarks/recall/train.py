# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Trains the small Qwen3-shaped model that answers the questions of `task`, from a seed.

Five to ten minutes on one core. Two layers are the fewest that can look a name up; the curriculum
and the wide embeddings are what makes it learn at once.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.recall import task

TOKENS_PER_STEP = 4096
WARM_UP = 50
LEARNING_RATE = 2e-3
OTHER_TOKENS = 0.1
"""Weight of all tokens that are not answers: they cannot be known, only their kind can."""


@dataclass(frozen=True)
class Stage:
    length: int
    names: int
    most_steps: int
    enough: float
    """Accuracy of the answers at which the next stage begins."""


STAGES = (
    Stage(64, 5, 600, 0.97),
    Stage(128, 10, 300, 0.97),
    Stage(256, task.NAMES, 300, 0.97),
    Stage(512, task.NAMES, 200, 0.97),
    Stage(1024, task.NAMES, 900, 1.01),
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path("build/recall-model"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=2)
    return parser.parse_args()


def build(layers: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=task.VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        bos_token_id=task.BOS,
        eos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    # With the usual 0.02 the loss stays on its plateau.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=1.0)
    return model


def batch(rng: random.Random, stage: Stage) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and, at the place of each answer, True."""
    streams = [
        task.draw(rng, stage.length, stage.names) for _ in range(TOKENS_PER_STEP // stage.length)
    ]
    tokens = torch.tensor([stream.tokens for stream in streams])
    is_answer = torch.zeros_like(tokens, dtype=torch.bool)
    for row, stream in enumerate(streams):
        is_answer[row, [answer.position for answer in stream.answers]] = True
    return tokens, is_answer


def step(model: Qwen3ForCausalLM, tokens: torch.Tensor, is_answer: torch.Tensor):
    """The loss to minimise, and the accuracy of the answers."""
    logits, targets = model(input_ids=tokens[:, :-1], use_cache=False).logits, tokens[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")
    wanted = is_answer[:, 1:]
    loss = losses[wanted].mean() + OTHER_TOKENS * losses[~wanted].mean()
    right = (logits.argmax(-1) == targets)[wanted].float().mean()
    return loss, right.item()


def train(model: Qwen3ForCausalLM, seed: int) -> None:
    rng, started, seen, count = random.Random(seed), time.perf_counter(), 0, 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    for stage in STAGES:
        smooth = 0.0
        for done in range(stage.most_steps):
            count += 1
            # The last stage runs to its end, so the rate can fall linearly there.
            left = 1 - done / stage.most_steps if stage is STAGES[-1] else 1.0
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, count / WARM_UP) * left
            loss, right = step(model, *batch(rng, stage))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            seen += TOKENS_PER_STEP
            smooth = right if done == 0 else 0.9 * smooth + 0.1 * right
            if done % 20 == 0 or smooth >= stage.enough:
                print(
                    f"length {stage.length:4d}  step {count:4d}  {seen / 1e6:.2f} M tokens  "
                    f"loss {loss.item():.3f}  accuracy {smooth:.3f}  "
                    f"{time.perf_counter() - started:.0f} s",
                    flush=True,
                )
            if smooth >= stage.enough:
                break


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    model = build(args.layers)
    train(model, args.seed)
    out = args.out / f"seed-{args.seed}"
    model.eval().save_pretrained(out)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
