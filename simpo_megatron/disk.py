"""What a disk can hold, and the sentence for a file that cannot be written."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from simpo_megatron.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)  # the file system, or the quota of the user


def human(size: float) -> str:
    """A number of bytes as people read it.

    >>> human(1536), human(3 * 2**30)
    ('1.5 KiB', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def existing_folder(folder: Path) -> Path:
    """A folder, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def free_bytes(folder: Path) -> int:
    """Bytes that can still be written below a folder, which need not exist yet."""
    return shutil.disk_usage(existing_folder(folder)).free


def cannot_write(what: str, error: BaseException, otherwise: str, then: str = "") -> UserError:
    """The error for a file or folder that cannot be written. It advises to free space only where space is missing.

    Args:
        what: flag and path.
        error: of the system, or of a library that writes files.
        otherwise: what the user can do in any case, such as "give another --save".
        then: what follows on freeing space, such as " and go on with --resume".

    >>> failure = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    >>> print(cannot_write("--save run", failure, "choose another --save"))
    --save run cannot be written: No space left on device; free space there, or choose another --save
    """
    number = _error_number(error)
    fix = f"free space there{then}, or {otherwise}" if number in FULL else otherwise
    reason = os.strerror(number) if number else " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{what} cannot be written: {reason}; {fix}")


def _error_number(error: BaseException) -> int | None:
    """The system's number of an error; None where neither the error nor its text has one.

    safetensors puts the number into its text. torch's writer of zip files says only that a file is shorter than what
    it wrote.
    """
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = re.search(r"(?:os error|Errno) (\d+)", str(error))
    if found is not None:
        return int(found[1])
    return errno.ENOSPC if re.search(r"inline_container.*unexpected pos", str(error), re.DOTALL) else None
