# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The worker side of the simulation: imaginary blocks, rings and histories; no model runs.

It follows SchedulerOutput and StepPlan as vLLM's V1 runner and our Evictor do, and knows at any
time which bytes each cell of each table must hold. The engine around it is in `audited_engine`."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gkv_vllm.engine.plan import PLAN_ATTRIBUTE, Compaction, Selection, StepPlan, WorkerReport
from gkv_vllm.policies.base import Needs

BLOCK = 4
EXACT = "exact"

Cell = tuple[int, int]
"""Block id and offset in the block."""


class Content(NamedTuple):
    """The KV bytes of one token in the layers of one KV cache group."""

    group: int
    position: int
    tokens: int
    """Hash of all tokens up to this one."""
    context: Any
    """EXACT, or what stands for the reduced context that the token saw."""


def token_at(prompt: tuple[int, ...], position: int) -> int:
    """The tokens that the imaginary model generates depend on prompt and position only."""
    if position < len(prompt):
        return prompt[position]
    return (sum(prompt) + position * position) % 50


def score_of(request_id: str, num_tokens: int, group: int, block: int) -> float:
    return random.Random(f"{request_id} {num_tokens} {group} {block}").random()


def survivors(request_id: str, seen: Selection, group: int) -> list[int]:
    """Which of the candidates' tokens stay: any will do, if the same request repeats them."""
    rng = random.Random(f"{request_id} {seen.num_tokens} {group}")
    return sorted(rng.sample(range(len(seen.candidates[0]) * BLOCK), seen.keep * BLOCK))


def cells_of(table: Sequence[int], blocks: Sequence[int]) -> list[Cell]:
    return [(table[block], offset) for block in blocks for offset in range(BLOCK)]


def positions_of(blocks: Sequence[int]) -> list[int]:
    return [block * BLOCK + offset for block in blocks for offset in range(BLOCK)]


