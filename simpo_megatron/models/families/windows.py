"""Sliding windows of all layers or of some: from config.json to Megatron's arguments, and back.

Hugging Face counts the token itself as part of the window, Megatron only the tokens on its left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from simpo_megatron.errors import UserError
from simpo_megatron.models.architecture import refuse, required
from simpo_megatron.models.megatron_args import need, sliding_window, windowed_layers
from simpo_megatron.models.rope import Rope

FULL, SLIDING = "full_attention", "sliding_attention"


def window_size(sliding_window: int | None) -> dict[str, Any]:
    """The argument of TransformerConfig, empty without a window.

    Raises:
        UserError: it is not a positive integer.
    """
    if sliding_window is None:
        return {}
    if type(sliding_window) is not int or sliding_window < 1:
        raise UserError(
            f"config.json sets sliding_window to {sliding_window!r}, which is not a positive integer; copy it from the "
            "original model"
        )
    return {"window_size": (sliding_window - 1, 0)}


def window_kwargs(window: int | None, layer_types: Sequence[str]) -> dict[str, Any]:
    """The arguments of TransformerConfig for a window in the layers of the type `SLIDING`, empty without one.

    Raises:
        UserError: a layer has another type, or needs a window and there is none.
    """
    if other := set(layer_types) - {FULL, SLIDING}:
        raise UserError(
            f"config.json lists {', '.join(sorted(map(str, other)))} in layer_types; only {FULL} and {SLIDING} run"
        )
    if SLIDING not in layer_types:
        return {}
    if window is None:
        raise UserError(
            f"config.json lists {SLIDING} in layer_types, but has no sliding_window, or turns it off; copy both "
            "from the original model"
        )
    size = window_size(window)
    if FULL in layer_types:
        size["window_attn_skip_freq"] = [int(layer_type == SLIDING) for layer_type in layer_types]
    return size


def listed_layer_types(config: dict[str, Any], default: Sequence[str]) -> Sequence[str]:
    """`layer_types` of config.json, or the default where it has none.

    Raises:
        UserError: it does not name a type for every layer.
    """
    listed = default if config.get("layer_types") is None else config["layer_types"]
    if len(listed) != required(config, "num_hidden_layers"):
        raise UserError(
            f"config.json has {len(listed)} layer_types for {config['num_hidden_layers']} layers; copy it again"
        )
    return listed


def scaling_of_full(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_scaling` of a model whose layers with a window have a rotary embedding of their own: of the other layers.

    Raises:
        UserError: it names its kind by the old key alone, which transformers does not read in these families.
    """
    scaling = config.get("rope_scaling") or {}
    refuse(scaling, "type", None, scaling.get("rope_type"), fix="transformers ignores it here: name it rope_type")
    return scaling


def unscaled_theta(rope: Rope) -> float:
    """The base of the rotary embedding of the layers with a window (`Additions.window_rope_theta`).

    Raises:
        UserError: it is scaled.
    """
    if rope.kind != "default":
        raise UserError(
            f"config.json asks for rope scaling {rope.kind!r} in the layers with a window; they run without scaling"
        )
    return rope.theta


def qwen_windows(config: dict[str, Any]) -> dict[str, Any]:
    """The window of Qwen2 and Qwen3: in the layers that `layer_types` names, else from `max_window_layers` on.

    Raises:
        UserError: as `window_kwargs` and `listed_layer_types`.
    """
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first = config.get("max_window_layers", 28) if window is not None else required(config, "num_hidden_layers")
    default = [SLIDING if layer >= first else FULL for layer in range(required(config, "num_hidden_layers"))]
    return window_kwargs(window, listed_layer_types(config, default))


def qwen_window_config(args: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json of Qwen2 and Qwen3 says of the window that Megatron-LM's arguments describe."""
    found = listed_windows(args)
    return {"use_sliding_window": True, **found} if found else {}


def listed_windows(args: Mapping[str, Any]) -> dict[str, Any]:
    """`sliding_window` and `layer_types` of config.json from Megatron-LM's arguments, empty without a window."""
    if not args.get("window_size"):
        return {}
    with_window = windowed_layers(args.get("window_attn_skip_freq"), need(args, "num_layers"))
    types = [SLIDING if has else FULL for has in with_window]
    return {**sliding_window(args), "layer_types": types}
