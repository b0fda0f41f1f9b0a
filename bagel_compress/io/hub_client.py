"""Access to the Hugging Face Hub: the client, the parser of repository ids, clear errors.

Everything that talks to the Hub goes through this module: checkpoints (source/checkpoint_download), published builds
(run/fetch) and publishing. huggingface_hub finds the user's token itself (HF_TOKEN, or what `hf auth login` stored);
it is never read, printed or kept here, and `scrubbed` removes anything that looks like one from messages.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar

from bagel_compress.errors import HubError
from bagel_compress.io.patience import within

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REPO_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@(\S+))?")  # owner/name, owner/name@branch, owner/name@refs/pr/1
SECRET = re.compile(r"hf_\w{8,}|(?<=[Bb]earer )\S+|(?<=://)[^/@\s]+(?=@)")  # tokens, and logins in an address
TRIES = 3  # attempts at a request that may be repeated
PAUSE = 1.0  # seconds before the second attempt, doubled before the third
ANSWER = 120.0  # seconds in which a request for a few lines has to be answered
LONGEST = 64 << 20  # bytes of an answer that is not a file
NAMING = ("X-Linked-ETag", "ETag", "X-Repo-Commit")  # headers after which huggingface_hub names files in its cache
NAME = re.compile(r"[\w.+=-]{1,200}", re.ASCII)
STALLED, LEAST = 300.0, 64 << 10  # a download is aborted if fewer than LEAST bytes arrive in STALLED seconds
DOWNLOADS = 4  # files that are downloaded at a time
T = TypeVar("T")


class UnreachableError(HubError):
    """There was no answer: the network or the Hub is down, or HF_HUB_OFFLINE is set."""


class RefusedAnswerError(Exception):
    """An answer is compressed, which was not asked for, longer than LONGEST, or names a file in the cache by a path.

    `failures` makes a HubError of it.
    """


def parse_repo_id(text: str) -> tuple[str, str | None] | None:
    """`owner/name` or `owner/name@revision` -> repository and revision (None if absent); None if it is no such id.

    A revision is a branch, a tag, a commit or a pull request (`refs/pr/1`).
    """
    match = REPO_ID.fullmatch(text)
    return None if match is None or ".." in match[1] else (match[1], match[2])


def offline() -> bool:
    """Whether the user forbids network access (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def split_repo_id(text: str, revision: str | None = None) -> tuple[str, str | None]:
    """`parse_repo_id`, where `revision` replaces the one in `text`. Raises HubError if `text` is no repository id."""
    parsed = parse_repo_id(text)
    if parsed is None:
        raise HubError(
            f"{text} is neither a local folder nor the name of a repository; expected owner/name or"
            " owner/name@revision."
        )
    return parsed[0], revision or parsed[1]


def client() -> HfApi:
    """huggingface_hub's client, with this program's name and version in its requests."""
    from importlib.metadata import version

    from huggingface_hub import HfApi

    return HfApi(library_name="bagel-compress", library_version=version("bagel-compress"))


def listing(repo: str, revision: str | None) -> tuple[str, set[str]]:
    """The commit that a revision (None: main) points to now, and the names of the files in it. Raises HubError."""
    with failures(f"{repo} cannot be read"):
        info = answered(lambda: client().model_info(repo, revision=revision))
        return str(info.sha), {str(sibling.rfilename) for sibling in info.siblings or ()}


def download(repo: str, revision: str | None, names: Iterable[str]) -> dict[str, Path]:
    """Name -> path in the client's cache, of files of one revision (None: main); missing ones are downloaded.

    An interrupted download is resumed. The client compares only sizes, so callers have to check digests. Raises
    HubError.
    """
    from huggingface_hub import hf_hub_download

    def one(name: str) -> tuple[str, Path]:
        def call() -> str:
            return insist(lambda: hf_hub_download(repo, name, revision=revision or "main"))

        return name, Path(within(STALLED, call, partial(_bytes_in_cache, repo), least, stopped))

    least, stopped = 0 if _xet_is_used() else LEAST, Event()
    with (
        failures(f"the download of {repo} broke off"),
        ThreadPoolExecutor(DOWNLOADS, "download") as pool,
    ):
        try:
            return dict(pool.map(one, names))
        finally:
            stopped.set()  # ends the waiting for running downloads after Ctrl-C
            pool.shutdown(wait=False, cancel_futures=True)


def answered(call: Callable[[], T]) -> T:
    """The result of a small request, repeated as by `insist`. Raises TimeoutError if it takes longer than ANSWER."""
    return within(ANSWER, lambda: insist(call))


def _xet_is_used() -> bool:
    """Whether files are downloaded by the Xet protocol, which writes them in large pieces and has its own timeouts."""
    from huggingface_hub import constants

    return importlib.util.find_spec("hf_xet") is not None and not constants.HF_HUB_DISABLE_XET


def _bytes_in_cache(repo: str) -> int:
    """Bytes of a repository's files in the client's cache, including unfinished ones."""
    from huggingface_hub import constants

    total = 0
    for path in Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}", "blobs").glob("*"):
        with contextlib.suppress(OSError):  # renamed meanwhile
            total += path.stat().st_size
    return total


