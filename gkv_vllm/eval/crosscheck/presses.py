# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""kvpress's half, a script for an environment of its own; nothing of ours is imported here.

`python presses.py JOB OUT` reads a job as JSON and writes tensors with torch.save. kvpress 0.5
wants transformers before 5.3 (its hooks read `cache_position`, which later ones do not hand to
attention), vLLM 0.32 wants 5.16.1 or later: no environment has both, so they exchange files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
import transformers
from kvpress import KnormPress, SnapKVPress, StreamingLLMPress
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

PRESSES = {"knorm": KnormPress, "snapkv": SnapKVPress, "streaming_llm": StreamingLLMPress}
ATTENTION = "sdpa_that_shows_queries"


class Watcher:
    """An attention function that keeps the queries of a prompt as attention saw them."""

    def __init__(self) -> None:
        self.queries: dict[int, Tensor] = {}
        AttentionInterface.register(ATTENTION, self._attend)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)

    def _attend(self, module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        if query.shape[2] > 1:
            self.queries[module.layer_idx] = query[0]
        return sdpa_attention_forward(module, query, *args, **kwargs)


def new_cache() -> Any:
    return transformers.DynamicCache()


def decode(model: Any, cache: Any, logits: Tensor, start: int, count: int) -> dict[str, Any]:
    """Greedy decoding over whatever the cache holds; positions go on from `start`."""
    tokens, logprobs, margins = [], [], []
    for position in range(start, start + count):
        best = logits.topk(2).values
        token = int(logits.argmax())
        tokens.append(token)
        logprobs.append(float(logits.log_softmax(-1)[token]))
        margins.append(float(best[0] - best[1]))
        logits = model(
            input_ids=torch.tensor([[token]]),
            past_key_values=cache,
            position_ids=torch.tensor([[position]]),
        ).logits[0, -1]
    return {"tokens": tokens, "logprobs": logprobs, "margins": margins}


def prompt_without_press(model: Any, watcher: Watcher, ids: list[int], count: int) -> Any:
    """Keys, values and queries of a prompt [layers, heads, tokens, head_dim]; how it goes on."""
    cache = new_cache()
    logits = model(input_ids=torch.tensor([ids]), past_key_values=cache).logits[0, -1]
    layers = range(len(cache.layers))
    tensors = {
        "keys": torch.stack([cache.layers[i].keys[0] for i in layers]),
        "values": torch.stack([cache.layers[i].values[0] for i in layers]),
        "queries": torch.stack([watcher.queries[i] for i in layers]),
    }
    return tensors | {"goes_on": decode(model, cache, logits, len(ids), count)}


def watched(press: Any, newest: int, scores: list[Tensor], kept: list[Tensor]) -> Any:
    """The press, which from now on notes what it scored and which positions it kept, per layer.

    newest: so many of the last tokens stay in any case, as the window does in SnapKVPress. The
    positions travel through its own `compress` in the place of values."""
    score: Callable[..., Tensor] = press.score
    compress: Callable[..., tuple[Tensor, Tensor]] = press.compress

    def noted_score(*args: Any) -> Tensor:
        scores.append(spare(score(*args)))
        return scores[-1]

    def spare(scored: Tensor) -> Tensor:
        if newest:
            scored = scored.clone()
            scored[..., -newest:] = scored.max() + 1
        return scored

    def noted_compress(
        module: Any, hidden: Tensor, keys: Tensor, values: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        places = torch.arange(keys.shape[2])[:, None].expand_as(keys)
        press.score = lambda *args: spare(score(*args))
        kept.append(compress(module, hidden, keys, places, *rest)[1][0, :, :, 0])
        press.score = noted_score
        return compress(module, hidden, keys, values, *rest)

    press.score, press.compress = noted_score, noted_compress
    return press


def prompt_with_press(model: Any, case: dict[str, Any], ids: list[int]) -> Any:
    """What a press scored and kept of a prompt [layers, kv_heads, ...]; how it goes on."""
    # kvpress keeps int(tokens * (1 - ratio)); half a token guards against rounding.
    ratio = 1 - (case["kept"] + 0.5) / len(ids)
    scores: list[Tensor] = []
    kept: list[Tensor] = []
    press = PRESSES[case["policy"]](compression_ratio=ratio, **case["press"])
    cache = new_cache()
    with watched(press, case["newest"], scores, kept)(model):
        logits = model(input_ids=torch.tensor([ids]), past_key_values=cache).logits[0, -1]
    return {
        "scores": torch.cat(scores),
        "kept": torch.stack(kept).sort().values,
        "goes_on": decode(model, cache, logits, len(ids), case["count"]),
    }


@torch.inference_mode()
def main() -> None:
    job = json.load(open(sys.argv[1]))  # noqa: SIM115
    torch.manual_seed(0)
    watcher = Watcher()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, attn_implementation=ATTENTION
    ).eval()
    result = {
        "versions": {name: version(name) for name in ("kvpress", "transformers", "torch")},
        "prompts": {
            name: prompt_without_press(model, watcher, ids, job["count"])
            for name, ids in job["prompts"].items()
        },
        "cases": [
            prompt_with_press(model, case, job["prompts"][case["prompt"]]) for case in job["cases"]
        ],
    }
    torch.save(result, sys.argv[2])


if __name__ == "__main__":
    main()
