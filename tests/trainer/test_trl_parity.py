"""The whole engine against TRL's trainers: same model, batches and hyperparameters, 20 optimizer steps in fp32."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from simpo_megatron.data import pairs_of_batch
from tests.support.distributed import WorkerPool
from tests.support.runs import flags, run_and_read
from tests.support.tiny import make_checkpoint, make_rows, write_rows

STEPS, BATCH, PAIRS, SEED = 20, 8, 56, 7
BETA, GAMMA, LR = 2.5, 1.375, 3e-3
NAMES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


def trl_history(
    checkpoint: Path, rows: list[dict[str, Any]], output: Path, kind: str, **settings: Any
) -> list[dict[str, float]]:
    """The loss, the metrics and the gradient norm of each step of TRL, on the pairs in our order.

    Args:
        checkpoint: the model.
        rows: the pairs.
        output: a folder for the trainer.
        kind: CPO, DPO or KTO: whose trainer. KTO's baseline is set to ours: that of the previous step.
        settings: of the loss.
    """
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl.experimental.cpo" if kind == "CPO" else "trl")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    order = [i for step in range(STEPS) for i in pairs_of_batch(step * BATCH, BATCH, PAIRS, SEED)]
    losses: list[float] = []
    baselines = [0.0]
    if kind == "KTO":
        settings |= {"train_sampling_strategy": "sequential"}

    class Recorder(getattr(trl, f"{kind}Trainer")):
        def _compute_kl_logps(self, model: Any, batch: Any) -> Any:  # KTO alone calls it, for policy and reference
            return torch.tensor([0.0 if model is self.ref_model else baselines[-1]])

        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())  # its log rounds to four digits
            if kind == "KTO":
                rewards = [self._metrics["train"][f"rewards/{side}"][-1] for side in ("chosen", "rejected")]
                baselines.append(sum(rewards) / 2 / settings["beta"])
            return loss

    trainer = Recorder(
        model=AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
        args=getattr(trl, f"{kind}Config")(
            output_dir=str(output),
            **settings,
            max_length=256,
            per_device_train_batch_size=BATCH * (2 if kind == "KTO" else 1),
            max_steps=STEPS,
            learning_rate=LR,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            weight_decay=0.0,
            max_grad_norm=1.0,
            logging_steps=1,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list([row for i in order for row in _rows_for(kind, rows[i])]),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )
    trainer.train()
    history = [row for row in trainer.state.log_history if "grad_norm" in row]
    return [{**row, "loss": loss} for row, loss in zip(history, losses, strict=True)]


def _rows_for(kind: str, pair: dict[str, Any]) -> list[dict[str, Any]]:
    """A pair as TRL takes it: for KTO two responses with a label each."""
    if kind != "KTO":
        return [pair]
    sides = (("chosen", True), ("rejected", False))
    return [{"prompt": pair["prompt"], "completion": pair[side], "label": label} for side, label in sides]


# What TRL is given, and our flags of the same run.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "simpo": (
        {"kind": "CPO", "loss_type": "simpo", "cpo_alpha": 0.0, "beta": BETA, "simpo_gamma": GAMMA},
        {"simpo_beta": BETA, "simpo_gamma": GAMMA},
    ),
    "cpo": (
        {"kind": "CPO", "loss_type": "sigmoid", "cpo_alpha": 0.5, "beta": 0.1},
        {"cpo_beta": 0.1, "nll_weight": 0.5},
    ),
    "slic": (
        {"kind": "CPO", "loss_type": "hinge", "cpo_alpha": 0.5, "beta": 1.0},
        {"slic_delta": 1.0, "nll_weight": 0.5, "nll_normalizer": "token"},
    ),
    # A mean over responses is half of a mean over pairs.
    "kto": (
        {"kind": "KTO", "beta": 0.1, "desirable_weight": 1.5},
        {"kto_beta": 0.1, "kto_desirable_weight": 0.75, "kto_undesirable_weight": 0.5},
    ),
    "dpo": ({"kind": "DPO", "loss_type": ["sigmoid"], "beta": 0.1}, {"dpo_beta": 0.1}),
    "ipo": ({"kind": "DPO", "loss_type": ["ipo"], "beta": 0.5}, {"ipo_beta": 0.5}),
    "ln-dpo": ({"kind": "DPO", "loss_type": ["sigmoid_norm"], "beta": 2.0}, {"ln_dpo_beta": 2.0}),
}
# TRL reports other rewards there: those of the sums.
OTHER_REWARDS = ("ln-dpo",)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("trl")
    rows = make_rows(PAIRS)
    return make_checkpoint(folder / "model"), write_rows(folder / "pairs.jsonl", rows), rows


@pytest.mark.parametrize(
    "objective, tensor, pipeline",
    [("simpo", 2, 2), ("cpo", 1, 1), ("dpo", 2, 1), ("ipo", 1, 1), ("ln-dpo", 1, 1), ("slic", 1, 1), ("kto", 1, 1)],
)
def test_twenty_steps_equal_trl(
    pool: WorkerPool,
    setting: tuple[Path, Path, list[dict[str, Any]]],
    tmp_path: Path,
    objective: str,
    tensor: int,
    pipeline: int,
) -> None:
    checkpoint, data, rows_of_data = setting
    theirs_given, ours_given = RUNS[objective]
    history = trl_history(checkpoint, rows_of_data, tmp_path / "trl", **theirs_given)
    argv = flags(
        checkpoint,
        data,
        objective=objective,
        train_iters=STEPS,
        global_batch_size=BATCH,
        seed=SEED,
        lr=LR,
        lr_decay_style="cosine",
        lr_warmup_fraction=5 / STEPS,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        **ours_given,
    )
    rows = run_and_read(pool, tensor * pipeline, argv, tmp_path / "run")
    assert len(rows) == len(history) == STEPS
    names = [name for name in NAMES if not (objective in OTHER_REWARDS and name.startswith("rewards/"))]
    names = [name for name in names if name in history[0]]  # KTOTrainer has no accuracies
    for ours, theirs in zip(rows, history, strict=True):
        assert math.isclose(ours["learning_rate"], theirs["learning_rate"], rel_tol=1e-6, abs_tol=1e-12)
        for name in ("loss", "grad_norm", *names):
            assert math.isclose(ours[name], theirs[name], rel_tol=2e-4, abs_tol=1e-4), (ours["step"], name)
    assert history[-1]["loss"] < 0.9 * history[0]["loss"], "the steps must have changed something"
    assert objective != "kto" or max(row["kl_on_given_text"] for row in rows[:-1]) > 0, "the baseline has had an effect"
