"""The factors of experts as PEFT joins them with transformers 5, which keeps the experts of a layer in one tensor.

PEFT names such an adapter by its parameters (`target_parameters`). Of the experts of a layer it writes

    mlp.experts.base_layer.lora_A.weight   [experts * rank, in]      of gate and up, which share A
    mlp.experts.base_layer.lora_B.weight   [2 * ffn, rank * experts] the expert counts fastest
    mlp.experts.lora_A.weight, lora_B.weight                         of down

Where only one of the two has factors, its names have no `base_layer`. The widths tell them apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simpo_megatron.adapters.lora import Lora, factor_entries, projections
from simpo_megatron.models.architecture import Architecture
from simpo_megatron.models.hf_checkpoint import HFTensor

if TYPE_CHECKING:
    from torch import Tensor

_JOINED = re.compile(r"(?P<module>.*\.layers\.(?P<layer>\d+)\..*experts(?:\.base_layer)?)\.lora_A\.weight$")


@dataclass(frozen=True)
class JoinedFactor:
    """Where a factor of one expert lies.

    Attributes:
        tensor: the name of the tensor with the factors of all experts.
        rank_dim: the dimension that counts ranks and experts: 0 of A, 1 of B.
        expert: whose factor it is.
        experts: of a layer.
        part: which of the parts of the rows of B it is.
        parts: of the rows: gate and up follow each other.
    """

    tensor: str
    rank_dim: int
    expert: int
    experts: int
    part: int
    parts: int

    def take(self, whole: Tensor) -> Tensor:
        """The factor, from the tensor of all experts."""
        if self.rank_dim == 0:
            return whole.unflatten(0, (self.experts, -1))[self.expert].contiguous()
        return whole.unflatten(1, (-1, self.experts))[:, :, self.expert].chunk(self.parts)[self.part].contiguous()


def joined_factors(architecture: Architecture, tensors: Mapping[str, HFTensor]) -> dict[str, JoinedFactor]:
    """The factors of experts that are in joined tensors, by their names in the weight table; empty where none are.

    Args:
        architecture: of the base.
        tensors: of the adapter, by their names without `base_model.model.`.
    """
    found = {}
    for a_name in tensors:
        match = _JOINED.match(a_name)
        b_name = a_name.replace(".lora_A.", ".lora_B.")
        if match is None or b_name not in tensors:
            continue
        a, b = tensors[a_name].shape, tensors[b_name].shape
        for entry in architecture.weights:
            if not entry.experts or not projections(entry) or (a[1], b[0]) != (entry.shapes[0][1], sum(entry.rows)):
                continue
            for index, factor in enumerate(factor_entries(entry, Lora(1, 1.0))):
                part, dim = divmod(index, 2)
                for expert in range(entry.experts):
                    name = factor.hf[0].format(layer=match["layer"], expert=expert)
                    holder = (a_name, b_name)[dim]
                    found[name] = JoinedFactor(holder, dim, expert, entry.experts, part, len(entry.hf))
    return found
