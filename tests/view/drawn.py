# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Records of random evictions, made without an engine, and what each head held by plain sets."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gkv_vllm.record import Event, Header, RecordWriter

BLOCK, WINDOW, PROTECTED, GROWTH, KEEP = 4, 3, 4, 8, 8
"""In tokens: after each growth KEEP tokens of those that compete stay."""
RECENT = 5

Head = tuple[int, int, int]
"""An event, a layer and a KV head."""


@dataclass
class Drawn:
    """One record, and what its events did."""

    path: Path
    header: Header
    token_ids: list[int]
    computed: list[int] = field(default_factory=list)
    held: dict[Head, set[int]] = field(default_factory=dict)
    """Positions below `computed` that the head still held after the event."""
    lost: dict[Head, set[int]] = field(default_factory=dict)
    """Those that it lost in this event."""
    scores: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    """By event and position: in each kept set in which the token competed."""


def draw(
    folder: Path,
    *,
    granularity: str = "token",
    scope: str = "head",
    events: int = 6,
    preempted_before: int | None = None,
    layers: int = 3,
    kv_heads: int = 2,
    request_id: str = "request",
    model: str = "m",
    token_ids: list[int] | None = None,
    seed: int = 0,
) -> Drawn:
    header = Header(
        request_id=request_id,
        model=model,
        policy="gkv",
        granularity=granularity,
        scope=scope,
        protect="prompt",
        budget=16,
        interval=GROWTH,
        window=WINDOW,
        block_size=BLOCK,
        layers=layers,
        kv_heads=kv_heads,
        layer_groups=[layer % 2 for layer in range(layers)],
    )
    rng = random.Random(seed)
    length = PROTECTED + KEEP + GROWTH * events + RECENT + 2
    ids = token_ids or [rng.randrange(5, 250) for _ in range(length)]
    writer = RecordWriter(folder, header, limit=1 << 30)
    drawn = Drawn(writer.path, header, ids)
    unit = BLOCK if granularity == "block" else 1
    epoch, first, stayed, last_end = 0, 0, np.empty((*header.shape, 0), dtype=np.int32), PROTECTED
    for index in range(events):
        if index == preempted_before:
            epoch, first, stayed, last_end = 1, index, stayed[..., :0], PROTECTED
        end = PROTECTED + KEEP + GROWTH * (index + 1)
        new = np.arange(last_end, end, unit, dtype=np.int32)
        positions = np.concatenate([stayed, np.broadcast_to(new, (*header.shape, len(new)))], -1)
        scores = np.array([rng.uniform(-1, 1) for _ in range(positions.size)], dtype=np.float32)
        scores = scores.reshape(positions.shape)
        kept = np.zeros(positions.shape, dtype=bool)
        np.put_along_axis(kept, np.argsort(scores, -1)[..., -(KEEP // unit) :], True, -1)
        event = Event(index - first, epoch, end + RECENT, PROTECTED, end, positions, scores, kept)
        writer.add(event)
        note(drawn, index, event, unit)
        stayed, last_end = event.survivors, end
    writer.close(
        token_ids=np.array(ids), prompt_tokens=3, preemptions=epoch, finish="length_capped"
    )
    return drawn


def note(drawn: Drawn, index: int, event: Event, unit: int) -> None:
    """What the event did, told once more without arrays."""
    header = drawn.header
    drawn.computed.append(event.num_tokens)
    around = {*range(event.protected), *range(event.recent, event.num_tokens)}
    for layer in range(header.layers):
        for head in range(header.kv_heads):
            row, column = (layer, head) if header.scope == "head" else (layer, 0)
            if header.scope == "all":
                row = 0
            if header.granularity == "block":
                row, column = header.layer_groups[layer], 0
            stay, go = set(around), set()
            for place, position in enumerate(event.positions[row, column].tolist()):
                tokens = range(position, position + unit)
                (stay if event.kept[row, column, place] else go).update(tokens)
            drawn.held[index, layer, head], drawn.lost[index, layer, head] = stay, go
    for row in range(header.shape[0]):
        for column in range(header.shape[1]):
            for place, position in enumerate(event.positions[row, column].tolist()):
                for token in range(position, position + unit):
                    scores = drawn.scores.setdefault((index, token), [])
                    scores.append(float(event.scores[row, column, place]))
