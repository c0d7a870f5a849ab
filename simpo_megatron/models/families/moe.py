"""What the mixture-of-experts families share: a router and experts in place of the dense feed-forward, in some layers.

transformers takes the softmax over all experts and keeps the k largest probabilities. Where it then divides them by
their sum (`norm_topk_prob`), the result is the softmax over the k largest logits alone. Megatron computes that
directly with `moe_router_pre_softmax=False`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from simpo_megatron.errors import UserError
from simpo_megatron.models.architecture import required
from simpo_megatron.models.families.dense import BLOCK, LAYER, dense_kwargs, swiglu
from simpo_megatron.models.part_layout import Copy, GateUp
from simpo_megatron.models.weight_table import WeightEntry


def num_experts(config: dict[str, Any]) -> int:
    """Experts of a layer: `num_experts`, `n_routed_experts` or `num_local_experts`, as configs name it.

    Raises:
        UserError: none is there, or they differ.
    """
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    given = {name: required(config, name) for name in names if config.get(name) is not None}
    if len(set(given.values())) > 1:
        values = " and ".join(f"{name} to {value}" for name, value in given.items())
        raise UserError(f"config.json sets {values}, which name the same number; copy it from the original model")
    return next(iter(given.values()), 0) or required(config, "num_local_experts")


def moe_kwargs(
    config: dict[str, Any], *, ffn: int, norm_topk_prob: bool, pattern: Sequence[bool] | None = None
) -> dict[str, Any]:
    """The arguments of TransformerConfig of a model with experts.

    Args:
        config: config.json.
        ffn: the intermediate size of one expert.
        norm_topk_prob: whether the probabilities of the chosen experts are divided by their sum.
        pattern: whether each layer has experts; None where all have.

    Raises:
        UserError: as `dense_kwargs`, or a token is sent to more experts than there are.
    """
    experts, topk = num_experts(config), required(config, "num_experts_per_tok")
    if topk > experts:
        raise UserError(f"config.json sets num_experts_per_tok to {topk}, but the model has {experts} experts a layer")
    return {
        **dense_kwargs(config),
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": ffn,
        "moe_router_topk": topk,
        "moe_router_pre_softmax": not norm_topk_prob,
        **({} if pattern is None or all(pattern) else {"moe_layer_freq": list(map(int, pattern))}),
    }


def moe_feed_forward(
    config: dict[str, Any],
    *,
    ffn: int,
    block: str,
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    pattern: Sequence[bool] | None = None,
) -> tuple[WeightEntry, ...]:
    """The entries of the router and of the experts, after those of the dense layers where there are some.

    Args:
        config: config.json.
        ffn: the intermediate size of one expert.
        block: the checkpoint's name of the module with router and experts.
        parts: the checkpoint's names of gate, up and down.
        pattern: whether each layer has experts; None where all have.
    """
    hidden, experts = required(config, "hidden_size"), num_experts(config)
    gate, up, down = (f"{LAYER}{block}.experts.{{expert}}.{part}.weight" for part in parts)
    expert = f"{BLOCK}mlp.experts.local_experts.{{expert}}."
    table = (
        WeightEntry(f"{BLOCK}mlp.router.weight", (f"{LAYER}{block}.gate.weight",), ((experts, hidden),), Copy(), None),
        WeightEntry(
            f"{expert}linear_fc1.weight", (gate, up), ((ffn, hidden), (ffn, hidden)), GateUp(), 0, experts=experts
        ),
        WeightEntry(f"{expert}linear_fc2.weight", (down,), ((hidden, ffn),), Copy(), 1, experts=experts),
    )
    if pattern is None or all(pattern):
        return table
    dense, sparse = (tuple(layer for layer, has in enumerate(pattern) if has == kind) for kind in (False, True))
    return (
        *(replace(entry, layers=dense) for entry in swiglu(config)),
        *(replace(entry, layers=sparse) for entry in table),
    )
