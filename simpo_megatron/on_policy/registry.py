"""A line of a registry: settings that are always there, and a class that is imported when it is chosen."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from simpo_megatron.settings import Group


class Entry(NamedTuple):
    """A backend or a scorer. transformers takes seconds to import, and vLLM may be absent."""

    settings: type[Group]
    module: str
    cls: str

    def load(self) -> Any:
        """The class."""
        return getattr(import_module(self.module), self.cls)
