"""The settings of adapters: LoRA on a frozen base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from simpo_megatron.settings import Group, flag, require, setting


@dataclass(frozen=True)
class AdapterConfig(Group):
    """Adapters (LoRA)."""

    lora_rank: int | None = setting(
        None, "train low-rank adapters of this rank and freeze all weights (default: train all weights)"
    )
    lora_alpha: float | None = setting(
        None, "the adapters are scaled by this number divided by the rank (default: twice the rank)"
    )
    lora_targets: tuple[str, ...] | None = setting(
        None,
        "the projections that get adapters, of q_proj k_proj v_proj o_proj gate_proj up_proj down_proj (default: all)",
        metavar="NAME",
    )
    use_rslora: bool = setting(False, "divide --lora-alpha by the square root of the rank")
    lora_dropout: float | None = setting(
        None,
        "in training, drop this share of what the A of each projection reads, as PEFT does (default: that of "
        "--load-adapter, else 0)",
    )
    load_adapter: Path | None = setting(
        None, "start from this folder of a PEFT adapter, which also gives rank, alpha, targets and dropout"
    )
    export_adapter: Path | None = setting(
        None, "after training, write the adapters in PEFT's format into this folder, which must be new or empty"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("lora_rank", "lora_alpha")
        shape = ("lora_alpha", "lora_targets", "use_rslora")
        given = next((name for name in shape if getattr(self, name)), None)
        require(
            given is None or self.lora_rank is not None,
            f"{flag(given or '')} needs --lora-rank: "
            + (
                "--load-adapter gives it already; drop it"
                if self.load_adapter
                else "without it all weights are trained"
            ),
        )
        require(
            self.lora_rank is None or self.load_adapter is None,
            f"--load-adapter {self.load_adapter} gives the rank of the adapters; drop --lora-rank",
        )
        require(
            self.export_adapter is None or self.trains_adapters,
            f"--export-adapter {self.export_adapter} needs adapters; give --lora-rank, or --export-hf for the model",
        )
        dropout = self.lora_dropout
        require(dropout is None or 0 <= dropout < 1, f"--lora-dropout {dropout} must be at least 0 and less than 1")
        require(
            dropout is None or self.trains_adapters,
            f"--lora-dropout {dropout} needs adapters; give --lora-rank or --load-adapter",
        )
        repeated = [name for name in self.lora_targets or () if (self.lora_targets or ()).count(name) > 1]
        require(not repeated, f"--lora-targets names {'' if not repeated else repeated[0]} twice; give it once")

    @property
    def trains_adapters(self) -> bool:
        """Whether the weights of the model are frozen and adapters are trained."""
        return self.lora_rank is not None or self.load_adapter is not None
