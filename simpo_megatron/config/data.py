"""The settings of the data: sources, rows, and how rows become pairs. See `simpo_megatron/config/run.py`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from simpo_megatron.data.options import AssistantHeader, DataOptions, DuplicatePolicy, PromptTruncation, TiePolicy
from simpo_megatron.settings import Group, require, setting

OPTIONS = tuple(item.name for item in fields(DataOptions))
"""The settings that a prepared set was made with."""


@dataclass(frozen=True)
class DataConfig(Group):
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
    prompt_truncation: PromptTruncation = setting("keep_end", "the part of a cut prompt that stays")
    assistant_header: AssistantHeader = setting(
        "prompt",
        "where the assistant's header counts; response is the SimPO repository's way: it is scored",
    )
    tie_policy: TiePolicy = setting("drop", "pairs with equal scores: drop them, or keep them with target margin 0")
    duplicates: DuplicatePolicy = setting("keep", "pairs that repeat an earlier row: keep or drop them")
    min_score_gap: float | None = setting(None, "drop pairs whose chosen score exceeds the rejected one by less")
    max_length_ratio: float | None = setting(
        None, "drop pairs whose longer response has more than this many times the tokens of the shorter one"
    )
    share_prompts: bool = setting(
        False,
        "compute the prompt of a pair once, for both responses; not under Transformer Engine or context parallelism",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.train_data), "--train-data is missing; give a .jsonl, .jsonl.gz or .parquet file")
        for name in ("train_data", "valid_data"):  # the command line gives lists
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self.positive("seq_length", "max_length", "max_prompt_length")
        given = {name: value for name in OPTIONS if (value := getattr(self, name)) != getattr(type(self), name)}
        object.__setattr__(self, "_given", given)
        if self.max_length is None:
            object.__setattr__(self, "max_length", self.seq_length // 2)
        assert self.max_length is not None
        require(
            self.max_length >= 2,
            f"--max-length {self.max_length} leaves no room for a prompt and a response; use at least 2, and --seq-length "
            "at least twice that",
        )
        require(
            2 * self.max_length <= self.seq_length,
            f"--max-length {self.max_length} lets a pair outgrow its row; use at most half of --seq-length "
            f"{self.seq_length}, or a longer row",
        )
        if self.max_prompt_length is None:
            object.__setattr__(self, "max_prompt_length", self.max_length // 2)
        _ = self.options  # checks them against each other

    @property
    def options(self) -> DataOptions:
        """What tokenizing needs to know."""
        assert self.max_length is not None and self.max_prompt_length is not None, "set in __post_init__"
        return DataOptions(
            max_length=self.max_length,
            max_prompt_length=self.max_prompt_length,
            prompt_truncation=self.prompt_truncation,
            assistant_header=self.assistant_header,
            tie_policy=self.tie_policy,
            duplicates=self.duplicates,
            min_score_gap=self.min_score_gap,
            max_length_ratio=self.max_length_ratio,
        )

    @property
    def given_options(self) -> dict[str, Any]:
        """The fields of `DataOptions` that are not at their default: what a prepared set must agree with."""
        return getattr(self, "_given")  # noqa: B009
