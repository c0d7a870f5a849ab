"""The settings of checkpoints: when a run saves, what stays, and what it goes on from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from simpo_megatron.settings import Group, flag, require, setting


@dataclass(frozen=True)
class CheckpointConfig(Group):
    """Checkpoints."""

    save: Path | None = setting(
        None, "folder for checkpoints, metrics.jsonl and TensorBoard files; without it no checkpoint is written"
    )
    load: Path | None = setting(
        None,
        "folder to start from: the latest checkpoint of a run, which is resumed, or weights of "
        "tools/hf_to_megatron.py; may be the folder of --save while it is still empty",
    )
    finetune: bool = setting(
        False,
        "take the weights of --load alone: a new run starts at step 0 with a fresh optimizer, schedule and data order, "
        "whatever the objective of the saved run",
    )
    save_interval: int | None = setting(
        None, "steps between two checkpoints (default: one checkpoint, after the last step, which is always saved)"
    )
    save_retain_interval: int | None = setting(
        None,
        "delete a checkpoint once a newer one is complete, unless its step is a multiple of this, which must be a "
        "multiple of --save-interval (default: delete none)",
    )
    keep_last: int | None = setting(
        None, "keep this many of the latest checkpoints and delete older ones (default: delete none)", metavar="N"
    )
    keep_best: str | None = setting(
        None,
        "of the older checkpoints, also keep the best one by this metric of metrics.jsonl, e.g. eval/loss or "
        "eval/rewards/accuracies; a loss should be low, another metric high; needs --keep-last or "
        "--save-retain-interval, and the metric at each checkpoint",
        metavar="METRIC",
    )
    async_save: bool = setting(
        False, "go on with training while a checkpoint is written; the run waits only until its state is copied"
    )
    save_optim: bool = setting(
        True, "save the optimizer state too; without it a checkpoint holds weights, and a run cannot be resumed from it"
    )
    dist_ckpt_optim_fully_reshardable: bool = setting(
        False,
        "save the optimizer state such that it loads in any layout, which takes more host memory and time; off: at "
        "another data-parallel or context-parallel size only",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("save_interval", "save_retain_interval", "keep_last")
        for name in ("save_retain_interval", "keep_last", "keep_best"):
            require(
                getattr(self, name) is None or self.save is not None,
                f"{flag(name)} needs --save, the folder to save into",
            )
        require(not self.async_save or self.save is not None, "--async-save needs --save, the folder to save into")
        retain = self.save_retain_interval
        require(
            retain is None or (self.save_interval is not None and retain % self.save_interval == 0),
            f"--save-retain-interval {retain} must be a multiple of --save-interval "
            f"{self.save_interval or '(not set)'}",
        )
        require(
            self.keep_best is None or self.keep_last is not None or retain is not None,
            f"--keep-best {self.keep_best} has no effect where nothing is deleted; give --keep-last too",
        )
        require(
            not self.finetune or self.load is not None,
            "--finetune needs --load, the folder of the run whose weights to start from",
        )
        require(
            self.save_interval is None or self.save is not None, "--save-interval needs --save, the folder to save into"
        )
