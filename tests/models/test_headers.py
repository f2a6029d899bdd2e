"""Headers of safetensors files: true ones are read as the library reads them, others are refused."""

from __future__ import annotations

import json
import os
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adamw_triton.models import ModelFileError, Weight
from adamw_triton.models.headers import BITS, read_header, read_shards
from tests.models.files import header_of, write, write_model

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
ONE_JSON = json.dumps(ONE).encode()


def test_names_shapes_and_dtypes_in_the_order_of_the_data(tmp_path: Path) -> None:
    header = {
        "late": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [8, 20]},
        "early": ONE,
        "empty": {"dtype": "I64", "shape": [0, 7], "data_offsets": [8, 8]},
        "scalar": {"dtype": "U8", "shape": [], "data_offsets": [20, 21]},
        "__metadata__": {"format": "pt"},
    }
    assert read_header(write(tmp_path / "a.safetensors", header, 21)) == [
        Weight("early", (2,), "F32"),
        Weight("empty", (0, 7), "I64"),
        Weight("late", (2, 3), "BF16"),
        Weight("scalar", (), "U8"),
    ]


HOSTILE: dict[str, tuple[Any, int, str]] = {
    "no JSON": (b"{what", 8, "is not valid JSON: Expecting property name"),
    "not UTF-8": (b'{"\xff": 1}', 8, "is not valid JSON: 'utf-8' codec can't decode"),
    "empty": (b"", 8, "is not valid JSON: Expecting value"),
    "an array": (b"[]", 8, "is not a JSON object but list"),
    "a number": (b"7", 8, "is not a JSON object but int"),
    "deep": (b"[" * 200_000, 8, "is not valid JSON: it nests too deeply"),
    "deep inside": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 8, "it nests too deeply"),
    "NaN": (b'{"a": NaN}', 8, "it has NaN, which is no JSON"),
    "endless number": (b'{"a": ' + b"9" * 10_000 + b"}", 8, "is not valid JSON: Exceeds the limit"),
    "the same tensor twice": (b'{"a": %s, "a": %s}' % (ONE_JSON, ONE_JSON), 8, "it has 'a' twice"),
    "a shape twice": (
        b'{"a": {"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', 8, "it has 'shape' twice",
    ),
    "overlap": ({"a": ONE, "b": ONE}, 8, "'b' overlaps 'a'"),
    "hole": ({"a": ONE, "b": {**ONE, "data_offsets": [9, 17]}}, 17, "'b' leaves a hole behind 'a'"),
    "late start": ({"a": {**ONE, "data_offsets": [1, 9]}}, 9, "'a' leaves a hole behind the header"),
    "data missing": ({"a": ONE}, 7, "is truncated: its tensors take 8 bytes and it has 7"),
    "data too many": ({"a": ONE}, 9, "is no safetensors file: its tensors take 8 bytes and it has 9"),
    "unknown dtype": ({"a": {**ONE, "dtype": "F31"}}, 8, "'a' has the unknown dtype 'F31'"),
    "a list as dtype": ({"a": {**ONE, "dtype": ["F32"]}}, 8, "'a' has the unknown dtype ['F32']"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8, "'a' has the unknown dtype None"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8, "'a' has the shape None"),
    "negative size": ({"a": {**ONE, "shape": [-2]}}, 8, "'a' has the shape [-2]"),
    "two negative sizes": ({"a": {**ONE, "shape": [-2, -1]}}, 8, "'a' has the shape [-2, -1]"),
    "half a size": ({"a": {**ONE, "shape": [2.0]}}, 8, "'a' has the shape [2.0]"),
    "true as size": ({"a": {**ONE, "shape": [True, 2]}}, 8, "'a' has the shape [True, 2]"),
    "text as shape": ({"a": {**ONE, "shape": "2"}}, 8, "'a' has the shape '2'"),
    "huge": ({"a": {**ONE, "shape": [1 << 62, 1 << 62]}}, 8, "'a' has more elements than anything has"),
    "huge number": ({"a": {**ONE, "shape": [1 << 300]}}, 8, "'a' has the shape ["),
    "many huge sizes": ({"a": {**ONE, "shape": [1 << 62] * 10_000}}, 8, "more elements than anything has"),
    "shape and bytes": ({"a": {**ONE, "shape": [3]}}, 8, "'a' has 8 bytes and needs 12, by its dtype F32"),
    "half a byte": ({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, 2, "2 bytes and needs 2"),
    "one offset": ({"a": {**ONE, "data_offsets": [8]}}, 8, "'a' has the data_offsets [8]"),
    "backwards": ({"a": {**ONE, "data_offsets": [8, 0]}}, 8, "'a' has the data_offsets [8, 0]"),
    "negative offset": ({"a": {**ONE, "data_offsets": [-8, 0]}}, 8, "'a' has the data_offsets [-8, 0]"),
    "no description": ({"a": None}, 8, "'a' has the description None"),
    "metadata": ({"__metadata__": {"a": 1}}, 0, "its __metadata__ is not text by name"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    header, data_bytes, message = HOSTILE[case]
    path = write(tmp_path / "model.safetensors", header, data_bytes)
    with pytest.raises(ModelFileError) as refusal:
        read_header(path)
    assert message in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
    assert len(str(refusal.value)) < 400 + len(str(path))


@pytest.mark.parametrize(
    ("announced", "message"),
    [
        (100, "is truncated: it announces a header of 100 bytes and has"),
        (100_000_000, "is truncated"),
        (100_000_001, "announces a header of 100,000,001 bytes; the format allows 100,000,000"),
        (2**64 - 1, "announces a header of 18,446,744,073,709,551,615 bytes"),
    ],
)
def test_lengths_beyond_the_file_or_the_format(announced: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=message):
        read_header(write(tmp_path / "a", {"a": ONE}, 8, announced=announced))


def test_a_hundred_megabytes_of_header_are_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    before = bytes_read()
    with pytest.raises(ModelFileError, match="the format allows"):
        read_header(path)
    assert bytes_read() - before < 100_000


@pytest.mark.parametrize("size", range(8))
def test_files_without_a_length(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"\0" * size)
    with pytest.raises(ModelFileError, match=f"is not a safetensors file: it has {size} bytes"):
        read_header(path)


def test_things_that_are_no_files(tmp_path: Path) -> None:
    """A pipe has no end to wait for."""
    os.mkfifo(tmp_path / "pipe")
    for path, message in {
        tmp_path: "is not a regular file",
        tmp_path / "pipe": "is not a regular file",
        tmp_path / "nothing": "cannot read .*: No such file",
    }.items():
        with pytest.raises(ModelFileError, match=message):
            read_header(path)


def bytes_read() -> int:
    """By this process, from anywhere, so far."""
    try:
        text = Path("/proc/self/io").read_text()
    except OSError:
        pytest.skip("this system does not count what a process reads")
    return int(text.split("rchar:")[1].split()[0])


# Held against the library


def by_library(path: Path) -> list[Weight] | None:
    """None: refused."""
    safetensors = pytest.importorskip("safetensors")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return [Weight(name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()]
    except safetensors.SafetensorError:
        return None


def by_us(path: Path) -> list[Weight] | None:
    try:
        return read_header(path)
    except ModelFileError:
        return None


sizes = st.integers(-1, 5)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "F31"]),
        "shape": st.lists(sizes, max_size=3),
        "data_offsets": st.tuples(sizes, st.integers(0, 40)).map(list),
    }
)
names = st.text(string.ascii_letters, min_size=1, max_size=3)


