"""The version gate, and quiet imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

from simpo_megatron import compat
from simpo_megatron.errors import UserError


def test_another_megatron_core_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    compat.check_megatron_core()
    monkeypatch.setattr(compat, "MEGATRON_CORE", (0, 99))
    with pytest.raises(UserError, match=r"megatron-core 0\.16\.\d+ is installed, but 0\.99\.x"):
        compat.check_megatron_core()


def test_megatron_imports_quietly() -> None:
    code = (
        "from simpo_megatron.compat import quiet_megatron; quiet_megatron();"
        "import simpo_megatron.models.build, megatron.core.optimizer, megatron.core.distributed"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr == ""
