"""The hyperparameters of the SimPO paper (arXiv 2405.14734) and its repository, by the model they were tuned for.

`--preset llama3-instruct`, or `preset: llama3-instruct` in the YAML file. The file and the flags win over a preset.

All presets train one epoch of 128 pairs a step, with cosine decay after 10 % of warm-up, on sequences of at most 2048
tokens. beta, gamma / beta and the learning rate are the paper's for the model, which trained all weights. With adapters
the learning rate is `LORA_LR_FACTOR` times the paper's.
"""

from __future__ import annotations

import argparse
from typing import Any, Literal, NoReturn, get_args

from simpo_megatron.config.layers import in_place_of

Preset = Literal[
    "mistral-base", "mistral-instruct", "llama3-base", "llama3-instruct", "llama3-instruct-v0.2", "gemma2-instruct"
]

_ALL = {
    "train_epochs": 1.0,
    "global_batch_size": 128,
    "lr_decay_style": "cosine",
    "lr_warmup_fraction": 0.1,
    "max_length": 2048,
    "max_prompt_length": 1800,
}
_BETA_RATIO_LR = {
    "mistral-base": (2.0, 0.8, 3e-7),
    "mistral-instruct": (2.5, 0.1, 5e-7),
    "llama3-base": (2.0, 0.5, 6e-7),
    "llama3-instruct": (2.5, 0.55, 1e-6),
    "llama3-instruct-v0.2": (10.0, 0.3, 1e-6),
    "gemma2-instruct": (10.0, 0.5, 8e-7),  # the repository's README, for google/gemma-2-9b-it
}
PRESETS: dict[str, dict[str, Any]] = {
    name: {"simpo_beta": beta, "simpo_gamma_beta_ratio": ratio, "lr": lr, **_ALL}
    for name, (beta, ratio, lr) in _BETA_RATIO_LR.items()
}
ADAPTERS = ("lora_rank", "load_adapter")  # settings with which adapters are trained
LORA_LR_FACTOR = 10.0  # an adapter is trained at about so many times the learning rate of all weights
assert set(PRESETS) == set(get_args(Preset)), "`Preset` and `_BETA_RATIO_LR` name different presets"


def preset_values(preset: str, adapters: bool) -> dict[str, Any]:
    """The settings of a preset; with adapters its learning rate is multiplied by `LORA_LR_FACTOR`.

    >>> preset_values("mistral-instruct", True)["lr"]
    5e-06
    """
    values = PRESETS.get(preset, {})
    return {**values, "lr": round(LORA_LR_FACTOR * values["lr"], 12)} if adapters and values else values


def describe(preset: str, settings: dict[str, Any]) -> str:
    """One line: what a preset set, and what the file or the flags set otherwise.

    Args:
        preset: its name.
        settings: of the run, from `arguments.flat`.

    >>> describe("mistral-instruct", {**PRESETS["mistral-instruct"], "lr": 3e-7}).partition("; ")[2]
    'set otherwise: lr 3e-07 (preset 5e-07)'
    """
    values = preset_values(preset, any(settings.get(name) is not None for name in ADAPTERS))
    used = {name: value for name, value in values.items() if name in settings}  # another objective has other settings
    kept = [f"{name} {value}" for name, value in used.items() if settings[name] == value]
    other = [_otherwise(name, value, settings) for name, value in used.items() if settings[name] != value]
    return f"preset {preset}: {', '.join(kept)}" + (f"; set otherwise: {', '.join(other)}" if other else "")


def _otherwise(name: str, value: Any, settings: dict[str, Any]) -> str:
    """A setting that is not the preset's, or the one that takes its place: train_iters for train_epochs."""
    instead = in_place_of(name, settings)
    if instead is not None:
        return f"{instead} {settings[instead]} (preset {name} {value})"
    return f"{name} {'not set' if settings[name] is None else settings[name]} (preset {value})"


def table() -> str:
    """All presets and their values: one line for each setting, one column for each preset."""
    rows = [["setting", *PRESETS]]
    rows += [[name, *(str(values[name]) for values in PRESETS.values())] for name in next(iter(PRESETS.values()))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


class ShowPresets(argparse.Action):
    """The flag --list-presets: prints the presets and ends the program, as --help does."""

    def __init__(self, option_strings: list[str], dest: str, **_: Any) -> None:
        short = "; ".join(f"{name} {beta:g}, {ratio:g}, {lr:g}" for name, (beta, ratio, lr) in _BETA_RATIO_LR.items())
        text = f"print the values of the presets and exit; beta, gamma / beta and lr are: {short}"
        super().__init__(option_strings, dest, nargs=0, help=text)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        """Prints the table; argparse calls it."""
        print(table())
        parser.exit()
