# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""When each token left each layer and head, and how it was scored: what all pictures show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gkv_vllm.record import Event, Record, RecordError

NEVER = 65535
"""In `Fates.left`: the token stayed."""
NO_RANK = 255
"""In `ranks`: the token did not compete."""


@dataclass(frozen=True, eq=False)
class Fates:
    """One request, from its record. A head is one layer's KV head: layer * kv_heads + head."""

    record: Record
    events: list[dict[str, int]]
    """Per event: `epoch`, `num_tokens`, `protected` and `recent`, as the record has them."""
    left: np.ndarray
    """[epochs, heads, tokens] uint16: the event (counted from 0 over all epochs) in which the head
    lost the token, or NEVER. A preemption starts the next epoch, and brings all tokens back."""
    scores: np.ndarray
    """[events, tokens] float32: mean over the kept sets in which the token competed, else NaN."""

    @property
    def heads(self) -> int:
        return self.left.shape[1]

    @property
    def tokens(self) -> int:
        return self.left.shape[2]

    def kept(self, event: int) -> np.ndarray:
        """Who still holds what right after an event, [heads, tokens] bool; later tokens, too."""
        return self.left[self.events[event]["epoch"]] > event

    def ranks(self) -> np.ndarray:
        """Scores as shares of the others that are lower, [events, tokens]: 0 to 254, or NO_RANK."""
        ranks = np.full(self.scores.shape, NO_RANK, dtype=np.uint8)
        for rank, scores in zip(ranks, self.scores, strict=True):
            competed = np.flatnonzero(~np.isnan(scores))
            if len(competed):
                below = np.searchsorted(np.sort(scores[competed]), scores[competed])
                rank[competed] = np.rint(254 * below / max(len(competed) - 1, 1))
        return ranks


def fates_of(record: Record) -> Fates:
    """Follow the events of a record; RecordError if they name tokens that it does not have."""
    tokens, heads = len(record.token_ids), record.header.layers * record.header.kv_heads
    left = np.full((record.preemptions + 1, heads, tokens), NEVER, dtype=np.uint16)
    scores = np.full((len(record), tokens), np.nan, dtype=np.float32)
    events = []
    for index, event in enumerate(record.events()):
        positions, units = _tokens(record, event)
        if positions.size and not 0 <= positions.min() <= positions.max() < tokens:
            raise RecordError(
                f"{record.path} is damaged: event {index} names a token beyond the {tokens} it has"
            )
        gone = record.header.per_head(_at(~event.kept, units)).reshape(heads, -1)
        where = record.header.per_head(positions).reshape(heads, -1)
        of_epoch = left[event.epoch]
        head, place = np.nonzero(gone)
        of_epoch[head, where[head, place]] = index
        scores[index] = _mean(positions, _at(event.scores, units), tokens)
        numbers = ("epoch", "num_tokens", "protected", "recent")
        events.append({name: getattr(event, name) for name in numbers})
    return Fates(record, events, left, scores)


def _tokens(record: Record, event: Event) -> tuple[np.ndarray, int]:
    """The positions of all tokens that competed, and how many make a unit."""
    if record.header.granularity != "block":
        return event.positions, 1
    size = record.header.block_size
    inside = event.positions[..., None] + np.arange(size)
    return inside.reshape(*event.positions.shape[:2], -1), size


def _at(of_units: np.ndarray, size: int) -> np.ndarray:
    """What is said of a unit, for each of its tokens."""
    return np.repeat(of_units, size, axis=-1)


def _mean(positions: np.ndarray, scores: np.ndarray, tokens: int) -> Any:
    count = np.bincount(positions.ravel(), minlength=tokens)
    total = np.bincount(positions.ravel(), weights=scores.ravel(), minlength=tokens)
    return np.divide(total, count, out=np.full(tokens, np.nan), where=count > 0)
