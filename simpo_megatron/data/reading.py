"""Rows of preferences, each with the place it came from.

Sources are JSON Lines (plain or gzip), Parquet files, datasets that `datasets` saved to disk (FOLDER or FOLDER:SPLIT),
and datasets of the Hugging Face hub (OWNER/NAME or OWNER/NAME:SPLIT). The split is `train` where none is named.
"""

from __future__ import annotations

import gzip
import json
import re
import shlex
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from simpo_megatron.data.prepared_format import SUFFIXES, is_prepared, part
from simpo_megatron.errors import UserError

Row = tuple[str, dict[str, Any]]  # where a row stands, and its columns

SUPPORTED = (".jsonl", ".json", ".jsonl.gz", ".parquet")
BLOCK_ROWS = 100  # rows held as Python objects at a time
LONGEST_LINE = (
    2**26
)  # bytes: four times a prompt and two responses of a million words; more is a file without line ends
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SAVED = ("dataset_dict.json", "state.json")  # files that `save_to_disk` writes


def read_rows(source: str | Path) -> Iterator[Row]:
    """The rows of a source, in its order. Blank lines are skipped.

    Args:
        source: a file, a folder or a name, as above.

    Yields:
        Where the row stands, and its columns. The place is "FILE:LINE", or "SOURCE row N" where there are no lines,
        from 1.

    Raises:
        UserError: the source is missing, empty, unreadable or of another format, or a line is not one JSON object.
    """
    path = Path(source)
    name, split = _split_of(str(source))
    if prefix := _prefix_of(str(source)):
        raise UserError(f"{path} is a file of a prepared set; give its prefix {prefix}")
    if path.name.endswith(SUPPORTED):
        if not path.is_file():
            raise UserError(f"{path}: there is no such file; check the path")
        rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
    elif Path(name).is_dir() or (_HUB_ID.fullmatch(name) and not path.exists()):
        rows = _dataset_rows(name, split)
    else:
        what = "unknown file type" if path.exists() else "there is no such file, folder or prepared set"
        raise UserError(f"{path}: {what}; use one of {', '.join(SUPPORTED)}, or the prefix of a prepared set")
    found = False
    try:
        for row in rows:
            found = True
            yield row
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error
    if not found:
        raise UserError(f"{path}: the file has no rows; it needs at least one")


def source_exists(source: str) -> bool:
    """Whether there is a file, a folder (with or without :SPLIT) or a prepared set of this name."""
    return is_prepared(source) or Path(source).exists() or Path(_split_of(source)[0]).is_dir()


def can_be_source(source: str) -> bool:
    """Whether a name exists, or has the form of a file or of a hub id."""
    return source_exists(source) or source.endswith(SUPPORTED) or bool(_HUB_ID.fullmatch(_split_of(source)[0]))


def _prefix_of(source: str) -> str | None:
    """The prefix of the prepared set that a file is a part of; None where it is of none."""
    prefixes = (source.removesuffix(suffix) for suffix in SUFFIXES if source.endswith(suffix))
    return next((prefix for prefix in prefixes if all(part(prefix, end).is_file() for end in SUFFIXES)), None)


def _split_of(source: str) -> tuple[str, str | None]:
    name, colon, split = source.rpartition(":")
    return (name, split) if colon and "/" not in split else (source, None)


def _dataset_rows(name: str, split: str | None) -> Iterator[Row]:
    saved = Path(name).is_dir()
    if saved and not any((Path(name) / marker).is_file() for marker in _SAVED):
        raise UserError(
            f"{name}: the folder holds no dataset that `datasets` saved ({' or '.join(_SAVED)}); give one of its files"
        )
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{name}: reading it needs `datasets`; run pip install datasets, or give a .jsonl file"
        ) from None
    online = not saved and not huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        if online:
            # One request that fails at once. `datasets` would try for half a minute, and print every attempt.
            huggingface_hub.HfApi().dataset_info(name, timeout=20)
        data: Any = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except Exception as error:  # from the network, the hub, Arrow, ...
        reason = " ".join(str(error).split())[:200]
        if saved:
            raise UserError(f"{name}: cannot be read ({reason}); check the folder") from error
        other = "set HF_HUB_OFFLINE=1 for a dataset that is in the cache" if online else "unset HF_HUB_OFFLINE"
        raise UserError(
            f"{name}: there is no such file, folder or prepared set, and the hub gives no such dataset ({reason}); "
            f"check the name, or {other}"
        ) from error
    if isinstance(data, dict):
        if (split or "train") not in data:
            raise UserError(
                f"{name}: there is no split {split or 'train'!r}; use {name}:SPLIT with one of {', '.join(data)}"
            )
        data = data[split or "train"]
    for number, row in enumerate(data, start=1):
        yield f"{name} row {number}", row


def _json_rows(path: Path) -> Iterator[Row]:
    first = True
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8"
            ) from None
        if not text.strip():
            continue
        if first and text.lstrip().startswith("["):
            raise UserError(
                f"{where}: the file is a JSON array, not JSON lines; write one object a line, for example with "
                f"jq -c '.[]' {shlex.quote(str(path))} > rows.jsonl"
            )
        first = False
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: not valid JSON ({error.msg.removesuffix(' at')}, column {error.colno} of "
                f"{len(text.rstrip())}); every line must be one whole JSON object, so fix or remove the line"
            ) from None
        except (ValueError, RecursionError) as error:
            what = "a number has too many digits" if isinstance(error, ValueError) else "it is nested too deeply"
            raise UserError(f"{where}: not readable JSON ({what}); remove the line") from None
        if not isinstance(row, dict):
            raise UserError(
                f"{where}: the line holds a JSON {type(row).__name__}, not an object; "
                'write one object a line, {"prompt": ..., "chosen": ..., "rejected": ...}'
            )
        yield where, row


def _lines(path: Path) -> Iterator[bytes]:
    """The raw lines, split at newline bytes alone: U+2028 and other line separators are legal in a JSON string."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            number = 0
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise UserError(
                        f"{path}:{number}: the line is longer than {LONGEST_LINE >> 20} MiB; write one pair a line, or "
                        "remove it"
                    )
                yield line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: the gzip data is damaged or cut short ({error}); copy the file again") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: reading Parquet needs pyarrow; run pip install 'simpo-megatron[parquet]' or convert to .jsonl"
        ) from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable Parquet file after row {number} ({error}); write it again") from error


def row_blocks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows in lists of BLOCK_ROWS, the last one shorter."""
    iterator = iter(rows)
    while block := list(islice(iterator, BLOCK_ROWS)):
        yield block


def row_number(where: str) -> int:
    """The number of the row that stands there, 0 where the place has none.

    >>> row_number("pairs.jsonl:7"), row_number("pairs.parquet row 7"), row_number("a test")
    (7, 7, 0)
    """
    digits = where[len(where.rstrip("0123456789")) :]
    return int(digits) if digits else 0


def with_progress(rows: Iterable[Row], description: str) -> Iterator[Row]:
    """The same rows, counted in a bar on stderr. Where stderr is no terminal there is no bar."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield from bar.track(rows, total=None, description=description)
