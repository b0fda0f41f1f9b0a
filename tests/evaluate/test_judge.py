"""Judges against a local endpoint: what is asked, kept, retried, refused and made of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import miniature
import pytest
from PIL import Image

from bagel_compress.errors import BenchmarkError
from bagel_compress.evaluate.benchmarks import benchmark_info
from bagel_compress.evaluate.evaluate import read_items
from bagel_compress.evaluate.judge import Judge, JudgeQuestion, judge_all
from bagel_compress.evaluate.judged import read_prompts, score_judged
from bagel_compress.evaluate.runner import picture_of
from bagel_compress.evaluate.values import figure
from bagel_compress.io.packaged import resource

KEY = "sk-very-secret"
NANO = resource("BAGEL-nano")
Reply = Callable[[dict[str, Any]], tuple[int, str]]  # body -> HTTP status, the judge's words


class Stub:
    """An endpoint whose words a test decides."""

    def __init__(self) -> None:
        self.reply: Reply = lambda body: (200, "score: 3/5")
        self.raw: bytes | None = None  # a whole reply in place of the judge's words
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.bodies.append(body)
                stub.keys.add(self.headers.get("Authorization"))
                status, words = stub.reply(body)
                usage = {"prompt_tokens": 1000, "completion_tokens": 10}
                data = json.dumps({"choices": [{"message": {"content": words}}], "usage": usage}).encode()
                data = data if stub.raw is None else stub.raw
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", f"{stub.url}/elsewhere")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def judge(self, **more: Any) -> Judge:
        return Judge(self.url, "stub-1", KEY, (2.0, 10.0), **{"sleep": lambda seconds: None, "threads": 2, **more})


@pytest.fixture
def stub() -> Iterator[Stub]:
    made = Stub()
    threading.Thread(target=made.server.serve_forever, daemon=True).start()
    yield made
    made.server.shutdown()
    made.server.server_close()


def text_of(body: dict[str, Any]) -> str:
    return " ".join(part["text"] for part in body["messages"][-1]["content"] if part["type"] == "text")


def pictures_of(body: dict[str, Any]) -> int:
    return sum(part["type"] == "image_url" for part in body["messages"][-1]["content"])


def third(answer: str) -> dict[str, float] | None:
    return {"score": 3.0} if "3" in answer else None


def judged(name: str, stub: Stub, folder: Path, **more: Any) -> tuple[dict[str, float], Any]:
    """Scores of a miniature whose pictures are all one scene."""
    data, drawn = folder / "data", folder / "drawn.png"
    if not data.exists():
        miniature.MAKE[name](data)
        drawn.write_bytes(miniature.png(3))
    items = read_items(benchmark_info(name), data, 1).items
    values, use = score_judged(
        benchmark_info(name), items, lambda item: drawn, data, folder / "out", stub.judge(**more)
    )
    return {n: round(figure(values, n).value, 6) for n in values.names()}, use


def test_wise_is_asked_once_with_its_own_words_and_scored(stub: Stub, tmp_path: Path) -> None:
    stub.reply = lambda body: (200, "**Consistency:** 2\nRealism: 1\nAesthetic Quality: 0")
    scores, use = judged("wise", stub, tmp_path)
    assert scores == {"Cultural": 0.8, "Time": 0.8, "Biology": 0.8, "overall": 0.8}  # (0.7 * 2 + 0.2 * 1) / 2
    assert text_of(stub.bodies[0]) == "P: a red circle E: a disc"
    assert [pictures_of(body) for body in stub.bodies] == [1, 1, 1]
    assert stub.keys == {f"Bearer {KEY}"}
    assert (use.answers, use.prompt_tokens, use.cost) == (3, 3000, pytest.approx((3000 * 2 + 30 * 10) / 1e6))
    assert judged("wise", stub, tmp_path)[0] == scores
    assert len(stub.bodies) == 3  # nothing was asked twice
    (tmp_path / "drawn.png").write_bytes(miniature.png(4))
    judged("wise", stub, tmp_path)
    assert len(stub.bodies) == 6  # other pictures are asked about anew
    kept = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert KEY.encode() not in kept
    assert KEY not in repr(stub.judge())


def test_gedit_takes_the_least_of_each_and_the_root_of_their_product(stub: Stub, tmp_path: Path) -> None:
    stub.reply = lambda body: (200, '{"score": [9, 4], "reasoning": "x"}' if pictures_of(body) == 2 else
                               '```json\n{"score": [9, 10]}\n```')  # fmt: skip
    scores, _ = judged("gedit", stub, tmp_path)
    assert (scores["semantics"], scores["quality"], scores["overall"]) == (4, 9, 6)
    assert any("do make it blue" in text_of(body) for body in stub.bodies)


def test_imgedit_averages_the_lines_with_a_number(stub: Stub, tmp_path: Path) -> None:
    stub.reply = lambda body: (200, "Brief reasoning: fine\nPrompt Compliance: 5\nVisual Quality: 3\nPhysics: 3")
    assert judged("imgedit", stub, tmp_path)[0] == {"style": 3.67, "overall": 3.67}
    assert text_of(stub.bodies[0]) == "Rate blue"
    assert pictures_of(stub.bodies[0]) == 2


def test_kris_asks_by_category_and_scales_to_a_hundred(stub: Stub, tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> tuple[int, str]:
        text = text_of(body)
        if text.startswith("dual_evaluation"):
            return 200, '{"instruction_score": 5, "knowledge_score": 1}'
        name = "instruction" if "instruction" in text.split()[0] else text.split()[0].partition("_")[0]
        name = {"consist": "consistency"}.get(name, name)
        return 200, json.dumps({f"{name}_score": 5 if name == "quality" else 3, "reason": "r"})

    stub.reply = reply
    scores, _ = judged("kris", stub, tmp_path)
    assert scores == {
        "Natural Science": 62.5,  # 50, 100, 100, 0
        "Attribute Perception": round(200 / 3, 6), "Temporal Prediction": round(200 / 3, 6),
        "Spatial Perception": round(200 / 3, 6), "overall": round((250 + 3 * 200) / 13, 6),
    }  # fmt: skip
    texts = [text_of(body) for body in stub.bodies]
    assert sum(text.startswith("view_instruction_following") for text in texts) == 1
    assert max(pictures_of(body) for body in stub.bodies) == 3
    assert any('change it {"score": 1}' in text for text in texts)  # doubled braces are single ones


def test_rise_is_all_or_nothing_and_weighted(stub: Stub, tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> tuple[int, str]:
        full = "logical" in text_of(body) or text_of(body).startswith("consist")
        return 200, f"because\n\n**Final Score**: {5 if full else 1}"

    stub.reply = reply
    scores, _ = judged("rise", stub, tmp_path)
    assert scores["accuracy"] == pytest.approx(100 / 3)  # the logical one alone
    assert scores["logical_reasoning score"] == 100
    assert scores["temporal_reasoning score"] == 2.5  # (0.3 * 5 + 0.5 + 0.2) / 2 = 1.1 of 5
    assert scores["spatial_reasoning score"] == 0  # (0.3 + 0.5 + 0.2) / 2 is raised to 1


def test_failures_that_pass_are_tried_again_with_backoff(stub: Stub, tmp_path: Path) -> None:
    states, waits = [429, 503, 200], list[float]()
    stub.reply = lambda body: (states.pop(0), "3")
    judge = stub.judge(sleep=waits.append)
    found = judge_all(judge, [JudgeQuestion("q", ("what", Image.new("RGB", (4, 4))), third)], tmp_path)
    assert found.scores == {"q": {"score": 3}}
    assert waits == [1, 2]


@pytest.mark.parametrize(("status", "asked"), [(401, 1), (404, 1), (302, 1), (500, 3)])
def test_an_endpoint_that_refuses_is_one_sentence_without_the_key(
    stub: Stub, tmp_path: Path, status: int, asked: int
) -> None:
    stub.reply = lambda body: (status, KEY)
    with pytest.raises(BenchmarkError, match=rf"stub-1 at 127.0.0.1:\d+ .*HTTP {status}") as caught:
        judge_all(stub.judge(attempts=3), [JudgeQuestion("q", ("what",), third)], tmp_path)
    assert KEY not in str(caught.value)
    assert len(stub.bodies) == asked  # a redirect is not followed


def test_an_answer_without_a_score_is_asked_for_again_and_then_counted(stub: Stub, tmp_path: Path) -> None:
    words = ["what a nice picture", "3"]
    stub.reply = lambda body: (200, words.pop(0))
    assert judge_all(stub.judge(), [JudgeQuestion("q", ("what",), third)], tmp_path / "a").scores == {"q": {"score": 3}}
    stub.reply = lambda body: (200, "as a language model, I")
    found = judge_all(stub.judge(), [JudgeQuestion("q", ("what",), third)], tmp_path / "b")
    assert (found.scores, found.unreadable, found.answers) == ({}, ("q",), 3)
    with pytest.raises(BenchmarkError, match=r"3 of 3 answers cannot be used"):
        judged("wise", stub, tmp_path)


NONSENSE = (
    "", "9" * 5000, "score: 99/5", "\u0663", '{"score": [5, NaN]}', "Final Score: " + "5" * 5000, "[" * 100_000,
    "Visual Quality: " + "4" * 5000, "Consistency: 9 Realism: 9 Aesthetic Quality: 9",
)  # fmt: skip


@pytest.mark.parametrize("words", NONSENSE, ids=range(len(NONSENSE)))
@pytest.mark.parametrize("name", ["wise", "gedit", "imgedit", "kris", "rise"])
def test_nonsense_is_no_score(stub: Stub, tmp_path: Path, name: str, words: str) -> None:
    stub.reply = lambda body: (200, words)
    with pytest.raises(BenchmarkError, match=r"the judge stub-1: (\d+) of \1 answers cannot be used"):
        judged(name, stub, tmp_path)


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"choices": [{"message": {"content": "3"}}], "usage": '
                                  b'{"prompt_tokens": Infinity}}', b"<html>", b'{"choices": []}', b"\xff"])  # fmt: skip
def test_an_endpoint_that_is_no_judge_is_one_sentence(stub: Stub, tmp_path: Path, body: bytes) -> None:
    stub.raw = body
    with pytest.raises(BenchmarkError, match=r"no chat completion in the answer"):
        judge_all(stub.judge(attempts=2), [JudgeQuestion("q", ("what",), third)], tmp_path)


def test_few_answers_without_a_score_are_counted_and_many_end_the_run(
    cli: Callable[..., tuple[int, str, str]], stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user sees it. What is drawn is not the question here, so nothing is."""
    monkeypatch.setenv("BAGEL_JUDGE_KEY", KEY)
    monkeypatch.setattr("bagel_compress.evaluate.evaluate.open_any", lambda *_: None)
    monkeypatch.setattr("bagel_compress.evaluate.runner._draw", _scenes)
    data, out = miniature.wise(tmp_path / "data"), tmp_path / "out"
    row = {"Explanation": "a disc", "Subcategory": "Horizontal time"}
    rows = [{**row, "prompt_id": i, "Prompt": f"thing {i}"} for i in range(1, 151)]
    for number, name in enumerate(("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")):
        miniature.put(data / f"{name}.json", rows[50 * number : 50 * (number + 1)])
    good = "Consistency: 2 Realism: 1 Aesthetic Quality: 1"
    stub.reply = lambda body: (200, "I like it" if "thing 7 " in text_of(body) else good)
    asked = ("evaluate", "wise", NANO, "--data", data, "--out", out, "--judge", stub.url, "--judge-model")
    code, text, err = cli(*asked, "one")
    assert code == 0, err
    assert "152 answers, 1 unreadable" in text  # it was asked for three times
    assert KEY not in err + text + (out / "report.json").read_text()
    stub.reply = lambda body: (200, "I like it")
    code, text, err = cli(*asked, "another")
    assert (code, text) == (2, "")
    assert "the judge another: 150 of 150 answers cannot be used, at most 1 % may be; the first: 1; 10; 100." in err


