# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The recorder against messages written by hand: what stands in the file, and what never waits."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gkv_vllm.config import KVPolicyConfig
from gkv_vllm.engine import recorder as module
from gkv_vllm.engine.plan import Compaction, Observation, Selection, StepPlan, WorkerReport
from gkv_vllm.engine.recorder import Recorder
from gkv_vllm.record import Event, Record, RecordWriter, read_record

BLOCK, WINDOW = 4, 2
IDS = [7, 8, 9, 10, 11]

Make = Callable[..., Recorder]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes a recorder of a model of two layers with two KV heads."""
    made = []

    def make(*, groups: tuple[int, int] = (0, 0), **settings: Any) -> Recorder:
        config = KVPolicyConfig(
            policy="gkv", window=WINDOW, record_positions=str(tmp_path), **settings
        )
        of_model = {"model": "m", "kv_heads": 2, "layer_groups": list(groups), "block_size": BLOCK}
        made.append(Recorder(tmp_path, config, **of_model))
        return made[-1]

    yield make
    for one in made:
        one.close()


def begin(recorder: Recorder, request_id: str = "a") -> None:
    recorder.begin(request_id, recorder.config.for_request({"kv_record": 1}))


def end(recorder: Recorder, request_id: str = "a") -> None:
    recorder.end(request_id, token_ids=IDS, prompt_tokens=2, finish="stopped")
    recorder.flush()


def read(folder: Path) -> tuple[Record, list[Event]]:
    (path,) = folder.glob("*")
    record = read_record(path)
    return record, list(record.events())


def selection(
    candidates: list[int], *, keep: int, num_tokens: int, remembered: int = 0, event: int = 0
) -> Selection:
    return Selection(None, num_tokens, 1, (candidates,), keep, remembered, event, 0)


def told(recorder: Recorder, seen: Selection, request_id: str = "a") -> int | None:
    """The plan says to compact; the number that the worker has to report it under."""
    order = Compaction(seen, seen.candidates[0][: seen.keep])
    recorder.planned(StepPlan(compact={request_id: order}))
    return order.record


def report(**fields: Any) -> WorkerReport:
    return WorkerReport(**{"scores": {}, "events": 1, "seconds": 0.0, "kept": {}, **fields})


def outcome(keep: list[int], units: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of two layers and heads these places, shifted by one in the last head."""
    kept = np.array([[keep, keep], [keep, [place + 1 for place in keep]]])
    scores = np.zeros((2, 2, units), dtype=np.float32)
    np.put_along_axis(scores, kept, 1.0, -1)
    return kept, scores


FIRST = selection([1, 2], keep=1, num_tokens=15)
"""Tokens 4 to 11 compete, and 13 on are the window's."""
SECOND = selection([1, 3], keep=1, num_tokens=19, remembered=1, event=1)
"""The four that survived, in block 1, against tokens 12 to 15."""


def test_positions_are_followed_through_moves(make: Make, tmp_path: Path) -> None:
    recorder = make()
    begin(recorder)
    for seen, keep in ((FIRST, [0, 2, 3, 6]), (SECOND, [1, 2, 3, 5])):
        number = told(recorder, seen)
        recorder.reported(report(kept={number: outcome(keep, 8)}))
    end(recorder)
    record, (first, second) = read(tmp_path)
    assert record.header.shape == (2, 2)
    assert first.positions.tolist() == [[[*range(4, 12)]] * 2] * 2
    assert first.survivors.tolist() == [[[4, 6, 7, 10]] * 2, [[4, 6, 7, 10], [5, 7, 8, 11]]]
    assert second.positions[0, 0].tolist() == [4, 6, 7, 10, 12, 13, 14, 15]
    assert second.positions[1, 1].tolist() == [5, 7, 8, 11, 12, 13, 14, 15]
    assert second.survivors[0, 0].tolist() == [6, 7, 10, 13]
    assert second.survivors[1, 1].tolist() == [8, 11, 12, 14]
    assert np.array_equal(second.scores == 1.0, second.kept)
    assert (first.number, first.num_tokens, first.protected, first.recent) == (0, 15, 4, 12)
    assert (second.number, second.num_tokens, second.recent) == (1, 19, 16)


def test_reports_may_come_late_and_where_none_may_stay_there_is_none(
    make: Make, tmp_path: Path
) -> None:
    recorder = make()
    begin(recorder)
    first = told(recorder, FIRST)
    nothing_stays = selection([1, 3], keep=0, num_tokens=19, remembered=1, event=1)
    assert told(recorder, nothing_stays) is None
    last = told(recorder, selection([4, 5], keep=1, num_tokens=27, event=2))
    for number, keep in ((first, [0, 2, 3, 6]), (last, [0, 1, 2, 3])):
        recorder.reported(report(kept={number: outcome(keep, 8)}))
    end(recorder)
    _, events = read(tmp_path)
    assert [event.number for event in events] == [0, 1, 2]
    assert events[1].positions[0, 0].tolist() == [4, 6, 7, 10, 12, 13, 14, 15]
    assert not events[1].kept.any()
    assert np.isnan(events[1].scores).all()
    assert events[2].positions[0, 0].tolist() == [*range(16, 24)]


