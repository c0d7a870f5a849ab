"""What DeepSeek-V2, DeepSeek-V3 and GLM-4.5 share: dense layers first, then routed and shared experts, in groups.

The router of DeepSeek-V2 takes the softmax over all experts. That of the others takes the sigmoid of every score; it
chooses by the sum with a correction bias, which is no weight: it is loaded and exported, and training leaves it.

Routing may be limited to a few groups of experts. A group is as good as its best expert (softmax), or as its best two
(sigmoid). Megatron counts as many of a group as a token has experts for every chosen group. Where that is another
number, `Additions.group_best` says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpo_megatron.errors import UserError
from simpo_megatron.models.additions import Additions
from simpo_megatron.models.architecture import positive, refuse, required
from simpo_megatron.models.families.dense import BLOCK, LAYER
from simpo_megatron.models.families.moe import moe_feed_forward, moe_kwargs, num_experts
from simpo_megatron.models.megatron_args import dense_layers, expert_config
from simpo_megatron.models.part_layout import Copy, GateUp
from simpo_megatron.models.weight_table import WeightEntry


def routed_kwargs(config: dict[str, Any], *, sigmoid: bool) -> dict[str, Any]:
    """The arguments of TransformerConfig.

    Args:
        config: config.json, with what a dense family reads of it.
        sigmoid: whether the router takes the sigmoid and has a correction bias.

    Raises:
        UserError: as `moe_kwargs`, or for a routing that Megatron does not compute.
    """
    refuse(config, "scoring_func", "sigmoid" if sigmoid else "softmax", None, fix="copy config.json again")
    refuse(config, "moe_layer_freq", 1, None, fix="only models with experts in every layer behind the dense ones run")
    refuse(config, "quantization_config", None, fix="dequantize the weights, and remove it")
    ffn, topk = required(config, "moe_intermediate_size"), required(config, "num_experts_per_tok")
    if sigmoid:
        # Megatron divides the chosen scores by their sum, unless there is only one.
        refuse(config, "norm_topk_prob", True, fix="only models that normalise the scores of the chosen experts run")
        if topk == 1:
            raise UserError("config.json sets num_experts_per_tok to 1, for which Megatron does not normalise scores")
    kwargs = moe_kwargs(config, ffn=ffn, norm_topk_prob=sigmoid, pattern=_pattern(config))
    kwargs["moe_shared_expert_intermediate_size"] = ffn * required(config, "n_shared_experts")
    if (scale := positive(config, "routed_scaling_factor")) != 1.0:
        kwargs["moe_router_topk_scaling_factor"] = scale
    if sigmoid:
        kwargs |= {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
        kwargs["moe_router_bias_update_rate"] = 0.0
    groups, chosen = _groups(config)
    if groups > 1:
        if num_experts(config) % groups or topk > num_experts(config) // groups * chosen:
            raise UserError(
                f"config.json sets n_group to {groups} and topk_group to {chosen}, which does not fit its "
                f"{num_experts(config)} experts and num_experts_per_tok {topk}; copy the file again"
            )
        kwargs |= {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}
    return kwargs


def routed_additions(config: dict[str, Any], *, sigmoid: bool) -> Additions:
    """What the router computes beyond Megatron's."""
    (groups, chosen), best = _groups(config), 2 if sigmoid else 1
    as_megatron = groups == 1 or required(config, "num_experts_per_tok") // chosen == best
    return Additions(group_best=None if as_megatron else best)


def _groups(config: dict[str, Any]) -> tuple[int, int]:
    """Groups of experts, and how many of them a token may use; 1 and 1 without a limit."""
    groups, chosen = (1 if config.get(key) is None else required(config, key) for key in ("n_group", "topk_group"))
    if chosen > groups:
        raise UserError(f"config.json sets topk_group to {chosen}, but n_group to {groups}; copy the file again")
    return (groups, chosen) if config.get("topk_method") != "greedy" else (1, 1)


def _pattern(config: dict[str, Any]) -> list[bool]:
    dense = config.get("first_k_dense_replace") or 0
    return [layer >= dense for layer in range(required(config, "num_hidden_layers"))]


def routed_feed_forward(config: dict[str, Any], *, sigmoid: bool) -> tuple[WeightEntry, ...]:
    """The entries of the dense layers, and of router, experts and shared experts."""
    hidden, ffn = required(config, "hidden_size"), required(config, "moe_intermediate_size")
    shared = ffn * required(config, "n_shared_experts")
    pattern = _pattern(config)
    layers = None if all(pattern) else tuple(layer for layer, experts in enumerate(pattern) if experts)
    block, (gate, up, down) = (
        f"{BLOCK}mlp.shared_experts.",
        (f"{LAYER}mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")),
    )
    table = [
        *moe_feed_forward(config, ffn=ffn, block="mlp", pattern=pattern),
        WeightEntry(
            f"{block}linear_fc1.weight", (gate, up), ((shared, hidden), (shared, hidden)), GateUp(), 0, layers=layers
        ),
        WeightEntry(f"{block}linear_fc2.weight", (down,), ((hidden, shared),), Copy(), 1, layers=layers),
    ]
    if sigmoid:
        name, bias = f"{BLOCK}mlp.router.expert_bias", (f"{LAYER}mlp.gate.e_score_correction_bias",)
        shape = (num_experts(config),)
        table.append(WeightEntry(name, bias, (shape,), Copy(), None, layers=layers, trained=False))
    return tuple(table)


def predicted_layers(config: dict[str, Any]) -> tuple[str, ...]:
    """The prefixes of the tensors of multi-token prediction, layers behind the last one, which transformers ignores."""
    first = required(config, "num_hidden_layers")
    more = config.get("num_nextn_predict_layers") or config.get("num_mtp_layers") or 0
    return tuple(f"model.layers.{layer}." for layer in range(first, first + more))


def routed_config(args: Mapping[str, Any]) -> dict[str, Any]:
    """What the config.json of such a model contains of its experts.

    Raises:
        UserError: an argument is missing, or the dense layers are not the first ones.
    """
    dense = dense_layers(args)
    if dense != list(range(len(dense))):
        raise UserError(
            f"it has moe_layer_freq {args['moe_layer_freq']!r}; only models with dense layers first convert"
        )
    experts = expert_config(args, number="n_routed_experts", width="moe_intermediate_size")
    shared = args.get("moe_shared_expert_intermediate_size") or 0
    return experts | {
        "first_k_dense_replace": len(dense),
        "n_shared_experts": shared // experts["moe_intermediate_size"],
        "routed_scaling_factor": args.get("moe_router_topk_scaling_factor") or 1.0,
        "n_group": args.get("moe_router_num_groups") or 1,
        "topk_group": args.get("moe_router_group_topk") or 1,
    }
