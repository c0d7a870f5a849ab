"""The settings of the data: sources, length of packed rows, and how rows become pairs."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from simpo_megatron.data.options import DataOptions, PairOptions
from simpo_megatron.settings import require, required, setting

OPTIONS = tuple(option.name for option in fields(DataOptions))  # settings that a prepared set records


@dataclass(frozen=True)
class DataConfig(PairOptions):
    """Data."""

    # `max_length` and `max_prompt_length` are not None once the object is made: the defaults follow from `seq_length`.
    train_data: tuple[str, ...] | None = setting(
        None,
        "preferences to train on: prefixes of prepared sets (tools/preprocess_preferences.py), .jsonl (or .json, the "
        "same lines), .jsonl.gz, .parquet, a folder or hub id of `datasets`; several are a blend, with weights: "
        "0.7 A 0.3 B",
    )
    valid_data: tuple[str, ...] | None = setting(None, "preferences to evaluate on, the same kinds")
    seq_length: int = setting(4096, "tokens of a packed row; it takes whole pairs")
    max_length: int | None = setting(None, "tokens of a prompt and one response; default half of --seq-length")
    max_prompt_length: int | None = setting(
        None, "tokens a prompt is cut to when its sequence is too long; default half of --max-length"
    )
    share_prompts: bool = setting(
        False,
        "compute the prompt of a pair once, for both responses; not under Transformer Engine or context parallelism",
    )
    # Names of the settings that a flag, a file or a preset set. None: all that differ from their default.
    given: frozenset[str] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("seq_length", "max_length", "max_prompt_length")
        if self.given is None:
            given = frozenset(f.name for f in fields(self) if getattr(self, f.name) != f.default)
            object.__setattr__(self, "given", given)
        length = self.seq_length // 2 if self.max_length is None else self.max_length
        require(
            length >= 2,
            f"--max-length {length} leaves no room for a prompt and a response; use at least 2, and --seq-length at "
            "least twice that",
        )
        require(
            2 * length <= self.seq_length,
            f"--max-length {length} lets a pair outgrow its row; use at most half of --seq-length {self.seq_length}, "
            "or a longer row",
        )
        follows = {"max_length": length, "max_prompt_length": self.max_prompt_length or length // 2}
        # The command line gives lists of sources.
        sources = {name: tuple(getattr(self, name) or ()) or None for name in ("train_data", "valid_data")}
        for name, value in (follows | sources).items():
            object.__setattr__(self, name, value)
        _ = self.options  # checks them

    @property
    def options(self) -> DataOptions:
        """What tokenizing needs to know."""
        return DataOptions(**{name: getattr(self, name) for name in OPTIONS})

    @property
    def given_options(self) -> dict[str, Any]:
        """The options that were given. A prepared set must agree with them, and its own hold for the others."""
        return {name: getattr(self, name) for name in OPTIONS if name in (self.given or ())}

    @property
    def training_sources(self) -> tuple[str, ...]:
        """--train-data, which training needs.

        Raises:
            UserError: it is not set.
        """
        return required(self.train_data, "--train-data is missing; give a .jsonl, .jsonl.gz or .parquet file")
