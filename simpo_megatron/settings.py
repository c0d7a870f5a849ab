"""What groups of settings are made of: fields with help texts, closed choices, and checks with clear errors.

A group is a frozen dataclass derived from `Group`. `config/arguments.py` makes flags and YAML keys from its fields.
"""

from __future__ import annotations

import functools
import math
import os
import re
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from simpo_megatron.errors import UserError


def setting(default: Any, help: str, metavar: str | None = None) -> Any:
    """A dataclass field with the text that `--help` shows for it; `metavar` names its value there."""
    return field(default=default, metadata={"help": help, "metavar": metavar})


def choices(annotation: Any) -> tuple[str, ...]:
    """The values of a `Literal`, of `Literal[...] | None`, or of the items of a tuple; empty for other types."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(value for part in get_args(annotation) for value in choices(part))


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def require(condition: bool, sentence: str) -> None:
    """Raises UserError with this sentence if the condition is false."""
    if not condition:
        raise UserError(sentence)


T = TypeVar("T")


def required(value: T | None, sentence: str) -> T:
    """Returns a setting that the program needs; raises UserError with this sentence if it is None or empty."""
    if value is None or value == ():
        raise UserError(sentence)
    return value


def parse_size(name: str, text: str) -> int:
    """The number of bytes of a size such as 80GiB.

    Args:
        name: the flag, for the error.
        text: a number with the unit B, KB, MB, GB, KiB, MiB or GiB; without a unit it counts bytes.

    Raises:
        UserError: the text is not a size, or not above 0, or without a unit below 1 MiB.

    >>> parse_size("--gpu-memory", "80GiB"), parse_size("--max-memory", "1.5 GB")
    (85899345920, 1500000000)
    """
    found = re.fullmatch(r" *(\d{1,15}(?:\.\d+)?) *(?:([KMG])(i)?)?B? *", text, re.IGNORECASE)
    size = 0
    if found is not None:
        number, unit, binary = found.groups()
        size = int(float(number) * (1024 if binary else 1000) ** (" KMG".index(unit.upper()) if unit else 0))
    if size <= 0:
        raise UserError(f"{name} {text} is not a size; give a number of bytes, or a size such as 256MiB or 1.5GB")
    if size < 2**20 and text.strip()[-1].isdecimal():  # the unit was forgotten
        unit = "G" if size < 100 else "M"
        raise UserError(f"{name} {text} is {size} bytes; give the unit too, as in {text.strip()}{unit}")
    return size


_VARIABLE = re.compile(r"\\\$|\$(?:\{(?P<braced>\w+)\}|(?P<bare>[A-Za-z_]\w*))", re.ASCII)


def expand(text: str) -> str:
    r"""Expands `~` at the start, `$NAME` and `${NAME}`, as a shell does; `\$` is a dollar sign.

    Raises:
        UserError: an environment variable is not set.
    """

    def value(found: re.Match[str]) -> str:
        name = found["braced"] or found["bare"]
        if name is None:
            return "$"
        if name not in os.environ:
            raise UserError(
                f"the environment variable {name} in {text} is not set; set it, or write \\$ for a dollar sign"
            )
        return os.environ[name]

    return _VARIABLE.sub(value, os.path.expanduser(text))


def path_value(text: str) -> Path:
    """The value of a setting that is a path, expanded as by `expand`."""
    if not text:
        raise UserError("a path is empty; is a variable of the shell not set?")
    return Path(expand(text))


def source_value(text: str) -> str:
    """The value of a setting that names data: a path, a hub id, or several with weights. Each word is expanded."""
    return " ".join(expand(word) for word in text.split(" "))


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """The types of the fields of a dataclass, by name. They are kept: a command line needs them many times."""
    return get_type_hints(cls)


class Group:
    """Base of the settings groups: rejects non-finite floats and unknown choices, and turns lists into tuples.

    Groups add checks in `__post_init__`. The first line of a group's docstring is its heading in `--help`.
    """

    def __post_init__(self) -> None:
        for name, annotation in field_types(type(self)).items():
            value, allowed = getattr(self, name), choices(annotation)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{flag(name)} {value} must be a finite number")
            if isinstance(value, list):  # the command line gives lists
                value = tuple(value)
                object.__setattr__(self, name, value)
            for item in value if isinstance(value, tuple) else (value,):
                if allowed and item is not None and item not in allowed:
                    raise UserError(f"{flag(name)} {item} is not known; use {' or '.join(allowed)}")

    def positive(self, *names: str) -> None:
        """Requires that these fields are above 0; None is allowed."""
        for name in names:
            value = getattr(self, name)
            require(value is None or value > 0, f"{flag(name)} {value} must be greater than 0")

    def not_negative(self, *names: str) -> None:
        """Requires that these fields are at least 0; None is allowed."""
        for name in names:
            value = getattr(self, name)
            require(value is None or value >= 0, f"{flag(name)} {value} must not be negative")

    def fraction(self, *names: str) -> None:
        """Requires that these fields are at least 0 and below 1."""
        for name in names:
            value = getattr(self, name)
            require(0 <= value < 1, f"{flag(name)} {value} must be at least 0 and less than 1")
