"""Command line, YAML file and preset -> `config.run.Config`.

    config = parse(["--hf-checkpoint", "MODEL", "--train-data", "pairs.jsonl", "--train-epochs", "1"])

Four layers: defaults, preset, YAML file, flags. Each layer wins over those before it.
"""

from __future__ import annotations

import argparse
import dataclasses
import reprlib
import typing
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from simpo_megatron.config.data import DataConfig
from simpo_megatron.config.layers import layered
from simpo_megatron.config.megatron import MegatronConfig
from simpo_megatron.config.other_names import advise
from simpo_megatron.config.presets import ADAPTERS, PRESETS, ShowPresets, preset_values
from simpo_megatron.config.run import Config
from simpo_megatron.config.yaml_file import read_mapping
from simpo_megatron.errors import UserError
from simpo_megatron.objectives import OBJECTIVES, Objective
from simpo_megatron.program import Parser
from simpo_megatron.settings import choices, field_types, flag, path_value, require, source_value

GROUPS: dict[str, type] = {
    field.name: field_types(Config)[field.name] for field in dataclasses.fields(Config) if field.name != "objective"
}
DEFAULT_OBJECTIVE = next(iter(OBJECTIVES))
METAVARS = {int: "N", float: "X", Path: "PATH", str: "NAME"}
# What a YAML value must be, for the error of one that is something else.
WANTED: dict[Any, str] = {
    int: "a whole number, such as 8",
    float: "a number, such as 0.5",
    bool: "true or false",
    Path: "a path, in quotes where it looks like a number",
    str: "a text",
}
_ITEM_LISTS = tuple(field.name for field in dataclasses.fields(MegatronConfig))
_ITEMS = "a list such as [bucket_size=40000000]"
_SOURCES = "a source, or a list such as [a.jsonl, b.jsonl] or, with weights, [0.7, a.jsonl, 0.3, b.jsonl]"


def settable(group: type) -> list[dataclasses.Field]:
    """The fields of a group that are settings, in the order of `--help`."""
    return [field for field in dataclasses.fields(group) if "help" in field.metadata]


def heading(group: type) -> str:
    """The title of a group in `--help`: the first line of its docstring, without the full stop."""
    return str(group.__doc__).partition("\n")[0].rstrip(".")


def _value_type(annotation: Any) -> type:
    """The type of a value that is set: `int` for `int | None`, `str` for a Literal."""
    kind = annotation
    if typing.get_origin(annotation) is not tuple:
        kind = next((part for part in typing.get_args(annotation) if part is not type(None)), annotation)
    return str if choices(annotation) and typing.get_origin(kind) is not tuple else kind


def _fields() -> list[tuple[str, dataclasses.Field, Any]]:
    """Every setting: name of its group (of an objective, its name), field and annotation."""
    return [
        (group, field, field_types(cls)[field.name])
        for group, cls in (*OBJECTIVES.items(), *GROUPS.items())
        for field in settable(cls)
    ]


def build_parser() -> Parser:
    """The parser of the training program, with a flag for every setting. A flag that is not given is absent."""
    parser = settings_parser(
        "torchrun --nproc-per-node N -m simpo_megatron.train",
        "SimPO preference training on Megatron-Core: Hugging Face checkpoint and preferences in, aligned one out.",
        "YAML file with the same names, for example `train_iters: 100`; flags win over it",
    )
    parser.add_argument("--list-presets", action=ShowPresets)
    add_objectives(parser)
    for cls in GROUPS.values():
        add_settings(parser.add_argument_group(heading(cls)), cls)
    return parser


def settings_parser(prog: str, description: str | None, config_help: str) -> Parser:
    """A parser with --config, to which a program adds settings. A flag that is not given is absent from the namespace.

    A setting of training that the program does not have is refused, and the error says so.

    Args:
        prog: the command, for the usage line.
        description: what the program does.
        config_help: the help text of --config.
    """
    settings = {"objective", *(field.name for _, field, _ in _fields())}

    def answer(name: str, known: Collection[str]) -> str | None:
        if name in settings and name not in known:
            return "training has it, and here it would have no effect; drop it"
        return advise(name, known, flag)

    parser = Parser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        advise=answer,
    )
    parser.add_argument("--config", type=path_value, metavar="PATH", help=config_help)
    return parser


