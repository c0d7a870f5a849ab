"""Prepared preferences: Megatron's IndexedDataset and a sidecar, opened by mapping the files.

    PREFIX.bin, PREFIX.idx    documents of three sequences (prompt, chosen, rejected), int32 ids: one document a pair
    PREFIX.pairs.npy          one record a pair (`RECORD`)
    PREFIX.json               counts, options, fingerprints of tokenizer and template, checksums of the others

The last one is written last: a set whose PREFIX.json exists is whole. Opening reads no ids and takes the same memory for a
thousand and for ten million pairs.
"""

import dataclasses
import json
import mmap
import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from simpo_megatron.data.clean import DataReport, EncodedRows
from simpo_megatron.data.options import DataOptions
from simpo_megatron.data.pairs import Pairs
from simpo_megatron.errors import UserError
from simpo_megatron.files import sync

VERSION = 1
SUFFIXES = (".bin", ".idx", ".pairs.npy", ".json")
RECORD = np.dtype(
    [
        ("row", "<i8"),  # of the source, from 1
        ("weight", "<f4"),
        ("margin", "<f4"),  # NaN: gamma
        ("score_chosen", "<f4"),  # NaN where the source has none
        ("score_rejected", "<f4"),
        ("truncated", "u1"),  # CHOSEN_CUT, REJECTED_CUT
        ("prompt_cut", "u1"),
    ]
)
_CHECKED = 2**28  # bytes of ids whose checksum is taken whenever a set is opened


def part(prefix: str | Path, suffix: str) -> Path:
    """A file of a prepared set."""
    return Path(f"{prefix}{suffix}")


def is_prepared(prefix: str | Path) -> bool:
    """Whether a prepared set, or a part of one, has this prefix."""
    return any(part(prefix, suffix).is_file() for suffix in (".json", ".idx", ".bin"))


class Writer:
    """Writes a set beside its final place and moves it there when the `with` block ends well.

    Raises UserError where the files cannot be written, or where `prefix` is an IndexedDataset of something else.
    """

    def __init__(self, prefix: Path) -> None:
        if not part(prefix, ".json").is_file() and any(part(prefix, end).exists() for end in SUFFIXES):
            raise UserError(
                f"--output-prefix {prefix}: {prefix}.bin or .idx is there and no prepared set; choose another"
            )
        self.prefix = prefix
        self._temporary = prefix.with_name(f".{prefix.name}.{os.getpid()}")
        self._crc = self._largest = self._longest = self._longest_pair = self._tokens = self._pairs = 0

    def __enter__(self) -> "Writer":
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        try:
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._records = self._at(".records").open("wb")
            self._builder = IndexedDatasetBuilder(str(self._at(".bin")), dtype=np.int32)
        except OSError as error:
            raise self._refused(error) from error
        return self

    def add(self, encoded: EncodedRows) -> None:
        """Appends the pairs of a encoded."""
        pairs = encoded.pairs
        lengths = np.stack([pairs.prompt_length, pairs.chosen_length, pairs.rejected_length], axis=1)
        records = np.zeros(len(pairs), RECORD)
        for name in ("weight", "margin", "truncated"):
            records[name] = getattr(pairs, name)
        records["row"], records["prompt_cut"] = encoded.row, encoded.prompt_cut
        records["score_chosen"], records["score_rejected"] = encoded.scores.T
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
        """Moves the files to their place; what was there is replaced, and readers keep the files they have open."""
        try:
            self._builder.finalize(str(self._at(".idx")))
            self._records.close()
            with self._at(".pairs.npy").open("wb") as file:
                header = {"descr": RECORD.descr, "fortran_order": False, "shape": (self._pairs,)}
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
                "crc32": {".bin": self._crc, **{end: _crc32(self._at(end)) for end in SUFFIXES[1:3]}},
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
        self._records.close()
        self._builder.data_file.close()
        for suffix in (*SUFFIXES, ".records"):
            self._at(suffix).unlink(missing_ok=True)

    def _at(self, suffix: str) -> Path:
        return part(self._temporary, suffix)

    def _refused(self, error: OSError) -> UserError:
        return UserError(
            f"--output-prefix {self.prefix} cannot be written: {error.strerror or error}; choose a folder that can"
        )


