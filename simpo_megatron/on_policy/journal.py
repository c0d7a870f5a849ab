"""A JSON Lines file that grows by blocks of rows, and goes on where a killed run stopped.

with Journal.open("--output", Path("responses.jsonl"), about) as journal:
    todo = [prompt for prompt in prompts if prompt.id not in journal.done]
    journal.append(rows)                       # on the disk when the call returns

Beside it, `responses.about.json` says what made the rows. A run with other settings is refused, unless there is no row
yet. A kill may leave a part of a line at the end of the file: the next run cuts it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from simpo_megatron.disk import cannot_write
from simpo_megatron.errors import UserError
from simpo_megatron.files import atomic_write, read_json, sync
from simpo_megatron.on_policy.prompts import digest
from simpo_megatron.trainer.lock import locked

_OTHERWISE = "give another --output"

Row = dict[str, Any]


class Journal:
    """An open file of rows. Each row has an `id`.

    Attributes:
        path: of the file.
        done: id -> digest of what the row was made from, of every row in the file.
    """

    def __init__(self, path: Path, made_from: Callable[[Row], Any]) -> None:
        self.path, self._made_from = path, made_from
        try:
            self.done = {row["id"]: self.digest(row) for row in read_journal(path)}
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} has rows that this program did not write ({error}); {_OTHERWISE}") from None

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        flag: str,
        path: Path,
        about: Mapping[str, Any],
        made_from: Callable[[Row], Any] = lambda row: row["prompt"],
    ) -> Iterator[Journal]:
        """Opens the file for this process alone, and creates it if it is not there.

        Args:
            flag: that names the file, for errors.
            path: of the file, which ends in .jsonl.
            about: what decides the rows, as JSON values.
            made_from: the part of a row that was there before this program, as a JSON value.

        Raises:
            UserError: the file belongs to a run with other settings or to another process, is damaged, or cannot be
                written.
        """
        if path.suffix != ".jsonl":
            raise UserError(f"{flag} {path}: rows are written as JSON lines; give a name that ends in .jsonl")
        with locked(flag, path, path.with_name(f".{path.name}.lock")):
            beside = about_path(path)
            begun = path.exists() and (not path.is_file() or path.stat().st_size > 0)
            if begun and not beside.exists():
                raise UserError(f"{flag} {path} exists and has no {beside.name} beside it; give another file")
            if begun:
                check_about(flag, path, about)
            try:
                if not begun:
                    atomic_write(beside, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
                    path.touch()
                    sync(path.parent)
                _cut_torn_line(path)
            except OSError as error:
                raise cannot_write(f"{flag} {path}", error, _OTHERWISE) from error
            yield cls(path, made_from)

    def digest(self, row: Row) -> str:
        """Digest of what a row is made from."""
        return digest(self._made_from(row))

    def append(self, rows: Sequence[Row]) -> None:
        """Adds rows and flushes them to the disk (fsync).

        Raises:
            UserError: the file cannot be written.
        """
        try:
            with self.path.open("ab") as file:
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(f"--output {self.path}", error, _OTHERWISE, " and start again, it goes on") from error
        self.done.update((row["id"], self.digest(row)) for row in rows)

    def check_source(self, digests: Mapping[str, str], source: str, what: str) -> None:
        """Checks that every row in the file is made from one of the source.

        Args:
            digests: id -> digest, of the rows of the source.
            source: for the error.
            what: the rows are made from, for the error.

        Raises:
            UserError: a row is made from another one.
        """
        for prompt_id, found in self.done.items():
            if prompt_id not in digests:
                what = "which is not among the prompts of"
            elif digests[prompt_id] != found:
                what = f"which has another {what} in"
            else:
                continue
            raise UserError(f"--output {self.path} has the prompt {prompt_id}, {what} {source}; {_OTHERWISE}")


def about_path(path: Path) -> Path:
    """`responses.about.json` beside `responses.jsonl`."""
    return path.with_suffix(".about.json")


def check_about(flag: str, path: Path, about: Mapping[str, Any]) -> None:
    """Compares what made a file with the settings of this run.

    Raises:
        UserError: they differ; the settings are named.
    """
    found = read_json(about_path(path))
    differ = [
        f"{name} is {json.dumps(found.get(name))} there and {json.dumps(about.get(name))} here"
        for name in {**found, **about}
        if found.get(name) != about.get(name)
    ]
    if differ:
        raise UserError(f"{flag} {path} was made with other settings: {'; '.join(differ[:3])}; {_OTHERWISE}")


def read_journal(path: Path) -> Iterator[Row]:
    """The rows of a journal.

    Raises:
        UserError: a line is not a row with `id`, `prompt` and `responses`, or two rows have one id.
    """
    seen: set[str] = set()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            row = row if isinstance(row, dict) and "prompt" in row and isinstance(row.get("responses"), list) else {}
            prompt_id = row.get("id")
            if not isinstance(prompt_id, str):
                raise UserError(
                    f"{path}:{number}: not a row with `id`, a text, `prompt` and `responses`; remove the line"
                )
            if prompt_id in seen:
                raise UserError(f"{path}:{number}: a second row with the id {prompt_id}; remove one")
            seen.add(prompt_id)
            yield row


def _cut_torn_line(path: Path) -> None:
    """Removes what follows the last end of a line."""
    with path.open("rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 2**16)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            end = start + newline + 1 if newline >= 0 else start
            if newline >= 0:
                break
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())