@given(st.dictionaries(names, entries, max_size=3), st.integers(0, 40))
def test_the_library_refuses_the_same_headers(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], data_bytes: int
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "one.safetensors", header, data_bytes)
    ours, theirs = by_us(path), by_library(path)
    assert (ours is None) == (theirs is None)
    if ours is not None and theirs is not None:
        assert sorted(ours) == sorted(theirs)


@given(
    st.dictionaries(names, st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(list(BITS))))
)
def test_the_library_accepts_the_same_headers(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[list[int], str]]
) -> None:
    """True ones, of every dtype; those of less than a byte only where they fill their last one."""
    header, end = {}, 0
    for name, (shape, dtype) in tensors.items():
        shape = [*shape, 4]
        part, count = header_of({name: tuple(shape)}, dtype)
        header[name] = {**part[name], "data_offsets": [end, end + count]}
        end += count
    path = write(tmp_path_factory.getbasetemp() / "two.safetensors", header, end)
    ours = by_us(path)
    assert ours is not None
    assert sorted(ours) == sorted(by_library(path) or [])


@given(st.data())
def test_damaged_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever happened to a file, there is an answer, and never another exception."""
    path = tmp_path_factory.getbasetemp() / "three.safetensors"
    content = bytearray(write_model(path, {"a.weight": (2, 3), "b": (4,)}).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        kind = data.draw(st.sampled_from(["change", "insert", "delete", "cut"]))
        if kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        elif kind == "cut":
            del content[at:]
        elif kind == "delete":
            del content[at : at + 3]
        elif at < len(content):
            content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    by_us(path)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    """As a header of the announced length."""
    by_us(write(tmp_path_factory.getbasetemp() / "four.safetensors", text, 8))


# Several files


def write_sharded(folder: Path, table: dict[str, str]) -> Path:
    for name in set(table.values()):
        write_model(folder / name, {weight: (4, 2) for weight, file in table.items() if file == name})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))
    return index


SHARDS = {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}


def test_shards_are_read_once_each(tmp_path: Path) -> None:
    assert sorted(read_shards(write_sharded(tmp_path, SHARDS))) == [
        Weight(name, (4, 2), "BF16") for name in "abc"
    ]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": "../1.safetensors"}, "not a safetensors file beside it: '../1.safetensors'"),
        ({"a": "/etc/passwd"}, "not a safetensors file beside it: '/etc/passwd'"),
        ({"a": ".."}, "not a safetensors file beside it"),
        ({"a": ""}, "not a safetensors file beside it"),
        ({"a": "1\0.safetensors"}, "not a safetensors file beside it"),
        ({"a": "model.bin"}, "not a safetensors file beside it"),
        ({"a": 7}, "not a safetensors file beside it"),
        ({"a": ["1.safetensors"]}, "not a safetensors file beside it"),
        ({"a": "3.safetensors"}, "lists '3.safetensors', which is not there: is the download complete?"),
        ({"z": "1.safetensors"}, "lists 'z', which '1.safetensors' does not have"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
        (None, "has no weight_map"),
    ],
)
def test_indexes_that_lie(table: Any, message: str, tmp_path: Path) -> None:
    index = write_sharded(tmp_path, SHARDS)
    index.write_text(json.dumps({"weight_map": table}))
    with pytest.raises(ModelFileError, match=message):
        read_shards(index)
