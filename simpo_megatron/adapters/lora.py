"""The shape of a LoRA adapter, and its entries of the weight table. Data only, without torch and Megatron.

    lora = Lora(rank=16, alpha=32.0)
    table = adapted_table(hf.architecture, lora)      # the frozen base, then the factors

For a projection with weight W [out, in], an adapter has A [rank, in] and B [out, rank], and the layer computes

    y = W x + scale * B A x          scale = alpha / rank, with rank-stabilised LoRA alpha / sqrt(rank)

(arXiv 2106.09685; arXiv 2312.03732). In training, dropout may act on the x that A reads. Every projection of the
Hugging Face model has factors of its own, as in PEFT: q, k and v do not share an A. So an adapter is the same in any
layout, and PEFT reads and writes the same one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from simpo_megatron.errors import UserError
from simpo_megatron.models.architecture import Architecture
from simpo_megatron.models.part_layout import Copy
from simpo_megatron.models.weight_table import WeightEntry

# Megatron's linear layers, and the projections that form each, in the order of `WeightEntry.hf`.
PROJECTIONS = {
    "self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "self_attention.linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
TARGETS = tuple(name for names in PROJECTIONS.values() for name in names)
EXPERT_TARGETS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Lora:
    """The shape of an adapter, and how it is trained.

    Attributes:
        rank: of the factors.
        alpha: numerator of the scale.
        targets: the projections that have factors, by the names in `TARGETS`.
        rslora: the scale is alpha / sqrt(rank).
        dropout: the share of the input of A that a training step drops.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS
    rslora: bool = False
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def projections(entry: WeightEntry) -> tuple[str, ...]:
    """The projections that form the weight of this entry, by the names in `TARGETS`; empty where none can be adapted.

    >>> from simpo_megatron.models.part_layout import Copy
    >>> projections(WeightEntry("decoder.layers.{layer}.mlp.linear_fc2.weight", ("down",), ((8, 4),), Copy(), 1))
    ('down_proj',)
    """
    layer = entry.megatron.removesuffix(".weight")
    if not entry.per_layer or layer == entry.megatron:
        return ()
    return next((names for key, names in PROJECTIONS.items() if layer.endswith(f".{key}")), ())


def check_lora(lora: Lora, architecture: Architecture) -> None:
    """Makes sure that a model can have this adapter.

    Raises:
        UserError: a target is not known or is none of this model, or the rank does not fit.
    """
    for target in lora.targets:
        if target in ("embed_tokens", "lm_head", "all-linear"):
            raise UserError(
                f"--lora-targets {target} is not supported: adapters go on projections; use {', '.join(TARGETS)}"
            )
        if target not in TARGETS:
            raise UserError(f"--lora-targets {target} is not a projection of the model; use {', '.join(TARGETS)}")
    present = [name for entry in architecture.weights for name in projections(entry)]
    if absent := [target for target in lora.targets if target not in present]:
        raise UserError(
            f"--lora-targets {' '.join(absent)}: {architecture.family.name} has no such projections to adapt; give "
            f"--lora-targets {' '.join(_adaptable(architecture))}"
        )
    narrow = architecture.transformer["hidden_size"]
    if lora.rank > narrow:
        raise UserError(f"--lora-rank {lora.rank} exceeds the hidden size {narrow} of the model; lower it")
    for entry in architecture.weights:
        if entry.fused and set(projections(entry)) & set(lora.targets):
            kept = " and ".join(projections(entry)) + (" of all experts" if entry.sliced else "")
            raise UserError(
                f"--lora-rank: {architecture.family.name} keeps {kept} in one tensor, for "
                "which PEFT has one adapter, and this package has one for each; train the whole model, or give "
                f"--lora-targets {' '.join(_adaptable(architecture))}"
            )
    of_experts = [target for target in EXPERT_TARGETS if target in lora.targets]
    if of_experts and _drops_experts(architecture):
        raise UserError(
            f"--lora-targets {' '.join(of_experts)}: {architecture.family.name} has dense layers or shared experts "
            "beside its experts, whose adapters PEFT would drop; give --lora-targets "
            f"{' '.join(_adaptable(architecture))}"
        )
    if architecture.num_experts is not None and 0 < len(of_experts) < len(EXPERT_TARGETS):
        raise UserError(
            f"--lora-targets has {' and '.join(of_experts)} alone: the model has experts, and PEFT would drop an "
            f"adapter with a part of {', '.join(EXPERT_TARGETS)}; give all three, or none"
        )


def _drops_experts(architecture: Architecture) -> bool:
    """Whether PEFT would drop adapters on the feed-forward: of a model with experts and other feed-forwards."""
    others = [
        entry for entry in architecture.weights if not entry.experts and {*projections(entry)} & {*EXPERT_TARGETS}
    ]
    return architecture.num_experts is not None and bool(others)


def _adaptable(architecture: Architecture) -> list[str]:
    """The projections that an adapter may be on, all of them together."""
    own = dict.fromkeys(name for one in architecture.weights if not one.fused for name in projections(one))
    return [name for name in own if name not in EXPERT_TARGETS or not _drops_experts(architecture)]


def factor_entries(entry: WeightEntry, lora: Lora) -> Iterator[WeightEntry]:
    """The entries of the factors of one base weight: A and B of each targeted projection.

    A of a weight that is split by rows is whole on every tensor-parallel rank, and B is split by rows. Of a weight that
    is split by columns A is split, and B is whole.
    """
    for target, hf, (rows, columns) in zip(projections(entry), entry.hf, entry.shapes, strict=False):
        if target not in lora.targets:
            continue
        module, base = entry.megatron.removesuffix(".weight"), hf.removesuffix(".weight")
        for factor, shape, tp_dim in (
            ("A", (lora.rank, columns), 1 if entry.tp_dim == 1 else None),
            ("B", (rows, lora.rank), 0 if entry.tp_dim == 0 else None),
        ):
            yield WeightEntry(
                f"{module}.adapter.{target}_{factor.lower()}",
                (f"{base}.lora_{factor}.weight",),
                (shape,),
                Copy(),
                tp_dim,
                experts=entry.experts,
                layers=entry.layers,
            )


def adapter_entries(architecture: Architecture, lora: Lora) -> tuple[WeightEntry, ...]:
    """The entries of all factors.

    Raises:
        UserError: see `check_lora`.
    """
    check_lora(lora, architecture)
    return tuple(factor for entry in architecture.weights for factor in factor_entries(entry, lora))


def adapted_table(architecture: Architecture, lora: Lora) -> tuple[WeightEntry, ...]:
    """The weight table of a model with an adapter: the base, which training does not change, then the factors.

    Raises:
        UserError: see `check_lora`.
    """
    frozen = tuple(replace(entry, trained=False) for entry in architecture.weights)
    return (*frozen, *adapter_entries(architecture, lora))


def parameters_of(entries: Sequence[WeightEntry], num_layers: int) -> int:
    """Numbers in all parameters of these entries, without padding."""
    return sum(sum(map(math.prod, entry.shapes)) * sum(1 for _ in entry.instances(num_layers)) for entry in entries)
