"""Which fused kernels and which attention a model gets, with and without a GPU, Transformer Engine and Apex."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from simpo_megatron import compat
from simpo_megatron.errors import UserError
from simpo_megatron.models import fusions, layer_limits
from simpo_megatron.models.fusions import Kernels, kernel_fields
from simpo_megatron.parallel.limits import check_layout
from tests.support.distributed import WorkerPool

FUSED = ("gradient_accumulation_fusion", "apply_rope_fusion", "moe_permute_fusion")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, and a Megatron that has found Transformer Engine's functions; no Apex."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.tensor_parallel import layers
    from megatron.core.transformer.moe import moe_utils

    monkeypatch.setattr(fusions, "on_gpu", lambda: True)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", object(), raising=False)
    for name in fusions._PERMUTE:
        monkeypatch.setattr(moe_utils, name, object(), raising=False)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    for name in fusions._SWITCHES:
        monkeypatch.delenv(name, raising=False)


def chosen(*args: Any) -> tuple[bool, ...]:
    fields = kernel_fields(*args)
    return tuple(fields[name] for name in FUSED)


@pytest.mark.usefixtures("gpu")
def test_transformer_engine_on_a_gpu_brings_its_kernels() -> None:
    assert chosen(Kernels(), True, True) == (True, True, True)
    assert chosen(Kernels(), True, False) == (True, True, False)
    assert chosen(Kernels(), False, True) == (False, False, False)
    assert chosen(Kernels(False, False, False), True, True) == (False, False, False)
    assert chosen(Kernels(), True, False, False) == (True, False, False)  # a rotary embedding that the kernel lacks
    with pytest.raises(UserError, match="--rope-fusion needs a model without interleaved rotary embedding"):
        kernel_fields(Kernels(rope_fusion=True), True, False, False)


def test_a_cpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusions, "on_gpu", lambda: False)
    for name in fusions._SWITCHES:
        monkeypatch.delenv(name, raising=False)
    assert chosen(Kernels(), True, True) == (False, False, False)
    for name in ("gradient_accumulation_fusion", "rope_fusion", "moe_permute_fusion"):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} needs a GPU and Transformer Engine's layers"):
            kernel_fields(Kernels(**{name: True}), True, True)


def test_the_attention_and_the_switches_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusions, "on_gpu", lambda: False)
    for name in fusions._SWITCHES:
        monkeypatch.delenv(name, raising=False)
    assert kernel_fields(Kernels(attention_backend="flash"), True, False)["attention_backend"].name == "flash"
    with pytest.raises(UserError, match="--attention-backend local needs --transformer-impl local"):
        kernel_fields(Kernels(attention_backend="local"), True, False)
    with pytest.raises(UserError, match="--attention-backend fused needs Transformer Engine's layers"):
        kernel_fields(Kernels(attention_backend="fused"), False, False)
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    with pytest.raises(UserError, match=r"NVTE_FLASH_ATTN is 0 .* --attention-backend auto needs 1; unset NVTE_FLASH"):
        kernel_fields(Kernels(), True, False)
    kernel_fields(Kernels(attention_backend="fused"), True, False)  # what the switch asks for


def output_layer() -> tuple[bool, bool, str]:
    """On a rank: whether Megatron's output layer and a head are built with the fusion and without Apex."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear, layers, model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    from simpo_megatron.head.layer import LogProbHead

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, gradient_accumulation_fusion=True)

    def build_layer() -> Any:
        init: Any = config.init_method
        return ColumnParallelLinear(8, 16, config=config, init_method=init, bias=False)

    before = layers._grad_accum_fusion_available
    try:
        layers._grad_accum_fusion_available = False
        with pytest.raises(RuntimeError, match="APEX"):
            build_layer()
        fusions._accept_fusion_without_apex()
        model: Any = SimpleNamespace(output_layer=build_layer())
        with_fusion = model.output_layer.gradient_accumulation_fusion
        fusions.plain_output_layer(model)
        after = model.output_layer.gradient_accumulation_fusion
        return with_fusion, after, type(LogProbHead.install(model, 1024)).__name__
    finally:
        layers._grad_accum_fusion_available = before


def test_the_fusion_of_transformer_engine_needs_no_apex(pool: WorkerPool) -> None:
    assert not compat.have_fused_weight_gradient()
    assert pool.run(1, output_layer) == [(True, False, "LogProbHead")]


def test_attention_under_context_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    check = layer_limits.check_context_attention
    monkeypatch.setattr(layer_limits, "get_te_version", lambda: "2.11.0")
    monkeypatch.setattr(layer_limits, "is_te_min_version", lambda version: False)
    check(True, None, False)
    check(True, "a2a", True)
    for kind in (None, "p2p"):
        with pytest.raises(UserError, match=r"no sliding window .* --cp-comm-type p2p; use a2a or all_gather"):
            check(True, kind, True)
    with pytest.raises(UserError, match=r"Transformer Engine 2.11.0 cannot gather packed rows"):
        check(True, "all_gather", True)
    monkeypatch.setattr(layer_limits, "is_te_min_version", lambda version: True)
    check(True, "all_gather", True)
    check(False, None, True)
    with pytest.raises(UserError, match="--cp-comm-type a2a needs Transformer Engine's layers"):
        check(False, "a2a", False)


def test_an_exchange_of_heads_needs_heads() -> None:
    model = {"num_layers": 4, "num_query_groups": 4, "num_attention_heads": 8, "kv_channels": 8, "ffn_hidden_size": 64}
    layout = {"context_parallel_size": 2, "tensor_model_parallel_size": 4}
    check_layout(model, {**layout, "cp_comm_type": "p2p"})
    check_layout(model, {"context_parallel_size": 4, "cp_comm_type": "a2a"})
    with pytest.raises(UserError, match=r"--cp-comm-type a2a .* 2 x .* 4 does not divide num_query_groups 4"):
        check_layout(model, {**layout, "cp_comm_type": "a2a"})
