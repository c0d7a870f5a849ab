"""Writes a prepared set (`prepared_format.py`), block after block of pairs."""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from simpo_megatron.data.counts import DataReport
from simpo_megatron.data.options import DataOptions
from simpo_megatron.data.pairs import InMemoryPairs
from simpo_megatron.data.prepared_format import SUFFIXES, VERSION, crc32, part, record_type
from simpo_megatron.disk import cannot_write
from simpo_megatron.errors import UserError
from simpo_megatron.files import sync


class Writer:
    """Writes a set beside its final place; `finish` moves it there. Without `finish` the `with` block removes it."""

    def __init__(self, prefix: Path) -> None:
        """A writer of one set.

        Args:
            prefix: of the files. A prepared set that is there is replaced.

        Raises:
            UserError: `prefix` is an IndexedDataset of something else, or (on entering) the files cannot be written.
        """
        if not part(prefix, ".json").is_file() and any(part(prefix, end).exists() for end in SUFFIXES):
            raise UserError(
                f"--output-prefix {prefix}: {prefix}.bin or .idx exists and is not a prepared set; choose another"
            )
        self.prefix = prefix
        self._temporary = prefix.with_name(f".{prefix.name}.{os.getpid()}")
        self._open: list[Any] = []  # the files under way
        self._crc = self._largest = self._longest = self._longest_pair = self._tokens = self._pairs = 0

    def __enter__(self) -> Writer:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        try:
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._records = self._at(".records").open("wb")
            self._open.append(self._records)
            self._builder = IndexedDatasetBuilder(str(self._at(".bin")), dtype=np.int32)
            self._open.append(self._builder.data_file)
        except OSError as error:
            self._remove()
            raise self._refused(error) from error
        return self

    def add(self, pairs: InMemoryPairs) -> None:
        """Appends pairs.

        Raises:
            UserError: the files cannot be written.
        """
        lengths = np.stack([pairs.prompt_length, pairs.chosen_length, pairs.rejected_length], axis=1)
        records = np.empty(len(pairs), record_type())
        for name, numbers in pairs.columns.items():
            records[name] = numbers
        try:
            self._records.write(records.tobytes())
            for start, stop, three in zip(pairs.offsets[:-1], pairs.offsets[1:], lengths.tolist(), strict=True):
                self._builder.add_document(pairs.tokens[start:stop], three)  # type: ignore[arg-type]
        except OSError as error:
            raise self._refused(error) from error
        self._crc = zlib.crc32(pairs.tokens.data, self._crc)
        self._tokens += len(pairs.tokens)
        self._pairs += len(pairs)
        if len(pairs):
            self._largest = max(self._largest, pairs.largest_token)
            self._longest = max(self._longest, pairs.longest_sequence)
            self._longest_pair = max(self._longest_pair, int(pairs.pair_tokens.max()))

    def finish(self, source: str, options: DataOptions, fingerprint: dict[str, str], report: DataReport) -> None:
        """Moves the files to their place. Earlier files are replaced; a program that has them open keeps reading those.

        Args:
            source: of the pairs.
            options: the pairs were made with.
            fingerprint: of tokenizer and template (`tokenizer.fingerprint`).
            report: of the rows.

        Raises:
            UserError: the files cannot be written.
        """
        try:
            self._builder.finalize(str(self._at(".idx")))
            self._records.close()
            with self._at(".pairs.npy").open("wb") as file:
                header = {"descr": record_type().descr, "fortran_order": False, "shape": (self._pairs,)}
                np.lib.format.write_array_header_1_0(file, header)
                with self._at(".records").open("rb") as records:
                    while block := records.read(2**24):
                        file.write(block)
            self._at(".records").unlink()
            about = {
                "version": VERSION,
                "source": source,
                "pairs": self._pairs,
                "tokens": self._tokens,
                "crc32": {".bin": self._crc, **{end: crc32(self._at(end)) for end in SUFFIXES[1:3]}},
                "largest_token": self._largest,
                "longest_sequence": self._longest,
                "longest_pair": self._longest_pair,
                "options": dataclasses.asdict(options),
                "fingerprint": fingerprint,
                "report": dataclasses.asdict(report),
            }
            self._at(".json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            part(self.prefix, ".json").unlink(missing_ok=True)
            for suffix in SUFFIXES:
                sync(self._at(suffix))
            for suffix in SUFFIXES:  # .json last
                if suffix == ".json":
                    sync(self.prefix.absolute().parent)
                os.replace(self._at(suffix), part(self.prefix, suffix))
            sync(self.prefix.absolute().parent)
        except OSError as error:
            raise self._refused(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        """Closes and removes the temporary files, whatever state they are in.

        On a full disk, closing fails where a buffer cannot be flushed. The file is removed all the same.
        """
        for stream in self._open:
            with suppress(OSError):
                stream.close()
        for suffix in (*SUFFIXES, ".records"):
            with suppress(OSError):
                self._at(suffix).unlink(missing_ok=True)

    def _at(self, suffix: str) -> Path:
        return part(self._temporary, suffix)

    def _refused(self, error: OSError) -> UserError:
        return cannot_write(f"--output-prefix {self.prefix}", error, "choose another folder")
