"""The weight table: which Hugging Face tensors form which Megatron parameter. Data only, without torch and Megatron.

Loading, export, the checkpoint converter, the verifier and the planner read the same table. `Architecture.weights` is
the table of a model as its config.json describes it. A caller may pass a longer one: an adapter adds entries.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from simpo_megatron.models.part_layout import PartLayout


@dataclass(frozen=True)
class WeightEntry:
    """One Megatron parameter and the Hugging Face tensors it is made of.

    Attributes:
        megatron: the canonical name, which is that of Megatron's Transformer Engine spec and of `torch_dist` keys;
            `{layer}` stands for the global layer index, `{expert}` for the global expert index.
        hf: the tensor of each of its parts, with the same `{layer}` and `{expert}`. A name that stands several times is
            a tensor that holds these parts one behind the other. A name that ends with `[{expert}]` is a slice along
            the first dimension of a tensor that holds all experts of a layer.
        shapes: the shape of each whole part, in the order of `hf`.
        part_layout: how the parts form the parameter.
        tp_dim: the dimension that tensor parallelism splits, of the parameter and of every part; None where every rank
            holds all of it. The weights of experts are split over the expert-tensor-parallel ranks instead.
        experts: how many experts of a layer have such a parameter; 0 where it does not belong to an expert.
        layers: the global indices of the layers that have it; None for all of them.
        trained: whether training changes it. A parameter that it does not change has no gradient and no optimizer
            state: the base weights under an adapter.
        transposed: whether its tensors are transposed, [columns, rows], with one row of each part in turn.
    """

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    part_layout: PartLayout
    tp_dim: int | None
    experts: int = 0
    layers: tuple[int, ...] | None = None
    trained: bool = True
    transposed: bool = False

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of each whole part."""
        return tuple(shape[0] for shape in self.shapes)

    @property
    def tensors(self) -> tuple[tuple[int, ...], ...]:
        """The indices of the parts that each tensor holds, tensors and parts in order.

        >>> from simpo_megatron.models.part_layout import GateUp
        >>> WeightEntry("fc1", ("gate_up", "gate_up"), ((6, 4), (6, 4)), GateUp(), 0).tensors
        ((0, 1),)
        """
        return tuple(
            tuple(part for part, other in enumerate(self.hf) if other == name) for name in dict.fromkeys(self.hf)
        )

    @property
    def fused(self) -> bool:
        """Whether a tensor holds several of its parts, or those of several experts."""
        return len(self.tensors) < len(self.hf) or self.sliced

    @property
    def sliced(self) -> bool:
        """Whether a tensor of the checkpoint holds those of all experts."""
        return self.hf[0].endswith("[{expert}]")

    def shape_of(self, tensor: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one of `tensors`."""
        shape = (sum(self.rows[part] for part in tensor), *self.shapes[tensor[0]][1:])
        return shape[::-1] if self.transposed else shape

    def stored_axes(self, held: tuple[int, ...]) -> tuple[int, int, int]:
        """A transposed tensor as [columns, rows, parts]. The parts, one behind the other, are its axes reversed."""
        rows, *columns = self.shapes[held[0]]
        return math.prod(columns), rows, len(held)

    def rows_first(self, tensor: Any, held: tuple[int, ...]) -> Any:
        """The parts that a tensor holds, one behind the other, [rows, columns].

        Args:
            tensor: of torch or NumPy, as the checkpoint has it.
            held: which of `tensors` it is.

        >>> import numpy
        >>> from simpo_megatron.models.part_layout import GateUp
        >>> entry = WeightEntry("bias", ("gate_up", "gate_up"), ((2,), (2,)), GateUp(), 0, transposed=True)
        >>> entry.rows_first(numpy.array([1, 5, 2, 6]), (0, 1)).tolist()
        [1, 2, 5, 6]
        """
        if not self.transposed:
            return tensor
        rows, *columns = self.shapes[held[0]]
        return tensor.reshape(self.stored_axes(held)).swapaxes(0, 2).reshape(len(held) * rows, *columns)

    def as_stored(self, parts: Any, held: tuple[int, ...]) -> Any:
        """The inverse of `rows_first`."""
        if not self.transposed:
            return parts
        return parts.reshape(self.stored_axes(held)[::-1]).swapaxes(0, 2).reshape(self.shape_of(held))

    def first_row(self, part: int) -> int:
        """Where a part starts in its tensor."""
        return sum(self.rows[other] for other in range(part) if self.hf[other] == self.hf[part])

    @property
    def per_layer(self) -> bool:
        """Whether it belongs to a layer."""
        return "{layer}" in self.megatron

    @property
    def is_vocabulary(self) -> bool:
        """Whether the first dimension is the vocabulary, which Megatron pads."""
        return self.megatron in (EMBEDDING, OUTPUT)

    def in_layer(self, layer: int) -> bool:
        """Whether the layer with this global index has one."""
        return self.per_layer and (self.layers is None or layer in self.layers)

    def instances(self, num_layers: int) -> Iterator[dict[str, int]]:
        """The values of `{layer}` and `{expert}`, once for every parameter of this entry."""
        for layer in filter(self.in_layer, range(num_layers)) if self.per_layer else (0,):
            for expert in range(self.experts or 1):
                yield {"layer": layer, "expert": expert}


_SLICE = re.compile(r"(.*)\[(\d+)\]")


def tensor_and_slice(name: str) -> tuple[str, int | None]:
    """The tensor of the checkpoint that a name means, and which slice of it; None for all of it.

    >>> tensor_and_slice("model.layers.0.mlp.experts.down_proj[3]"), tensor_and_slice("model.norm.weight")
    (('model.layers.0.mlp.experts.down_proj', 3), ('model.norm.weight', None))
    """
    found = _SLICE.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, None)


EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"

# The norms whose canonical name is that of the linear layer behind them. In a layer without that linear layer, because
# experts or latent attention follow, they are modules of their own in both specs.
SEPARATE_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
# The norms after attention and feed-forward are this package's (`spec.PostNormAdd`), in both specs. Their canonical
# names are Megatron-Bridge's.
POST_NORMS = {
    "self_attention.linear_proj.post_layernorm.weight": "self_attn_bda.norm.weight",
    "mlp.linear_fc2.post_layernorm.weight": "mlp_bda.norm.weight",
}
# Names in Megatron's local spec that differ from the canonical ones: there, all norms are modules of their own.
_LOCAL_TO_CANONICAL = {local: canonical for canonical, local in {**SEPARATE_NORMS, **POST_NORMS}.items()}
_GROUPED_EXPERT = re.compile(r"experts\.(linear_fc[12])\.(weight|bias|adapter\.\w+_[ab])(\d+)$")


def canonical_name(parameter: str) -> str:
    """The canonical name of a parameter of a model that was built with either spec.

    Experts that are grouped into one module get the names of experts that are modules of their own.

    >>> canonical_name("decoder.layers.3.input_layernorm.weight")
    'decoder.layers.3.self_attention.linear_qkv.layer_norm_weight'
    >>> canonical_name("decoder.layers.3.mlp.experts.linear_fc2.weight5")
    'decoder.layers.3.mlp.experts.local_experts.5.linear_fc2.weight'
    """
    parameter = _GROUPED_EXPERT.sub(r"experts.local_experts.\3.\1.\2", parameter)
    for local, canonical in _LOCAL_TO_CANONICAL.items():
        if parameter.endswith("." + local):
            return parameter.removesuffix(local) + canonical
    return parameter
