"""`SAVE/run.yaml`: every setting of a run, with versions and the command. `--config SAVE/run.yaml` repeats the run."""

from __future__ import annotations

import platform
import shlex
import sys
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from simpo_megatron.config.arguments import GROUPS, settable
from simpo_megatron.config.data import OPTIONS
from simpo_megatron.config.run import Config
from simpo_megatron.data.blend import parse_blend
from simpo_megatron.data.prepared_format import is_prepared
from simpo_megatron.disk import cannot_write
from simpo_megatron.files import atomic_write

RECORD = "run.yaml"
_PACKAGES = ("simpo-megatron", "torch", "megatron-core", "transformer-engine", "transformers", "numpy")


def write_record(config: Config, folder: Path) -> None:
    """Writes run.yaml.

    Args:
        config: of the run, with what it found out itself (`setup.name_layers`).
        folder: of --save.

    Raises:
        UserError: the file cannot be written.
    """
    head = [
        f"Settings of a run of {dist.get_world_size()} processes. --config with this file repeats it; for a new run",
        "add --save and --load with a new folder.",
        f"Command: {shlex.join(sys.orig_argv)}",
        f"In the folder: {Path.cwd()}",
        f"Python {platform.python_version()}, {', '.join(versions())}",
    ]
    text = "".join(f"# {line}\n" for line in head) + yaml.safe_dump(
        effective_settings(config), sort_keys=False, width=120
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / RECORD, text)
    except OSError as error:
        raise cannot_write(f"--save: {folder / RECORD}", error, "choose another --save") from error


def versions() -> list[str]:
    """The packages that decide a run, with their versions."""
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return found


def effective_settings(config: Config) -> dict[str, Any]:
    """Every setting by its name, as a YAML value that `arguments.read_yaml` reads back."""
    values: dict[str, Any] = {"objective": config.objective.name}
    for group in (config.objective, *(getattr(config, field.name) for field in fields(Config) if field.name in GROUPS)):
        values |= {field.name: _yaml_value(getattr(group, field.name)) for field in settable(type(group))}
    sources = parse_blend(config.data.training_sources, "--train-data").sources
    if any(is_prepared(source) for source in sources):  # the set itself holds what was not given
        for name in set(OPTIONS) - set(config.data.given_options):
            values.pop(name, None)
    return values


def _yaml_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_literal(item) for item in value]
    return _literal(str(value)) if isinstance(value, Path) else value


def _literal(text: str) -> str:
    r"""A path or a source with its dollar signs as `\$`, because the reader expands variables."""
    return text.replace("$", r"\$")
