"""The import of Transformer Engine's wheel on a CPU, and what it asks of `torch.cuda`."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.te_on_cpu import attention, kernels, ring


class _Values(type):
    """The type of enums of the extension that TE only passes around: every name has a value of its own."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        value = len([key for key in vars(cls) if not key.startswith("__")])
        setattr(cls, name, value)
        return value


def _missing(name: str) -> Any:
    """A name of the extension that is not in this package: an enum or a class, or a function that raises."""
    if name.startswith("__"):
        raise AttributeError(name)
    if name[0].isupper():
        return _Values(name, (), {})

    def call(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"Transformer Engine on a CPU has no {name}")

    return call


def _extension(new: bool) -> types.ModuleType:
    """What stands for `transformer_engine_torch`."""
    module = types.ModuleType("transformer_engine_torch", "Kernels of Transformer Engine in plain torch.")

    def remembered(name: str) -> Any:
        value = _missing(name)
        setattr(module, name, value)
        return value

    module.__getattr__ = remembered  # type: ignore[method-assign]
    found = {**vars(kernels), **vars(ring), **attention.functions(new, module.NVTE_QKV_Layout.NVTE_THD_THD_THD)}
    for name in ("layernorm_fwd", "layernorm_bwd"):  # TE looks them up beside the RMS norm's
        remembered(name)
    for name, value in found.items():
        if not name.startswith("_") and (callable(value) and name not in ("only", "Any", "Tensor")):
            setattr(module, name, value)
    return module


def _asked_by_te() -> bool:
    """Whether the code that asks is Transformer Engine's own. Function modes and `support/offload.py` do not count."""
    frame: Any = sys._getframe(2)
    while frame.f_code.co_name in ("__torch_function__", "is_cuda"):
        frame = frame.f_back
    return frame.f_globals.get("__name__", "").startswith("transformer_engine.")


def _answer_for_cuda() -> None:
    """Tells Transformer Engine, and nobody else, that there is a GPU and that tensors are on it."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=1, total_memory=0, name="cpu")
    cuda: Any = torch.cuda
    cuda.get_device_properties = lambda *args: properties
    cuda.get_device_capability = lambda *args: (9, 0)
    cuda.is_current_stream_capturing = lambda: False
    is_available = cuda.is_available
    cuda.is_available = lambda: is_available() or _asked_by_te()
    is_cuda: Any = torch.Tensor.is_cuda
    torch.Tensor.is_cuda = property(lambda self: _asked_by_te() or is_cuda.__get__(self))  # type: ignore[assignment]


def _common(folder: Path) -> types.ModuleType:
    """`transformer_engine.common` without its shared libraries, as a build of the package imports it."""
    spec: Any = importlib.util.spec_from_file_location(
        "transformer_engine.common", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    common: Any = importlib.util.module_from_spec(spec)
    sys.modules["transformer_engine.common"] = common
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    try:
        spec.loader.exec_module(common)
    finally:
        del os.environ["NVTE_PROJECT_BUILDING"]
    common.load_framework_extension = lambda framework: None
    return common


class _Torch(types.ModuleType):
    """torch as `FusedAttention` sees it: its check for 16-bit inputs passes in fp32 too."""

    float16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _fuse_attention_in_fp32() -> None:
    """Lets fused attention, which bf16 training uses, run in fp32 too, where a test can have fp32's tolerance."""
    from transformer_engine.pytorch.attention.dot_product_attention import (  # pyright: ignore[reportMissingImports]
        backends,
        utils,
    )

    backends.torch = _Torch("torch")
    choose = utils.get_attention_backend

    def chosen(params: Any) -> Any:
        dtype, params.qkv_dtype = params.qkv_dtype, torch.bfloat16
        try:
            return choose(params)
        finally:
            params.qkv_dtype = dtype

    utils.get_attention_backend = chosen


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports `transformer_engine` from a folder, with the extension in place before and the last answers after."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.new = int(folder.name.split(".")[1]) > 15

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "transformer_engine":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, [str(self.folder)])
        if spec is not None:
            self.loader: Any = spec.loader
            spec.loader = self
        return spec

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        sys.modules["transformer_engine_torch"] = _extension(self.new)
        common = _common(self.folder / "transformer_engine" / "common")
        _answer_for_cuda()
        self.loader.exec_module(module)
        module.common = common  # type: ignore[attr-defined]
        for name, loaded in list(sys.modules.items()):
            if name.startswith("transformer_engine.") and hasattr(loaded, "canonicalize_device"):
                loaded.canonicalize_device = lambda device=None: torch.device("cpu")  # type: ignore[attr-defined]
        _fuse_attention_in_fp32()


class _Beside(importlib.metadata.DistributionFinder):
    """Imports from the folder what the wheel needs and the environment lacks.

    The folder is not on sys.path, which a spawned process inherits: Megatron's checkpoint writer spawns processes, and
    there the wheel would be found without its extension. They have Megatron's plain layers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.PathFinder.find_spec(name, [self.folder]) if path is None else None

    def find_distributions(self, context: Any = None) -> Iterable[importlib.metadata.Distribution]:
        name = None if context is None else context.name
        context = importlib.metadata.DistributionFinder.Context(name=name, path=[self.folder])
        return importlib.metadata.MetadataPathFinder.find_distributions(context)


def enable(folder: Path) -> None:
    """Makes `import transformer_engine.pytorch` work in this process.

    Args:
        folder: of an installed wheel; its last part is the release.

    Raises:
        RuntimeError: something has imported Transformer Engine before, or has failed to.
    """
    if "transformer_engine" in sys.modules:
        raise RuntimeError("call te_on_cpu.enable() before Megatron is imported")
    sys.meta_path.insert(0, _Finder(folder))
    sys.meta_path.append(_Beside(folder))
