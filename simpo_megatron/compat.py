"""Every optional import and version gate of this package, each with its reason."""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any

from simpo_megatron.errors import UserError

MEGATRON_CORE = (0, 16)  # the release whose contracts this package was checked against


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
        UserError: megatron-core is absent or not 0.16.x.
    """
    wanted = ".".join(map(str, MEGATRON_CORE))
    mend = f"install it with `pip install 'megatron-core=={wanted}.*'`"
    try:
        info = importlib.import_module("megatron.core.package_info")
    except ImportError as error:
        raise UserError(f"megatron-core cannot be imported ({error}); {mend}") from error
    if (info.MAJOR, info.MINOR) != MEGATRON_CORE:
        raise UserError(
            f"megatron-core {info.__version__} is installed, but {wanted}.x is what this program knows; {mend}"
        )


def quiet_megatron() -> None:
    """Silences warnings about Megatron-Core's own code that the user can do nothing about, and no others.

    Call it before the first Megatron import. They say that Transformer Engine and Apex are absent (ten lines on a CPU), that
    the optimizer looks at `.grad` of a shard that is no leaf, that whole experts are not sequence-parallel, and that torch
    will rename collectives Megatron calls.
    """
    for message in (
        "Apex is not installed",
        "Transformer Engine and Apex are not installed",
        "The .grad attribute of a Tensor that is not a leaf",
        "`sequence_parallel` is set to `True`, but tensor model parallel size is 1",
    ):
        warnings.filterwarnings("ignore", message, UserWarning)
    for name in ("reduce_scatter_tensor", "all_gather_into_tensor"):
        warnings.filterwarnings("ignore", f"`torch.distributed.{name}` is deprecated", FutureWarning)
