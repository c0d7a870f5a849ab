"""Every optional package and every check of a version, each with its reason."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

from simpo_megatron.errors import UserError

MEGATRON_CORE = ((0, 15), (0, 19))  # first and last release that this package was run with


@functools.cache
def _importable(module: str) -> bool:
    """Whether a module can be imported. One that does not load counts as absent.

    Megatron counts a module as absent only if the import raises ImportError; `check_megatron_core` refuses the others.
    """
    try:
        importlib.import_module(module)
    except Exception:
        return False
    return True


def have_transformer_engine() -> bool:
    """Whether Transformer Engine is installed: fused layers and experts, and attention for context parallelism."""
    return _importable("transformer_engine.pytorch")


def have_apex() -> bool:
    """Whether NVIDIA Apex is installed with its extensions. The package `apex` on the registry is another project."""
    return _importable("amp_C") and _importable("apex.optimizers")


def adam() -> str:
    """The project whose Adam Megatron uses: its `optimizer/__init__.py` tries the three in this order."""
    return "Transformer Engine's" if have_transformer_engine() else "Apex's" if have_apex() else "torch's"


def have_fused_weight_gradient() -> bool:
    """Whether Apex's kernel for `gradient_accumulation_fusion` in Megatron's own linear layers is installed."""
    return _importable("fused_weight_gradient_mlp_cuda")


def moe_without_transformer_engine() -> None:
    """Lets Megatron's router run without Transformer Engine.

    `moe_utils.py` of 0.16 reads the name `te_general_gemm`, which is defined only where Transformer Engine is
    installed.
    """
    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def latent_attention_without_transformer_engine() -> None:
    """Lets Megatron's multi-latent attention run without Transformer Engine.

    `multi_latent_attention.py` of 0.16 takes it for installed where Megatron's wrapper of it can be imported, which it
    always can, and then asks whether layers are of classes that are none.
    """
    attention: Any = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    if not have_transformer_engine():
        attention.HAVE_TE = False


def norms_recomputed_without_transformer_engine() -> None:
    """Lets Megatron recompute norms without Transformer Engine.

    `CheckpointWithoutOutput` of 0.16 asks it whether FP8 is on, by names that are defined only where it is installed.
    """
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    if not hasattr(random, "FP8GlobalStateManager"):
        random.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False)
        random.activation_recompute_forward = random.fp8_autocast = lambda **settings: contextlib.nullcontext()


@functools.cache
def have_native_bf16() -> bool:
    """Whether this CPU computes in bf16 (AVX512-BF16 or AMX). Others emulate it, hundreds of times slower than fp32."""
    torch = importlib.import_module("torch")
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@functools.cache
def fp32_products(device: Any) -> Literal["addmm", "mm", "cast"]:
    """How a device multiplies bf16 matrices into an fp32 result. Each way is tried once, on 16 x 16 matrices.

    The name of an operator does not decide: torch 2.8 and 2.9 have `addmm` with `out_dtype`, but it refuses an fp32
    addend. The host waits for the device once.

    Args:
        device: a torch.device.

    Returns:
        `addmm`: `torch.addmm(..., out_dtype=torch.float32)` adds the product to an fp32 matrix. `mm`: only
        `torch.mm(..., out_dtype=torch.float32)` works. `cast`: the matrices must be cast to fp32 first.
    """
    torch = importlib.import_module("torch")
    matrix = torch.full((16, 16), 2.0**-6, dtype=torch.bfloat16, device=device)
    matrix.fill_diagonal_(1)
    product = matrix.float() @ matrix.float()  # 1 + 15 * 2**-12 on the diagonal, which bf16 cannot represent

    def works(multiply: Callable[[], Any], wanted: Any) -> bool:
        try:
            return torch.equal(multiply(), wanted)
        except (RuntimeError, TypeError):  # the operator refuses these dtypes, or has no such argument
            return False

    out = torch.ones(16, 16, device=device)
    if works(lambda: torch.addmm(out, matrix, matrix, out_dtype=torch.float32, out=out), 1 + product):
        return "addmm"
    return "mm" if works(lambda: torch.mm(matrix, matrix, out_dtype=torch.float32), product) else "cast"


def have_triton() -> bool:
    """Whether Triton is installed. Only torch for CUDA brings it."""
    return _importable("triton")


def check_megatron_core() -> None:
    """Refuses an unknown release of Megatron-Core: schedules, specs and checkpoint keys change between releases.

    Call it before anything else imports Megatron. Without a GPU it turns Megatron's use of torch.compile off.

    Raises:
        UserError: megatron-core is absent, or is a release that this package was not run with; or Transformer Engine or
            Apex, which it imports, is installed and does not load.
    """
    first, last = ("{}.{}".format(*version) for version in MEGATRON_CORE)
    fix = "install one with `pip install 'megatron-core==0.16.*'`"
    try:
        with _compiling_nothing():
            info = importlib.import_module("megatron.core.package_info")
    except Exception as error:
        _refuse_broken_packages()
        raise UserError(f"megatron-core cannot be imported ({_first_line(error)}); {fix}") from error
    if not MEGATRON_CORE[0] <= (info.MAJOR, info.MINOR) <= MEGATRON_CORE[1]:
        raise UserError(
            f"megatron-core {info.__version__} is installed, but this program was run with {first} to {last}; {fix}"
        )


@contextlib.contextmanager
def _compiling_nothing() -> Iterator[None]:
    """Without a GPU, leaves the functions of Megatron that are imported here and later as they are.

    Megatron wraps some of them in torch.compile (`megatron/core/jit.py`). To wrap one, torch imports its compiler,
    which takes a quarter of the time to start a program. `cpu.py` turns compiling off in any case.
    """
    torch: Any = importlib.import_module("torch")
    if torch.cuda.is_available():
        yield
        return
    compile_, torch.compile = torch.compile, _unchanged
    try:
        yield
        importlib.import_module("megatron.core.jit").jit_fuser = _unchanged  # type: ignore[attr-defined]
    finally:
        torch.compile = compile_


def _unchanged(function: Any = None, **options: Any) -> Any:
    return _unchanged if function is None else function


def _refuse_broken_packages() -> None:
    """Names the optional package that does not load, where the import of Megatron failed.

    Raises:
        UserError: there is one.
    """
    for name, module, package in (
        ("Transformer Engine", "transformer_engine.pytorch", "transformer_engine"),
        ("Apex", "apex.optimizers", "apex"),
    ):
        try:
            if importlib.util.find_spec(package) is not None:
                importlib.import_module(module)
        except ImportError:  # forgiven by Megatron too
            continue
        except Exception as error:
            raise UserError(
                f"{name} is installed but does not load ({_first_line(error)}); complete its installation, or remove "
                f"it with `pip uninstall {package}`"
            ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _release_before(major: int, minor: int) -> str | None:
    """The release of megatron-core, where it is older than this one."""
    info = importlib.import_module("megatron.core.package_info")
    return info.__version__ if (major, minor) > (info.MAJOR, info.MINOR) else None


def check_balancing_loss() -> None:
    """Refuses the balancing loss of experts where it would count padding.

    Raises:
        UserError: megatron-core is 0.15, whose router takes no padding mask.
    """
    if release := _release_before(0, 16):
        raise UserError(
            f"--moe-aux-loss-coeff: the router of megatron-core {release} would balance padding too; install "
            "megatron-core 0.16 or newer, or set it to 0"
        )


def check_cut_query_groups() -> None:
    """Refuses tensor parallelism beyond the number of key and value heads where Megatron has no attention for it.

    Raises:
        UserError: megatron-core is 0.15, in which every rank needs a key head of its own.
    """
    if release := _release_before(0, 16):
        raise UserError(
            "--tensor-model-parallel-size exceeds the number of key and value heads, and megatron-core "
            f"{release} gives every rank one of its own; install 0.16 or newer, or use fewer ranks"
        )


# Python packages that core_v0.16.1 needs and does not declare. It imports six and triton; its Makefile uses pybind11.
_MEGATRON_LM_PACKAGES = ("six", "pybind11", "triton")


def missing_for_megatron_lm() -> list[str]:
    """What Megatron-LM needs and this environment lacks, each with its remedy; nothing of Megatron-LM is imported."""
    packages = [name for name in _MEGATRON_LM_PACKAGES if importlib.util.find_spec(name) is None]
    missing = [f"{' and '.join(packages)} (pip install {' '.join(packages)})"] if packages else []
    tools = [name for name in ("make", "g++") if shutil.which(name) is None]
    if tools:
        missing.append(
            f"{' and '.join(tools)} on PATH, to compile its data set helpers (apt-get install {' '.join(tools)})"
        )
    if importlib.util.find_spec("gpt_builders") is None:
        missing.append("Megatron-LM itself (PYTHONPATH=MEGATRON_LM, a checkout of core_v0.16.1)")
    return missing


def check_megatron_lm() -> None:
    """Checks that Megatron-LM can be imported and can start. Call it before the first import of `megatron.training`.

    Raises:
        UserError: the environment lacks what Megatron-LM needs; it lists all of it.
    """
    missing = missing_for_megatron_lm()
    if missing:
        raise UserError(f"Megatron-LM cannot start, because the environment lacks {'; '.join(missing)}")


def quiet_connections() -> None:
    """Silences what Megatron and Transformer Engine warn of on every rank: CUDA_DEVICE_MAX_CONNECTIONS is not 1.

    A run says it once, where it matters (`trainer/environment.py`).
    """
    for message in (
        "When using async grad allreduce it is recommended",
        "When using sequence parallelism it is recommended",
        "To guarantee overlapping TP and SP collectives with the backward",
    ):
        warnings.filterwarnings("ignore", message, UserWarning)


def quiet_megatron() -> None:
    """Silences warnings about Megatron-Core's own code, on which a user cannot act. Call it before importing Megatron.

    These warnings are silenced, and no others: Transformer Engine or Apex is absent; the optimizer reads `.grad` of a
    shard that is not a leaf; whole experts are not sequence-parallel; CUDA_DEVICE_MAX_CONNECTIONS is not 1
    (`quiet_connections`); torch will rename or remove collectives, a loader and a class of tensors that Megatron uses;
    parts of Megatron itself are deprecated (in 0.15, and from 0.17 on).
    """
    quiet_connections()
    for message in (
        "Apex is not installed",
        "Transformer Engine and Apex are not installed",
        "The .grad attribute of a Tensor that is not a leaf",
        "`sequence_parallel` is set to `True`, but tensor model parallel size is 1",
        "MimoModelConfig is experimental",
        "Failed to create unified memory mempool",
    ):
        warnings.filterwarnings("ignore", message, UserWarning)
    for message in (
        "`torch.distributed.reduce_scatter_tensor` is deprecated",
        "`torch.distributed.all_gather_into_tensor` is deprecated",
        "`load_state_dict` is deprecated",
        "Please use DTensor instead and we are deprecating ShardedTensor",
    ):
        warnings.filterwarnings("ignore", message, FutureWarning)
    for name, message in (
        ("dist_checkpointing.strategies.torch", "MCore's async save is deprecated"),
        ("distributed.distributed_data_parallel", "DistributedDataParallel: full_param_layout not provided"),
        ("models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
        ("utils", "fused_indices_to_multihot has reached end of life"),
    ):
        logging.getLogger(f"megatron.core.{name}").addFilter(partial(_other_than, message))


def _other_than(message: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(message)