@dataclass
class Row:
    """What the worker knows of one request."""

    prompt: tuple[int, ...]
    tables: list[list[int]]
    """One for each KV cache group."""
    num_computed: int
    written: list[list[Content]] = field(default_factory=list)
    """Per group and logical position, what the cell must hold; of no meaning in a hole."""
    hashes: list[int] = field(default_factory=list)
    """Per position the hash of all tokens up to it."""

    def append(self, context: Any) -> None:
        """One token more, computed with this context."""
        position = len(self.hashes)
        before = self.hashes[-1] if self.hashes else 0
        self.hashes.append(hash((before, token_at(self.prompt, position))))
        for group, written in enumerate(self.written):
            written.append(Content(group, position, self.hashes[-1], context))

    def live(self, group: int, start: int = 0) -> list[int]:
        """The logical positions, from `start` on, that are not in holes."""
        table = self.tables[group]
        return [p for p in range(start, self.num_computed) if table[p // BLOCK]]


class Worker:
    """Carries out one step after the other."""

    def __init__(
        self,
        *,
        window: int,
        needs: Needs,
        moves_tokens: bool,
        layer_group_of: list[int],
        check_target: Callable[[str, int, int, int], None],
    ) -> None:
        self.window = window
        self.needs = needs
        self.moves_tokens = moves_tokens
        self.layer_group_of = layer_group_of
        """Of each KV cache group."""
        self.check_target = check_target
        """Called with request, KV cache group, logical block, id: survivors are written there."""
        self.rows: dict[str, Row] = {}
        self.bytes: dict[Cell, Content] = {}
        self.plane: dict[Cell, Any] = {}
        """One number per token: of a history the token it belongs to, or how often it was seen."""
        self.rings: dict[int, dict[int, tuple[str, int]]] = {}
        self.history: dict[int, tuple[int, list[set[int]]] | None] = {}
        """Slot -> epoch that it belongs to, and the blocks it knows per layer group."""
        self.observed: dict[str, int] = {}
        self.moved: defaultdict[str, list[list[int]]] = defaultdict(list)
        """For each compaction of a request, the positions of the tokens that survived it."""
        self.steps = 0

    def step(self, output: Any) -> WorkerReport | None:
        self.steps += 1
        plan: StepPlan = getattr(output, PLAN_ATTRIBUTE, None) or StepPlan()
        for request_id, order in plan.compact.items():
            self._compact(request_id, order)
        for request_id, dropped in plan.drops.items():
            self._drop(request_id, dropped)
        for slot in plan.reset:
            self.rings[slot], self.history[slot] = {}, None
        self._update_states(output)
        for block_id in output.new_block_ids_to_zero or ():
            for offset in range(BLOCK):
                self.bytes.pop((block_id, offset), None)
        # A layer writes the keys and values of the whole batch before it attends, so a request may
        # start on blocks that its neighbour fills in the same step.
        for request_id, count in output.num_scheduled_tokens.items():
            self._write(request_id, count)
        for request_id in output.num_scheduled_tokens:
            self._check_bytes(request_id)
        self._accumulate(plan, output.num_scheduled_tokens)
        self._record(plan, output.num_scheduled_tokens)
        scores = {id_: self._score(id_, seen) for id_, seen in plan.observe.items()}
        events = len(scores) + len(plan.compact)
        return WorkerReport(scores, events, seconds=1e-4) if events else None

    # ---- eviction

    def _compact(self, request_id: str, order: Compaction) -> None:
        row, seen = self.rows[request_id], order.selection
        assert row.num_computed == seen.num_tokens, "compacted later than in its next step"
        self._check_ring(request_id, seen)
        for group in range(len(row.tables)):
            self._check_memory(row, seen, group)
            self._move(request_id, order, group)
            ages = [
                row.written[group][p].position for p in row.live(group) if self._stays(order, p)
            ]
            assert ages == sorted(set(ages)), "survivors out of order, or twice"

    def _stays(self, order: Compaction, position: int) -> bool:
        block = position // BLOCK
        return block in order.targets or block not in order.selection.candidates[0]

    def _move(self, request_id: str, order: Compaction, group: int) -> None:
        row, seen = self.rows[request_id], order.selection
        table, written = row.tables[group], row.written[group]
        (candidates,), fresh = seen.candidates, order.fresh.get(group, {})
        assert set(order.targets) <= set(candidates)
        assert set(fresh) <= set(order.targets)
        kept = survivors(request_id, seen, group)
        sources, positions = cells_of(table, candidates), positions_of(candidates)
        # All are read before any is written: a target may hold a token that goes elsewhere.
        moving = [
            (self.bytes[sources[i]], self.plane.get(sources[i]), written[positions[i]])
            for i in kept
        ]
        for block, block_id in fresh.items():
            table[block] = block_id
        for block in order.targets:
            self.check_target(request_id, group, block, table[block])
        self.moved[request_id].append([expected.position for _, _, expected in moving])
        targets = zip(cells_of(table, order.targets), positions_of(order.targets), strict=True)
        for (cell, position), (content, number, expected) in zip(targets, moving, strict=True):
            self.bytes[cell], self.plane[cell], written[position] = content, number, expected

    def _drop(self, request_id: str, dropped: tuple[list[int], ...]) -> None:
        row = self.rows[request_id]
        seen = row.num_computed if self.moves_tokens else self.observed[request_id]
        for group, table in enumerate(row.tables):
            for block in dropped[self.layer_group_of[group]]:
                assert table[block] != 0, "a hole was dropped again"
                assert (block + 1) * BLOCK <= seen - self.window, "a block of the window went"
                table[block] = 0

    # ---- vLLM's part

    def _update_states(self, output: Any) -> None:
        for request_id in output.finished_req_ids:
            self.rows.pop(request_id, None)
            self.observed.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            assert new.req_id not in self.rows
            prompt, tables = tuple(new.prompt_token_ids), [list(ids) for ids in new.block_ids]
            self.rows[new.req_id] = Row(prompt, tables, new.num_computed_tokens)
            self._adopt_hits(new.req_id)
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            row, new_ids = self.rows[request_id], cached.new_block_ids[i]
            row.num_computed = cached.num_computed_tokens[i]
            if request_id in cached.resumed_req_ids:
                row.tables = [list(ids) for ids in new_ids]
                self._adopt_hits(request_id)
            elif new_ids is not None:
                for table, ids in zip(row.tables, new_ids, strict=True):
                    table.extend(ids)

    def _adopt_hits(self, request_id: str) -> None:
        """What was found in the prefix cache must be this prompt's, computed in full."""
        row = self.rows[request_id]
        row.written, row.hashes = [[] for _ in row.tables], []
        for _ in range(row.num_computed):
            row.append(EXACT)

    def _write(self, request_id: str, count: int) -> None:
        row = self.rows[request_id]
        reduced = any(0 in table for table in row.tables)
        for position in range(row.num_computed, row.num_computed + count):
            row.append((request_id, self.steps) if reduced else EXACT)
            for table, written in zip(row.tables, row.written, strict=True):
                block_id = table[position // BLOCK]
                assert block_id != 0, "a step writes into a hole"
                self.bytes[block_id, position % BLOCK] = written[position]
        row.num_computed += count

    def _check_bytes(self, request_id: str) -> None:
        row = self.rows[request_id]
        assert len(row.hashes) == row.num_computed
        for table, written in zip(row.tables, row.written, strict=True):
            for position, content in enumerate(written):
                block_id = table[position // BLOCK]
                if block_id:
                    assert self.bytes[block_id, position % BLOCK] == content, "foreign bytes"

    # ---- what is kept for the policy

    def _accumulate(self, plan: StepPlan, scheduled: dict[str, int]) -> None:
        """Count for each unprotected live token the queries that saw it, itself included."""
        assert set(plan.accumulate) <= set(scheduled)
        for request_id, protected in plan.accumulate.items():
            row = self.rows[request_id]
            first = row.num_computed - scheduled[request_id]
            for group, table in enumerate(row.tables):
                for position in row.live(group, start=protected):
                    cell = table[position // BLOCK], position % BLOCK
                    so_far = self.plane.get(cell, 0) if position < first else 0
                    self.plane[cell] = so_far + row.num_computed - max(first, position)

    def _record(self, plan: StepPlan, scheduled: dict[str, int]) -> None:
        assert set(plan.record) <= set(scheduled)
        for request_id, recording in plan.record.items():
            row = self.rows[request_id]
            assert recording.num_tokens == row.num_computed
            first = recording.num_tokens - min(self.window, scheduled[request_id])
            for position in range(first, recording.num_tokens):
                self.rings[recording.slot][position % self.window] = (request_id, position)

    def _score(self, request_id: str, observation: Any) -> tuple[int, list[Sequence[float]]]:
        row, epoch, seen = self.rows[request_id], observation.epoch, observation.selection
        assert seen.num_tokens == row.num_computed
        self._check_ring(request_id, seen)
        for group, table in enumerate(row.tables):
            assert all(table[block] for block in seen.candidates[self.layer_group_of[group]])
            self._check_memory(row, seen, group)
        if self.needs.history:
            self._renew_history(epoch, seen)
        self.observed[request_id] = seen.num_tokens
        return epoch, [
            [score_of(request_id, seen.num_tokens, group, block) for block in blocks]
            for group, blocks in enumerate(seen.candidates)
        ]

    def _check_ring(self, request_id: str, seen: Selection) -> None:
        if self.needs.queries:
            assert seen.slot is not None
            window = range(seen.num_tokens - self.window, seen.num_tokens)
            expected = {(request_id, position) for position in window}
            assert set(self.rings[seen.slot].values()) == expected, "a ring without its window"

    def _check_memory(self, row: Row, seen: Selection, group: int) -> None:
        """The numbers kept per token are those of the tokens that lie there now."""
        candidates = seen.candidates[self.layer_group_of[group]]
        cells, positions = cells_of(row.tables[group], candidates), positions_of(candidates)
        contents = [row.written[group][position] for position in positions]
        if self.needs.attention_mass:
            for cell, content in zip(cells, contents, strict=True):
                queries = seen.num_tokens - content.position
                assert self.plane[cell] == queries, "attention of some query was not counted"
        elif self.needs.history and self.moves_tokens:
            scored = seen.remembered * BLOCK
            for cell, content in list(zip(cells, contents, strict=True))[:scored]:
                assert self.plane[cell] == content, "another token's history"
            self.plane.update(zip(cells, contents, strict=True))

    def _renew_history(self, epoch: int, seen: Selection) -> None:
        known = self.history[seen.slot] or (epoch, [set() for _ in seen.candidates])  # type: ignore[index]
        assert known[0] == epoch, "another one's score history"
        for blocks, before in zip(seen.candidates, known[1], strict=True):
            assert [block in before for block in blocks] == [
                place < seen.remembered for place in range(len(blocks))
            ]
            before.update(blocks)
        self.history[seen.slot] = known  # type: ignore[index]
