"""Bytes of a trained parameter: its gradient, and its optimizer state on the GPU and in host memory.

    StateBytes.of(MemoryConfig(use_precision_aware_optimizer=True), bf16=True).device      # 10

These are the tensors that Megatron-Core 0.16 and Transformer Engine's Adam allocate
(`tests/trainer/test_precision_aware.py` counts them).
"""

from __future__ import annotations

from dataclasses import dataclass

from simpo_megatron.config.memory import MemoryConfig

# FP8 has a second copy, transposed for products: FusedAdam asks for it, and a Hopper allocates it.
_SIZE = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}


@dataclass(frozen=True)
class StateBytes:
    """Bytes of a trained parameter.

    Attributes:
        gradient: on every rank that holds the parameter.
        device: of its optimizer state on the GPU of the rank that updates it. The distributed optimizer has one such
            rank for each parameter.
        host: the same in host memory, with the gradient that the step reads there.
        update: fp32 copies that the GPU of that rank needs during the optimizer step.
        device_copy: fp32 copies that the GPU of every rank that holds it needs while the optimizer is built.
        host_copy: the same in host memory.
    """

    gradient: int
    device: float
    host: float = 0
    update: float = 0
    device_copy: float = 0
    host_copy: float = 0

    @classmethod
    def of(cls, settings: MemoryConfig, *, bf16: bool) -> StateBytes:
        """The bytes with these settings.

        Args:
            settings: of the run.
            bf16: the dtype of the weights, else fp32.
        """
        if not settings.use_precision_aware_optimizer:
            return cls(4, 12 if bf16 else 8)  # two moments in fp32, and for bf16 an fp32 copy of the weight
        gradient = _SIZE[settings.main_grads_dtype]
        if settings.optimizer_cpu_offload:
            share = settings.optimizer_offload_fraction
            state = 12 if gradient == 4 else 16  # a bf16 gradient is copied to fp32, and the copy stays
            return cls(
                gradient,
                device=state * (1 - share),
                host=16 * share,
                device_copy=4 * (1 - share),
                host_copy=4 * share,
            )
        moments = (settings.exp_avg_dtype, settings.exp_avg_sq_dtype)
        # An fp32 weight is kept as the 16 bits that its bf16 weight lacks.
        copied = [dtype for dtype in (*moments, settings.main_params_dtype) if dtype != "fp32"]
        return cls(gradient, 2 + sum(_SIZE[dtype] for dtype in moments), update=4 * len(copied))