def add_objectives(parser: argparse.ArgumentParser, with_defaults: bool = False) -> None:
    """Adds `--objective` and the flags of every objective.

    Args:
        parser: to add them to.
        with_defaults: a flag that is not given gets its default; otherwise it is absent from the namespace.
    """
    section = parser.add_argument_group("objective")
    default: dict[str, Any] = {"default": DEFAULT_OBJECTIVE} if with_defaults else {}
    text = f"what the model is trained for (default: {DEFAULT_OBJECTIVE})"
    section.add_argument("--objective", choices=tuple(OBJECTIVES), help=text, **default)
    add_settings(section, Objective, with_defaults=with_defaults)
    for cls in OBJECTIVES.values():
        if names := own_settings(cls):
            add_settings(parser.add_argument_group(heading(cls)), cls, names, with_defaults)


def own_settings(objective: type[Objective]) -> list[str]:
    """The names of the settings that an objective has beside those of all objectives."""
    common = {field.name for field in settable(Objective)}
    return [field.name for field in settable(objective) if field.name not in common]


def check_owner(names: Collection[str], objective: str, spell: Callable[[str], str] = flag) -> None:
    """Refuses settings of another objective, which would have no effect.

    Args:
        names: of the settings that were given.
        objective: the name of the one that was chosen.
        spell: writes a setting as the user gave it.

    Raises:
        UserError: it names the setting and its objective.
    """
    for name, cls in OBJECTIVES.items():
        for field in own_settings(cls) if name != objective else ():
            require(
                field not in names,
                f"{spell(field)} belongs to --objective {name} and has no effect with --objective {objective}; drop it",
            )


def build_objective(settings: dict[str, Any]) -> Objective:
    """The objective that `settings` name, built from its own fields among them.

    Raises:
        UserError: the objective is not known, or its settings contradict each other.
    """
    name = settings.get("objective", DEFAULT_OBJECTIVE)
    require(name in OBJECTIVES, f"--objective {name} is not known; use {' or '.join(OBJECTIVES)}")
    return build_group(OBJECTIVES[name], settings)


def build_group(group: type, settings: dict[str, Any]) -> Any:
    """Builds a group from those settings that are its fields."""
    own = {field.name: settings[field.name] for field in settable(group) if field.name in settings}
    given = frozenset(name for name, value in own.items() if value is not None)
    return DataConfig(**own, given=given) if group is DataConfig else group(**own)


def add_settings(section: Any, group: type, names: Sequence[str] | None = None, with_defaults: bool = False) -> None:
    """Adds a group's fields as flags to a parser or a section of one.

    Args:
        section: the parser or the section.
        group: the dataclass.
        names: of the fields to add; None for all.
        with_defaults: a flag that is not given gets its default; otherwise it is absent from the namespace.
    """
    for field in settable(group):
        if names is None or field.name in names:
            _add(section, field, field_types(group)[field.name], {"default": field.default} if with_defaults else {})


