"""What the user can set: frozen dataclasses, one a group of flags, each validated where it is made.

A field `train_iters` is the flag `--train-iters` and the YAML key `train_iters`; names follow Megatron-LM where it has the
setting. `arguments.py` turns the groups into flags. Fields carry their help text; a closed set of values is a `Literal`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from simpo_megatron.config.data import DataConfig
from simpo_megatron.config.presets import Preset
from simpo_megatron.objectives import Objective
from simpo_megatron.parallel.config import ParallelConfig
from simpo_megatron.parallel.limits import check_rows, check_shared_prompts
from simpo_megatron.parallel.stages import VOCAB_DIVISOR
from simpo_megatron.settings import Group, parse_size, require, required, setting


@dataclass(frozen=True)
class ModelConfig(Group):
    """model"""

    hf_checkpoint: Path | None = setting(None, "folder of the Hugging Face checkpoint: weights, config, tokenizer")
    export_hf: Path | None = setting(None, "write the trained model here as a Hugging Face checkpoint")
    transformer_impl: Literal["auto", "local", "transformer_engine"] = setting(
        "auto",
        "layers: Transformer Engine's, Megatron's own (local), or TE where it is installed (auto)",
    )
    gradient_accumulation_fusion: bool | None = setting(
        None,
        "accumulate weight gradients directly in fp32 with Apex's kernel (default: where Apex's extension is installed)",
    )
    make_vocab_size_divisible_by: int = setting(
        VOCAB_DIVISOR, "pad the vocabulary to a multiple of this times the tensor-parallel size"
    )
    head: Literal["fused", "plain"] = setting(
        "fused", "log-probs a slab of logits at a time, or from all logits of the row at once"
    )
    head_slab_bytes: str = setting("256MiB", "logits the fused head holds at a time, in bytes, KiB, MiB or GiB")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("make_vocab_size_divisible_by")
        _ = self.slab_bytes  # checks it

    @property
    def checkpoint_folder(self) -> Path:
        """--hf-checkpoint, which training needs.

        Raises:
            UserError: it is not set.
        """
        return required(self.hf_checkpoint, "--hf-checkpoint is missing; give the folder of a Hugging Face checkpoint")

    @property
    def slab_bytes(self) -> int:
        """--head-slab-bytes as a number."""
        return parse_size("--head-slab-bytes", self.head_slab_bytes)


@dataclass(frozen=True)
class TrainConfig(Group):
    """training"""

    preset: Preset | None = setting(
        None, "hyperparameters of the SimPO paper, by the model they were tuned for; file and flags win over it"
    )
    dry_run: bool = setting(
        False, "check flags, layout, data, checkpoint and folders on one CPU process, and train nothing"
    )
    global_batch_size: int = setting(128, "pairs an optimizer step sees, over all ranks")
    train_iters: int | None = setting(None, "optimizer steps")
    train_epochs: float | None = setting(None, "passes over the training pairs, instead of --train-iters")
    seed: int = setting(1234, "of the data order")
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "cuda with nccl, or cpu with gloo; auto: cuda where there is one"
    )
    bf16: bool = setting(True, "bf16 weights and activations with fp32 main gradients and fp32 master weights")
    fp32: bool = setting(False, "everything in fp32, for checks")
    fp16: bool = setting(False, "not supported (log-prob sums overflow fp16); use --bf16 or --fp32")
    moe_aux_loss_coeff: float = setting(
        0.0, "weight of Megatron's load-balancing loss of every layer with experts, a mean over packed rows"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.fp16,
            "--fp16 is not supported: a response's log-prob sum leaves fp16's range and loss scaling would hide it; "
            "use bf16 (the default) or --fp32",
        )
        if self.fp32:
            object.__setattr__(self, "bf16", False)
        require(self.bf16 or self.fp32, "--no-bf16 leaves no precision; say --fp32")
        require(0 <= self.seed < 2**32, f"--seed {self.seed} must be at least 0 and below 2**32")
        self.positive("global_batch_size", "train_iters", "train_epochs")
        self.not_negative("moe_aux_loss_coeff")
        require(
            (self.train_iters is None) != (self.train_epochs is None),
            "give one of --train-iters and --train-epochs"
            + (", not both" if self.train_iters is not None else ": neither is set"),
        )


@dataclass(frozen=True)
class OptimizerConfig(Group):
    """optimizer"""

    lr: float = setting(1e-6, "highest learning rate")
    min_lr: float = setting(0.0, "lowest learning rate after decay")
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = setting(
        "cosine", "decay after the warm-up"
    )
    lr_warmup_fraction: float = setting(0.1, "share of the steps that warm up")
    weight_decay: float = setting(0.0, "decoupled weight decay; norms and biases have none")
    adam_beta1: float = setting(0.9, "Adam's first decay")
    adam_beta2: float = setting(0.999, "Adam's second decay")
    adam_eps: float = setting(1e-8, "Adam's epsilon")
    clip_grad: float = setting(1.0, "clip gradients to this norm; 0 does not clip")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("lr", "adam_eps")
        self.fraction("lr_warmup_fraction", "adam_beta1", "adam_beta2")
        require(0 <= self.min_lr <= self.lr, f"--min-lr {self.min_lr} must lie between 0 and --lr {self.lr}")
        self.not_negative("weight_decay", "clip_grad")


@dataclass(frozen=True)
class CheckpointConfig(Group):
    """checkpoints"""

    save: Path | None = setting(None, "folder of checkpoints, metrics.jsonl and TensorBoard files")
    load: Path | None = setting(None, "resume from the latest checkpoint in this folder")
    save_interval: int | None = setting(None, "steps between checkpoints; one is saved after the last step in any case")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("save_interval")
        require(
            self.save_interval is None or self.save is not None, "--save-interval needs --save, the folder to save into"
        )


@dataclass(frozen=True)
class LogConfig(Group):
    """evaluation and logging"""

    log_interval: int = setting(1, "steps between logged lines")
    eval_interval: int | None = setting(None, "steps between evaluations; before and after training in any case")
    tensorboard_dir: Path | None = setting(None, "TensorBoard files; default SAVE/tensorboard")
    wandb_project: str | None = setting(None, "log to this Weights & Biases project")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("log_interval", "eval_interval")


@dataclass(frozen=True)
class Config:
    """Everything a run is told; `objective` holds its own settings."""

    objective: Objective
    model: ModelConfig
    parallel: ParallelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    log: LogConfig

    def __post_init__(self) -> None:
        _ = self.model.checkpoint_folder, self.data.training_sources  # a run needs both
        save, export = self.checkpoint.save, self.model.export_hf
        require(
            save is None or save != export, f"--export-hf {export} is the --save folder too; export to another folder"
        )
        check_rows(self.data.seq_length, self.parallel)
        if self.data.share_prompts:
            fused = self.model.transformer_impl == "transformer_engine"
            check_shared_prompts(self.objective.responses, self.parallel.context_parallel_size, fused)