@contextmanager
def failures(what: str) -> Iterator[None]:
    """Inside, every error of the client becomes a HubError "<what>: <reason>; <what to do>." without secrets.

    It is an UnreachableError if there was no answer. Compressed answers are refused before they are unpacked, and long
    ones before they are in memory.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    _refuse_senseless_answers()
    silent: tuple[type[Exception], ...] = (OfflineModeIsEnabled, LocalEntryNotFoundError, *transport_errors())
    try:
        yield
    except RefusedAnswerError as error:
        raise HubError(
            f"{what}: the Hub's answer {scrubbed(first_line(error))}; check HF_ENDPOINT and the proxy."
        ) from None
    except GatedRepoError:
        raise HubError(f"{what}: it is gated; accept its terms on its page and log in.") from None
    except RepositoryNotFoundError:
        raise HubError(
            f"{what}: there is no such repository, or your token may not see it; check its name, or log in."
        ) from None
    except HfHubHTTPError as error:
        raise HubError(f"{what}: {_status(error)}.") from None
    except LocalTokenNotFoundError:
        raise HubError(f"{what}: you are not logged in; run `hf auth login` or set HF_TOKEN.") from None
    except silent as error:
        raise UnreachableError(
            f"{what}: the Hub cannot be reached ({scrubbed(first_line(error))}); run the same command again later."
        ) from None
    except TimeoutError as error:
        raise UnreachableError(
            f"{what}: the Hub sends almost no data ({error}); run the same command again later to continue."
        ) from None
    except (AttributeError, KeyError, IndexError, TypeError, AssertionError, RecursionError, OverflowError) as error:
        raise HubError(
            f"{what}: the Hub's answer is not valid ({scrubbed(first_line(error))}); run the same command again"
            " later, or tell the owner of the repository."
        ) from None
    except OSError as error:  # a full disk, an impossible file name, a downloaded file of the wrong size
        raise HubError(f"{what}: {scrubbed(first_line(error))}; run the same command again.") from None
    except (HFValidationError, ValueError) as error:
        raise HubError(f"{what}: {scrubbed(' '.join(str(error).split()))}") from None


def _refuse_senseless_answers() -> None:
    """Makes huggingface_hub ask for plain answers and refuse others, and long ones: 100 KB of gzip can be 100 MB.

    It calls files and folders of its cache as `NAMING` headers say, so those may be no paths.

    This is set in the factory of its HTTP sessions, for it replaces a session after an error. Xet's own client, which
    only downloads files, is not affected.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    factory: Callable[[], Any] = _http._GLOBAL_CLIENT_FACTORY
    if getattr(factory, "refuses_senseless", False):
        return

    def plain() -> Any:
        session = factory()
        session.headers["Accept-Encoding"] = "identity"
        hooks = session.event_hooks
        session.event_hooks = {**hooks, "response": [_expect_sense, *hooks.get("response", ())]}
        return session

    plain.refuses_senseless = True  # type: ignore[attr-defined]
    set_client_factory(plain)


def _expect_sense(response: Any) -> None:
    """Called with every answer when its headers have arrived and nothing of its body has been read."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    method, path = response.request.method, response.request.url.path
    if encoding not in ("", "identity") and method != "HEAD":
        raise RefusedAnswerError(f"is compressed ({encoding[:40]}), which was not asked for and may unpack to any size")
    for header in NAMING if method == "HEAD" else ():
        name = response.headers.get(header, "x").removeprefix("W/").strip('"')
        if not NAME.fullmatch(name) or not name.strip("."):
            raise RefusedAnswerError(f"has the {header} {name[:40]!r}, after which no file can be called")
    if not (method == "GET" and response.status_code in (200, 206) and not path.startswith("/api/")):  # no file
        response.stream = _bounded(response.stream)


def _bounded(stream: Any) -> Any:
    """A stream of an answer that ends in RefusedAnswerError after LONGEST bytes."""
    base = next(kind for kind in type(stream).__mro__ if kind.__name__ == "SyncByteStream")

    class Bounded(base):  # type: ignore[misc,valid-type]
        def __iter__(self) -> Iterator[bytes]:
            total = 0
            for part in stream:
                total += len(part)
                if total > LONGEST:
                    raise RefusedAnswerError(f"is longer than {LONGEST >> 20} MiB, which none has to be")
                yield part

        def close(self) -> None:
            stream.close()

    return Bounded()


def insist(call: Callable[[], T]) -> T:
    """The result of a request that may be repeated: up to TRIES attempts after transient errors, with pauses between.

    The client repeats some of its requests itself; which ones depends on its version.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    retried: tuple[type[Exception], ...] = (HfHubHTTPError, LocalEntryNotFoundError, *transport_errors())
    for attempt in range(TRIES - 1):
        try:
            return call()
        except retried as error:
            if not transient(error):
                raise
            time.sleep(PAUSE * 2**attempt)
    return call()


def transient(error: BaseException) -> bool:
    """Whether a repetition can succeed: after no answer, a server error (5xx), or too many requests (429)."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code is None or code >= 500 or code == 429


def transport_errors() -> tuple[type[Exception], ...]:
    """The base error of huggingface_hub's HTTP library; which library that is depends on its version."""
    errors: list[type[Exception]] = []
    for library in ("httpx2", "httpx", "requests"):
        with contextlib.suppress(ImportError):
            module = importlib.import_module(library)
            errors.append(module.RequestException if library == "requests" else module.HTTPError)
    return tuple(errors)


def scrubbed(text: str) -> str:
    """The text with anything that could be a token replaced by ***."""
    return SECRET.sub("***", text)


def first_line(error: Exception) -> str:
    """The first line of an error's text, without a full stop; the name of its class if it has no text."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")


def _status(error: Exception) -> str:
    """The meaning of an HTTP error for the user, and what to do."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    known = {
        401: "the token is invalid or has expired; run `hf auth login` again",
        403: "the token may not do that; create one with write access to this repository",
        404: "the Hub does not know this revision or file",
        409: "the repository changed at this moment; run the same command again",
        412: "somebody else changed it since the upload began; check the repository and run the same command again",
        429: "the Hub limits the rate of requests (429); run the same command later to continue",
    }
    if code in known:
        return known[code]
    if code is not None and code >= 500:
        return f"the Hub answered {code} repeatedly; run the same command again later to continue"
    return scrubbed(first_line(error))
