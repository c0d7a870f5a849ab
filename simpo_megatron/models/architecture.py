"""What a model computes, and the family it belongs to. Data only, without torch and Megatron.

    architecture = family_of(config).architecture(config)     # config: the content of a config.json

`Architecture` is read from a config.json alone; the folder with the weights is `hf_checkpoint.HFCheckpoint`. A family is one
file in `families/`, and a line in its registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from simpo_megatron.errors import UserError
from simpo_megatron.models.megatron_args import default_megatron_args
from simpo_megatron.models.rope import Rope, read_rope
from simpo_megatron.models.weight_table import WeightEntry


def default_layer_spec(*args: Any, **kwargs: Any) -> Any:
    """`spec.layer_spec`, imported when a model is built: this module stays free of torch and Megatron."""
    from simpo_megatron.models.spec import layer_spec

    return layer_spec(*args, **kwargs)


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: for messages.
        model_types: values of `model_type` in config.json.
        transformer_kwargs: config.json -> arguments of Megatron's TransformerConfig that describe the architecture;
            raises UserError for what Megatron would compute differently.
        weights: config.json -> the weight table, embedding first, output last.
        layer_spec: Megatron's layers of a model; arguments as `spec.layer_spec`.
        megatron_args: the architecture under Megatron-LM's argument names, primitives alone.
        config_from_megatron_args: those arguments -> config.json without its vocabulary size, None where they describe
            another family.
    """

    name: str
    model_types: tuple[str, ...]
    transformer_kwargs: Callable[[dict[str, Any]], dict[str, Any]]
    weights: Callable[[dict[str, Any]], tuple[WeightEntry, ...]]
    config_from_megatron_args: Callable[[Mapping[str, Any]], dict[str, Any] | None]
    megatron_args: Callable[[Architecture], dict[str, Any]] = default_megatron_args
    layer_spec: Callable[..., Any] = default_layer_spec

    def architecture(self, config: dict[str, Any]) -> Architecture:
        """Reads a config.json of this family.

        Raises:
            UserError: it lacks a value, or sets one that changes the computation and is not supported.
        """
        return Architecture(
            family=self,
            transformer=self.transformer_kwargs(config),
            weights=self.weights(config),
            num_layers=required(config, "num_hidden_layers"),
            vocab_size=required(config, "vocab_size"),
            max_position_embeddings=config.get("max_position_embeddings", 0),
            tied=bool(config.get("tie_word_embeddings", False)),
            rope=read_rope(config),
        )


@dataclass(frozen=True)
class Architecture:
    """What a model computes.

    Attributes:
        family: what `model_type` names.
        transformer: arguments of Megatron's TransformerConfig.
        weights: the weight table.
        num_layers: transformer layers.
        vocab_size: rows of the embedding, without Megatron's padding.
        max_position_embeddings: positions the model was made for; 0 where config.json does not say.
        tied: the output layer is the embedding.
        rope: rotary frequencies.
    """

    family: Family
    transformer: dict[str, Any]
    weights: tuple[WeightEntry, ...]
    num_layers: int
    vocab_size: int
    max_position_embeddings: int
    tied: bool
    rope: Rope

    @property
    def num_experts(self) -> int | None:
        """Experts of a layer; None for a dense model."""
        return self.transformer.get("num_moe_experts")


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


def refuse(config: dict[str, Any], key: str, *accepted: Any, fix: str) -> None:
    """Raises UserError where config.json sets `key` to something else than `accepted`; absent is accepted."""
    value = config.get(key, accepted[0])
    if value not in accepted:
        raise UserError(f"config.json sets {key} to {value!r}, which is not supported; {fix}")
