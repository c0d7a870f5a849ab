"""Rows of preferences, each with the place it came from.

Read are JSON Lines (plain or gzip), Parquet, what `datasets` saved to disk (DIR or DIR:SPLIT), and datasets of the Hugging Face
hub (OWNER/NAME or OWNER/NAME:SPLIT). The split is `train` unless said.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simpo_megatron.errors import UserError

SUPPORTED = (".jsonl", ".json", ".jsonl.gz", ".parquet")
LONGEST_LINE = 2**26
"""Bytes. Prompt and two responses of a million words are a quarter of it; more is a file without line ends."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves


def read_rows(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row) for every row; `where` is "FILE:LINE", or "SOURCE row N" where there are no lines, from 1.

    Blank lines are skipped. Raises UserError for a source that is missing, empty, unreadable or of another format, and
    for a line that is not one JSON object.
    """
    path = Path(source)
    name, split = _split_of(str(source))
    if path.name.endswith(SUPPORTED):
        if not path.is_file():
            raise UserError(f"{path}: there is no such file; check the path of the preference data.")
        rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
    elif Path(name).is_dir() or (_HUB_ID.fullmatch(name) and not path.exists()):
        rows = _dataset_rows(name, split)
    else:
        raise UserError(f"{path}: unknown file type; use one of {', '.join(SUPPORTED)}.")
    found = False
    try:
        for found_row in rows:
            found = True
            yield found_row
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the file.") from error
    if not found:
        raise UserError(f"{path}: the file has no rows; it needs at least one preference pair.")


def _split_of(source: str) -> tuple[str, str | None]:
    name, colon, split = source.rpartition(":")
    return (name, split) if colon and "/" not in split else (source, None)


def _dataset_rows(name: str, split: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    saved = Path(name).is_dir()
    if saved and not any((Path(name) / marker).is_file() for marker in _SAVED):
        raise UserError(
            f"{name}: the folder holds no dataset that `datasets` saved ({' or '.join(_SAVED)}); give one of its files."
        )
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{name}: reading it needs `datasets`; run pip install datasets, or give a .jsonl file."
        ) from None
    try:
        data: Any = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except Exception as error:  # of the network, the hub, Arrow, ...
        what = "cannot be read" if saved else "is no file, no prepared set and no dataset that the hub gives"
        raise UserError(f"{name}: {what} ({' '.join(str(error).split())[:200]}); check the name.") from error
    if isinstance(data, dict):
        if (split or "train") not in data:
            raise UserError(
                f"{name}: there is no split {split or 'train'!r}; use {name}:SPLIT with one of {', '.join(data)}."
            )
        data = data[split or "train"]
    for number, row in enumerate(data, start=1):
        yield f"{name} row {number}", row


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8."
            ) from None
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: not valid JSON ({error.msg.removesuffix(' at')}, column {error.colno} of "
                f"{len(text.rstrip())}); every line must be one whole JSON object, so mend or remove the line."
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not readable JSON ({error}); remove the line.") from None
        if not isinstance(row, dict):
            raise UserError(
                f"{where}: the line holds a JSON {type(row).__name__}, not an object; "
                'write one object a line, {"prompt": ..., "chosen": ..., "rejected": ...}.'
            )
        yield where, row


def _lines(path: Path) -> Iterator[bytes]:
    """The raw lines, split at newline bytes only: U+2028 and the like are legal inside a JSON string."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            number = 0
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise UserError(
                        f"{path}:{number}: the line is longer than {LONGEST_LINE >> 20} MiB; write one pair a line, or "
                        "remove it."
                    )
                yield line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: the gzip data is damaged or cut short ({error}); copy the file again.") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: reading Parquet needs pyarrow; run pip install 'simpo-megatron[parquet]' or convert to .jsonl."
        ) from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable Parquet file after row {number} ({error}); write it again.") from error