def _add(section: Any, field: dataclasses.Field, annotation: Any, options: dict[str, Any]) -> None:
    text = field.metadata["help"]
    if isinstance(field.default, bool):
        text += f" (default: {'on' if field.default else 'off'})"
    elif field.default is not None:
        text += f" (default: {field.default})"
    name, kind, allowed = flag(field.name), _value_type(annotation), choices(annotation)
    if kind is bool:
        section.add_argument(name, action=argparse.BooleanOptionalAction, help=text, **options)
    elif typing.get_origin(kind) is tuple:
        metavar = field.metadata["metavar"] or ("NAME" if allowed else "SOURCE")
        text += f" ({', '.join(allowed)})" if allowed else ""
        section.add_argument(name, nargs="+", type=source_value, help=text, metavar=metavar, **options)
    elif allowed:
        section.add_argument(name, choices=allowed, help=text, **options)
    else:
        metavar = field.metadata["metavar"] or METAVARS[kind]
        section.add_argument(name, type=path_value if kind is Path else kind, help=text, metavar=metavar, **options)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads the settings of a YAML file, by field name and in the field's type.

    Raises:
        UserError: the file cannot be read, a key is not a setting, or a value is not of its type.
    """
    named = read_mapping(path)
    annotations = {"objective": str, **{field.name: annotation for _, field, annotation in _fields()}}
    unknown = [
        f"{key} is not a setting; {advise(name, annotations, str) or '--help lists them'}"
        for name, (key, _) in named.items()
        if name not in annotations
    ]
    require(not unknown, f"--config {path}: {'. '.join(unknown)}")
    settings = {}
    for name, (key, value) in named.items():
        try:
            settings[name] = _convert(value, annotations[name])
        except UserError as error:
            raise UserError(f"--config {path}: {key}: {error}") from error
        except (TypeError, ValueError, OverflowError) as error:
            found = "has no value" if value is None else f"is {reprlib.repr(value)}"
            names = f"a list such as [{', '.join(choices(annotations[name])[:2])}]"
            listed = _ITEMS if name in _ITEM_LISTS else names if choices(annotations[name]) else _SOURCES
            wanted = WANTED.get(_value_type(annotations[name]), listed)
            raise UserError(f"--config {path}: {key} {found}; give {wanted}") from error
    return settings


def _convert(value: Any, annotation: Any) -> Any:
    kind: Any = _value_type(annotation)
    if value is None and type(None) in typing.get_args(annotation):
        return None
    if typing.get_origin(kind) is tuple:
        return tuple(source_value(_text(item)) for item in (value if isinstance(value, list) else [value]))
    if value is None or (kind is bool) != isinstance(value, bool):
        raise TypeError
    if kind is Path:
        return path_value(value)
    if kind is int and int(value) != float(value):
        raise ValueError
    if kind is str:
        return _text(value)
    return kind(value)  # YAML reads 1e-6 as a string: float() takes it


def _text(value: Any) -> str:
    """A value as text: YAML reads `7` as a number, and `2026-01-01` as a date.

    Raises:
        TypeError: it is no single value, or none at all.
    """
    if value is None or isinstance(value, bool | list | dict):
        raise TypeError
    return str(value)


def with_file(given: dict[str, Any], defaults: dict[str, Any] | None = None) -> dict[str, Any]:
    """Merges the layers: `given` over the file that its `config` names, over the preset, over `defaults`."""
    path = given.get("config")
    file = read_yaml(path) if path else {}
    preset = {**(defaults or {}), **file, **given}.get("preset")
    require(preset is None or preset in PRESETS, f"--preset {preset} is not known; use {' or '.join(PRESETS)}")
    objective = {"objective": DEFAULT_OBJECTIVE, **(defaults or {}), **file, **given}["objective"]
    if objective in OBJECTIVES:  # `build_objective` refuses others
        check_owner(file, objective, lambda name: f"--config {path}: {name}")
        check_owner(given, objective)
    adapters = any({**file, **given}.get(name) is not None for name in ADAPTERS)
    return layered(defaults or {}, preset_values(str(preset), adapters), file, given)


def parse(argv: Sequence[str] | None = None) -> Config:
    """The configuration that a command line of the training program asks for.

    Args:
        argv: the flags; None for those of this process.

    Raises:
        UserError: an unknown flag or key, a value of the wrong type, or settings that contradict each other.
    """
    return build_config(with_file(vars(build_parser().parse_args(argv))))


def build_config(settings: dict[str, Any]) -> Config:
    """The configuration of these settings, by field name; the others have their defaults.

    Raises:
        UserError: settings contradict each other, or one that a run needs is missing.
    """
    groups = {name: build_group(group, settings) for name, group in GROUPS.items()}
    return Config(objective=build_objective(settings), **groups)


def flat(config: Config) -> dict[str, Any]:
    """Every setting by its name, as a primitive value: for logs and for the `args` of a checkpoint.

    Paths are strings, and lists are one string with blanks between the items.
    """
    groups = (config.objective, *(getattr(config, group) for group in GROUPS))
    values = {field.name: getattr(group, field.name) for group in groups for field in settable(type(group))}
    return {"objective": config.objective.name, **{name: _primitive(value) for name, value in values.items()}}


def _primitive(value: Any) -> Any:
    if isinstance(value, tuple):
        return " ".join(value)
    return str(value) if isinstance(value, Path) else value
