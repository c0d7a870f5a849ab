"""The files of a prepared set: Megatron's IndexedDataset and a sidecar, which training maps into memory.

    PREFIX.bin, PREFIX.idx    one document of int32 ids a pair; its sequences are prompt, chosen and rejected response
    PREFIX.pairs.npy          one record a pair: the numbers of `pairs.COLUMNS`
    PREFIX.json               counts, options, fingerprints of tokenizer and template, checksums of the other files

PREFIX.json is written last, so a set is complete where that file exists. `prepared_writer.py` writes a set,
`prepared_set.py` opens it.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from simpo_megatron.data import pairs
from simpo_megatron.data.counts import DataReport
from simpo_megatron.data.options import DataOptions
from simpo_megatron.errors import UserError

VERSION = 1
SUFFIXES = (".bin", ".idx", ".pairs.npy", ".json")


def record_type() -> np.dtype:
    """The type of a record: the columns of a pair, packed, in the order of their declaration."""
    return np.dtype([(column.name, column.dtype) for column in pairs.COLUMNS])


def part(prefix: str | Path, suffix: str) -> Path:
    """The path of a file of a prepared set."""
    return Path(f"{prefix}{suffix}")


def is_prepared(prefix: str | Path) -> bool:
    """Whether there is a prepared set of this prefix, or a part of one."""
    return any(part(prefix, suffix).is_file() for suffix in (".json", ".idx", ".bin"))


def read_about(prefix: str) -> dict[str, Any]:
    """The content of PREFIX.json, checked for the keys that opening a set reads.

    Raises:
        UserError: the file is missing, damaged, or of another version.
    """
    path = part(prefix, ".json")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        version = about["version"]
        if version == VERSION:
            _ = [int(about[name]) for name in ("pairs", "tokens", "largest_token", "longest_sequence")]
            _ = [int(about["crc32"][suffix]) for suffix in SUFFIXES[:3]]
            _ = DataReport(**about["report"]), DataOptions(**about["options"]), dict(about["fingerprint"])
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: {prefix} is not a prepared set, or preparing it was interrupted; make it with "
            "tools/preprocess_preferences.py"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error
    if version != VERSION:
        raise UserError(f"{path}: version {version!r} is not {VERSION}; prepare it again")
    return about


def damaged(path: str | Path, how: str) -> UserError:
    """The error for a file that is not what was written; `how` it differs."""
    return UserError(f"{path} is damaged: {how}; copy it again, or prepare it again")


def crc32(path: Path) -> int:
    """The checksum of a file, read in blocks."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            crc = zlib.crc32(block, crc)
    return crc
