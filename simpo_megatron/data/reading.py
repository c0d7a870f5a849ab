"""Rows of a preference file: JSON Lines (plain or gzip) and Parquet, each with the place it came from."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simpo_megatron.errors import UserError

SUPPORTED = (".jsonl", ".json", ".jsonl.gz", ".parquet")


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row) for every row; `where` is "FILE:LINE" or, for Parquet, "FILE row N", both counted from 1.

    Blank lines are skipped. Raises UserError for a file that is missing, empty, unreadable or of another format, and
    for a line that is not one JSON object.
    """
    path = Path(path)
    if not path.name.endswith(SUPPORTED):
        raise UserError(f"{path}: unknown file type; use one of {', '.join(SUPPORTED)}.")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; check the path of the preference data.")
    found = False
    try:
        for found_row in _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path):
            found = True
            yield found_row
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the file.") from error
    if not found:
        raise UserError(f"{path}: the file has no rows; it needs at least one preference pair.")


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
    if path.suffix != ".gz":
        with path.open("rb") as file:
            yield from file
        return
    try:
        with gzip.open(path, "rb") as file:
            yield from file
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
