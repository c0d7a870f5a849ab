"""What a model computes, and the family it belongs to. Data only, without torch and Megatron.

    architecture = family_of(config).architecture(config)     # config: the content of a config.json

An `Architecture` is read from a config.json alone. The folder with the weights is `hf_checkpoint.HFCheckpoint`. A
family is one file in `families/` and one line in `families/registry.py`; `README.md` in this folder says how to add
one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from simpo_megatron.errors import UserError
from simpo_megatron.models.additions import Additions, no_additions
from simpo_megatron.models.megatron_args import default_megatron_args, windowed_layers
from simpo_megatron.models.rope import Rope, check_factors, read_rope
from simpo_megatron.models.weight_table import WeightEntry


def default_layer_spec(*args: Any, **kwargs: Any) -> Any:
    """Calls `spec.layer_spec`, which is imported here so that this module needs neither torch nor Megatron."""
    from simpo_megatron.models.spec import layer_spec

    return layer_spec(*args, **kwargs)


@dataclass(frozen=True)
class Family:
    """A model family: how its config.json and its tensors become a Megatron model, and how they come back.

    Attributes:
        name: used in messages.
        model_types: the values of `model_type` in config.json that belong to it.
        transformer_kwargs: makes the arguments of Megatron's TransformerConfig that describe the architecture from the
            config.json. It raises UserError for what Megatron would compute differently.
        weights: makes the weight table from the config.json: the embedding first, the output layer last.
        config_from_megatron_args: makes a config.json without its vocabulary size from Megatron-LM's arguments by name.
            It returns None where they describe another family.
        megatron_args: makes Megatron-LM's arguments by name from the architecture. Their values are primitives.
        layer_spec: makes the layers that Megatron builds; takes the arguments of `spec.layer_spec`.
        additions: makes from the config.json what the model computes beyond Megatron's TransformerConfig.
        rope: makes the rotary frequencies from the config.json.
        unread: makes from the config.json the prefixes of tensors that a checkpoint may have and the model does not
            use.
        defaults: the values that transformers takes for keys that a config.json of the family may lack.
    """

    name: str
    model_types: tuple[str, ...]
    transformer_kwargs: Callable[[dict[str, Any]], dict[str, Any]]
    weights: Callable[[dict[str, Any]], tuple[WeightEntry, ...]]
    config_from_megatron_args: Callable[[Mapping[str, Any]], dict[str, Any] | None]
    megatron_args: Callable[[Architecture], dict[str, Any]] = default_megatron_args
    layer_spec: Callable[..., Any] = default_layer_spec
    additions: Callable[[dict[str, Any]], Additions] = no_additions
    rope: Callable[[dict[str, Any]], Rope] = read_rope
    unread: Callable[[dict[str, Any]], tuple[str, ...]] = lambda config: ()
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def architecture(self, config: dict[str, Any]) -> Architecture:
        """Reads a config.json of this family.

        Raises:
            UserError: the config lacks a value, or sets one that changes the computation and is not supported.
        """
        config = {**self.defaults, **config}
        refuse(config, "is_causal", True, None, fix="only causal models run")
        found = Architecture(
            family=self,
            transformer=self.transformer_kwargs(config),
            weights=self.weights(config),
            num_layers=required(config, "num_hidden_layers"),
            vocab_size=required(config, "vocab_size"),
            max_position_embeddings=config.get("max_position_embeddings", 0),
            tied=bool(config.get("tie_word_embeddings", False)),
            rope=self.rope(config),
            additions=self.additions(config),
        )
        check_factors(found.rope, found.rotary_head_dim)
        return found


@dataclass(frozen=True)
class Architecture:
    """What a model computes.

    Attributes:
        family: the family that `model_type` names.
        transformer: arguments of Megatron's TransformerConfig.
        weights: the weight table.
        num_layers: transformer layers.
        vocab_size: rows of the embedding, without Megatron's padding.
        max_position_embeddings: positions the model was made for; 0 where config.json does not say.
        tied: whether the output layer is the embedding.
        rope: the rotary frequencies.
        additions: what it computes beyond Megatron's TransformerConfig.
    """

    family: Family
    transformer: dict[str, Any]
    weights: tuple[WeightEntry, ...]
    num_layers: int
    vocab_size: int
    max_position_embeddings: int
    tied: bool
    rope: Rope
    additions: Additions

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The keys that a query of each layer attends to at most, itself included; None where it attends to all.

        Megatron's `window_size` counts the keys on the left of the query.
        """
        if "window_size" not in self.transformer:
            return (None,) * self.num_layers
        has_window = windowed_layers(self.transformer.get("window_attn_skip_freq"), self.num_layers)
        return tuple(self.transformer["window_size"][0] + 1 if has else None for has in has_window)

    @property
    def rotary_head_dim(self) -> int:
        """The width of a head, or of its part that has a rotary embedding where only a part has one."""
        return self.transformer.get("qk_pos_emb_head_dim") or self.transformer["kv_channels"]

    @property
    def value_head_dim(self) -> int:
        """The width of the values of a head; queries and keys are `kv_channels` wide."""
        return self.transformer.get("v_head_dim") or self.transformer["kv_channels"]

    @property
    def scored_in_blocks(self) -> bool:
        """Whether the attention on plain torch is `attention_blocks.BlockAttention`."""
        return self.additions.attention_softcap is not None or self.transformer.get("softmax_type") == "learnable"

    @property
    def num_experts(self) -> int | None:
        """Experts of a layer that has them; None for a dense model."""
        return self.transformer.get("num_moe_experts")

    @property
    def has_whole_experts(self) -> bool:
        """Whether it has experts that tensor parallelism cannot split, because they have biases."""
        return self.num_experts is not None and bool(self.transformer.get("add_bias_linear"))

    @property
    def expert_layers(self) -> tuple[bool, ...]:
        """Whether each layer has experts; the others have a dense feed-forward."""
        pattern = self.transformer.get("moe_layer_freq") or [int(self.num_experts is not None)] * self.num_layers
        return tuple(map(bool, pattern[: self.num_layers]))

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, without padding and without a second copy of a tied embedding."""
        return sum(
            sum(map(math.prod, entry.shapes)) * sum(1 for _ in entry.instances(self.num_layers))
            for entry in self.weights
        )

    def only(self, layer: int) -> Architecture:
        """The model without its other layers: its layer 0 computes what this layer does.

        A list among the arguments of TransformerConfig has one value for each layer.
        """
        cut = {
            name: value[layer : layer + 1] if isinstance(value, list) else value
            for name, value in self.transformer.items()
        }
        weights = (
            entry if entry.layers is None else replace(entry, layers=(0,))
            for entry in self.weights
            if not entry.per_layer or entry.in_layer(layer)
        )
        return replace(self, num_layers=1, transformer={**cut, "num_layers": 1}, weights=tuple(weights))


def required(config: dict[str, Any], key: str) -> int:
    """The size that config.json gives under `key`.

    Raises:
        UserError: it is absent, or not a positive integer.
    """
    if config.get(key) is None:
        raise UserError(
            f"config.json has no {key!r}, which a {config.get('model_type')!r} model needs; is the file complete?"
        )
    if type(config[key]) is not int or config[key] < 1:
        raise UserError(
            f"config.json sets {key} to {config[key]!r}, which is not a positive integer; copy the file again"
        )
    return config[key]


# transformers would otherwise save the dequantized weights under the names of the quantized ones.
DEQUANTIZE_MXFP4 = (
    "load it in transformers with quantization_config=Mxfp4Config(dequantize=True), and save it with "
    "save_pretrained(FOLDER, save_original_format=False)"
)


def positive(config: dict[str, Any], key: str) -> float:
    """The positive number that config.json gives under `key`.

    Raises:
        UserError: it is another value.
    """
    value = config[key]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise UserError(f"config.json sets {key} to {value!r}, which is not a positive number; copy the file again")
    return float(value)


def refuse(config: dict[str, Any], key: str, *accepted: Any, fix: str) -> None:
    """Refuses a value of config.json that would change what is computed.

    Args:
        config: config.json.
        key: of the value; a config without it is accepted.
        *accepted: the values that are accepted.
        fix: what the user can do, for the error.

    Raises:
        UserError: the value is another.
    """
    value = config.get(key, accepted[0])
    if value not in accepted:
        raise UserError(f"config.json sets {key} to {value!r}, which is not supported; {fix}")
