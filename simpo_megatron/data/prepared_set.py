"""Opens a prepared set (`prepared_format.py`) as `Pairs`, and compares it with the run that uses it."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np

from simpo_megatron.data.counts import DataReport
from simpo_megatron.data.pairs import Pairs, all_columns
from simpo_megatron.data.prepared_format import SUFFIXES, crc32, damaged, part, read_about, record_type
from simpo_megatron.errors import UserError

_CHECKED = 2**28  # bytes of ids: larger sets are not read whole for their checksum when they are opened


class PreparedPairs(Pairs):
    """The pairs of a prepared set, mapped into memory. Opening reads no ids, however many pairs there are.

    Attributes:
        prefix: of the files.
        about: the content of PREFIX.json.
    """

    def __init__(self, prefix: str | Path, verify: bool = True) -> None:
        """Opens a set.

        Args:
            prefix: of its files.
            verify: compare the checksums of a set that is not large (`_CHECKED`).

        Raises:
            UserError: the files are missing, damaged, or of another version.
        """
        self.prefix = str(prefix)
        self.about = read_about(self.prefix)
        records = self._open()
        lengths = self._data.sequence_lengths
        self.prompt_length, self.chosen_length, self.rejected_length = (lengths[i::3] for i in range(3))
        self.columns = all_columns(len(records), {name: records[name] for name in records.dtype.names})
        if verify and self.about["tokens"] * 4 <= _CHECKED:
            self.verify()

    def pair(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `Pairs`."""
        prompt, chosen, rejected = (self._data.get(3 * int(i) + sequence) for sequence in range(3))
        return prompt, chosen, rejected  # type: ignore[return-value]

    @property
    def fingerprint(self) -> int:
        """See `Pairs`."""
        return self.about["crc32"][".bin"]

    @property
    def largest_token(self) -> int:
        """See `Pairs`."""
        return self.about["largest_token"]

    @property
    def longest_sequence(self) -> int:
        """See `Pairs`."""
        return self.about["longest_sequence"]

    @property
    def report(self) -> DataReport:
        """Counts of what became of the rows of the source."""
        return DataReport(**self.about["report"])

    def verify(self) -> None:
        """Compares the checksums of all files, which reads them whole.

        Raises:
            UserError: a file is not the one that was written.
        """
        for suffix, wanted in self.about["crc32"].items():
            if suffix in SUFFIXES and (found := crc32(part(self.prefix, suffix))) != wanted:
                raise damaged(part(self.prefix, suffix), f"its checksum is {found}, not {wanted}")

    def check(self, fingerprint: dict[str, str], given: dict[str, Any], checkpoint: Path) -> None:
        """Compares how the set was prepared with what a run would do.

        Args:
            fingerprint: of the model's tokenizer and template (`tokenizer.fingerprint`).
            given: options that the user set. For all others the set's own are used.
            checkpoint: named in errors.

        Raises:
            UserError: they differ.
        """
        fix = f"prepare it again with tools/preprocess_preferences.py --hf-checkpoint {checkpoint}"
        for name, value in fingerprint.items():
            before = self.about["fingerprint"].get(name)
            if value != before:
                raise UserError(
                    f"{self.prefix}: prepared with another {name} (fingerprint {before}) than that of {checkpoint} "
                    f"({value}); {fix}"
                )
        for name, value in given.items():
            before = self.about["options"].get(name)
            if value != before:
                flag = "--" + name.replace("_", "-")
                raise UserError(
                    f"{self.prefix}: prepared with {flag} {before}, not {value}; drop the flag, or {fix} {flag} {value}"
                )

    def _open(self) -> Any:
        """Maps the files and compares their sizes and types. Returns the records, [P]."""
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        binary, idx, sidecar = (part(self.prefix, suffix) for suffix in SUFFIXES[:3])
        pairs = self.about["pairs"]
        sizes = {binary: 4 * self.about["tokens"], idx: 34 + 3 * pairs * 12 + (pairs + 1) * 8}
        try:
            for path, size in sizes.items():
                if path.stat().st_size != size:
                    raise damaged(path, f"it has {path.stat().st_size} bytes, not {size}")
            self._data = IndexedDataset(self.prefix)
            records: Any = np.load(sidecar, mmap_mode="r", allow_pickle=False)
        except (OSError, EOFError, ValueError, AssertionError, KeyError) as error:
            raise damaged(self.prefix, " ".join(str(error).split())[:200]) from error
        index = self._data.index
        for mapped in (getattr(self._data.bin_reader, "_bin_buffer_mmap", None), index.bin_buffer_mmap, records):
            _expect_random_reads(mapped)
        end = 0 if not pairs else int(index.sequence_pointers[-1]) + 4 * int(index.sequence_lengths[-1])
        for found, wanted, what in (
            (index.dtype, np.int32, "type of ids"),
            (len(index), 3 * pairs, "number of sequences"),
            (end, 4 * self.about["tokens"], "last offset"),
        ):
            if found != wanted:
                raise damaged(idx, f"its {what} is {found}, not {wanted}")
        stored, declared = records.dtype.descr, record_type().descr
        if stored != declared[: len(stored)] or len(records) != pairs:  # a set made before a column was added lacks it
            raise damaged(sidecar, f"it has {len(records)} records, not {pairs}, or other columns")
        return records


def _expect_random_reads(mapped: Any) -> None:
    """Keeps the kernel from reading ahead, because pairs are read in random order."""
    pages = getattr(mapped, "_mmap", None)
    if pages is not None and hasattr(mmap, "MADV_RANDOM"):
        pages.madvise(mmap.MADV_RANDOM)
