"""What a model computes that Megatron's TransformerConfig has no field for. Data only, without torch and Megatron."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

SCORES_BLOCK = 1024  # queries whose scores exist at a time (`attention_blocks.BlockAttention`)


@dataclass(frozen=True)
class Additions:
    """What a model computes that Megatron's TransformerConfig has no field for. The defaults add nothing.

    `spec.py` builds what concerns a layer, `build.py` what concerns the whole model. Megatron-LM's own training cannot
    compute any of it (`checkpoint/saved_args.py`, `not_expressible`).

    Attributes:
        activation: of the gated feed-forward, by its name in transformers (`ACT2FN`).
        post_norms: whether the outputs of attention and feed-forward are normalised before they are added to the
            residual.
        embedding_scale: the number that multiplies the embeddings, rounded to their dtype; None for none.
        attention_softcap: c of `c * tanh(score / c)`, before the mask; None for none.
        logit_softcap: the same for the logits.
        window_rope_theta: the base of the rotary frequencies, without scaling, of the layers with a window; None where
            they have those of the other layers.
        group_best: how many of its best experts say how good a group of experts is, where routing is limited to groups;
            None for Megatron's rule, a token's experts divided by its groups.
        attention_output_bias: whether the output projection of the attention has a bias. With those of the feed-forward
            too it is Megatron's `add_bias_linear`.
        mlp_bias: whether the projections of the feed-forward have biases, and the attention none.
        pre_norms: whether the inputs of attention and feed-forward are normalised.
        qk_norm_over_heads: whether queries, and keys, are normalised over all heads of a token together.
    """

    activation: str = "silu"
    post_norms: bool = False
    embedding_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    window_rope_theta: float | None = None
    group_best: int | None = None
    attention_output_bias: bool = False
    mlp_bias: bool = False
    pre_norms: bool = True
    qk_norm_over_heads: bool = False

    @property
    def beyond_transformer_engine(self) -> str | None:
        """What Transformer Engine's layers cannot compute of it, in words; None where they compute all."""
        return None if self.attention_softcap is None else "capped attention scores"

    def as_dict(self) -> dict[str, Any]:
        """The fields that add something, as primitives."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }


def no_additions(config: dict[str, Any]) -> Additions:
    """The additions of a family whose layers are Megatron's."""
    del config
    return Additions()
