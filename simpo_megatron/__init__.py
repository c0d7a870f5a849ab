"""SimPO preference training on Megatron-Core: from a Hugging Face checkpoint and preferences to an aligned checkpoint.

    from simpo_megatron import LogProbHead, PreferenceStep, RowPacker, SimPO, reduce_metrics

A name of `__all__` is imported when it is first used, so `import simpo_megatron` imports neither torch nor Megatron.
`examples/plain_loop.py` shows the names in a training loop.

Programs:

train.py        the training program: `torchrun -m simpo_megatron.train`
dry_run.py      `--dry-run`: what can be known about a run on one CPU process
megatron_lm.py  the plug for Megatron-LM's own `pretrain()`

From pairs to the loss:

data/           preference files -> tokenized pairs: schemas, templates, packing, order, prepared sets, the data doctor
batch/          pairs -> packed rows -> the microbatches of this rank
head/           hidden states -> log-probs, loss and gradients, a slab of logits at a time
objectives/     one file an objective: the loss of a pair, its flags, rewards and metrics
step.py         Megatron's `forward_step`: one microbatch, and every normaliser
metrics.py      the sums behind the metrics of a step, and their one reduction

Models and checkpoints:

models/         Hugging Face checkpoints as Megatron-Core models: one file a family, loading, export
checkpoint/     conversion between Hugging Face checkpoints and Megatron's
parallel/       what a parallel layout may be, and which layers and tokens a rank has

Runs:

config/         the settings: flags, YAML file, presets
trainer/        processes, engine, checkpoints, logging, and the training loop
planning/       memory and pipeline bubble of a layout before it runs
diagnose/       two trained models beside each other: exact KL, rankings, length
verify/         a layout compared with Hugging Face: log-probs, loss, every gradient
self_test/      everything above with tiny models, in one table: what works on this machine
on_policy/      responses of the model, their scores, pairs of them, in rounds; the files of benchmarks

Used by all:

settings.py     groups of settings, and the checks of their values
program.py      what programs share: exit codes, one sentence for a mistake of the user, the time left
errors.py       `UserError`, a mistake that the user can fix
files.py        files that are read and written whole
disk.py         what a disk can hold, and the sentence for a file that cannot be written
compat.py       optional imports and version gates
cpu.py          Megatron-Core on a CPU
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simpo_megatron.batch.packer import RowPacker
    from simpo_megatron.batch.row import PreferenceBatch
    from simpo_megatron.errors import UserError
    from simpo_megatron.head.layer import LogProbHead
    from simpo_megatron.metrics import reduce_metrics
    from simpo_megatron.objectives import Objective, PairScores, SimPO
    from simpo_megatron.step import PreferenceStep

    __version__: str

__all__ = [
    "LogProbHead",
    "Objective",
    "PairScores",
    "PreferenceBatch",
    "PreferenceStep",
    "RowPacker",
    "SimPO",
    "UserError",
    "__version__",
    "reduce_metrics",
]

_MODULES = {
    "LogProbHead": "head.layer",
    "Objective": "objectives",
    "PairScores": "objectives",
    "PreferenceBatch": "batch.row",
    "PreferenceStep": "step",
    "RowPacker": "batch.packer",
    "SimPO": "objectives",
    "UserError": "errors",
    "reduce_metrics": "metrics",
}


def __getattr__(name: str) -> Any:
    """Imports a public name from its module; `__version__` is the one in `setup.py`, from the package's metadata."""
    if name == "__version__":
        return version("simpo-megatron")
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names with those that are imported already."""
    return sorted({*globals(), *__all__})
