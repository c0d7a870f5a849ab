"""Which runs the study has, and the flags of each.

    plan = Plan(output, own_data=False, seeds=3)
    plan.variants["simpo"].flags        plan.sft_flags()        plan.run_flags(plan.variants["simpo"], seed=1)

Every objective of the package is a variant with its default flags, and so are the two ablations of SimPO. All variants
take the same learning rate, steps and data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from simpo_megatron.config.arguments import parse
from simpo_megatron.errors import UserError
from simpo_megatron.objectives import OBJECTIVES, Objective
from simpo_megatron.program import nearest

QUICK = ("simpo", "dpo", "cpo")  # of --quick, with one seed
SEEDS = 3
BATCH = 32  # pairs of a step
SEQ_LENGTH = 2048  # tokens of a packed row


@dataclass(frozen=True)
class Variant:
    """A line of the table.

    Attributes:
        name: in file names and in the table.
        objective: value of --objective.
        flags: of the objective, other than its defaults.
    """

    name: str
    objective: str
    flags: tuple[str, ...] = ()

    @property
    def needs_reference(self) -> bool:
        """Whether the objective compares with a reference model."""
        return OBJECTIVES[self.objective].needs_reference


ABLATIONS = (
    Variant("simpo-sum", "simpo", ("--no-simpo-length-normalization",)),
    Variant("simpo-gamma-0", "simpo", ("--simpo-gamma", "0")),
)
OBJECTIVE_VARIANTS = tuple(Variant(name, name) for name in OBJECTIVES if name != "sft")
VARIANTS = {
    variant.name: variant for variant in (OBJECTIVE_VARIANTS[0], *ABLATIONS, *OBJECTIVE_VARIANTS[1:])
}  # the ablations stand below SimPO


def choose(names: list[str]) -> list[Variant]:
    """The variants of some names.

    Raises:
        UserError: a name is not one of a variant.
    """
    for name in names:
        if name not in VARIANTS:
            near = nearest(name, VARIANTS)
            advice = f"did you mean {near}?" if near else f"choose from {', '.join(VARIANTS)}"
            raise UserError(f"--objectives {name} is not in the study; {advice}")
    return [VARIANTS[name] for name in names]


@dataclass(frozen=True)
class Plan:
    """The settings of a study.

    Attributes:
        output: folder of all files.
        own_data: the pairs are the user's (--data), not made-up questions.
        variants: lines of the table.
        seeds: runs of each variant. A seed decides the order of the data.
        steps: of each run; 0 for those of the data.
        sft_steps: of the SFT; 0 for those of the data.
        lr: learning rate of all runs; 0 for that of the data.
    """

    output: Path
    own_data: bool
    variants: tuple[Variant, ...]
    seeds: int = SEEDS
    steps: int = 0
    sft_steps: int = 0
    lr: float = 0.0

    @property
    def max_length(self) -> int:
        """Tokens of a prompt with its response."""
        return 192 if self.own_data else 64

    @property
    def learning_rate(self) -> float:
        """The learning rate of all runs but SFT."""
        return self.lr or (5e-5 if self.own_data else 2e-4)

    @property
    def model(self) -> Path:
        """The model with random weights."""
        return self.output / "model"

    @property
    def sft(self) -> Path:
        """The model that all runs start from."""
        return self.output / "sft"

    def data(self, name: str) -> Path:
        """A file of pairs: sft, train, ranked (some of train) or heldout."""
        return self.output / "data" / f"{name}.jsonl"

    def prefix(self, name: str) -> Path:
        """The prepared set of the same pairs."""
        return self.output / "data" / name

    def objective(self, variant: Variant) -> Objective:
        """The objective of a variant."""
        return parse(self.run_flags(variant, 1)).objective

    def row_flags(self, batch: int = BATCH) -> list[str]:
        """The flags of device and batch that training and scoring share."""
        return ["--device", "cpu", "--fp32", "--seq-length", str(SEQ_LENGTH), "--global-batch-size", str(batch)]

    def sft_flags(self) -> list[str]:
        """The flags of the SFT."""
        steps = str(self.sft_steps or (140 if self.own_data else 400))
        return [
            *("--objective", "sft", "--hf-checkpoint", str(self.model), "--train-data", str(self.data("sft"))),
            *("--valid-data", str(self.data("heldout")), "--max-length", str(self.max_length)),
            *self.row_flags(BATCH if self.own_data else 2 * BATCH),
            *("--train-iters", steps, "--lr", "2e-3", "--log-interval", "20"),
        ]

    def run_flags(self, variant: Variant, seed: int) -> list[str]:
        """The flags of one run, without those of the files that it writes."""
        steps = str(self.steps or (45 if self.own_data else 60))
        return [
            *("--objective", variant.objective, *variant.flags, "--hf-checkpoint", str(self.sft)),
            *("--train-data", str(self.prefix("train")), "--valid-data", str(self.prefix("heldout"))),
            *self.row_flags(),
            *("--train-iters", steps, "--lr", str(self.learning_rate), "--seed", str(seed), "--log-interval", "5"),
        ]
