"""A judge: any endpoint that speaks OpenAI's chat completions, asked about texts and pictures.

The key comes from the caller (the command line reads it from the environment), is sent to that host alone and is
neither stored nor shown; redirects are refused, because they would carry it elsewhere. Every answer is kept in
OUT/judge/*.jsonl under a digest of all that was asked, so a run that is killed asks nothing twice, and another picture
or judge is asked anew.
Failures that may pass (429, 5xx, a broken connection) are tried again after 1, 2, 4 ... seconds.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from PIL import Image

from bagel_compress.errors import BenchmarkError
from bagel_compress.evaluate.runner import _append, _appending, read_rows

LOCAL = ("127.0.0.1", "localhost", "::1")
MAX_WAIT = 60.0  # seconds between two attempts
REASKED = 2  # times that an answer without a score is asked for again


@dataclass(frozen=True, slots=True)
class JudgeQuestion:
    """One question to a judge: `parts` are texts and pictures in order; `read` finds the scores or gives None."""

    name: str
    parts: tuple[str | Image.Image | Path, ...]
    read: Callable[[str], Mapping[str, float] | None]
    system: str = ""


@dataclass(frozen=True)
class Judge:
    """`url` is the API's root (https://host/v1). `prices`: per million tokens in and out, to count the cost."""

    url: str
    model: str
    key: str = field(default="", repr=False)
    prices: tuple[float, float] | None = None
    attempts: int = 6
    timeout: float = 120.0
    threads: int = 8
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise BenchmarkError(f"--judge {parts.scheme}://{parts.hostname}: expected a URL such as https://host/v1.")
        if self.key and parts.scheme == "http" and parts.hostname not in LOCAL:
            raise BenchmarkError(f"--judge http://{parts.hostname}: a key is sent over https only; use https.")

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc

    def ask(self, question: JudgeQuestion) -> tuple[str, int, int]:
        """(answer, tokens in, tokens out). Raises BenchmarkError if the endpoint refuses or stays away."""
        request = urllib.request.Request(
            self.url.rstrip("/") + "/chat/completions", json.dumps(self._body(question)).encode(), self._headers()
        )
        why, wait = "", 0.0
        for attempt in range(self.attempts):
            if attempt:
                self.sleep(min(MAX_WAIT, wait))
            wait = float(2**attempt)
            try:
                with _OPENER.open(request, timeout=self.timeout) as response:
                    return _answer(json.load(response))
            except urllib.error.HTTPError as error:
                why = f"HTTP {error.code}"
                if error.code != 429 and error.code < 500:
                    self._fail(f"refused the request ({why})")
                wait = max(wait, _seconds(error.headers.get("Retry-After")))
            except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
                why = type(getattr(error, "reason", error)).__name__
            except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError):
                why = "no chat completion in the answer"
        self._fail(f"gave no answer in {self.attempts} attempts (the last: {why})")

    def _fail(self, why: str) -> NoReturn:
        raise BenchmarkError(
            f"the judge {self.model} at {self.host} {why}; check --judge, --judge-model and the key, and run the same"
            " command again: what it answered is kept."
        )

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        return headers | ({"Authorization": f"Bearer {self.key}"} if self.key else {})

    def _body(self, question: JudgeQuestion) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        for part in question.parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
            else:
                content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_png(part)}"}})
        system = [{"role": "system", "content": question.system}] if question.system else []
        return {"model": self.model, "temperature": 0, "messages": [*system, {"role": "user", "content": content}]}

    def digest(self, question: JudgeQuestion) -> str:
        """Of all that is asked and of whom, but for the key."""
        return hashlib.sha256(json.dumps([self.host, self._body(question)]).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Question name -> scores; names of those whose answers hold none; tokens of all answers that are kept."""

    scores: Mapping[str, Mapping[str, float]]
    unreadable: tuple[str, ...]
    answers: int
    prompt_tokens: int
    completion_tokens: int


def judge_all(judge: Judge, questions: Sequence[JudgeQuestion], folder: Path) -> Verdicts:
    """Asks what is not answered yet, several at a time. An answer without a score is asked for again, twice.

    Raises BenchmarkError where `Judge.ask` does; answers so far are kept.
    """
    kept: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(folder):
        kept.setdefault(row["digest"], []).append(row)
    lock = threading.Lock()
    scores: dict[str, Mapping[str, float]] = {}
    unreadable: list[str] = []
    rows: list[dict[str, Any]] = []

    with _appending(folder / "answers.jsonl") as file:

        def one(question: JudgeQuestion) -> None:
            digest = judge.digest(question)
            told = kept.get(digest, [])
            found = next((s for row in told if (s := question.read(row["answer"])) is not None), None)
            while found is None and len(told) <= REASKED:
                answer, asked, said = judge.ask(question)
                row = {"digest": digest, "name": question.name, "model": judge.model, "answer": answer,
                       "prompt_tokens": asked, "completion_tokens": said}  # fmt: skip
                told = [*told, row]
                with lock:
                    _append(file, row)
                found = question.read(answer)
            with lock:
                rows.extend(told)
                if found is None:
                    unreadable.append(question.name)
                else:
                    scores[question.name] = found

        with ThreadPoolExecutor(judge.threads) as pool:
            try:
                list(pool.map(one, questions))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return Verdicts(
        scores, tuple(sorted(unreadable)), len(rows), sum(r["prompt_tokens"] for r in rows),
        sum(r["completion_tokens"] for r in rows),
    )  # fmt: skip


def _answer(data: Any) -> tuple[str, int, int]:
    text = data["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise ValueError("no text")
    usage = data.get("usage") or {}
    return text, int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)


def _seconds(value: str | None) -> float:
    """Of a Retry-After header; its form as a date is passed over."""
    return float(value) if value and value.isascii() and value.isdecimal() else 0.0


def _png(part: Image.Image | Path) -> str:
    """A picture as base64 PNG."""
    buffer = BytesIO()
    if isinstance(part, Path):
        with Image.open(part) as image:
            image.convert("RGB").save(buffer, "PNG")
    else:
        part.convert("RGB").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)
