"""The factors of experts as PEFT joins them with transformers 5, which keeps the experts of a layer in one tensor.

PEFT names such an adapter by its parameters (`target_parameters`). Of the experts of a layer it writes

    mlp.experts.base_layer.lora_A.weight   [experts * rank, in]      of gate and up, which share A
    mlp.experts.base_layer.lora_B.weight   [2 * ffn, rank * experts] the expert counts fastest
    mlp.experts.lora_A.weight, lora_B.weight                         of down

An adapter with factors of each expert's own, which PEFT loads, has separate A for gate and up. Saved again it has both,
one after the other: twice the rank, and in B blocks of zeros where the A of gate would meet the rows of up.

Where only one of the two has factors, its names have no `base_layer`. The widths tell them apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simpo_megatron.adapters.lora import Lora, factor_entries, projections
from simpo_megatron.models.architecture import Architecture
from simpo_megatron.models.weight_files import HFTensor
from simpo_megatron.models.weight_table import WeightEntry

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
        blocks: of the rank: as many as parts where each part has its own, else 1.
        module: PEFT's name of the parameter that has the factors.
    """

    tensor: str
    rank_dim: int
    expert: int
    experts: int
    part: int
    parts: int
    blocks: int
    module: str

    def take(self, whole: Tensor) -> Tensor:
        """The factor, from the tensor of all experts.

        Raises:
            ValueError: gate and up have become one adapter of twice the rank.
        """
        own = self.part if self.blocks > 1 else 0
        if self.rank_dim == 0:
            return whole.unflatten(0, (self.experts, -1))[self.expert].chunk(self.blocks)[own].contiguous()
        rows = whole.unflatten(1, (-1, self.experts))[:, :, self.expert].chunk(self.parts)[self.part]
        blocks = rows.chunk(self.blocks, dim=1)
        if any(block.any() for index, block in enumerate(blocks) if index != own):
            raise ValueError(
                "gate and up share their factors, which are of twice the rank of the others, as PEFT trains them after "
                "it has joined them; merge the adapter with PEFT and start from the model"
            )
        return blocks[own].contiguous()


def joined_factors(architecture: Architecture, tensors: Mapping[str, HFTensor]) -> dict[str, JoinedFactor]:
    """The factors of experts that are in joined tensors, by their names in the weight table; empty where none are.

    Args:
        architecture: of the base.
        tensors: of the adapter, by their names without `base_model.model.`.
    """
    places = list(_joined_tensors(architecture, tensors))
    least = min((tensors[a_name].shape[0] // entry.experts for a_name, entry in places if entry.experts), default=0)
    found = {}
    for a_name, entry in places:
        match = _JOINED.match(a_name)
        assert match is not None and entry.experts
        parts = len(entry.hf)
        blocks = parts if tensors[a_name].shape[0] == least * parts * entry.experts else 1
        parameter = "_".join(name.removesuffix("_proj") for name in projections(entry)) + "_proj"
        module = f"{match['module'].removesuffix('.base_layer')}.{parameter}"
        holders = (a_name, a_name.replace(".lora_A.", ".lora_B."))
        for index, factor in enumerate(factor_entries(entry, Lora(1, 1.0))):
            part, dim = divmod(index, 2)
            for expert in range(entry.experts):
                name = factor.hf[0].format(layer=match["layer"], expert=expert)
                found[name] = JoinedFactor(holders[dim], dim, expert, entry.experts, part, parts, blocks, module)
    return found


def _joined_tensors(architecture: Architecture, tensors: Mapping[str, HFTensor]) -> Iterator[tuple[str, WeightEntry]]:
    """The names of all A of joined experts, each with the entry of its weights, which the widths tell."""
    for a_name in filter(_JOINED.match, tensors):
        b_name = a_name.replace(".lora_A.", ".lora_B.")
        if b_name in tensors:
            widths = tensors[a_name].shape[1], tensors[b_name].shape[0]
            for entry in architecture.weights:
                if entry.experts and projections(entry) and widths == (entry.shapes[0][1], sum(entry.rows)):
                    yield a_name, entry
