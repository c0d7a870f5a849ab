"""The settings of the data: sources, rows, and how rows become pairs. See `simpo_megatron/config/run.py`."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field, fields
from typing import Any

from simpo_megatron.data.options import DataOptions, PairOptions
from simpo_megatron.settings import require, required, setting

OPTIONS = tuple(option.name for option in fields(DataOptions))
"""The settings that a prepared set was made with."""


@dataclass(frozen=True)
class DataConfig(PairOptions):
    """data"""

    train_data: tuple[str, ...] | None = setting(
        None,
        "preferences to train on: prefixes of prepared sets (tools/preprocess_preferences.py), .jsonl (or .json, the same "
        "lines), .jsonl.gz, .parquet, a folder or hub id of `datasets`; several are a blend, with weights: 0.7 A 0.3 B",
    )
    valid_data: tuple[str, ...] | None = setting(None, "preferences to evaluate on, the same kinds")
    seq_length: int = setting(4096, "tokens of a row; whole pairs are packed into it")
    max_length: int | None = setting(None, "tokens of prompt and response together; default half of --seq-length")
    max_prompt_length: int | None = setting(
        None, "tokens a prompt is cut to when its sequence is too long; default half of --max-length"
    )
    share_prompts: bool = setting(
        False,
        "compute the prompt of a pair once, for both responses; not under Transformer Engine or context parallelism",
    )
    given: InitVar[frozenset[str] | None] = None
    """Names of the settings that a flag, a file or a preset set; None: those that differ from their default."""
    given_options: dict[str, Any] = field(init=False, repr=False, compare=False, default_factory=dict)
    """The options that were given: a prepared set must agree with them, and its own hold for the others."""
    options: DataOptions = field(init=False, repr=False, compare=False, default_factory=DataOptions)
    """What tokenizing needs to know, with the lengths that follow from the others."""

    def __post_init__(self, given: frozenset[str] | None) -> None:  # type: ignore[override]
        super().__post_init__()
        for name in ("train_data", "valid_data"):  # the command line gives lists
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self.positive("seq_length", "max_length", "max_prompt_length")
        values = {name: getattr(self, name) for name in OPTIONS}
        if given is None:
            given = frozenset(f.name for f in fields(self) if f.name in values and values[f.name] != f.default)
        object.__setattr__(self, "given_options", {name: values[name] for name in OPTIONS if name in given})
        length = self.seq_length // 2 if self.max_length is None else self.max_length
        require(
            length >= 2,
            f"--max-length {length} leaves no room for a prompt and a response; use at least 2, and --seq-length at least "
            "twice that",
        )
        require(
            2 * length <= self.seq_length,
            f"--max-length {length} lets a pair outgrow its row; use at most half of --seq-length {self.seq_length}, or a "
            "longer row",
        )
        prompt = length // 2 if self.max_prompt_length is None else self.max_prompt_length
        object.__setattr__(self, "max_length", length)
        object.__setattr__(self, "max_prompt_length", prompt)
        values |= {"max_length": length, "max_prompt_length": prompt}
        object.__setattr__(self, "options", DataOptions(**values))

    @property
    def training_sources(self) -> tuple[str, ...]:
        """--train-data, which training needs.

        Raises:
            UserError: it is not set.
        """
        return required(self.train_data, "--train-data is missing; give a .jsonl, .jsonl.gz or .parquet file")
