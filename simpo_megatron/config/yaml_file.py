"""The YAML file of --config as a mapping of names to values, with one sentence for each way it can be wrong.

What the names and values mean is the matter of `arguments.read_yaml`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from simpo_megatron.errors import UserError


def read_mapping(path: Path) -> dict[str, tuple[str, Any]]:
    """Reads the file.

    Args:
        path: the file.

    Returns:
        By field name (dashes are underscores): the key as it is written, and its value.

    Raises:
        UserError: the file cannot be read, is not YAML, holds no `name: value` lines, or has a name twice.
    """
    text = _read(path)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        content: Any = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        parts = (getattr(error, name, None) for name in ("context", "problem", "reason"))
        reason = ", ".join(filter(None, parts)) or type(error).__name__
        raise UserError(f"--config {where}: not valid YAML ({reason}); write `name: value` lines") from error
    if content is None or content == {}:
        raise UserError(
            f"--config {path} sets nothing; write lines such as `train_iters: 100` into it, or drop --config"
        )
    if not isinstance(content, dict) or not isinstance(node, yaml.MappingNode):
        kind = "list" if isinstance(content, list) else "single value"
        raise UserError(f"--config {path} holds a {kind}; it must hold `name: value` lines")
    _refuse_double_names(path, node)
    return {_name(key): (str(key), value) for key, value in content.items()}


def _read(path: Path) -> str:
    if path.is_dir():
        raise UserError(f"--config {path} is a folder; give the YAML file of a run")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"--config {path}: there is no such file; check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(f"--config {path} cannot be read: {reason}; check the file and its permissions") from error


def _refuse_double_names(path: Path, node: yaml.MappingNode) -> None:
    """Refuses a name that is given twice: YAML would take the last value, without a word."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        name, line = _name(key.value), key.start_mark.line + 1
        if name in lines:
            raise UserError(
                f"--config {path}: {name} is set in line {lines[name]} and again in line {line}; keep one of them"
            )
        lines[name] = line


def _name(key: Any) -> str:
    return str(key).replace("-", "_")