class PreparedPairs(Pairs):
    """The pairs of a prepared set, mapped."""

    def __init__(self, prefix: str | Path, verify: bool = True) -> None:
        """`verify` compares the checksums of a set that is not large. Raises UserError for files that are missing, damaged
        or of another version."""
        self.prefix = str(prefix)
        self.about = _read_about(self.prefix)
        self._open()
        lengths = self._data.sequence_lengths
        self.prompt_length, self.chosen_length, self.rejected_length = (lengths[i::3] for i in range(3))
        self.weight, self.margin, self.truncated = (self.records[name] for name in ("weight", "margin", "truncated"))
        if verify and self.about["tokens"] * 4 <= _CHECKED:
            self.verify()

    def pair(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        data = self._data
        prompt, chosen, rejected = (data.get(3 * int(i) + member) for member in range(3))
        return prompt, chosen, rejected  # type: ignore[return-value]

    @property
    def fingerprint(self) -> int:
        return self.about["crc32"][".bin"]

    @property
    def largest_token(self) -> int:
        return self.about["largest_token"]

    @property
    def longest_sequence(self) -> int:
        return self.about["longest_sequence"]

    @property
    def report(self) -> DataReport:
        """What became of the rows of the source."""
        return DataReport(**self.about["report"])

    def verify(self) -> None:
        """Reads all of the files. Raises UserError where they are not those that were written."""
        for suffix, wanted in self.about["crc32"].items():
            if suffix in SUFFIXES and (found := _crc32(part(self.prefix, suffix))) != wanted:
                raise _damaged(part(self.prefix, suffix), f"its checksum is {found}, not {wanted}")

    def check(self, fingerprint: dict[str, str], given: dict[str, Any], checkpoint: Path) -> None:
        """Compares how the set was prepared with what a run would do.

        Args:
            fingerprint: of the model's tokenizer and template (`tokenizer.fingerprint`).
            given: options the user set; others are taken as prepared.
            checkpoint: named in errors.

        Raises:
            UserError: they differ.
        """
        mend = f"prepare it again with tools/preprocess_preferences.py --hf-checkpoint {checkpoint}"
        for name, value in fingerprint.items():
            before = self.about["fingerprint"].get(name)
            if value != before:
                raise UserError(
                    f"{self.prefix}: prepared with another {name} (fingerprint {before}) than that of {checkpoint} ({value}); "
                    + mend
                )
        for name, value in given.items():
            before = self.about["options"].get(name)
            if value != before:
                flag = "--" + name.replace("_", "-")
                raise UserError(
                    f"{self.prefix}: prepared with {flag} {before}, not {value}; drop the flag, or {mend} {flag} {value}"
                )

    def _open(self) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        binary, idx, records = (part(self.prefix, suffix) for suffix in SUFFIXES[:3])
        pairs = self.about["pairs"]
        sizes = {binary: 4 * self.about["tokens"], idx: 34 + 3 * pairs * 12 + (pairs + 1) * 8}
        try:
            for path, size in sizes.items():
                if path.stat().st_size != size:
                    raise _damaged(path, f"it has {path.stat().st_size} bytes, not {size}")
            self._data = IndexedDataset(self.prefix)
            self.records: Any = np.load(records, mmap_mode="r", allow_pickle=False)
        except (OSError, EOFError, ValueError, AssertionError, KeyError) as error:
            raise _damaged(self.prefix, " ".join(str(error).split())[:200]) from error
        index = self._data.index
        for mapped in (getattr(self._data.bin_reader, "_bin_buffer_mmap", None), index.bin_buffer_mmap, self.records):
            _expect_random_reads(mapped)
        end = 0 if not pairs else int(index.sequence_pointers[-1]) + 4 * int(index.sequence_lengths[-1])
        for found, wanted, what in (
            (index.dtype, np.int32, "type of ids"),
            (len(index), 3 * pairs, "number of sequences"),
            (end, 4 * self.about["tokens"], "last offset"),
        ):
            if found != wanted:
                raise _damaged(idx, f"its {what} is {found}, not {wanted}")
        if self.records.dtype != RECORD or len(self.records) != pairs:
            raise _damaged(records, f"it has {len(self.records)} records, not {pairs}, or other columns")


def _read_about(prefix: str) -> dict[str, Any]:
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
            f"{prefix}: there is no {path.name}, so it is no prepared set of preferences or an unfinished one; make it with "
            "tools/preprocess_preferences.py."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if version != VERSION:
        raise UserError(f"{path}: version {version!r} is not {VERSION}; prepare it again.")
    return about


def _expect_random_reads(mapped: Any) -> None:
    """Keeps the kernel from reading ahead: pairs come in random order, and what is near a pair is not read next."""
    pages = getattr(mapped, "_mmap", None)
    if pages is not None and hasattr(mmap, "MADV_RANDOM"):
        pages.madvise(mmap.MADV_RANDOM)


def _damaged(path: str | Path, how: str) -> UserError:
    return UserError(f"{path} is damaged: {how}; copy it again, or prepare it again.")


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            crc = zlib.crc32(block, crc)
    return crc
