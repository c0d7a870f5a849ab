"""A file of reference log-probs: two numbers a pair, and what they were made of.

    SAVE/reference/train.npz, valid.npz    beside the checkpoints of a run
    PREFIX.reference                       beside a prepared set, from tools/score_reference.py

The file is written while the pairs are scored, so scoring goes on after a kill.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simpo_megatron.disk import cannot_write
from simpo_megatron.errors import UserError
from simpo_megatron.files import atomic_path


@dataclass
class ReferenceFile:
    """Reference log-probs of a data set.

    Attributes:
        path: of the file.
        made_of: fingerprints of weights, tokenizer, template and tokens, and the precision, by name.
        sums: float32 [P, 2], chosen first; NaN for pairs that are not scored yet.
    """

    path: Path
    made_of: dict[str, str]
    sums: np.ndarray

    @classmethod
    def new(cls, path: Path, made_of: dict[str, str], count: int) -> ReferenceFile:
        """A file of `count` pairs, none of them scored. Nothing is written yet."""
        return cls(path, made_of, np.full((count, 2), np.nan, np.float32))

    @classmethod
    def read(cls, path: Path) -> ReferenceFile:
        """Reads a file.

        Raises:
            UserError: it cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                made_of, sums = json.loads(str(arrays["made_of"])), arrays["sums"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} cannot be read: {reason}; remove it to score the pairs again") from error
        return cls(path, made_of, sums)

    def write(self) -> None:
        """Writes the file whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(self.path) as temporary, temporary.open("wb") as file:
                np.savez(file, made_of=np.array(json.dumps(self.made_of)), sums=self.sums)
        except OSError as error:
            raise cannot_write(str(self.path), error, "choose another folder") from error

    def check(self, wanted: dict[str, str], advice: str) -> None:
        """Compares what the file was made of.

        Args:
            wanted: what it must have been made of; names that are not in it are not compared.
            advice: what to do where it differs.

        Raises:
            UserError: it was made of something else, which is named.
        """
        for name, value in wanted.items():
            if self.made_of.get(name) != value:
                raise UserError(
                    f"{self.path} holds reference log-probs for other {name} ({self.made_of.get(name)}) than those of "
                    f"this run ({value}); {advice}"
                )

    @property
    def missing(self) -> int:
        """How many pairs are not scored yet."""
        return int(np.isnan(self.sums).any(axis=1).sum())
