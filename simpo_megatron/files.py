"""Small files written whole or not at all, JSON files read with clear errors, and the record of what was written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from simpo_megatron.errors import UserError

# In a model that this package wrote: {"files": {NAME: size}}, and "plan" where a conversion made it.
WRITTEN = "written_files.json"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Replaces a file in one step: after a kill or a power failure it is either the old file or the new one.

    Data and folder entry are flushed to the disk (fsync). The mode of the file follows the umask.

    Args:
        path: the file to replace or to create.

    Yields:
        A temporary path in the same folder, to write to. It is renamed to `path` when the block ends, and removed when
        the block raises. A kill leaves the temporary file behind; the next write overwrites it.

    Raises:
        OSError: the file cannot be written.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EISDIR if path.is_dir() else errno.EINVAL, "it is no regular file", str(path))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        with suppress(OSError):  # a read-only file system refuses this too, and the first error says more
            temporary.unlink(missing_ok=True)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Writes a text or bytes whole or not at all; see `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def follow_umask(file: Path) -> None:
    """Gives a file the mode that `open` would have given it: a library that writes a temporary file leaves 0600."""
    # Setting the umask is the only way to read it. A file that another thread creates meanwhile is its owner's alone.
    mask = os.umask(0o077)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def check_empty(flag: str, folder: Path) -> None:
    """Refuses a folder to export to that holds something.

    Args:
        flag: that names the folder, for the error.
        folder: to export to.

    Raises:
        UserError: it is neither absent nor an empty directory.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{flag} {folder} is not empty; export to a new directory, or remove it")


def record_files(folder: Path, plan: str | None = None) -> None:
    """Writes down the files of a folder, so that `wrote_all` knows later that nothing else is in it.

    Args:
        folder: otherwise complete. It has no folders in it.
        plan: the identity of the conversion that made it; None where none did.
    """
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != WRITTEN}
    made_by = {} if plan is None else {"plan": plan}
    atomic_write(folder / WRITTEN, json.dumps({**made_by, "files": sizes}, indent=1) + "\n")


def wrote_all(folder: Path) -> bool:
    """Whether all that a folder holds was there when `record_files` was called, and was not changed since.

    Sizes and times are compared, not bytes: a file must not be newer than the record.
    """
    record = folder / WRITTEN
    try:
        sizes = read_json(record)["files"]
        latest = record.stat().st_mtime_ns
        found = {path.name: path.stat() for path in folder.iterdir() if path.name != WRITTEN}
    except (OSError, KeyError, UserError):
        return False
    return isinstance(sizes, dict) and all(
        sizes.get(name) == status.st_size and status.st_mtime_ns <= latest for name, status in found.items()
    )


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        UserError: the file is missing, cannot be read, or does not hold a JSON object.
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
    """Reads the token ids that end a generation.

    Args:
        folder: of a Hugging Face checkpoint, or of its tokenizer alone.
        config: the config.json, if it has another name or lies in another folder.

    Returns:
        `eos_token_id` of generation_config.json, else of config.json; empty if neither file sets it.

    Raises:
        UserError: a file cannot be read, or its `eos_token_id` is neither a token id nor a list of them.
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
