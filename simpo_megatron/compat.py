"""Every optional import and version gate of this package, each with its reason."""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from functools import partial
from typing import Any

from simpo_megatron.errors import UserError

MEGATRON_CORE = ((0, 15), (0, 19))  # first and last release this package was run with


@functools.cache
def _importable(module: str) -> bool:
    """Whether `module` imports here; a build for another CUDA or torch counts as absent, as it does for Megatron."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError):
        return False
    return True


def have_transformer_engine() -> bool:
    """Transformer Engine: fused layers and experts, and attention that overlaps context parallelism."""
    return _importable("transformer_engine.pytorch")


def have_apex() -> bool:
    """NVIDIA Apex with its extensions. `import apex` proves nothing: the registry's `apex` is another project."""
    return _importable("amp_C") and _importable("apex.optimizers")


def adam() -> str:
    """Whose Adam Megatron takes: its `optimizer/__init__.py` tries the three in this order."""
    return "Transformer Engine's" if have_transformer_engine() else "Apex's" if have_apex() else "torch's"


def have_fused_weight_gradient() -> bool:
    """The Apex extension of `gradient_accumulation_fusion`; the output layer needs it under Transformer Engine too."""
    return _importable("fused_weight_gradient_mlp_cuda")


def moe_without_transformer_engine() -> None:
    """Lets Megatron's router run where Transformer Engine is absent.

    `moe_utils.py` of 0.16 asks whether `te_general_gemm` is None, a name that only the import of Transformer Engine defines.
    """
    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


@functools.cache
def have_native_bf16() -> bool:
    """bf16 arithmetic on this CPU (AVX512-BF16 or AMX). Elsewhere torch emulates it, hundreds of times slower than fp32."""
    torch = importlib.import_module("torch")
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@functools.cache
def have_fp32_accumulating_addmm() -> bool:
    """`addmm` of bf16 matrices into an fp32 one, on CUDA; torch has it from 2.8 on."""
    torch = importlib.import_module("torch")
    return hasattr(torch.ops.aten.addmm, "dtype_out")


def have_triton() -> bool:
    """Triton, which torch brings on CUDA alone."""
    return _importable("triton")


def check_megatron_core() -> None:
    """Refuses a Megatron-Core this package does not know: schedules, specs and checkpoint keys change between releases.

    Raises:
        UserError: megatron-core is absent, or a release this package was not run with.
    """
    first, last = ("{}.{}".format(*version) for version in MEGATRON_CORE)
    mend = "install one with `pip install 'megatron-core==0.16.*'`"
    try:
        info = importlib.import_module("megatron.core.package_info")
    except ImportError as error:
        raise UserError(f"megatron-core cannot be imported ({error}); {mend}") from error
    if not MEGATRON_CORE[0] <= (info.MAJOR, info.MINOR) <= MEGATRON_CORE[1]:
        raise UserError(
            f"megatron-core {info.__version__} is installed, but this program was run with {first} to {last}; {mend}"
        )


def check_balancing_loss() -> None:
    """Refuses the balancing loss of experts where it would count padding.

    Raises:
        UserError: megatron-core 0.15, whose router is not told what is padding.
    """
    info = importlib.import_module("megatron.core.package_info")
    if (info.MAJOR, info.MINOR) < (0, 16):
        raise UserError(
            f"--moe-aux-loss-coeff: the router of megatron-core {info.__version__} would balance padding too; install "
            "megatron-core 0.16 or newer, or set it to 0"
        )


def quiet_megatron() -> None:
    """Silences warnings about Megatron-Core's own code that the user can do nothing about, and no others.

    Call it before the first Megatron import. They say that Transformer Engine and Apex are absent (ten lines on a CPU), that
    the optimizer looks at `.grad` of a shard that is no leaf, that whole experts are not sequence-parallel, that torch
    will rename collectives Megatron calls; and, in 0.15 and from 0.17 on, that parts of Megatron itself are to go.
    """
    for message in (
        "Apex is not installed",
        "Transformer Engine and Apex are not installed",
        "The .grad attribute of a Tensor that is not a leaf",
        "`sequence_parallel` is set to `True`, but tensor model parallel size is 1",
        "MimoModelConfig is experimental",
        "Failed to create unified memory mempool",
    ):
        warnings.filterwarnings("ignore", message, UserWarning)
    for name in ("reduce_scatter_tensor", "all_gather_into_tensor"):
        warnings.filterwarnings("ignore", f"`torch.distributed.{name}` is deprecated", FutureWarning)
    for name, message in (
        ("dist_checkpointing.strategies.torch", "MCore's async save is deprecated"),
        ("distributed.distributed_data_parallel", "DistributedDataParallel: full_param_layout not provided"),
        ("models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
        ("utils", "fused_indices_to_multihot has reached end of life"),
    ):
        logging.getLogger(f"megatron.core.{name}").addFilter(partial(_other_than, message))


def _other_than(message: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(message)
