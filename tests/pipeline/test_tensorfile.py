"""The safetensors reader refuses what is damaged, and the layout is byte for byte that of the library."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bagel_compress.codecs.base import dtype_code
from bagel_compress.errors import CheckpointError
from bagel_compress.io.safetensors_file import TensorFile, lay_out
from bagel_compress.io.tensor_spec import PartSpec

DTYPES = (
    "uint64", "int64", "float64", "float32", "uint32", "int32", "bfloat16", "float16", "uint16", "int16",
    "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "bool",
)  # fmt: skip


def test_layout_is_that_of_save_file(tmp_path: Path) -> None:
    tensors = {f"{'zyxab'[i % 5]}.{i}": torch.zeros(3, i % 4, dtype=getattr(torch, d)) for i, d in enumerate(DTYPES)}
    tensors |= {"scalar": torch.zeros((), dtype=torch.uint8), "é.ü": torch.zeros(5, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header, offsets = lay_out({n: PartSpec(dtype_code(t.dtype), tuple(t.shape)) for n, t in tensors.items()})
    assert (tmp_path / "x.safetensors").read_bytes().startswith(header)
    opened = TensorFile.open(tmp_path / "x.safetensors")
    assert {n: t.start for n, t in opened.tensors.items()} == offsets
    assert opened.metadata == {"format": "pt"}


def raw_file(path: Path, table: object, data: bytes = b"", length: int | None = None) -> Path:
    header = json.dumps(table).encode() if not isinstance(table, bytes) else table
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


ROW = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("table", "data", "length", "says"),
    [
        ({"a": ROW}, b"123", None, "truncated"),
        ({"a": ROW}, b"12345", None, "behind its last tensor"),
        ({"a": ROW, "b": ROW}, b"1234", None, "overlaps"),
        ({"a": ROW, "b": {**ROW, "data_offsets": [6, 10]}}, b"1234567890", None, "hole"),
        ({"a": {**ROW, "dtype": "Q3"}}, b"1234", None, "dtype 'Q3'"),
        ({"a": {**ROW, "shape": [5]}}, b"1234", None, "takes 4 bytes"),
        ({"a": {**ROW, "shape": [-4]}}, b"1234", None, "damaged"),
        ({"a": {**ROW, "shape": [1 << 62, 4]}}, b"1234", None, "damaged"),
        ({"a": {**ROW, "data_offsets": [4, 0]}}, b"1234", None, "takes -4 bytes"),
        ({"a": {"dtype": "U8"}}, b"1234", None, "damaged"),
        ([1, 2], b"", None, "not a safetensors file"),
        (b"not json at all", b"", None, "not a safetensors file"),
        (b"\xff\xfe\x00\x01", b"", None, "not a safetensors file"),
        ({"a": ROW}, b"1234", 1 << 60, "not a safetensors file"),
        ({"a": ROW}, b"1234", 90_000_000, "truncated"),
    ],
)
def test_damaged_files_end_in_one_sentence(
    tmp_path: Path, table: object, data: bytes, length: int | None, says: str
) -> None:
    path = raw_file(tmp_path / "bad.safetensors", table, data, length)
    with pytest.raises(CheckpointError, match=says) as caught:
        TensorFile.open(path)
    assert "bad.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_and_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="0 bytes"):
        TensorFile.open(tmp_path / "empty.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        TensorFile.open(tmp_path / "none.safetensors")
