"""What a model family is: the transformer arguments of a Hugging Face config, and the table of its weights.

Data only, without torch and Megatron: direct loading, export and the checkpoint converter read the same tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from simpo_megatron.errors import UserError


@dataclass(frozen=True)
class Weight:
    """One Megatron parameter and the Hugging Face tensors it is made of.

    Attributes:
        megatron: canonical name (Transformer Engine spec, torch_dist keys); `{layer}` is the global layer index,
            `{expert}` the global expert index.
        hf: names of its parts, with the same `{layer}` and `{expert}`.
        shapes: the whole shape of each part, in the order of `hf`.
        layout: how the parts form the parameter. "copy": one part, as it is. "qkv": q, k, v interleaved by query group,
            `[q_0 .. q_{n-1}, k, v]` for every group. "gate_up": gate, then up, on every tensor-parallel rank.
        tp_dim: the dimension tensor parallelism splits, of the parameter and of every part; None for replicated.
            The weights of experts are split over the expert-tensor-parallel ranks instead.
        groups: of "qkv", the number of query groups.
        experts: how many experts have one in every layer; 0 where it belongs to none.
    """

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    layout: Literal["copy", "qkv", "gate_up"]
    tp_dim: int | None
    groups: int = 1
    experts: int = 0

    @property
    def per_layer(self) -> bool:
        """Whether every layer has one."""
        return "{layer}" in self.megatron

    @property
    def is_vocabulary(self) -> bool:
        """Whether the first dimension is the vocabulary, which Megatron pads."""
        return self.megatron in (EMBEDDING, OUTPUT)

    def instances(self, num_layers: int) -> Iterator[dict[str, int]]:
        """What `{layer}` and `{expert}` stand for, once for every parameter of this row."""
        for layer in range(num_layers) if self.per_layer else (0,):
            for expert in range(self.experts or 1):
                yield {"layer": layer, "expert": expert}


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: for messages.
        model_types: values of `model_type` in config.json.
        transformer_kwargs: config.json -> arguments of Megatron's TransformerConfig that describe the architecture;
            raises UserError for what Megatron would compute differently.
        weights: config.json -> the weight table, embedding first, output last.
    """

    name: str
    model_types: tuple[str, ...]
    transformer_kwargs: Callable[[dict[str, Any]], dict[str, Any]]
    weights: Callable[[dict[str, Any]], tuple[Weight, ...]]


EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"

# Parameters that the local spec names otherwise than the canonical names: there, norms are modules of their own. So is the
# norm before experts in either spec; the row keeps the dense model's name, the torch_dist key of the local spec.
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


def required(config: dict[str, Any], key: str) -> int:
    """The size that `key` gives in config.json.

    Raises:
        UserError: it is absent, or no positive integer.
    """
    if config.get(key) is None:
        raise UserError(
            f"config.json has no {key!r}, which a {config.get('model_type')!r} model needs; is the file complete?"
        )
    if type(config[key]) is not int or config[key] < 1:
        raise UserError(f"config.json sets {key} to {config[key]!r}, which is no positive integer; copy the file again")
    return config[key]


def refuse(config: dict[str, Any], key: str, *accepted: Any, mend: str) -> None:
    """Raises UserError where config.json sets `key` to something else than `accepted`; absent is accepted."""
    value = config.get(key, accepted[0])
    if value not in accepted:
        raise UserError(f"config.json sets {key} to {value!r}, which is not supported; {mend}")
