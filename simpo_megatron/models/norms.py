"""Norms of queries and keys over all heads of a token together (OLMo), which tensor parallelism spreads over ranks.

Megatron's own norms of queries and keys take one head at a time.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from simpo_megatron.errors import UserError


class AllHeadsNorm(torch.nn.Module):
    """RMSNorm over the heads of all tensor-parallel ranks, with the arguments with which Megatron builds a norm.

    A rank holds the weight of its own heads. Its gradient is whole without a sum over the ranks, so the config must not
    set `qk_layernorm`, with which Megatron would sum it (`distributed/finalize_model_grads.py`).

    Collectives: where heads are split, one all-reduce of one number a token in the forward and in the backward pass.

    Raises:
        UserError: when built, there are fewer heads than tensor-parallel ranks.
    """

    heads_field: ClassVar[str]  # of TransformerConfig: how many heads there are

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        heads, ranks = getattr(config, self.heads_field), parallel_state.get_tensor_model_parallel_world_size()
        if heads % ranks:
            raise UserError(
                f"--tensor-model-parallel-size {ranks} does not divide the {heads} heads whose norm spans all heads; "
                "use a smaller size"
            )
        self.width, self.eps = heads * hidden_size, eps
        size, device = self.width // ranks, torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(size, dtype=config.params_dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """The normalised heads of this rank.

        Args:
            x: [..., heads of this rank, width of a head], of any float dtype.

        Returns:
            The same shape and dtype. The product is computed in fp32 and rounded once.
        """
        flat = x.flatten(-2).float()
        squares: Any = reduce_from_tensor_model_parallel_region(flat.square().sum(-1, keepdim=True))
        squares = copy_to_tensor_model_parallel_region(squares)  # sums the gradients of all ranks' uses
        normal = flat * torch.rsqrt(squares / self.width + self.eps)
        return (self.weight * normal).to(x.dtype).view(x.shape)

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
