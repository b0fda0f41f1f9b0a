"""The page as an API: equal pictures, their settings, and uploads that mean harm."""

from __future__ import annotations

import json
import struct
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bagel_compress.app.settings import settings_of
from bagel_compress.cli import main
from bagel_compress.run.picture_settings import read_settings

PROMPT = "a red circle left of a blue square on a white background"
NANO = Path(__file__).parents[2] / "bagel_compress" / "data" / "BAGEL-nano"


@pytest.fixture(scope="module")
def client(server: Any) -> Any:
    gradio_client = pytest.importorskip("gradio_client")
    return gradio_client.Client(server.url, verbose=False)


def values(tab: str, **changed: Any) -> list[Any]:
    """The controls of a tab with their defaults."""
    changed = {"seed": 7, "num_timesteps": 10} | changed
    return [changed.get(setting.name, setting.default) for setting in settings_of(tab)]


def pixels(path: Any) -> bytes:
    return Image.open(path["path"] if isinstance(path, dict) else path).convert("RGB").tobytes()


def generated(model: Path, out: Path) -> bytes:
    options = ("--size", "32x32", "--seed", "7", "--steps", "10", "--out", str(out))
    assert main(["generate", str(model), PROMPT, *options]) == 0
    return pixels(out)


def test_two_builds_draw_what_generate_draws(client: Any, server: Any, tmp_path: Path, capsys: Any) -> None:
    first, second, _, verdict, _ = client.predict(PROMPT, *values("draw"), api_name="/compare")
    assert pixels(first) == generated(NANO, tmp_path / "a.png")
    assert pixels(second) == generated(server.build, tmp_path / "b.png")
    assert pixels(first) != pixels(second)
    assert verdict.startswith("PSNR")


def test_a_picture_holds_the_settings_it_was_drawn_with(client: Any, tmp_path: Path, capsys: Any) -> None:
    file, _, status, seed = client.predict(PROMPT, False, *values("draw", timestep_shift=2.5), api_name="/draw")
    assert (status.partition(" in")[0], seed) == ("Done", 7)
    assert main(["settings", file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["prompt"], found["seed"], found["width"]) == ("BAGEL-nano", PROMPT, 7, 32)
    assert (found["flow"]["timestep_shift"], found["thinking"]) == (2.5, None)
    assert generated(NANO, tmp_path / "c.png") != pixels(file)
    assert read_settings(tmp_path / "c.png")["flow"]["num_timesteps"] == 10  # generate keeps them too


def test_a_batch_has_a_picture_for_each_line(client: Any) -> None:
    gallery, status = client.predict("a red circle\n\na blue square", *values("draw"), api_name="/batch")
    assert [entry["caption"] for entry in gallery] == ["a red circle", "a blue square"]
    assert status.startswith("2 pictures")


def bomb(path: Path) -> Path:
    """A PNG that says it has 200 megapixels."""
    header = struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    path.write_bytes(data)
    return path


def test_uploads_that_are_no_pictures_are_refused_in_one_sentence(client: Any, tmp_path: Path) -> None:
    from gradio_client import handle_file

    svg, html = tmp_path / "a.svg", tmp_path / "b.png"
    svg.write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    html.write_text("<html><script>alert(1)</script></html>")
    for file, said in (
        (bomb(tmp_path / "c.png"), "more than 50 megapixels"),
        (svg, "no picture"),
        (html, "no picture"),
    ):
        with pytest.raises(Exception, match=said) as refused:
            client.predict(handle_file(str(file)), [], "x", False, *values("edit"), api_name="/edit")
        assert str(refused.value).count("\n") == 0


def test_no_path_of_the_server_is_read(client: Any, server: Any) -> None:
    secret = {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(Exception, match=r"(?i)path|allowed|file"):
        client.predict(secret, [], "x", False, *values("edit"), api_name="/edit")
    with pytest.raises(Exception, match=r"(?i)path|allowed|file"):
        client.predict(None, [secret], "x", False, *values("edit"), api_name="/edit")
    for path in ("/etc/hostname", str(NANO / "config.json"), str(server.build / "manifest.json"), "../../etc/hostname"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server.url}gradio_api/file={path}", timeout=10)
        assert refused.value.code in (403, 404)
