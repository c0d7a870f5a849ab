"""Rows on versions and variables. setup.py and compat.py own the facts about versions."""

from __future__ import annotations

import ast
import importlib
import os
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import InvalidRequirement, Requirement

from simpo_megatron import compat
from simpo_megatron.errors import UserError
from simpo_megatron.self_test.rows import Bench, Outcome, Row

# Distributions, and how an optional one is asked for.
NEEDED = ("torch", "megatron-core", "transformers")
OPTIONAL = {
    "transformer-engine": ("Transformer Engine", compat.have_transformer_engine),
    "apex": ("Apex", compat.have_apex),
    "triton": ("Triton", compat.have_triton),
}
# Variables that change speed or results, by their beginnings.
VARIABLES = ("CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_", "TORCH_NCCL_", "NVTE_", "PYTORCH_CUDA_ALLOC_CONF")
VARIABLES += ("PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS")
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
BLACKWELL = 10  # the first compute capability that does not need one connection


def environment_rows(bench: Bench) -> Iterator[Row]:
    """The rows of this file."""
    for name in (*NEEDED, *OPTIONAL):
        yield Row(f"version: {name}", partial(_version, name))
    yield Row("variables: CUDA_DEVICE_MAX_CONNECTIONS", _connections, gpu=True)
    yield Row("variables: allocator", _allocator, gpu=True)
    yield Row("variables: NCCL", _nccl, gpu=True)
    yield Row("variables: Transformer Engine", _nvte)


def installed(name: str) -> str:
    """The version of a distribution; empty where it is absent."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def versions() -> dict[str, str]:
    """The versions that a report states; those of CUDA, cuDNN and NCCL where torch has them."""
    found = {name: installed(name) for name in (*NEEDED, *OPTIONAL)}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
        nccl: Any = importlib.import_module("torch.cuda.nccl")
        found["nccl"] = ".".join(map(str, nccl.version()))
    return found


def variables() -> dict[str, str]:
    """The variables of the environment that matter, as they are set."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}


def bounds() -> dict[str, str]:
    """The versions that this package accepts, by distribution: from setup.py beside it, or its installed metadata."""
    setup = Path(__file__).resolve().parents[2] / "setup.py"
    if setup.is_file():
        tree = ast.parse(setup.read_text(encoding="utf-8"))
        texts = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    else:
        try:
            texts = metadata.requires("simpo-megatron") or []
        except metadata.PackageNotFoundError:
            texts = []
    found = {}
    for text in texts:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:  # another text of setup.py
            continue
        if requirement.specifier:
            found.setdefault(requirement.name, str(requirement.specifier))
    return found


def _version(name: str, bench: Bench) -> Outcome:
    found, accepted = installed(name), bounds().get(name, "")
    if name in OPTIONAL:
        title, usable = OPTIONAL[name]
        if not usable():
            if not found or name == "apex":  # the package `apex` on the registry is another project
                return Outcome("not here", f"{title} is not installed")
            return Outcome("FAILED", f"{title} {found} does not load", f"complete it, or pip uninstall {name}")
        found = found or "built from source"
    if not _is_within(found, accepted):
        return Outcome("FAILED", f"{found}, but {accepted} is needed", f"pip install '{name}{accepted}'")
    if name == "megatron-core":
        try:
            compat.check_megatron_core()
        except UserError as error:
            return Outcome("FAILED", str(error))
    return Outcome("proved", f"{found}, {accepted or 'any'} is accepted")


def _is_within(version: str, accepted: str) -> bool:
    """Whether a version is one of those; pre-releases count as releases."""
    requirement = Requirement(f"name{accepted}")
    return version == "built from source" or requirement.specifier.contains(version, prereleases=True)


def _connections(bench: Bench) -> Outcome:
    value = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
    shown = value or "not set"
    if value == "1" or torch.cuda.get_device_capability()[0] >= BLACKWELL:
        return Outcome("proved", shown)
    return Outcome("slow", shown, "export CUDA_DEVICE_MAX_CONNECTIONS=1 for runs with TP or CP above 1")


def _allocator(bench: Bench) -> Outcome:
    text = next((os.environ[name] for name in ALLOCATOR if name in os.environ), "")
    if "expandable_segments:True" in text.replace(" ", ""):
        return Outcome("proved", text)
    advice = "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True: rows of changing lengths fragment memory"
    return Outcome("slow", text or "not set", advice)


def _nccl(bench: Bench) -> Outcome:
    found = {name: value for name, value in variables().items() if name.startswith("NCCL_")}
    shown = ", ".join(f"{name}={value}" for name, value in found.items()) or "none is set"
    for name, bad in (("NCCL_P2P_DISABLE", "1"), ("NCCL_IB_DISABLE", "1"), ("NCCL_SHM_DISABLE", "1")):
        if found.get(name) == bad:
            return Outcome("slow", shown, f"unset {name}, unless the network needs it")
    return Outcome("proved", shown)


def _nvte(bench: Bench) -> Outcome:
    """Megatron's `auto` attention asserts that these are unset or 1."""
    names = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
    found = {name: value for name, value in variables().items() if name.startswith("NVTE_")}
    if not found and not compat.have_transformer_engine():
        return Outcome("not here", "Transformer Engine is not installed")
    shown = ", ".join(f"{name}={value}" for name, value in found.items()) or "none is set"
    if off := [name for name in names if found.get(name) == "0"]:
        return Outcome("FAILED", shown, f"unset {', '.join(off)}: Megatron refuses it")
    return Outcome("proved", shown)
