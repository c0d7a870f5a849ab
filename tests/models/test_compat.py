"""The check of Megatron-Core's version, the choice of optional packages, and imports without warnings."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from simpo_megatron import compat
from simpo_megatron.errors import UserError
from simpo_megatron.models import spec
from simpo_megatron.objectives import SimPO
from simpo_megatron.step import PreferenceStep
from tests.support.distributed import free_environment


def test_another_megatron_core_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    compat.check_megatron_core()
    monkeypatch.setattr(compat, "MEGATRON_CORE", ((0, 98), (0, 99)))
    with pytest.raises(UserError, match=r"megatron-core 0\.\d+\.\d+ is installed, but .* run with 0\.98 to 0\.99"):
        compat.check_megatron_core()


def test_the_balancing_loss_needs_a_router_that_is_told_what_is_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import package_info

    monkeypatch.setattr(package_info, "MINOR", 15)
    PreferenceStep(SimPO(), vocab_size=8, num_microbatches=1)
    with pytest.raises(
        UserError, match=r"--moe-aux-loss-coeff: the router of megatron-core .* would balance padding too"
    ):
        PreferenceStep(SimPO(), vocab_size=8, num_microbatches=1, moe_aux_loss_coeff=0.1)


@pytest.mark.parametrize(
    "installed, adam",
    [
        (["transformer_engine.pytorch", "amp_C", "apex.optimizers"], "Transformer Engine's"),
        (["amp_C", "apex.optimizers"], "Apex's"),
        (["apex.optimizers"], "torch's"),  # the registry's apex, or NVIDIA's without its extensions
        ([], "torch's"),
    ],
)
def test_whose_adam_megatron_takes(monkeypatch: pytest.MonkeyPatch, installed: list[str], adam: str) -> None:
    monkeypatch.setattr(compat, "_importable", installed.__contains__)
    assert compat.adam() == adam


def test_the_optional_packages_are_chosen_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_importable", lambda module: True)
    assert compat.have_transformer_engine() and compat.have_apex() and compat.have_fused_weight_gradient()
    assert spec.use_transformer_engine("auto") and spec.use_transformer_engine("transformer_engine")
    assert not spec.use_transformer_engine("local")
    monkeypatch.setattr(compat, "_importable", lambda module: False)
    assert not spec.use_transformer_engine("auto")


def test_connections_are_not_warned_of_on_every_rank() -> None:
    """A run says once that CUDA_DEVICE_MAX_CONNECTIONS should be 1. Transformer Engine and Megatron say it too."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        compat.quiet_megatron()
        warnings.warn(
            "To guarantee overlapping TP and SP collectives with the backwardGEMMs, set environment variable "
            "CUDA_DEVICE_MAX_CONNECTIONS = 1",
            stacklevel=1,
        )
        warnings.warn("When using sequence parallelism it is recommended to set the environment", stacklevel=1)
        warnings.warn("another warning", stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["another warning"]


@pytest.mark.parametrize(
    "package, error, name",
    [
        ("transformer_engine", "RuntimeError('Found empty meta package')", "Transformer Engine"),
        ("transformer_engine", "FileNotFoundError('libtransformer_engine.so')", "Transformer Engine"),
        ("transformer_engine", "AssertionError()", "Transformer Engine"),
        ("apex", "RuntimeError('compiled for another CUDA')", "Apex"),
    ],
)
def test_a_half_installed_package_is_a_sentence(tmp_path: Path, package: str, error: str, name: str) -> None:
    """Megatron imports it whatever the flags say, and forgives an ImportError alone."""
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(f"raise {error}")
    command = [sys.executable, "-m", "simpo_megatron.train", "--transformer-impl", "local", "--device", "cpu"]
    command += ["--hf-checkpoint", str(tmp_path), "--train-data", "x.jsonl", "--train-iters", "1"]
    environment = {**free_environment(), "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    kind, _, text = error.partition("('")
    why = f"{kind}: {text[:-2]}" if text else kind.removesuffix("()")
    assert (ended.returncode, ended.stderr) == (
        2,
        f"simpo_megatron.train: {name} is installed but does not load ({why}); complete its installation, or remove it "
        f"with `pip uninstall {package}`\n",
    )


def test_megatron_imports_quietly_and_without_the_compiler_of_torch() -> None:
    code = (
        "import sys, torch; from simpo_megatron import compat; compat.quiet_megatron(); compat.check_megatron_core();"
        "import simpo_megatron.models.build, megatron.core.optimizer, megatron.core.distributed;"
        "print('torch._inductor' in sys.modules, torch.compile.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{torch.cuda.is_available()} torch\n", "")
