"""Small file systems: full ones and read-only ones."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mounts a file system in memory at `folder` while the block runs. The test is skipped where that is refused."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("only root can mount a file system, and not in every container")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int) -> None:
    """Fills the file system of a folder; about `leave` bytes stay free."""
    (folder / "filler").unlink(missing_ok=True)
    status = os.statvfs(folder)
    with (folder / "filler").open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, status.f_bavail * status.f_frsize - leave)


def make_read_only(folder: Path) -> None:
    """Mounts the file system of `small_disk` again, read-only."""
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
