"""What a parallel layout costs, before it runs. See README.md. No torch and no process group.

parameters.py  parameters that a rank of each pipeline stage holds
memory.py      bytes that a rank needs with one layout
layouts.py     the layouts that fit on a number of GPUs, best first
"""

from __future__ import annotations
