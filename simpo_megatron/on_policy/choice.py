"""Flags of one of several parts of a program, such as `--backend`: each part has settings of its own.

add_choice(parser, "backend", {"transformers": TransformersSettings, "server": ServerSettings})
settings = chosen_settings(args, "backend", {...})       # a flag of another part is an error
"""

from __future__ import annotations

import argparse
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
    part = getattr(args, name)
    if (other := flag_of_another(part, parts, vars(args))) is not None:
        field, owner = other
        raise UserError(f"{flag(field)} belongs to {flag(name)} {owner} and has no effect on {part}; drop it")
    return build_group(parts[part], vars(args))


def flag_of_another(part: str, parts: Mapping[str, type[Group]], given: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first setting that is given and that the chosen part does not have, with the part that has it.

    Args:
        part: the name of the chosen part.
        parts: name of a part -> its settings.
        given: the flags of the command line, by field name.
    """
    own = {field.name for field in settable(parts[part])}
    others = ((field.name, name) for name, group in parts.items() for field in settable(group))
    return next(((field, name) for field, name in others if field in given and field not in own), None)
