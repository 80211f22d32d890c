# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""A Hugging Face forward in which each head of each layer sees what survived there: the oracle of
what an engine computes with eviction on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .harness import BLOCK_SIZE, InProcessEngine


class Survivors:
    """Which position each cell of each layer and head holds, by the engine's own moves."""

    def __init__(self, engine: InProcessEngine, positions: int) -> None:
        scorer = engine.worker.evictor.scorer
        heads = [layer.kv_heads for layer in scorer.layers]
        self.layers_of = scorer.layer_groups
        """Per layer group, the layers that keep the same blocks."""
        self.held = torch.arange(positions).repeat(len(heads), heads[0], 1)
        """[layers, kv_heads, cells]: -1 where nothing is held any more."""
        self.gone: list[tuple[int, torch.Tensor]] = []
        """From which position on [layers, kv_heads, positions] are out of sight."""

    def moved(self, targets: list[int], sources: list[int], keep: torch.Tensor) -> None:
        """keep [layers, kv_heads, tokens] among the tokens of the source blocks."""
        before = self.held[..., cells_of(sources)]
        self.held[..., cells_of(targets)] = before.gather(-1, keep.expand(*before.shape[:2], -1))

    def dropped(self, blocks: tuple[list[int], ...], position: int) -> None:
        """Per layer group, logical blocks that left its tables before this position's step."""
        for layers, gone in zip(self.layers_of, blocks, strict=True):
            for layer in layers:
                self.held[layer][:, cells_of(gone)] = -1
        self.gone.append((position, self.held.clone()))

    def visible(self, length: int) -> torch.Tensor:
        """[layers, kv_heads, length, length] bool: which position each query sees."""
        layers, kv_heads = self.held.shape[:2]
        visible = torch.ones(length, length, dtype=torch.bool).tril().repeat(layers, kv_heads, 1, 1)
        for position, held in self.gone:
            left = torch.zeros(layers, kv_heads, length + BLOCK_SIZE, dtype=torch.bool)
            left.scatter_(-1, held.clamp_min(0), True)
            left[..., 0] = (held == 0).any(-1)  # what is not held was written there
            # Newer positions are not concerned: they are in their own cells.
            left[..., position:] = True
            visible[:, :, position:] &= left[:, :, None, :length]
        return visible


def cells_of(blocks: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(b * BLOCK_SIZE, (b + 1) * BLOCK_SIZE) for b in blocks])


def run_and_follow(
    engine: InProcessEngine, asked: dict[str, Any]
) -> tuple[dict[str, Any], Survivors]:
    """One request to its end, and what survived in each layer and head on the way."""
    length = len(asked["prompt_token_ids"]) + asked["params"]["max_tokens"]
    survivors = Survivors(engine, -(-length // BLOCK_SIZE) * BLOCK_SIZE)
    kept: list[torch.Tensor] = []

    def look(plan: Any) -> None:
        if plan is None or not plan.drops:
            return
        ((id_, blocks),) = plan.drops.items()
        for order in plan.compact.values():
            survivors.moved(order.targets, order.selection.candidates[0], kept.pop())
        survivors.dropped(blocks, engine.scheduler.requests[id_].num_computed_tokens - 1)

    with engine.each_compaction(lambda keep: kept.append(keep)), engine.each_begin(look):
        (answer,) = engine.run([asked])
    return answer, survivors


def dense_log_probabilities(
    model_path: Path, prompt: list[int], answer: list[int], visible: torch.Tensor
) -> torch.Tensor:
    """Of each token of the answer, with `visible` as each layer's and KV head's mask."""
    from transformers import AutoModelForCausalLM

    tokens = torch.tensor([prompt + answer])
    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float32, attn_implementation="eager"
    )
    group = model.config.num_attention_heads // visible.shape[1]
    minimum = torch.finfo(torch.float32).min
    masks = torch.zeros(visible.shape).masked_fill(~visible, minimum).repeat_interleave(group, 1)
    for layer, mask in zip(model.model.layers, masks, strict=True):
        layer.self_attn.register_forward_pre_hook(masked(mask[None]), with_kwargs=True)
    with torch.no_grad():
        logits = model(tokens).logits[0]
    predicted = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return predicted.gather(1, tokens[0, len(prompt) :, None])[:, 0]


def masked(mask: torch.Tensor) -> Any:
    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": mask}

    return hook
