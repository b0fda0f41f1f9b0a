"""Fixtures of the publishing tests: a local Hub, a client that talks to nothing else, and small artifacts."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

# Read by huggingface_hub when it is imported. The Xet protocol has no local server; the plain one is tested.
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from hub import Hub, User
from publish_data import BASE, CARD, REPO, TOKEN, write_reports

from bagel_compress.build.artifact import Artifact
from bagel_compress.publishing.publishable import Publishable


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tiny model is faster on one thread, and much faster where other programs want the cores too."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub where ann may write to ann/ and to the organisation lab/. The client knows no other place."""
    import huggingface_hub.constants as constants
    import huggingface_hub.utils._http as http

    with Hub() as server:
        server.store.users[TOKEN] = User("ann", orgs=("lab",))
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
        monkeypatch.setattr("bagel_compress.io.hub_client.PAUSE", 0.0)
        clock = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
        monkeypatch.setattr(http, "time", clock)  # the client's back-off is not waited for
        yield server


@pytest.fixture
def fresh_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], Path]:
    """Gives the client an empty download cache, as a stranger has."""
    import huggingface_hub.constants as constants

    def empty() -> Path:
        cache = tmp_path / f"cache{len(list(tmp_path.glob('cache*')))}"
        cache.mkdir()
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        return cache

    return empty


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Callable[[str], Artifact]:
    """Artifacts of the tiny checkpoint by recipe, built once, without reports. Do not change them.

    The shipped recipes promise cards at sizes that the tiny model cannot draw; here they promise the tests' card.
    """
    from bagel_compress.build.compress import compress
    from bagel_compress.build.plan import make_plan
    from bagel_compress.build.recipe import Recipe
    from bagel_compress.io.packaged import find_recipe
    from bagel_compress.source.checkpoint import Checkpoint

    root = tmp_path_factory.mktemp("built")

    def build(recipe: str) -> Artifact:
        checkpoint = Checkpoint.open(tiny)
        chosen = Recipe.load(find_recipe(recipe)).model_copy(update={"targets": (CARD,)})
        return compress(make_plan(checkpoint, chosen), checkpoint, root / recipe)

    return build


@pytest.fixture
def artifact(built: Callable[[str], Artifact], tmp_path: Path) -> Artifact:
    """An NF4 build with reports that pass, of this test's own."""
    folder = tmp_path / "nf4"
    shutil.copytree(built("nf4").path, folder)
    return write_reports(Artifact.open(folder))


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., object]:
    """publish() with the options that tests seldom change."""
    from bagel_compress.publishing.pipeline import PublishRequest, PublishResult
    from bagel_compress.publishing.pipeline import publish as run

    def go(artifact: Publishable, repo: str = REPO, **options: object) -> PublishResult:
        settings = {"base_model": BASE, "receipts": tmp_path / "receipts", **options}
        return run(PublishRequest(artifact.path, repo, **settings))

    return go
