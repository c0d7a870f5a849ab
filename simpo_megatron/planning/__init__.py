"""What a run costs, before it runs: memory, time lost, disk. See README.md. No torch and no process group.

parameters.py       parameters that a rank of each pipeline stage holds
state.py            bytes of a parameter: gradient and optimizer state, on GPU and host
activations.py      bytes that autograd keeps of a layer
adapters.py         bytes that autograd keeps of the adapters of a layer
memory.py           bytes that a rank needs with one layout
layouts.py          the layouts that fit on a number of GPUs, best first
flops.py            floating-point operations of a step
checkpoint_size.py  bytes of a checkpoint, how many a run writes, and whether the disk has room
"""

from __future__ import annotations
