"""Transformer Engine's own Python on a CPU, over plain torch in place of its compiled extension.

    from simpo_megatron import cpu
    from tests import te_on_cpu

    cpu.enable()
    te_on_cpu.enable(te_on_cpu.folder("2.20.2"))     # before anything imports Megatron
    import transformer_engine.pytorch as te

Modules, autograd functions, parallel linears, attention, ring attention and FusedAdam are NVIDIA's, unmodified, from
the wheel. The functions of this package stand for the kernels, in fp32 and bf16. A kernel that is not here imports, and
raises NotImplementedError with its name when it is called. So the tests prove names, layouts, collectives, dtypes and
gradients. They do not prove NVIDIA's kernels, streams or speed.

    kernels.py     matrix products, norms, rotary embedding, Adam
    attention.py   fused attention of packed rows
    ring.py        what ring attention does with the two halves of each sequence
    loading.py     the import of the wheel, and what it asks of torch.cuda

`tools/venv.sh` installs the releases in `releases.txt` beside the environment, never into it: without this package the
wheel breaks `import megatron.core`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.te_on_cpu.loading import enable

__all__ = ["NEWEST", "RELEASES", "enable", "folder"]

# 2.11 is in the range that Megatron-Core 0.16 was released against.
RELEASES = tuple(
    line.strip()
    for line in Path(__file__).with_name("releases.txt").read_text(encoding="utf-8").splitlines()
    if line.strip() and not line.startswith("#")
)
NEWEST = RELEASES[-1]


def folder(release: str) -> Path:
    """Where `tools/venv.sh` installed a release of Transformer Engine."""
    return Path(sys.prefix) / "te" / release
