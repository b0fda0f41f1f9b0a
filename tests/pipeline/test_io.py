"""Atomic writes, names that stay inside their folder, and the one reader of YAML files."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import EpsImagePlugin, Image
from PIL.PngImagePlugin import PngInfo
from pydantic import Field

from bagel.json_file import small_bytes
from bagel_compress import open_model
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.manifest import MANIFEST
from bagel_compress.build.recipe import Recipe
from bagel_compress.errors import ArtifactError, BagelCompressError, InputError, RecipeError, TargetError
from bagel_compress.exporting.manifest import ExportFolder
from bagel_compress.io.atomic import atomic_file, atomic_path, write_atomic
from bagel_compress.io.packaged import find_recipe
from bagel_compress.io.pictures import MAX_PIXELS, open_picture, read_picture
from bagel_compress.io.safe_paths import check_names, exists, stays_inside
from bagel_compress.io.yaml_model import FrozenModel, load_yaml, meaning_digest, parse_yaml
from bagel_compress.parity.trace import TraceFile
from bagel_compress.run.picture_settings import KEY, read_settings
from bagel_compress.run.target import Target
from bagel_compress.source.adapter_config import AdapterConfig
from bagel_compress.source.checkpoint import Checkpoint


class Part(FrozenModel):
    size: int = Field(gt=0)
    kind: str = Field("small", alias="class")


class Tree(FrozenModel):
    name: str
    parts: tuple[Part, ...] = ()
    best: Part | None = None


def write_half(path: Path) -> None:
    with atomic_file(path) as file:
        file.write(b"half of the next")
        raise KeyError


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "made" / "report.json"
    with atomic_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    with pytest.raises(KeyError):
        write_half(path)
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_text_is_utf_8_with_the_line_ends_it_has(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.md", "é\n")
    assert (tmp_path / "a.md").read_bytes() == b"\xc3\xa9\n"


@pytest.mark.skipif(os.name != "posix", reason="/dev/null is a file of POSIX systems")
def test_a_device_is_written_to_and_not_replaced() -> None:
    with atomic_path(Path(os.devnull)) as path:
        assert path == Path(os.devnull)
    assert Path(os.devnull).is_char_device()


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "C:/x", "a\\..\\x", "x:stream", "", "."])
def test_names_that_lead_out_of_a_folder(name: str) -> None:
    assert not stays_inside(name)
    with pytest.raises(RecipeError, match="points outside its folder"):
        check_names(["fine.txt", name], Path("listing.json"), RecipeError)


@pytest.mark.parametrize("name", ["a", "a/b.safetensors", "..a", "a..b/c", ".hidden"])
def test_names_that_stay(name: str) -> None:
    assert stays_inside(name)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: a\npartz: []", "f has an unknown key 'partz' (did you mean parts?); keys here are name, parts, best."),
        ("name: a\nbest: {size: 1, clas: x}",
         "f has an unknown key 'clas' (did you mean class?); keys here are size, class."),
        ("name: a\nparts: [{size: 1}, {size: 1, siz: 2}]",
         "f part 2 has an unknown key 'siz' (did you mean size?); keys here are size, class."),
        ("name: a\nparts: [{class: x}]", "f part 1 has no size; it is required."),
        ("name: a\nbest: {size: 0}", "f: best.size: input should be greater than 0, found 0."),
        ("parts: []", "f has no name; it is required."),
        ("[]", "f holds a list, expected a mapping with the keys name, parts, best."),
    ],
)  # fmt: skip
def test_a_fault_is_one_sentence_with_the_keys_of_its_place(text: str, says: str) -> None:
    with pytest.raises(TargetError) as caught:
        parse_yaml(Tree, text, "f", TargetError)
    assert str(caught.value) == says


def test_a_file_that_is_not_there_or_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"^tree .*a\.yaml cannot be read"):
        load_yaml(Tree, tmp_path / "a.yaml", "tree", TargetError)
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(TargetError, match="is not YAML") as caught:
        load_yaml(Tree, tmp_path / "a.yaml", "tree", TargetError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("a: " + "[" * 60 + "]" * 60, "50 levels of nesting"),
        ("[" * 100_000, "is not YAML"),
        ("a: " + "9" * 5000, "is not YAML"),
        ("# " + "x" * 200_000, "more than 131072"),
    ],
)
def test_yaml_that_is_short_and_means_much(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "hostile.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=says):
        Recipe.load(file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names on this system")
def test_a_pipe_is_no_file_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / MANIFEST)
    for opens in (Artifact.open, ExportFolder.open):
        with pytest.raises(ArtifactError, match="has no"):
            opens(tmp_path)
    for read in (Recipe.load, Target.load, TraceFile.open, Checkpoint.open, read_picture, AdapterConfig.read):
        with pytest.raises(BagelCompressError):
            read(tmp_path / MANIFEST)
    with pytest.raises(OSError, match="no file"):
        small_bytes(tmp_path / MANIFEST)
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(OSError, match="11 bytes"):
        small_bytes(tmp_path / "large", most=10)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "/".join(["y" * 200] * 30)])
def test_a_name_that_no_system_takes_is_one_that_is_not_there(name: str) -> None:
    assert not exists(name)
    for read in (find_recipe, Target.load, Checkpoint.open, open_model):
        with pytest.raises(BagelCompressError):
            read(name)


def test_a_nested_key_of_a_target_is_answered_with_the_keys_beside_it(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\ndevice: {name: x, memory_mib: 1, memory_gib: 12}")
    with pytest.raises(
        TargetError, match=r"'memory_gib' \(did you mean memory_mib\?\); keys here are name, memory_mib"
    ):
        Target.load(tmp_path / "a.yaml")


def test_the_digest_is_of_the_values() -> None:
    one = parse_yaml(Tree, "name: a\nbest: {size: 1}", "f", TargetError)
    same = parse_yaml(Tree, "best: {class: small, size: 1} # comment\nname: a", "f", TargetError)
    other = parse_yaml(Tree, "name: a\nbest: {size: 2}", "f", TargetError)
    assert meaning_digest(one) == meaning_digest(same) != meaning_digest(other)


def png_of(path: Path, width: int, height: int, data: bytes = b"") -> Path:
    """A PNG that says it has this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        content += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    path.write_bytes(content)
    return path


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("width", [MAX_PIXELS // 100 + 1, 10**6 * 2, 2**31 - 1])
def test_a_picture_that_says_it_is_huge_is_refused_before_it_is_decoded(width: int, tmp_path: Path) -> None:
    """A few bytes that would take hundreds of megabytes. Pillow refuses from twice its limit on, and warns before."""
    with pytest.raises(InputError, match=r"bomb\.png is too large .*of at most 100 megapixels"):
        read_picture(png_of(tmp_path / "bomb.png", width, 100))


def test_the_largest_picture_is_opened(tmp_path: Path) -> None:
    with open_picture(png_of(tmp_path / "large.png", MAX_PIXELS // 100, 100)) as image:
        assert image.size == (MAX_PIXELS // 100, 100)


def test_no_program_is_started_for_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands EPS to Ghostscript."""

    def started(*rest: object) -> None:
        raise AssertionError("Ghostscript")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with Image.open(tmp_path / "a.png") as image, pytest.raises(AssertionError):
        image.load()  # what Pillow does
    with pytest.raises(InputError, match="is not a readable picture"):
        read_picture(tmp_path / "a.png")


@pytest.mark.parametrize("text", ["[" * 200_000, "1" * 6000, "[]", '{"flow": [1]}', '{"flow": {"cfg_interval": 3}}'])
def test_settings_that_a_picture_only_claims_to_hold(text: str, tmp_path: Path) -> None:
    info = PngInfo()
    info.add_itxt(KEY, text)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(InputError, match="holds no settings"):
        read_settings(tmp_path / "a.png")


def test_text_of_a_picture_is_not_unpacked_without_end(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_itxt(KEY, "x" * 50_000_000, zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    assert (tmp_path / "a.png").stat().st_size < 100_000
    for read in (read_settings, read_picture):
        with pytest.raises(InputError, match="readable"):
            read(tmp_path / "a.png")
