"""Norms of queries and keys over all heads of a token together (OLMo), which tensor parallelism spreads over ranks.

Megatron's own norms of queries and keys take one head at a time.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor


class _Normalise(torch.autograd.Function):
    """`weight * x / rms`, where the mean of squares spans all ranks of a group. Of the inputs only x is kept.

    Shapes: x [..., w] and weight [w] of this rank; `width` is w of all ranks together.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, width: int, group: Any) -> Tensor:
        """In fp32, and rounded once."""
        inverse = _sum(x.float().square(), group).div_(width).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.width, ctx.group = width, group
        return (x.float() * inverse * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """The gradients of x and of this rank's weight."""
        x, weight, inverse = ctx.saved_tensors
        normal, grad = x.float() * inverse, grads[0].float()
        of_weight = (grad * normal).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight
        of_x = inverse * (grad - normal * (_sum(grad * normal, ctx.group) / ctx.width))
        return of_x.to(x.dtype), of_weight, None, None, None


def _sum(x: Tensor, group: Any) -> Tensor:
    """The sum over the last dimension, which is kept, and over the ranks."""
    total = x.sum(-1, keepdim=True)
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return total


class AllHeadsNorm(torch.nn.Module):
    """RMSNorm over the heads of all tensor-parallel ranks, with the arguments with which Megatron builds a norm.

    A rank holds the weight of its own heads. Its gradient is whole without a sum over the ranks, so the config must not
    set `qk_layernorm`, with which Megatron would sum it (`distributed/finalize_model_grads.py`).

    Collectives: where heads are split, one all-reduce of one number a token in the forward and in the backward pass.
    """

    heads_field: ClassVar[str]  # of TransformerConfig: how many heads there are

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.group: Any = parallel_state.get_tensor_model_parallel_group()
        self.width, self.eps = getattr(config, self.heads_field) * hidden_size, eps
        size, device = self.width // self.group.size(), torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(size, dtype=config.params_dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """The normalised heads of this rank.

        Args:
            x: [..., heads of this rank, width of a head], of any float dtype.

        Returns:
            The same shape and dtype. The product is computed in fp32 and rounded once.
        """
        normal: Any = _Normalise.apply(x.flatten(-2), self.weight, self.eps, self.width, self.group)
        return normal.view(x.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's description of the weight for its checkpoints: split in its only dimension."""
        del metadata
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


class QueryNorm(AllHeadsNorm):
    """Over all query heads."""

    heads_field = "num_attention_heads"


class KeyNorm(AllHeadsNorm):
    """Over all key heads."""

    heads_field = "num_query_groups"