@pytest.mark.parametrize(("scope", "shape"), [("layer", (2, 1)), ("all", (1, 1))])
def test_a_shared_kept_set_is_stored_once(
    make: Make, tmp_path: Path, scope: str, shape: tuple[int, int]
) -> None:
    recorder = make(scope=scope)
    begin(recorder)
    keep, scores = outcome([0, 2, 3, 6], 8)
    shared = keep[: shape[0], : shape[1]], scores[: shape[0], : shape[1]]
    recorder.reported(report(kept={told(recorder, FIRST): shared}))
    end(recorder)
    record, (event,) = read(tmp_path)
    assert event.kept.shape == (*shape, 8)
    assert record.header.per_head(event.survivors).tolist() == [[[4, 6, 7, 10]] * 2] * 2


BLOCKS = Selection(0, 19, 1, ([1, 2, 3], [1, 2, 3]), 2, 0, 0, 0)
SCORES = [[0.5, 0.25, 1.0], [0.125, 0.75, 0.5]]


def test_blocks_are_recorded_by_layer_group_when_they_leave(make: Make, tmp_path: Path) -> None:
    recorder = make(groups=(1, 0), granularity="block", layer_groups=2)
    begin(recorder)
    recorder.planned(StepPlan(observe={"a": Observation(5, BLOCKS)}))
    recorder.reported(report(scores={"a": (4, [[0.0] * 3] * 2)}))  # of an earlier life
    recorder.reported(report(scores={"a": (5, SCORES)}))
    recorder.planned(StepPlan(drops={"a": ([2], [1]), "b": ([9], [9])}))
    end(recorder)
    record, (event,) = read(tmp_path)
    assert event.positions.tolist() == [[[4, 8, 12]]] * 2
    assert event.scores.tolist() == [[SCORES[0]], [SCORES[1]]]
    assert event.survivors.tolist() == [[[4, 12]], [[8, 12]]]
    # Layer 0 is in group 1.
    assert record.header.per_head(event.survivors)[:, 0].tolist() == [[8, 12], [4, 12]]


def test_a_plan_that_drops_and_observes_again_is_about_two_events(
    make: Make, tmp_path: Path
) -> None:
    """As in a prefill, where every chunk may make the request due."""
    recorder = make(granularity="block", groups=(0, 1))
    begin(recorder)
    again = Selection(0, 27, 1, ([1, 3, 4, 5], [2, 3, 4, 5]), 2, 2, 1, 0)
    recorder.planned(StepPlan(observe={"a": Observation(5, BLOCKS)}))
    recorder.reported(report(scores={"a": (5, SCORES)}))
    recorder.planned(StepPlan(drops={"a": ([2], [1])}, observe={"a": Observation(5, again)}))
    recorder.reported(report(scores={"a": (5, [[1.0, 2.0, 3.0, 4.0]] * 2)}))
    recorder.planned(StepPlan(drops={"a": ([1, 3], [2, 3])}))
    end(recorder)
    _, events = read(tmp_path)
    assert [event.num_tokens for event in events] == [19, 27]
    assert events[0].survivors.tolist() == [[[4, 12]], [[8, 12]]]
    assert events[1].survivors.tolist() == [[[16, 20]]] * 2


def test_a_preemption_starts_over_and_late_reports_belong_to_the_life_before(
    make: Make, tmp_path: Path
) -> None:
    recorder = make()
    begin(recorder)
    number = told(recorder, FIRST)
    recorder.restart("a")
    recorder.reported(report(kept={number: outcome([0, 2, 3, 6], 8)}))
    recorder.reported(report(kept={told(recorder, FIRST): outcome([0, 1, 2, 3], 8)}))
    end(recorder)
    record, events = read(tmp_path)
    assert record.preemptions == 1
    assert [(event.epoch, event.number) for event in events] == [(0, 0), (1, 0)]
    assert events[1].positions[0, 0].tolist() == [*range(4, 12)]


def test_scores_of_blocks_that_a_preemption_overtook_make_no_event(
    make: Make, tmp_path: Path
) -> None:
    recorder = make(granularity="block", groups=(0, 1))
    begin(recorder)
    recorder.planned(StepPlan(observe={"a": Observation(5, BLOCKS)}))
    recorder.reported(report(scores={"a": (5, SCORES)}))
    recorder.restart("a")
    recorder.planned(StepPlan(drops={"a": ([2], [1])}))
    end(recorder)
    assert read(tmp_path)[1] == []


