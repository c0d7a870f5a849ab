"""Runs a script on Transformer Engine's Python, with its own arguments.

torchrun --nproc-per-node 2 -m tests.te_on_cpu 2.20.2 tools/self_test.py
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from tests import te_on_cpu

if __name__ == "__main__":
    _, release, script, *rest = sys.argv
    te_on_cpu.enable(te_on_cpu.folder(release))
    sys.argv = [script, *rest]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")
