# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""A planner with an imaginary worker that only keeps track of positions; no engine, no vLLM."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gkv_vllm.config import KVPolicyConfig, RequestPolicy
from gkv_vllm.engine.plan import Compaction, Selection, StepPlan, WorkerReport
from gkv_vllm.engine.planner import EvictionPlanner, choose_targets
from gkv_vllm.policies.base import Needs

BLOCK = 4
# In blocks: budget 4, due at 16 + 8 = 24 unprotected tokens; recorded above 24 - 4 = 20.
BUDGET, INTERVAL, WINDOW, DUE = 16, 8, 4, 24

NOTHING = Needs()
QUERIES = Needs(queries=True, history=True)
HISTORY = Needs(history=True)
MASS = Needs(attention_mass=True)

Score = Callable[[str, int, int], float]


def descending(request_id: str, num_tokens: int, block: int) -> float:
    """Newer blocks score lower, so that the newest candidates go first."""
    return -float(block)


def by_chance(request_id: str, num_tokens: int, block: int) -> float:
    return random.Random(f"{request_id} {num_tokens} {block}").random()


@dataclass
class Life:
    """What one request lived through."""

    num_tokens: int = 0
    recorded: list[int] = field(default_factory=list)
    """`num_tokens` of the steps in which it was recorded."""
    selections: list[Selection] = field(default_factory=list)
    """One for each time that it fell due."""
    drops: list[tuple[list[int], ...]] = field(default_factory=list)
    compactions: list[Compaction] = field(default_factory=list)
    scored: set[int] = field(default_factory=set)
    """Blocks of the first layer group that were candidates of an eviction which happened."""

    @property
    def observed(self) -> list[int]:
        return [selection.num_tokens for selection in self.selections]

    @property
    def dropped(self) -> list[list[int]]:
        """What the first layer group lost."""
        return [groups[0] for groups in self.drops]

    def holes(self, group: int = 0) -> set[int]:
        return {block for groups in self.drops for block in groups[group]}

    def live(self, group: int = 0) -> set[int]:
        return set(range(-(-self.num_tokens // BLOCK))) - self.holes(group)


class Harness:
    """Steps a planner as the scheduler does, and checks each selection against the rules."""

    def __init__(
        self,
        *,
        needs: Needs = QUERIES,
        granularity: str = "block",
        layer_groups: int = 1,
        slots: int = 8,
        score: Score = by_chance,
        window: int = WINDOW,
        interval: int = INTERVAL,
        lag: int = 0,
    ) -> None:
        config = KVPolicyConfig(
            policy="gkv",
            budget=BUDGET,
            interval=interval,
            window=window,
            granularity=granularity,
            layer_groups=layer_groups,
        )
        self.planner = EvictionPlanner(config, needs, block_size=BLOCK, num_slots=slots)
        self.score = score
        self.lag = lag
        """Steps that are scheduled before the scores of one arrive."""
        self.free_blocks = 100
        self.shared: set[tuple[str, int]] = set()
        """(request id, logical block) that some other request holds as well."""
        self.lives: dict[str, Life] = {}
        self.on_the_way: list[WorkerReport | None] = [None] * lag
        self.rings: dict[int, dict[int, tuple[str, int]]] = {}

    def add(
        self,
        request_id: str,
        prompt: int = 0,
        *,
        protect: str = "prompt",
        evict: bool = True,
        key: int = 0,
        budget: int = BUDGET,
    ) -> None:
        policy = RequestPolicy(evict=evict, budget=budget, protect=protect)
        self.planner.add(request_id, prompt_tokens=prompt, policy=policy, key=key)
        self.lives[request_id] = Life()

    def step(self, *request_ids: str, tokens: int = 1) -> StepPlan:
        """One engine step in which each of these requests computes `tokens` tokens."""
        drops = self._evict()
        for request_id in request_ids:
            self.lives[request_id].num_tokens += tokens
        plan = self.planner.plan((id_, self.lives[id_].num_tokens) for id_ in request_ids)
        assert plan.drops == drops
        for request_id, order in plan.compact.items():
            self._check_compaction(request_id, order)
        for request_id, groups in drops.items():
            life = self.lives[request_id]
            life.drops.append(groups)
            life.scored.update(life.selections[-1].candidates[0])
        self._record(plan, tokens)
        self._follow_selections(request_ids)
        self.on_the_way.append(self._scores(plan))
        self.deliver()
        return plan

    def deliver(self) -> None:
        arrived = self.on_the_way.pop(0)
        if arrived is not None:
            self.planner.accept(arrived)

    def run(self, *request_ids: str, until: int, tokens: int = 1) -> None:
        while any(self.lives[id_].num_tokens < until for id_ in request_ids):
            self.step(*request_ids, tokens=tokens)

    # ---- before the step is scheduled

    def _evict(self) -> dict[str, tuple[list[int], ...]]:
        if not self.planner.config.moves_tokens:
            return self.planner.evictions()
        drops: dict[str, tuple[list[int], ...]] = {}
        for request_id, selection in self.planner.compactions().items():
            gone = self._compact(request_id, selection)
            if gone is not None:
                drops[request_id] = (gone,)
        return drops

    def _compact(self, request_id: str, selection: Selection) -> list[int] | None:
        assert selection is self.lives[request_id].selections[-1]
        (candidates,) = selection.candidates
        private = [(request_id, block) not in self.shared for block in candidates]
        places, fresh = choose_targets(private, selection.keep)
        if len(fresh) > self.free_blocks:
            self.planner.postpone(request_id, "no_free_block")
            return None
        targets = [candidates[place] for place in places]
        renewed = {0: {candidates[place]: 900 + place for place in fresh}} if fresh else {}
        self.planner.compacted(request_id, targets, renewed)
        return [block for block in candidates if block not in targets]

    def _check_compaction(self, request_id: str, order: Compaction) -> None:
        life = self.lives[request_id]
        assert order.selection is life.selections[-1]
        assert len(order.targets) == order.selection.keep
        assert set(order.targets) <= set(order.selection.candidates[0])
        life.compactions.append(order)

    # ---- once it is

    def _record(self, plan: StepPlan, tokens: int) -> None:
        window = self.planner.config.window
        for slot in plan.reset:
            self.rings[slot] = {}
        for request_id, recording in plan.record.items():
            self.lives[request_id].recorded.append(recording.num_tokens)
            ring = self.rings[recording.slot]
            first = recording.num_tokens - min(window, tokens)
            for position in range(first, recording.num_tokens):
                ring[position % window] = (request_id, position)

    def _follow_selections(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            track, life = self.planner.tracks.get(request_id), self.lives[request_id]
            pending = track.pending if track is not None else None
            if pending is not None and not any(pending is seen for seen in life.selections):
                self._check_selection(request_id, pending)
                life.selections.append(pending)

    def _check_selection(self, request_id: str, seen: Selection) -> None:
        life, track = self.lives[request_id], self.planner.tracks[request_id]
        window, n = self.planner.config.window, life.num_tokens
        assert (seen.num_tokens, seen.protected, seen.key) == (n, track.protected, track.key)
        for group, candidates in enumerate(seen.candidates):
            assert candidates == sorted(
                block
                for block in life.live(group)
                if block >= seen.protected and (block + 1) * BLOCK <= n - window
            )
            unprotected = [block for block in life.live(group) if block >= seen.protected]
            assert len(unprotected) - (len(candidates) - seen.keep) == track.budget
        remembered = [block in life.scored for block in seen.candidates[0]]
        assert remembered == [place < seen.remembered for place in range(len(remembered))]
        assert seen.event == len(life.drops)
        if self.planner.needs.queries:
            assert seen.slot is not None
            expected = {(request_id, position) for position in range(n - window, n)}
            assert set(self.rings[seen.slot].values()) == expected, "a ring without its window"

    def _scores(self, plan: StepPlan) -> WorkerReport | None:
        scores: dict[str, tuple[int, list[Sequence[float]]]] = {}
        for request_id, observation in plan.observe.items():
            seen = observation.selection
            assert seen is self.lives[request_id].selections[-1]
            scores[request_id] = (
                observation.epoch,
                [
                    [self.score(in_group(request_id, group), seen.num_tokens, b) for b in blocks]
                    for group, blocks in enumerate(seen.candidates)
                ],
            )
        return WorkerReport(scores, len(scores), seconds=1e-3) if scores else None


def in_group(request_id: str, group: int) -> str:
    """What a `Score` calls a request in one of its layer groups."""
    return f"{request_id}.{group}" if group else request_id