def _scenes(settings: object, sampler: object, part: list[Any], out: Path) -> None:
    for _, item, _ in part:
        miniature.put(picture_of(out, item), miniature.png(3))


def test_a_killed_run_asks_only_what_is_left(stub: Stub, tmp_path: Path) -> None:
    questions = [JudgeQuestion(str(i), (f"what {i}",), third) for i in range(4)]
    stub.reply = lambda body: (401, "") if len(stub.bodies) > 2 else (200, "3")
    with pytest.raises(BenchmarkError):
        judge_all(stub.judge(threads=1), questions, tmp_path)
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"digest": "cut sho')
    stub.bodies.clear()
    stub.reply = lambda body: (200, "3")
    assert len(judge_all(stub.judge(), questions, tmp_path).scores) == 4
    assert len(stub.bodies) == 2


def test_a_key_goes_over_https_or_to_this_machine_only() -> None:
    with pytest.raises(BenchmarkError, match="over https only"):
        Judge("http://judge.example/v1", "m", KEY)
    with pytest.raises(BenchmarkError, match="expected a URL"):
        Judge("judge.example", "m")


def test_prompts_that_are_missing_are_named(stub: Stub, tmp_path: Path) -> None:
    miniature.imgedit(tmp_path / "data")
    (tmp_path / "drawn.png").write_bytes(miniature.png(3))
    miniature.put(tmp_path / "data" / "singleturn" / "judge_prompt.json", {"add": "x"})
    with pytest.raises(BenchmarkError, match="hold no style"):
        judged("imgedit", stub, tmp_path)
    (tmp_path / "data" / "singleturn" / "judge_prompt.json").unlink()
    with pytest.raises(BenchmarkError, match=r"judge_prompt\.json .*put it there"):
        judged("imgedit", stub, tmp_path)
    miniature.put(tmp_path / "p.py", "x = (")
    with pytest.raises(BenchmarkError, match="not readable Python"):
        read_prompts(tmp_path / "p.py")
