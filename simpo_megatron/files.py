"""Files that are read and written whole: JSON with errors that are sentences, and writes that a kill cannot cut in two."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simpo_megatron.errors import UserError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to. It takes the place of `path` when the block ends well, and is removed otherwise.

    After a kill it stays, and the next write takes its place. What was written is on the disk before the name changes, and
    the change of the name is on the disk before the block is left: after a power failure the file is the old one or the new
    one. Modes follow the umask.

    Raises:
        OSError: as the writing.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path, text: str) -> None:
    """Writes a text file whole or not at all; see `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: the file is absent, cannot be read, or holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; is {file.parent} a complete Hugging Face checkpoint?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} holds {type(value).__name__} instead of a JSON object; copy it again")
    return value


def end_of_turn_ids(folder: Path, config: Path | None = None) -> tuple[int, ...]:
    """The token ids that end a generation: of generation_config.json, else of config.json; none where neither says.

    Args:
        folder: of a Hugging Face checkpoint, or of its tokenizer alone.
        config: the config.json, where it has another name or folder.

    Raises:
        UserError: a file cannot be read, or sets something else than token ids.
    """
    for file in (folder / "generation_config.json", config or folder / "config.json"):
        found = read_json(file).get("eos_token_id") if file.exists() else None
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise UserError(f"{file} sets eos_token_id to {found!r}; it must be a token id or a list of them")
        return tuple(ids)
    return ()