def test_who_did_not_ask_is_not_reported(make: Make, tmp_path: Path) -> None:
    recorder = make()
    assert told(recorder, FIRST, "b") is None
    begin(recorder)
    assert told(recorder, FIRST, "b") is None
    recorder.restart("b")
    recorder.end("b", token_ids=IDS, prompt_tokens=1, finish="stopped")
    recorder.reported(report(kept={12: outcome([0, 1, 2, 3], 8)}))
    end(recorder)
    assert read(tmp_path)[1] == []


def test_what_was_not_reported_by_the_end_is_left_out(make: Make, tmp_path: Path) -> None:
    recorder = make()
    begin(recorder)
    number = told(recorder, FIRST)
    end(recorder)
    recorder.reported(report(kept={number: outcome([0, 2, 3, 6], 8)}))
    record, events = read(tmp_path)
    assert (events, record.truncated, record.token_ids.tolist()) == ([], False, IDS)
    assert (record.prompt_tokens, record.finish) == (2, "stopped")


@pytest.mark.parametrize("request_id", ["../../etc/passwd", "/abs", "..", "a b\n<x>", "x" * 300])
def test_no_request_id_leads_out_of_the_folder(make: Make, tmp_path: Path, request_id: str) -> None:
    recorder = make()
    for _ in range(2):  # the second finds the name taken
        begin(recorder, request_id)
        end(recorder, request_id)
    found = sorted(tmp_path.iterdir())
    assert len(found) == 2
    assert [read_record(path).header.request_id for path in found] == [request_id] * 2


# ---- the disk


def many_events(recorder: Recorder, count: int) -> None:
    for event in range(count):
        number = told(recorder, selection([1, 2], keep=1, num_tokens=15, event=event))
        recorder.reported(report(kept={number: outcome([0, 2, 3, 6], 8)}))


def test_nobody_waits_for_a_slow_disk(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released, add = threading.Event(), RecordWriter.add

    def slow(self: RecordWriter, event: Event) -> None:
        released.wait()
        add(self, event)

    monkeypatch.setattr(RecordWriter, "add", slow)
    recorder = make()
    begin(recorder)
    many_events(recorder, 3 * module.WAITING_EVENTS)
    released.set()
    end(recorder)
    record, events = read(tmp_path)
    assert record.truncated
    assert [event.number for event in events] == [*range(len(events))]
    assert module.WAITING_EVENTS / 2 < len(events) <= module.WAITING_EVENTS + 2


def test_a_record_ends_at_its_limit(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RECORD_BYTES", 4000)
    monkeypatch.setattr(module, "WAITING_EVENTS", 10**6)
    recorder = make()
    begin(recorder)
    many_events(recorder, 100)
    end(recorder)
    record, events = read(tmp_path)
    assert record.truncated
    assert 0 < len(events) < 30
    # Names and lengths of the members follow at the end.
    assert record.path.stat().st_size < 4000 + 2000 + 400 * len(events)


def test_a_full_folder_takes_no_new_record(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "FOLDER_BYTES", 1)
    recorder = make()
    begin(recorder, "a")
    end(recorder, "a")
    assert len([*tmp_path.iterdir()]) == 1
    with caplog.at_level(logging.WARNING, logger=module.logger.name):
        monkeypatch.setattr(module.logger, "propagate", True)
        caplog.handler.setLevel(0)
        module.logger.addHandler(caplog.handler)
        begin(recorder, "b")
        many_events(recorder, 1)
        end(recorder, "b")
        module.logger.removeHandler(caplog.handler)
    assert "request b is not recorded" in caplog.text
    assert len([*tmp_path.iterdir()]) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError()], ids=repr)
def test_a_disk_that_is_full_costs_the_record_only(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(self: RecordWriter, event: Event) -> None:
        raise error

    monkeypatch.setattr(RecordWriter, "add", full)
    recorder = make()
    begin(recorder, "a")
    many_events(recorder, 2)
    end(recorder, "a")
    assert [*tmp_path.iterdir()] == []
    begin(recorder, "b")
    end(recorder, "b")
    assert len([*tmp_path.iterdir()]) == 1


def test_the_file_is_plain_numpy_and_json(make: Make, tmp_path: Path) -> None:
    recorder = make()
    begin(recorder)
    recorder.reported(report(kept={told(recorder, FIRST): outcome([0, 2, 3, 6], 8)}))
    end(recorder)
    (path,) = tmp_path.iterdir()
    archive = np.load(path, allow_pickle=False)
    about = json.loads(archive["record.json"])
    assert about["events"] == [
        {"number": 0, "epoch": 0, "num_tokens": 15, "protected": 4, "recent": 12}
    ]
    arrays = {name: archive[f"events/0/{name}"] for name in ("positions", "scores", "kept")}
    assert {name: array.dtype.name for name, array in arrays.items()} == {
        "positions": "int32",
        "scores": "float32",
        "kept": "bool",
    }
    assert archive["token_ids"].tolist() == IDS
