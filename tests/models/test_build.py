"""What is not available is refused, parameters have the attributes that Megatron's optimizer reads, padding is zero."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from simpo_megatron.errors import UserError
from simpo_megatron.models.build import transformer_config
from simpo_megatron.models.fusions import Kernels
from simpo_megatron.parallel.stages import padded_vocab_size
from tests.support import families as tiny


def refusals(path: Path) -> list[str]:
    """On a rank: the errors for what only Megatron or Transformer Engine decides."""
    from simpo_megatron.models.build import build_model

    hf, config, _ = tiny.build(path)
    found = []
    for call in (
        lambda: transformer_config(hf, bf16=True, recompute_granularity="some"),
        lambda: build_model(hf, config, transformer_impl="transformer_engine"),
        lambda: transformer_config(hf, bf16=True, kernels=Kernels(gradient_accumulation_fusion=True)),
    ):
        with pytest.raises(UserError) as raised:
            call()
        found.append(str(raised.value))
    return found


def test_what_is_not_available_is_refused(pool: Any, tmp_path: Path) -> None:
    tiny.make("llama", tmp_path)
    [[recompute, engine, fusion]] = pool.run(1, refusals, tmp_path)
    assert "Megatron refuses this layout" in recompute
    assert "Transformer Engine is not installed" in engine
    assert "--gradient-accumulation-fusion needs a GPU and Transformer Engine's layers, or Apex's extension" in fusion


def parameters(path: Path, layout: dict[str, Any]) -> dict[str, Any]:
    """On a rank: dtype, value and attributes of every parameter."""
    _, _, models = tiny.build(path, bf16=True, **layout)
    return {
        name: {
            "dtype": parameter.dtype,
            "split": getattr(parameter, "partition_dim", None)
            if getattr(parameter, "tensor_model_parallel", False)
            else None,
            "stride": getattr(parameter, "partition_stride", None),
            "sequence": getattr(parameter, "sequence_parallel", False),
            "value": parameter.detach(),
        }
        for model in models
        for name, parameter in model.named_parameters()
    }


def test_parameters_carry_what_megatron_looks_for(pool: Any, tmp_path: Path) -> None:
    tiny.make("qwen3", tmp_path)
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    ranks = pool.run(2, parameters, tmp_path, layout)
    for found in ranks:
        for name, known in found.items():
            column = any(part in name for part in ("linear_qkv", "linear_fc1", "word_embeddings", "output_layer"))
            assert known["split"] == (0 if column else 1 if "norm" not in name else None), name
            assert known["sequence"] == ("norm" in name), name
            assert known["dtype"] == torch.bfloat16
            if known["split"] is not None:
                assert known["stride"] == (2 if "fc1" in name else 1)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        whole = torch.cat([found[name]["value"] for found in ranks])
        assert whole.shape[0] == padded_vocab_size(tiny.VOCAB, 2) == 256
        assert whole[tiny.VOCAB - 1].any()
        assert not whole[tiny.VOCAB :].any()


def test_a_rank_may_hold_padding_alone(pool: Any, tmp_path: Path) -> None:
    tiny.make("llama", tmp_path, vocab_size=100)
    ranks = pool.run(2, parameters, tmp_path, {"tensor_model_parallel_size": 2})
    assert ranks[0]["output_layer.weight"]["value"][:100].any(dim=1).all()
    assert not ranks[1]["output_layer.weight"]["value"].any()


def test_a_norm_behind_a_projection_keeps_nothing_where_there_is_no_gradient() -> None:
    """Megatron adds to the residual with gradients turned on, also in evaluations and before recomputation."""
    from simpo_megatron import cpu
    from simpo_megatron.models.spec import PostNormAdd, RMSNorm

    cpu.enable()
    config: Any = SimpleNamespace(
        params_dtype=torch.float32,
        sequence_parallel=False,
        layernorm_zero_centered_gamma=True,
        hidden_size=8,
        layernorm_epsilon=1e-6,
    )
    add = PostNormAdd(config, RMSNorm)(True, False)
    output, residual = torch.randn(3, 8), torch.randn(3, 8, requires_grad=True)
    assert not add((output, None), residual, 0.0).requires_grad
    assert add((output.requires_grad_(), None), residual, 0.0).requires_grad
