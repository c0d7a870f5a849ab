"""The weight table: which Hugging Face tensors form which Megatron parameter. Data only, without torch and Megatron.

Loading, export, the checkpoint converter, the verifier and the planner read the same table. A caller may pass a longer one:
an adapter is entries more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from simpo_megatron.models.part_layout import PartLayout


@dataclass(frozen=True)
class WeightEntry:
    """One Megatron parameter and the Hugging Face tensors it is made of.

    Attributes:
        megatron: canonical name (Transformer Engine spec, torch_dist keys); `{layer}` is the global layer index,
            `{expert}` the global expert index.
        hf: names of its parts, with the same `{layer}` and `{expert}`.
        shapes: the whole shape of each part, in the order of `hf`.
        part_layout: how the parts form the parameter.
        tp_dim: the dimension tensor parallelism splits, of the parameter and of every part; None for replicated.
            The weights of experts are split over the expert-tensor-parallel ranks instead.
        experts: how many experts have one in every layer; 0 where it belongs to none.
    """

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    part_layout: PartLayout
    tp_dim: int | None
    experts: int = 0

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of each whole part."""
        return tuple(shape[0] for shape in self.shapes)

    @property
    def per_layer(self) -> bool:
        """Whether every layer has one."""
        return "{layer}" in self.megatron

    @property
    def is_vocabulary(self) -> bool:
        """Whether the first dimension is the vocabulary, which Megatron pads."""
        return self.megatron in (EMBEDDING, OUTPUT)

    def instances(self, num_layers: int) -> Iterator[dict[str, int]]:
        """What `{layer}` and `{expert}` stand for, once for every parameter of this entry."""
        for layer in range(num_layers) if self.per_layer else (0,):
            for expert in range(self.experts or 1):
                yield {"layer": layer, "expert": expert}


EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"

# Local-spec names of parameters whose canonical name differs. There, norms are separate modules. Before experts they are in
# both specs, and the table keeps the dense name, which is the torch_dist key of the local spec.
_LOCAL_TO_CANONICAL = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_GROUPED_EXPERT = re.compile(r"experts\.(linear_fc[12])\.weight(\d+)$")


def canonical_name(parameter: str) -> str:
    """The canonical name of a parameter of a model built with either spec; grouped experts get the sequential names.

    >>> canonical_name("decoder.layers.3.input_layernorm.weight")
    'decoder.layers.3.self_attention.linear_qkv.layer_norm_weight'
    >>> canonical_name("decoder.layers.3.mlp.experts.linear_fc2.weight5")
    'decoder.layers.3.mlp.experts.local_experts.5.linear_fc2.weight'
    """
    parameter = _GROUPED_EXPERT.sub(r"experts.local_experts.\2.\1.weight", parameter)
    for local, canonical in _LOCAL_TO_CANONICAL.items():
        if parameter.endswith("." + local):
            return parameter.removesuffix(local) + canonical
    return parameter
