# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Pushes streams through a served model as decodes, and notes how it answers.

A request's prompt is the first token of its stream; vLLM generates the rest, one token a step. A
logits processor notes what the model would say at the places of the answers, then puts the stream's
own token in its place (or lets the answer stand). So evictions happen where they do in a server:
between the decoding steps of many requests that run together.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.recall.task import Stream

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
os.environ.update(ENVIRONMENT)  # before vLLM and torch are imported

import torch  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.v1.attention.selector import _cached_get_attn_backend  # noqa: E402
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor  # noqa: E402

BLOCK_SIZE = 32


class Dictation(AdapterLogitsProcessor):
    """Makes each request write its stream; `heard` has what the model would have said."""

    heard: ClassVar[dict[int, dict[int, int]]] = {}
    """Stream number -> position of an answer -> the model's token."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        asked = params.extra_args or {}
        tokens, answers = asked["tokens"], set(asked["answers"])
        heard = self.heard.setdefault(asked["number"], {})

        def process(written: list[int], logits: torch.Tensor) -> torch.Tensor:
            position = 1 + len(written)
            if position in answers:
                heard[position] = int(logits.argmax())
                if asked["own_answers"]:
                    return logits
            logits.fill_(float("-inf"))
            logits[tokens[position]] = 0.0
            return logits

        return process


@dataclass
class Run:
    """What one engine did with all streams."""

    said: list[list[int]]
    """Per stream, the model's answers in the order of its questions."""
    seconds: float
    steps: int
    evictions: int = 0
    tokens_evicted: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    live_tokens: dict[int, int] = field(default_factory=dict)
    """Live tokens of a request right after an eviction -> how often."""
    eviction_us: dict[int, int] = field(default_factory=dict)


def run(
    model: Path, streams: list[Stream], kv_policy: dict[str, Any] | None, *, own_answers: bool
) -> Run:
    """All streams together through an engine of their own. `kv_policy` None: nothing is evicted."""
    length = len(streams[0].tokens)
    # vLLM remembers the backend of the first engine in a process. If that one has no policy, later
    # ones with a policy would run without live tables and without queries to score by.
    _cached_get_attn_backend.cache_clear()
    llm = LLM(
        str(model),
        skip_tokenizer_init=True,
        dtype="float32",
        seed=0,
        enforce_eager=True,
        async_scheduling=False,  # `written` must be complete when the next token is chosen
        block_size=BLOCK_SIZE,
        max_model_len=length,
        max_num_seqs=len(streams),
        # Enough for every stream to be kept whole: nobody waits, nobody is preempted.
        num_gpu_blocks_override=len(streams) * (length // BLOCK_SIZE + 2),
        logits_processors=[Dictation],
        additional_config={"kv_policy": kv_policy} if kv_policy else {},
    )
    try:
        return _decode(llm, streams, own_answers)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def _decode(llm: LLM, streams: list[Stream], own_answers: bool) -> Run:
    Dictation.heard.clear()
    for number, stream in enumerate(streams):
        order = {
            "number": number,
            "tokens": stream.tokens,
            "answers": [answer.position for answer in stream.answers],
            "own_answers": own_answers,
        }
        params = SamplingParams(
            temperature=0.0,
            max_tokens=len(stream.tokens) - 1,
            ignore_eos=True,
            seed=number,  # greedy decoding draws nothing; the policy `random` does
            detokenize=False,
            extra_args=order,
        )
        prompt = {"prompt_token_ids": stream.tokens[:1]}
        llm.llm_engine.add_request(str(number), prompt, params)

    written: dict[int, list[int]] = {}
    steps, started = 0, time.perf_counter()
    while llm.llm_engine.has_unfinished_requests():
        steps += 1
        for output in llm.llm_engine.step():
            if output.finished:
                written[int(output.request_id)] = list(output.outputs[0].token_ids)
    seconds = time.perf_counter() - started

    for number, stream in enumerate(streams):
        _check_dictated(stream, written[number], own_answers)
    said = [
        [Dictation.heard[number][answer.position] for answer in stream.answers]
        for number, stream in enumerate(streams)
    ]
    result = Run(said, seconds, steps)
    planner = getattr(llm.llm_engine.engine_core.engine_core.scheduler, "planner", None)
    if planner is not None:
        stats = planner.stats
        result.evictions, result.tokens_evicted = stats.evictions, stats.tokens_evicted
        result.skipped = dict(stats.skipped)
        result.live_tokens = dict(sorted(stats.live_tokens.items()))
        result.eviction_us = dict(sorted(stats.eviction_us.items()))
    return result


def _check_dictated(stream: Stream, written: list[int], own_answers: bool) -> None:
    """The engine wrote the stream, but for the answers that were the model's own."""
    free = {answer.position for answer in stream.answers} if own_answers else set()
    pairs = zip(stream.tokens[1:], written, strict=True)
    wrong = [at for at, (token, got) in enumerate(pairs, 1) if token != got and at not in free]
    if wrong:
        raise RuntimeError(f"the engine left the stream at positions {wrong[:5]}")
