"""Every file format gives the same rows, every broken file one sentence with its place."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from simpo_megatron.data.prepared_format import SUFFIXES, part
from simpo_megatron.data.reading import read_rows
from simpo_megatron.errors import UserError

ROWS = [{"prompt": "a", "chosen": "ü\u2028🤝", "rejected": "c"}, {"prompt": "d", "chosen": "e", "rejected": None}]
TEXT = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def error_of(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        list(read_rows(path))
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(TEXT, encoding="utf-8")
    assert list(read_rows(path)) == [(f"{path}:{i + 1}", row) for i, row in enumerate(ROWS)]
    assert list(read_rows(str(path))) == list(read_rows(path))


def test_blank_lines_crlf_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}\r\n')
    assert list(read_rows(path)) == [(f"{path}:1", {"a": 1}), (f"{path}:4", {"a": 2})]


def test_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(TEXT.encode()))
    assert [row for _, row in read_rows(path)] == ROWS


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = ROWS * 600  # more than one batch
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    read = list(read_rows(path))
    assert [row for _, row in read] == rows
    assert [read[0][0], read[1199][0]] == [f"{path} row 1", f"{path} row 1200"]


def test_no_such_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert error_of(path) == f"{path}: there is no such file; check the path"


def test_unknown_type(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    kinds = "use one of .jsonl, .json, .jsonl.gz, .parquet, or the prefix of a prepared set"
    assert error_of(path) == f"{path}: there is no such file, folder or prepared set; {kinds}"
    path.touch()
    assert error_of(path) == f"{path}: unknown file type; {kinds}"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_a_prepared_set_names_its_prefix(tmp_path: Path, suffix: str) -> None:
    for end in SUFFIXES:
        part(tmp_path / "pp", end).touch()
    path = part(tmp_path / "pp", suffix)
    assert error_of(path) == f"{path} is a file of a prepared set; give its prefix {tmp_path / 'pp'}"


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_no_rows(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    assert error_of(path) == f"{path}: the file has no rows; it needs at least one"


def test_no_rows_in_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"chosen": pyarrow.array([], pyarrow.string())}), path)
    assert error_of(path) == f"{path}: the file has no rows; it needs at least one"


def test_truncated_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "a", "chos')
    assert error_of(path) == (
        f"{path}:2: not valid JSON (Unterminated string starting, column 17 of 21); "
        "every line must be one whole JSON object, so fix or remove the line"
    )


@pytest.mark.parametrize("text", ['[{"prompt": "a"},\n {"prompt": "b"}]', "[\n  {}\n]", "[1]"])
def test_an_array_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "my rows.json"
    path.write_text("\n" + text)
    assert error_of(path) == (
        f"{path}:2: the file is a JSON array, not JSON lines; write one object a line, for example with "
        f"jq -c '.[]' '{path}' > rows.jsonl"
    )


def test_json_that_python_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for text, what in (("1" * 5000, "a number has too many digits"), ("[" * 100_000, "it is nested too deeply")):
        path.write_text(f'{{}}\n{{"a": {text}')
        assert error_of(path) == f"{path}:2: not readable JSON ({what}); remove the line"


@pytest.mark.parametrize(("line", "kind"), [("[1]", "list"), ("3", "int"), ('"a"', "str")])
def test_line_that_is_not_an_object(tmp_path: Path, line: str, kind: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n" + line)
    assert error_of(path) == (
        f"{path}:2: the line holds a JSON {kind}, not an object; "
        'write one object a line, {"prompt": ..., "chosen": ..., "rejected": ...}'
    )


def test_invalid_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}')
    assert error_of(path) == f"{path}:2: byte 8 of the line is not UTF-8; save the file as UTF-8"


@pytest.mark.parametrize("damage", [lambda b: b"no gzip", lambda b: b[:-12], lambda b: b[:20] + b"\0\0\0\0\0" + b[25:]])
def test_damaged_gzip(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(damage(gzip.compress(TEXT.encode())))
    message = error_of(path)
    assert message.startswith(f"{path}: the gzip data is damaged or cut short (")
    assert message.endswith("); copy the file again")


@pytest.mark.parametrize("content", [b"no parquet", b""])
def test_damaged_parquet(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    message = error_of(path)
    assert message.startswith(f"{path}: not a readable Parquet file after row 0 (")
    assert message.endswith("); write it again")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert error_of(path) == (
        f"{path}: reading Parquet needs pyarrow; run pip install 'simpo-megatron[parquet]' or convert to .jsonl"
    )


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    assert "there is no such file" in error_of(tmp_path / "a.jsonl")


def test_a_dataset_saved_to_disk(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "splits")
    assert list(read_rows(tmp_path / "one")) == [(f"{tmp_path}/one row {i + 1}", row) for i, row in enumerate(ROWS)]
    assert [row for _, row in read_rows(tmp_path / "splits")] == ROWS
    assert [row for _, row in read_rows(f"{tmp_path}/splits:test")] == ROWS[1:]
    assert "there is no split 'dev'; use" in error_of(f"{tmp_path}/splits:dev")
    assert "test" in error_of(f"{tmp_path}/splits:dev")


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    assert "holds no dataset that `datasets` saved" in error_of(tmp_path)


@pytest.mark.parametrize("offline", [False, True])
def test_a_name_that_is_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], offline: bool
) -> None:
    """Without a network one request fails, and no attempt is printed; offline, the cache alone is asked."""
    import datasets
    import huggingface_hub

    asked: list[str] = []

    def fail(source: str, *_: Any, **__: Any) -> None:
        asked.append(source)
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: fail("cache"))
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: fail("hub"))
    message = error_of("owner/absent")
    assert message.startswith("owner/absent: there is no such file, folder or prepared set, and the hub gives no such")
    assert message.endswith("unset HF_HUB_OFFLINE" if offline else "for a dataset that is in the cache")
    assert asked == ["cache" if offline else "hub"] and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_giant_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("simpo_megatron.data.reading.LONGEST_LINE", 100)
    content = json.dumps(ROWS[1]).encode() + b"\n" + json.dumps({"prompt": "a" * 200}).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert error_of(tmp_path / name).startswith(f"{tmp_path / name}:2: the line is longer than")
