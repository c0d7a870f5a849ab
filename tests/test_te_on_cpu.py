"""The stand-in for Transformer Engine's kernels: its own modules on it compute what plain torch computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import te_on_cpu
from tests.support.distributed import Pools, WorkerPool

pytestmark = pytest.mark.te
LENGTHS = [5, 1, 12]
RELEASES = pytest.mark.parametrize("pool", te_on_cpu.RELEASES, indirect=True)


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The result of a function, and its gradients for fixed slopes of the result."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    result = function(*leaves)
    slopes = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    return [result.detach(), *torch.autograd.grad((result * slopes).sum(), leaves)]


def errors(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True)]


def linear_errors() -> list[float]:
    """A norm with a linear layer, and experts of which one has no token."""
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    layer = te.LayerNormLinear(16, 24, normalization="RMSNorm", params_dtype=torch.float32, device="cpu")
    experts = te.GroupedLinear(3, 16, 8, bias=False, params_dtype=torch.float32, device="cpu")
    x, splits = torch.randn(18, 16), [7, 0, 11]

    def plain(x: Tensor) -> Tensor:
        normal = torch.nn.functional.rms_norm(x, (16,), layer.layer_norm_weight, layer.eps)
        return torch.nn.functional.linear(normal, layer.weight, layer.bias)

    def plain_experts(x: Tensor) -> Tensor:
        weights = [getattr(experts, f"weight{i}") for i in range(3)]
        return torch.cat([part @ weight.t() for part, weight in zip(x.split(splits), weights, strict=True)])

    return [
        *errors(gradients(layer, x), gradients(plain, x)),
        *errors(gradients(lambda x: experts(x, splits), x), gradients(plain_experts, x)),
    ]


def attention_errors(window: int) -> list[float]:
    """Packed rows with two query heads for each key head."""
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    q, k, v = torch.randn(18, 4, 8), torch.randn(18, 2, 8), torch.randn(18, 2, 8)
    offsets = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    attention = te.DotProductAttention(4, 8, num_gqa_groups=2, attention_dropout=0.0, qkv_format="thd")

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = attention(
            *(q, k, v),
            attn_mask_type="padding_causal",
            cu_seqlens_q=offsets,
            cu_seqlens_kv=offsets,
            max_seqlen_q=12,
            max_seqlen_kv=12,
            window_size=(window, 0),
        )
        return found.reshape(18, 4, 8)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for parts in zip(*(x.split(LENGTHS) for x in (q, k, v)), strict=True):
            n = len(parts[0])
            seen = torch.ones(n, n, dtype=torch.bool).tril()
            seen = seen if window < 0 else seen.triu(-window)
            heads = [x.transpose(0, 1) for x in parts]
            outs.append(
                torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True).transpose(
                    0, 1
                )
            )
        return torch.cat(outs)

    return errors(gradients(theirs, q, k, v), gradients(plain, q, k, v))


def rope_errors() -> list[float]:
    """The fused rotary embedding of packed rows against Megatron's, of a whole row and of each of two ranks."""
    from megatron.core.extensions.transformer_engine import fused_apply_rotary_pos_emb_thd
    from megatron.core.models.common.embeddings import rope_utils

    torch.manual_seed(0)
    freqs = torch.randn(16, 1, 1, 4).repeat(1, 1, 1, 2)  # both halves turn by the same angles
    found = []
    for lengths, cp in (([5, 1, 12], (1, 0)), ([8, 12], (2, 0)), ([8, 12], (2, 1))):
        offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        x = torch.randn(sum(lengths) // cp[0], 2, 8)

        def plain(x: Tensor, lengths: list[int] = lengths, cp: tuple[int, int] = cp) -> Tensor:
            rows = []
            for part in x.split([n // cp[0] for n in lengths]):
                angles = rope_utils._get_thd_freqs_on_this_cp_rank(cp[1], cp[0], part, freqs)
                rows.append(rope_utils._apply_rotary_pos_emb_bshd(part[:, None], angles)[:, 0])
            return torch.cat(rows)

        def theirs(x: Tensor, offsets: Tensor = offsets, cp: tuple[int, int] = cp) -> Tensor:
            return fused_apply_rotary_pos_emb_thd(x, offsets, freqs, *cp)

        found += errors(gradients(theirs, x), gradients(plain, x))
    return found


def adam_errors() -> list[float]:
    """Three steps of AdamW."""
    from transformer_engine.pytorch.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizers = [
        make([parameter], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
        for make, parameter in ((FusedAdam, ours), (torch.optim.AdamW, theirs))
    ]
    for _ in range(3):
        ours.grad = torch.randn(5)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    return errors([ours.detach()], [theirs.detach()])


@RELEASES
@pytest.mark.parametrize(
    "check, args",
    [(linear_errors, ()), (attention_errors, (-1,)), (attention_errors, (4,)), (rope_errors, ()), (adam_errors, ())],
)
def test_modules_on_the_stand_in_compute_what_torch_computes(
    pool: WorkerPool, check: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    [found] = pool.run(1, check, *args)
    assert max(found) < 2e-6


def call_what_is_missing() -> None:
    import transformer_engine_torch as tex  # pyright: ignore[reportMissingImports]

    tex.swiglu(None, None)


def test_a_kernel_that_is_not_here_says_its_name(pools: Pools) -> None:
    with pytest.raises(AssertionError, match="NotImplementedError: Transformer Engine on a CPU has no swiglu"):
        pools[te_on_cpu.NEWEST].run(1, call_what_is_missing)
