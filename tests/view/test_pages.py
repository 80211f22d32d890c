# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The pages hold the record's own numbers, any text is only text in them, and they need nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gkv_vllm.record import read_record
from gkv_vllm.view import __main__ as view
from gkv_vllm.view import forgot
from gkv_vllm.view.fates import fates_of
from gkv_vllm.view.page import page, unpack

from .drawn import PROTECTED, Drawn, draw

CHROMIUM = shutil.which("chromium")
HOSTILE = "</script><script>document.title = 'gone'</script><img src=x onerror=alert(1)>&amp;@DATA@"


class Parts(HTMLParser):
    """The tags of a page, and what stands in each script element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])


def assert_self_contained(text: str) -> None:
    parts = Parts(text)
    assert [tag for tag, _ in parts.tags if tag in ("link", "img", "iframe", "object")] == []
    assert not any({"src", "href"} & set(attributes) for _, attributes in parts.tags)
    assert re.findall(r"https?://|@import|url\(|fetch\(", text) == []
    policy = next(a["content"] for t, a in parts.tags if t == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def run(*arguments: object) -> int:
    return view.main([str(argument) for argument in arguments])


@pytest.fixture
def drawn(tmp_path: Path) -> Drawn:
    return draw(tmp_path, request_id=HOSTILE, preempted_before=4)


def test_a_keepmap_embeds_what_the_records_say(drawn: Drawn, tmp_path: Path) -> None:
    other = draw(tmp_path, granularity="block", seed=1)
    out = tmp_path / "map.html"
    assert run("keepmap", drawn.path, other.path, "-o", out) == 0
    assert_self_contained(out.read_text())
    records = Parts(out.read_text()).data["records"]
    assert len(records) == 2
    for record, of in zip(records, (drawn, other), strict=True):
        fates = fates_of(read_record(of.path))
        assert np.array_equal(unpack(record["left"]), fates.left)
        assert record["events"] == fates.events
        assert (record["request_id"], record["tokens"]) == (
            of.header.request_id,
            len(of.token_ids),
        )
        assert (record["layers"], record["kv_heads"]) == (3, 2)
        assert record["prompt_tokens"] == 3


def test_a_text_embeds_what_the_record_says(drawn: Drawn, demo_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "text.html"
    assert run("forgot", drawn.path, "--model", demo_model, "-o", out) == 0
    assert_self_contained(out.read_text())
    data, fates = Parts(out.read_text()).data, fates_of(read_record(drawn.path))
    assert data["ids"] == drawn.token_ids
    assert len(data["texts"]) == len(drawn.token_ids)
    assert np.array_equal(unpack(data["left"]), fates.left)
    assert np.array_equal(unpack(data["scores"]), fates.scores, equal_nan=True)
    assert np.array_equal(unpack(data["ranks"]), fates.ranks())


def test_hostile_text_stays_text(drawn: Drawn) -> None:
    texts = [HOSTILE] * len(drawn.token_ids)
    written = forgot.html(fates_of(read_record(drawn.path)), texts)
    parts = Parts(written)
    assert parts.data["texts"] == texts
    assert parts.data["request_id"] == HOSTILE
    assert len(parts.scripts) == 2
    assert "img" not in {tag for tag, _ in parts.tags}
    assert "<title>&lt;b&gt;</title>" in page("forgot", "<b>", {})


def test_scripts_never_make_markup_of_a_text() -> None:
    folder = Path(view.__file__).parent / "assets"
    scripts = "".join(path.read_text() for path in folder.glob("*.js"))
    assert "textContent" in scripts
    assert (
        re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", scripts) == []
    )


def test_a_token_that_ends_inside_a_character_leaves_its_text_to_the_next() -> None:
    text = "né 漢🎉 x"
    ids = list(text.encode())

    def decode(some: Any) -> str:
        return bytes(some).decode(errors="replace")

    found = forgot.pieces(ids, decode)
    assert "".join(found) == text
    assert found[1:3] == ["", "é"]
    assert len(found) == len(ids)


def test_the_demo_models_tokens_add_up_to_their_text(demo_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    text = "Once upon a time in a café: “naïve” <b>tags</b> & 漢字 🎉\n\nNew line.<|im_end|> " * 2
    ids = tokenizer(text)["input_ids"]
    drawn = draw(tmp_path, token_ids=ids)
    texts = forgot.texts_of(fates_of(read_record(drawn.path)), str(demo_model))
    assert "".join(texts) == text
    assert len(texts) == len(ids)


def test_a_png_is_drawn_for_any_event(drawn: Drawn, tmp_path: Path) -> None:
    pictures = set()
    for arguments in ([], ["--event", 1], ["--event", 6]):
        out = tmp_path / "map.png"
        assert run("keepmap", drawn.path, "-o", out, *arguments) == 0
        pictures.add(out.read_bytes())
        assert out.read_bytes().startswith(b"\x89PNG")
    assert len(pictures) == 2, "the last event is the sixth, and differs from the first"


def bad(path: Path, tmp_path: Path, demo_model: Path) -> dict[str, tuple[list[object], str]]:
    """Command lines, and what each is told."""
    html, text = tmp_path / "x.html", tmp_path / "hello.npz"
    text.write_text("hello")
    unknown = draw(tmp_path, token_ids=[10_000] * 80).path
    empty = draw(tmp_path, events=0).path
    return {
        "no such file": (["keepmap", tmp_path / "no.npz", "-o", html], "there is no file"),
        "no record": (["keepmap", text, "-o", html], "is not a record of evictions"),
        "one of several": (["keepmap", path, text, "-o", html], "is not a record of evictions"),
        "ending": (["keepmap", path, "-o", tmp_path / "x.gif"], "must end in .html or .png"),
        "event of a page": (["keepmap", path, "-o", html, "--event", 1], "--event is for a PNG"),
        "event": (["keepmap", path, "-o", tmp_path / "x.png", "--event", 7], "has events 1 to 6"),
        "no event": (["keepmap", empty, "-o", tmp_path / "x.png"], "nothing was evicted"),
        "no folder to write to": (
            ["keepmap", path, "-o", tmp_path / "no" / "x.html"],
            "No such file or directory",
        ),
        "text of no record": (["forgot", text, "-o", html], "is not a record of evictions"),
        "model": (["forgot", path, "--model", tmp_path / "none", "-o", html], "is no folder"),
        "no tokenizer": (["forgot", path, "--model", tmp_path, "-o", html], "has no tokenizer"),
        "another model": (
            ["forgot", unknown, "--model", demo_model, "-o", html],
            "has no token 10000, which",
        ),
    }


def test_bad_input_gets_one_sentence_and_exit_code_2(
    tmp_path: Path, demo_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = draw(tmp_path).path
    for name, (arguments, says) in bad(path, tmp_path, demo_model).items():
        assert run(*arguments) == 2, name
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("python -m gkv_vllm.view: error: "), name
        assert says in line, name
    assert not (tmp_path / "x.html").exists()


# ---- in a browser, where there is one


def dumped(path: Path, asked: str) -> str:
    """The page's elements once its script has run."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--virtual-time-budget=10000", f"--user-data-dir={path.parent / 'profile'}"),
            f"file://{path}#{asked}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def said(dom: str, element: str) -> str:
    (text,) = re.findall(rf'id="{element}"[^>]*>([^<]*)<', dom)
    return text


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_who_still_holds_a_token(
    drawn: Drawn, demo_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "text.html"
    run("forgot", drawn.path, "--model", demo_model, "-o", out)
    for event, position in ((1, PROTECTED + 3), (3, PROTECTED + 9), (5, PROTECTED + 30)):
        dom = dumped(out, f"eviction={event + 1}&position={position}")
        heads = [(i, h) for i in range(3) for h in range(2)]
        holding = [head for head in heads if position in drawn.held[event, *head]]
        count = {0: "no head", 6: "all 6 heads"}.get(len(holding), f"{len(holding)} of 6 heads")
        assert f"seen by {count}" in said(dom, "token")
        assert f"(id {drawn.token_ids[position]})" in said(dom, "token")
        mean = np.mean(drawn.scores[event, position]) if (event, position) in drawn.scores else None
        score = re.search(r"score (-?[\d.e-]+)", said(dom, "token"))
        assert (score is None) == (mean is None)
        if score is not None:
            assert float(score[1]) == pytest.approx(mean, rel=1e-3)
        gone = [
            p
            for p in range(drawn.computed[event])
            if not any(p in drawn.held[event, *head] for head in heads)
        ]
        assert f"{len(gone)} forgotten by every head" in said(dom, "where")
        future = len(drawn.token_ids) - drawn.computed[event]
        assert len(re.findall(r'class="future"', dom)) == future
        assert "<title>What the model forgot</title>" in dom


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_reads_a_cell_of_the_chosen_record(drawn: Drawn, tmp_path: Path) -> None:
    other = draw(tmp_path, granularity="block", seed=1)
    out = tmp_path / "map.html"
    run("keepmap", drawn.path, other.path, "-o", out)
    position, event = PROTECTED + 2, 2
    dom = dumped(out, f"record=1&eviction={event + 1}&head=3&position={position}")
    (lost,) = [e for e in range(6) if position in other.lost[e, 1, 1]]
    assert "blocks of 4" in said(dom, "about")
    expected = (
        "kept"
        if lost > event
        else "evicted now"
        if lost == event
        else f"before (eviction {lost + 1})"
    )
    assert said(dom, "cell").endswith(expected)
    assert said(dom, "cell").startswith(f"Layer 1, KV head 1, position {position}: ")
