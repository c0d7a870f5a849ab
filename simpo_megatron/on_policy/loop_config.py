"""The YAML file of `tools/iterate.py`.

    folder: runs/loop             # one folder a round, and the table over the rounds
    rounds: 3
    hf_checkpoint: MODEL
    prompts: prompts.jsonl
    prompts_per_round: 500        # the next 500 in each round; left out: all of them in every round
    processes: 2                  # of training
    generate: {num_responses: 5, max_new_tokens: 512}             # flags of tools/generate_responses.py
    score: {reward_model: REWARD_MODEL}                           # of tools/score_responses.py
    build: {}                                                     # of tools/build_pairs.py
    train: {preset: llama3-instruct-v0.2, seq_length: 4096, ...}  # settings of training
    evaluate: {prompts: heldout.jsonl, temperature: 0, num_responses: 1, max_new_tokens: 512}

`evaluate` answers its prompts with the model of every round and scores them as the round's responses are scored; its
prompts are left out of training. Its other keys are flags of tools/generate_responses.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from simpo_megatron.config.yaml_file import read_mapping
from simpo_megatron.data.schema import kind_of
from simpo_megatron.errors import UserError
from simpo_megatron.settings import expand, flag, require

# What the loop sets itself in each section.
_OWN = {
    "generate": ("prompts", "hf_checkpoint", "output", "shard", "for", "questions", "exclude_prompts", "seed"),
    "score": ("responses", "output"),
    "build": ("data", "input", "output"),
    "train": ("hf_checkpoint", "train_data", "save", "load", "export_hf", "config"),
    "evaluate": ("hf_checkpoint", "output", "shard", "for", "questions", "exclude_prompts"),
}


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The settings of a loop.

    Attributes:
        folder: of the rounds.
        rounds: how many.
        hf_checkpoint: the model that the first round starts from.
        prompts: to answer.
        prompts_per_round: how many of them a round takes; None for all.
        processes: of training.
        seed: of the responses; every round draws others.
        generate: flags of tools/generate_responses.py.
        score: flags of tools/score_responses.py.
        build: flags of tools/build_pairs.py.
        train: settings of training.
        evaluate: `prompts`, and flags of tools/generate_responses.py; empty for no evaluation.
    """

    folder: str
    rounds: int
    hf_checkpoint: str
    prompts: str
    score: Mapping[str, Any]
    train: Mapping[str, Any]
    prompts_per_round: int | None = None
    processes: int = 1
    seed: int = 42
    generate: Mapping[str, Any] = field(default_factory=dict)
    build: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("rounds", "processes", "prompts_per_round"):
            value = getattr(self, name)
            require(value is None or value > 0, f"--config: {name} {value} must be greater than 0")
        for section, own in _OWN.items():
            taken = [key for key in getattr(self, section) if key in own]
            require(not taken, f"--config: {section}: {', '.join(taken)} is set by the loop itself; remove it")
        require(
            not self.evaluate or "prompts" in self.evaluate,
            "--config: evaluate: it needs `prompts`, the prompts to evaluate on",
        )

    @classmethod
    def read(cls, path: Path) -> LoopConfig:
        """Reads the file.

        Raises:
            UserError: it cannot be read, or a key or a value is wrong.
        """
        values = {name: value for name, (_, value) in read_mapping(path).items()}
        known = {item.name: item for item in fields(cls)}
        if unknown := sorted(set(values) - set(known)):
            raise UserError(f"--config {path}: {unknown[0]} is not known; the keys are {', '.join(known)}")
        needed = [name for name, item in known.items() if item.default is MISSING and item.default_factory is MISSING]
        if missing := [name for name in needed if name not in values]:
            raise UserError(
                f"--config {path}: {missing[0]} is missing; the keys that are needed are {', '.join(needed)}"
            )
        for name, annotation in get_type_hints(cls).items():
            if name in values:
                values[name] = _checked(path, name, values[name], annotation)
        return cls(**values)


def _checked(path: Path, name: str, value: Any, annotation: Any) -> Any:
    """A value in the type of its field."""
    if annotation is str:
        wanted, fits = "a text", isinstance(value, str) and value != ""
    elif annotation in (int, int | None):
        wanted, fits = "a whole number", isinstance(value, int) and not isinstance(value, bool)
    else:
        value = {} if value is None else value
        wanted, fits = "a mapping of flags to values, such as {top_p: 0.95}", isinstance(value, dict)
    if not fits:
        raise UserError(f"--config {path}: {name} is {kind_of(value)}; it must be {wanted}")
    if isinstance(value, dict):
        return {str(key).replace("-", "_"): item for key, item in value.items()}
    return expand(value) if isinstance(value, str) else value


def command_line(settings: Mapping[str, Any]) -> list[str]:
    """The flags of a section.

    >>> command_line({"top_p": 0.9, "share_prompts": True, "bf16": False, "train_data": ["a", "b"]})
    ['--top-p', '0.9', '--share-prompts', '--no-bf16', '--train-data', 'a', 'b']
    """
    words: list[str] = []
    for name, value in settings.items():
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        else:
            words += [flag(name), *(str(item) for item in (value if isinstance(value, list) else [value]))]
    return words
