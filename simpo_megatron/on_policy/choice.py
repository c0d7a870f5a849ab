"""Flags of one of several parts of a program, such as `--backend`: each part has settings of its own.

add_choice(parser, "backend", {"transformers": TransformersSettings, "server": ServerSettings})
settings = chosen_settings(args, "backend", {...})       # a flag of another part is an error
"""

from __future__ import annotations

import argparse
import typing
from collections.abc import Mapping
from typing import Any

from simpo_megatron.config.arguments import add_settings, build_group, heading, settable
from simpo_megatron.errors import UserError
from simpo_megatron.settings import Group, flag


def add_choice(parser: argparse.ArgumentParser, name: str, parts: Mapping[str, type[Group]], help: str) -> None:
    """Adds the flag that chooses, and the settings of every part. The first part is the default.

    Args:
        parser: to add to; a flag that is not given is absent from its namespace.
        name: of the flag, as a field name.
        parts: name of a part -> its settings. Several parts may share a setting.
        help: of the flag.
    """
    default = next(iter(parts))
    parser.add_argument(flag(name), choices=tuple(parts), default=default, help=f"{help} (default: {default})")
    known: set[str] = set()
    for part, group in parts.items():
        new = [field.name for field in settable(group) if field.name not in known]
        known.update(new)
        if new:
            add_settings(parser.add_argument_group(f"{flag(name)} {part}: {heading(group)}"), group, new)


def chosen_settings(args: argparse.Namespace, name: str, parts: Mapping[str, type[Group]]) -> Any:
    """The settings of the part that is chosen.

    Raises:
        UserError: a flag of another part is given, or a value is wrong.
    """
    given, part = vars(args), getattr(args, name)
    own = typing.get_type_hints(parts[part])
    for other, group in parts.items():
        for field in settable(group):
            if field.name in given and field.name not in own:
                raise UserError(
                    f"{flag(field.name)} belongs to {flag(name)} {other} and has no effect on {part}; drop it"
                )
    return build_group(parts[part], given)
