"""What the user can set: one frozen dataclass for each group of flags. A group checks its values when it is made.

A field `train_iters` is the flag `--train-iters` and the YAML key `train_iters`. Names follow Megatron-LM where it has
the setting. Each field carries its help text; a closed set of values is a `Literal`. `arguments.py` turns the groups
into flags.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from simpo_megatron.config.checkpoint import CheckpointConfig
from simpo_megatron.config.data import DataConfig
from simpo_megatron.config.megatron import MegatronConfig
from simpo_megatron.config.memory import MemoryConfig
from simpo_megatron.config.presets import Preset
from simpo_megatron.config.profile import ProfileConfig
from simpo_megatron.config.stop import StopConfig
from simpo_megatron.objectives import Objective
from simpo_megatron.parallel.config import ParallelConfig
from simpo_megatron.parallel.limits import check_rows, check_shared_prompts
from simpo_megatron.parallel.stages import VOCAB_DIVISOR
from simpo_megatron.settings import Group, flag, parse_size, require, required, setting


@dataclass(frozen=True)
class ModelConfig(Group):
    """Model."""

    hf_checkpoint: Path | None = setting(
        None, "folder of the Hugging Face checkpoint to train: weights, config.json and tokenizer; needed"
    )
    reference_checkpoint: Path | None = setting(
        None,
        "folder of the Hugging Face checkpoint of the reference model, for objectives that compare with one: its "
        "log-probs of the pairs are computed once, before the first step (default: the weights that the run starts "
        "from, unless the data has the log-probs)",
    )
    export_hf: Path | None = setting(
        None,
        "after training, write the model as a Hugging Face checkpoint into this folder, which must be new or empty",
    )
    transformer_impl: Literal["auto", "local", "transformer_engine"] = setting(
        "auto",
        "code of the layers: transformer_engine, local (Megatron's own, on plain torch), or auto: Transformer Engine "
        "if it is installed",
    )
    attention_backend: Literal["auto", "flash", "fused", "unfused", "local"] = setting(
        "auto",
        "attention of Transformer Engine: flash (FlashAttention), fused (cuDNN), unfused, or auto: the fastest that "
        "runs; local: the one of the layers on plain torch",
    )
    gradient_accumulation_fusion: bool | None = setting(
        None,
        "accumulate weight gradients directly in fp32; needs a GPU and Transformer Engine's layers or Apex's extension "
        "(default: on if they are there)",
    )
    rope_fusion: bool | None = setting(
        None, "rotary embedding by Transformer Engine's kernel, on a GPU (default: on with Transformer Engine's layers)"
    )
    moe_permute_fusion: bool | None = setting(
        None,
        "sort tokens by expert with Transformer Engine's kernel, on a GPU (default: on with Transformer Engine's "
        "layers)",
    )
    make_vocab_size_divisible_by: int = setting(
        VOCAB_DIVISOR, "pad the vocabulary to a multiple of this number times --tensor-model-parallel-size"
    )
    head: Literal["fused", "plain"] = setting(
        "fused",
        "how log-probs are computed: fused holds one slab of logits at a time; plain holds all logits of a packed row",
    )
    head_slab_bytes: str = setting(
        "256MiB",
        "memory for the logits that the fused head holds at a time, e.g. 256MiB or 1GiB; larger is faster for pairs "
        "longer than a slab",
        metavar="SIZE",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("make_vocab_size_divisible_by")
        _ = self.slab_bytes  # raises if it is not a size

    @property
    def checkpoint_folder(self) -> Path:
        """--hf-checkpoint, which training needs.

        Raises:
            UserError: it is not set.
        """
        return required(self.hf_checkpoint, "--hf-checkpoint is missing; give the folder of a Hugging Face checkpoint")

    @property
    def slab_bytes(self) -> int:
        """--head-slab-bytes as a number of bytes."""
        return parse_size("--head-slab-bytes", self.head_slab_bytes)


@dataclass(frozen=True)
class TrainConfig(Group):
    """Training."""

    preset: Preset | None = setting(
        None, "hyperparameters of the SimPO paper for this model; the file and the flags win over them"
    )
    dry_run: bool = setting(
        False,
        "check flags, layout, data, checkpoint and folders in one CPU process and print what the run would be; train "
        "nothing",
    )
    global_batch_size: int = setting(128, "pairs of one optimizer step, over all ranks")
    train_iters: int | None = setting(None, "optimizer steps of the whole run; give this or --train-epochs")
    train_epochs: float | None = setting(
        None, "passes over the training pairs, e.g. 1 or 0.5; give this or --train-iters"
    )
    seed: int = setting(1234, "seed of the order of the data")
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "cuda (over NCCL), cpu (over gloo), or auto: cuda if there is a GPU"
    )
    bf16: bool = setting(True, "bf16 weights and activations, fp32 gradients and fp32 master weights")
    fp32: bool = setting(False, "everything in fp32, instead of --bf16; for checks and small models")
    fp16: bool = setting(False, "not supported (log-prob sums overflow fp16); use --bf16 or --fp32")
    deterministic_mode: bool = setting(
        False,
        "give the same numbers, bit for bit, in every run of one layout on the same machines, also on GPUs; slower",
    )
    moe_aux_loss_coeff: float = setting(
        0.0,
        "weight of Megatron's load-balancing loss in every layer with experts; its value is a mean over packed rows",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.fp16,
            "--fp16 is not supported: the log-prob sum of a response leaves fp16's range, and loss scaling would hide "
            "it; use bf16 (the default) or --fp32",
        )
        if self.fp32:
            object.__setattr__(self, "bf16", False)
        require(self.bf16 or self.fp32, "--no-bf16 leaves no precision; give --fp32")
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
    """Optimizer (Adam)."""

    lr: float = setting(1e-6, "highest learning rate, reached at the end of the warm-up")
    min_lr: float = setting(0.0, "learning rate at the end of the decay")
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = setting(
        "cosine", "how the learning rate falls after the warm-up"
    )
    lr_warmup_fraction: float = setting(
        0.1, "share of the steps in which the learning rate rises from 0, at least 0 and below 1"
    )
    weight_decay: float = setting(0.0, "decoupled weight decay; norms and biases are not decayed")
    adam_beta1: float = setting(0.9, "decay of Adam's mean of the gradient")
    adam_beta2: float = setting(0.999, "decay of Adam's mean of the squared gradient")
    adam_eps: float = setting(1e-8, "added to the denominator of Adam's update")
    clip_grad: float = setting(1.0, "clip the gradient to this norm; 0: do not clip")
    override_opt_param_scheduler: bool | None = setting(
        None,
        "on resume, learning rates, warm-up, decay and weight decay are those of the flags (default: on, unless "
        "--use-checkpoint-opt-param-scheduler is given); off: they must be those of the checkpoint",
    )
    use_checkpoint_opt_param_scheduler: bool = setting(
        False,
        "on resume, learning rates, warm-up, decay, its length and weight decay are those of the checkpoint, and the "
        "flags are not used",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not (self.override_opt_param_scheduler and self.use_checkpoint_opt_param_scheduler),
            "--override-opt-param-scheduler takes the schedule of the flags and --use-checkpoint-opt-param-scheduler "
            "that of the checkpoint; give one of them",
        )
        self.positive("lr", "adam_eps")
        self.fraction("lr_warmup_fraction", "adam_beta1", "adam_beta2")
        require(0 <= self.min_lr <= self.lr, f"--min-lr {self.min_lr} must lie between 0 and --lr {self.lr}")
        self.not_negative("weight_decay", "clip_grad")


@dataclass(frozen=True)
class LogConfig(Group):
    """Evaluation and logging."""

    log_interval: int = setting(1, "steps between two logged steps")
    eval_interval: int | None = setting(
        None,
        "steps between two evaluations on --valid-data (default: only before and after training, where it is always "
        "evaluated)",
    )
    tensorboard_dir: Path | None = setting(
        None, "folder for TensorBoard files (default: SAVE/tensorboard; none without --save)"
    )
    peak_tflops: float | None = setting(
        None, "TFLOP/s that a GPU has at most, for the MFU in the log (default: of bf16, by the name of the GPU)"
    )
    wandb_project: str | None = setting(None, "log to this Weights & Biases project too; needs the package wandb")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("log_interval", "eval_interval", "peak_tflops")


@dataclass(frozen=True)
class Config:
    """All settings of a run; `objective` holds its own."""

    objective: Objective
    model: ModelConfig
    parallel: ParallelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    memory: MemoryConfig
    megatron: MegatronConfig
    checkpoint: CheckpointConfig
    stop: StopConfig
    log: LogConfig
    profile: ProfileConfig

    def __post_init__(self) -> None:
        _ = self.model.checkpoint_folder, self.data.training_sources  # raises if one is missing: a run needs both
        save, export = self.checkpoint.save, self.model.export_hf
        require(
            save is None or save != export,
            f"--export-hf {export} is also the folder of --save; export to another folder",
        )
        require(
            self.model.reference_checkpoint is None or self.objective.needs_reference,
            f"--reference-checkpoint has no effect with --objective {self.objective.name}, which compares with no "
            "reference model; drop it",
        )
        require(
            self.train.global_batch_size > 1 or not self.objective.needs_baseline,
            f"--global-batch-size {self.train.global_batch_size} is too small for --objective {self.objective.name}: "
            "its baseline is a mean over the pairs of a step; give at least 2",
        )
        given = self.stop.given
        require(
            given is None or save is not None,
            f"{flag(given or '')} needs --save: a run that stops early saves a checkpoint to resume from",
        )
        profile = self.profile
        require(
            not (profile.profile or profile.record_memory_history)
            or save is not None
            or profile.profile_dir is not None,
            "--profile and --record-memory-history write files; give --profile-dir, or --save",
        )
        self._check_keep_best()
        self.memory.check(bf16=self.train.bf16, distributed_optimizer=self.parallel.use_distributed_optimizer)
        check_rows(self.data.seq_length, self.parallel, self.memory.row_multiple)
        if self.data.share_prompts:
            fused = self.model.transformer_impl == "transformer_engine"
            check_shared_prompts(self.objective.responses, self.parallel.context_parallel_size, fused)

    def _check_keep_best(self) -> None:
        """Makes sure that each checkpoint has a value of --keep-best.

        Raises:
            UserError: the metric is not one of the run, or is not measured at each checkpoint.
        """
        metric, every = self.checkpoint.keep_best, self.checkpoint.save_interval
        if metric is None:
            return
        known = [one.name for one in self.objective.metrics]
        name = metric.removeprefix("eval/")
        require(
            name in known,
            f"--keep-best {metric} is not a metric of this run; use one of {', '.join(known)}, or eval/ and one",
        )
        held_out = name != metric
        interval = self.log.eval_interval if held_out else self.log.log_interval
        require(not held_out or self.data.valid_data is not None, f"--keep-best {metric} needs --valid-data")
        require(
            every is None or (interval is not None and every % interval == 0),
            f"--keep-best {metric} needs its value at each checkpoint; --save-interval {every} must be a multiple of "
            f"{'--eval-interval' if held_out else '--log-interval'} {interval or '(not set)'}",
        )
