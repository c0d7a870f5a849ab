"""`import simpo_megatron`: its public names, and that it imports neither torch nor Megatron."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

import simpo_megatron


def test_the_import_is_light() -> None:
    code = "import sys, simpo_megatron; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "megatron", "transformers", "numpy"} & set(done.stdout.split())


def test_every_public_name_resolves() -> None:
    found = {name: getattr(simpo_megatron, name) for name in simpo_megatron.__all__}
    assert found.pop("__version__") == importlib.metadata.version("simpo-megatron")
    for name, value in found.items():
        assert value.__name__ == name and value.__module__.startswith("simpo_megatron.")
    assert set(found) == set(simpo_megatron._MODULES) and set(simpo_megatron.__all__) <= set(dir(simpo_megatron))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LossConfig'"):
        _ = simpo_megatron.LossConfig  # type: ignore[attr-defined]
    assert not hasattr(simpo_megatron, "DPO")
