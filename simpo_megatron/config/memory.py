"""The settings that make a model fit into less memory: dtypes of the optimizer, host memory, and FP8.

The names are Megatron-LM's. `trainer/optimizer.py` and `trainer/low_precision.py` act on them. Which activations are
computed again is a setting of the layout (`parallel/config.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from simpo_megatron.settings import Group, flag, require, setting

_BELOW_FP32 = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
_NOT_OFFLOADED = ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
# Tokens that the matrix products of a recipe work on at a time (Megatron's `get_fp8_align_size`).
_ROW_MULTIPLE = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}


@dataclass(frozen=True)
class MemoryConfig(Group):
    """Memory and FP8."""

    use_precision_aware_optimizer: bool = setting(
        False,
        "Transformer Engine's Adam keeps weights and moments itself, in the dtypes below; a bf16 run then needs 10 "
        "bytes a parameter for them in place of 12, and less with smaller dtypes",
    )
    main_grads_dtype: Literal["fp32", "bf16"] = setting(
        "fp32", "dtype in which gradients are added up over microbatches and ranks, with the precision-aware optimizer"
    )
    main_params_dtype: Literal["fp32", "fp16"] = setting(
        "fp32", "dtype of the weights that the precision-aware optimizer keeps; fp32 takes 2 bytes beside bf16 weights"
    )
    exp_avg_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = setting(
        "fp32", "dtype of Adam's mean of the gradient, with the precision-aware optimizer"
    )
    exp_avg_sq_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = setting(
        "fp32", "dtype of Adam's mean of the squared gradient, with the precision-aware optimizer"
    )
    optimizer_cpu_offload: bool = setting(
        False,
        "keep fp32 weights and moments in host memory and take the optimizer step there; needs "
        "--use-precision-aware-optimizer",
    )
    optimizer_offload_fraction: float = setting(
        1.0, "share of the parameters of a rank whose optimizer state is in host memory, above 0 and at most 1"
    )
    overlap_cpu_optimizer_d2h_h2d: bool = setting(
        False, "copy between GPU and host while the processor computes; needs --optimizer-cpu-offload"
    )
    fp8_format: Literal["e4m3", "hybrid"] | None = setting(
        None,
        "matrix products of the layers in FP8, by Transformer Engine: e4m3 for all, or hybrid (e5m2 for gradients); "
        "weights stay bf16, and the head computes in bf16",
    )
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = setting(
        "delayed", "how FP8 numbers are scaled; mxfp8 needs Blackwell"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _BELOW_FP32:
            value = getattr(self, name)
            require(
                value == "fp32" or self.use_precision_aware_optimizer,
                f"{flag(name)} {value} needs --use-precision-aware-optimizer; add it",
            )
        fraction = self.optimizer_offload_fraction
        require(
            0 < fraction <= 1,
            f"--optimizer-offload-fraction {fraction} must be above 0 and at most 1; drop --optimizer-cpu-offload to "
            "keep all on the GPU",
        )
        require(
            self.optimizer_cpu_offload or fraction == 1,
            f"--optimizer-offload-fraction {fraction} needs --optimizer-cpu-offload; add it",
        )
        require(
            self.use_precision_aware_optimizer or not self.optimizer_cpu_offload,
            "--optimizer-cpu-offload needs --use-precision-aware-optimizer; add it",
        )
        require(
            self.optimizer_cpu_offload or not self.overlap_cpu_optimizer_d2h_h2d,
            "--overlap-cpu-optimizer-d2h-h2d needs --optimizer-cpu-offload; add it, or drop both",
        )
        for name in _NOT_OFFLOADED:
            value = getattr(self, name)
            require(
                value == "fp32" or not self.optimizer_cpu_offload,
                f"{flag(name)} {value} has no effect with --optimizer-cpu-offload, which keeps weights and moments in "
                "fp32, also those on the GPU; drop one of them",
            )

    @property
    def row_multiple(self) -> int:
        """The number that divides the tokens which a rank multiplies with a weight: 1 without FP8."""
        return 1 if self.fp8_format is None else _ROW_MULTIPLE[self.fp8_recipe]

    def check(self, *, bf16: bool, distributed_optimizer: bool) -> None:
        """Checks these settings against those of other groups.

        Args:
            bf16: the precision of the run, else fp32.
            distributed_optimizer: --use-distributed-optimizer.

        Raises:
            UserError: they do not go together.
        """
        require(
            distributed_optimizer or not self.use_precision_aware_optimizer,
            "--use-precision-aware-optimizer needs --use-distributed-optimizer; drop --no-use-distributed-optimizer",
        )
        for name in ("use_precision_aware_optimizer", "fp8_format"):
            value = getattr(self, name)
            shown = "" if value is True else f" {value}"
            require(bf16 or not value, f"{flag(name)}{shown} needs --bf16: with --fp32 everything is in fp32; drop one")
