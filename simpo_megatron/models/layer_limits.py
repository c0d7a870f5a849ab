"""What the layers that a run asks for cannot compute: Transformer Engine's, or Megatron's on plain torch."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.utils import get_te_version, is_te_min_version

from simpo_megatron.errors import UserError
from simpo_megatron.models.additions import Additions
from simpo_megatron.models.architecture import Architecture


def check_additions(transformer_engine: bool, additions: Additions) -> None:
    """Refuses Transformer Engine's layers for a model that they would compute differently.

    Raises:
        UserError: it names what to use.
    """
    if transformer_engine and (what := additions.beyond_transformer_engine):
        raise UserError(
            f"this model has {what}, which Transformer Engine {get_te_version()} cannot compute: no release up to 2.20 "
            "has DotProductAttention(softcap=...), which is on its main branch; use --transformer-impl local"
        )


def check_heads(architecture: Architecture, ranks: int) -> None:
    """Refuses tensor-parallel ranks that would share a key head whose norm spans all heads: its sum would count twice.

    Raises:
        UserError: it names the flag.
    """
    heads = architecture.transformer["num_query_groups"]
    if architecture.additions.qk_norm_over_heads and heads % ranks:
        raise UserError(
            f"--tensor-model-parallel-size {ranks} does not divide the {heads} key heads of this model, whose norm "
            "spans all of them; use a smaller size"
        )


def check_recomputed(transformer_engine: bool, experts: bool, modules: Sequence[str]) -> None:
    """Refuses modules of --recompute-modules that the layers do not have, which Megatron would ignore or explain badly.

    Raises:
        UserError: it names the module.
    """
    if "layernorm" in modules and transformer_engine and not experts:
        raise UserError(
            "--recompute-modules layernorm does nothing here: Transformer Engine's linear layers compute the norms of "
            "a dense model; drop it, or give mlp"
        )
    if "moe_act" in modules and not transformer_engine:
        raise UserError(
            "--recompute-modules moe_act needs Transformer Engine's layers, and these are on plain torch; give moe"
        )


def check_context_attention(transformer_engine: bool, comm_type: str | None, window: bool) -> None:
    """Refuses what the attention under context parallelism cannot do, which it would say in the first step.

    Args:
        transformer_engine: whether the layers are Transformer Engine's.
        comm_type: --cp-comm-type, or None for Transformer Engine's default, p2p.
        window: whether the model has a sliding window.

    Raises:
        UserError: it names what to use.
    """
    if not transformer_engine:
        if comm_type is not None:
            raise UserError(
                f"--cp-comm-type {comm_type} needs Transformer Engine's layers: those on plain torch gather keys and "
                "values; drop the flag"
            )
        return
    if window and comm_type not in ("all_gather", "a2a"):
        raise UserError(
            f"Transformer Engine has no sliding window under context parallelism with --cp-comm-type "
            f"{comm_type or 'p2p'}; use a2a or all_gather, --transformer-impl local, or --context-parallel-size 1"
        )
    # 2.11 asserts that nothing is packed (`context_parallel.py`, AttnFuncWithCPAndKVAllGather); 2.20 takes packed rows.
    if comm_type == "all_gather" and not is_te_min_version("2.20.0"):
        raise UserError(
            f"--cp-comm-type all_gather: Transformer Engine {get_te_version()} cannot gather packed rows; use "
            "a2a, or install 2.20 or newer"
        )
