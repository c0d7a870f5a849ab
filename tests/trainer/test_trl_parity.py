"""The whole engine against TRL's CPOTrainer: same model, batches and hyperparameters, 20 optimizer steps in fp32."""

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
Setting = tuple[Path, Path, list[dict[str, float]]]  # checkpoint, preferences, and what TRL logged


def trl_history(checkpoint: Path, rows: list[dict[str, Any]], output: Path) -> list[dict[str, float]]:
    """TRL's loss, metrics and gradient norm of each step, on the pairs in our order."""
    datasets = pytest.importorskip("datasets")
    cpo = pytest.importorskip("trl.experimental.cpo")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    order = [i for step in range(STEPS) for i in pairs_of_batch(step * BATCH, BATCH, PAIRS, SEED)]
    losses: list[float] = []

    class Recorder(cpo.CPOTrainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())  # its log rounds to four digits
            return loss

    trainer = Recorder(
        model=AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
        args=cpo.CPOConfig(
            output_dir=str(output),
            loss_type="simpo",
            cpo_alpha=0.0,
            beta=BETA,
            simpo_gamma=GAMMA,
            max_length=256,
            per_device_train_batch_size=BATCH,
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
        train_dataset=datasets.Dataset.from_list([rows[i] for i in order]),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )
    trainer.train()
    history = [row for row in trainer.state.log_history if "grad_norm" in row]
    return [{**row, "loss": loss} for row, loss in zip(history, losses, strict=True)]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("trl")
    rows = make_rows(PAIRS)
    checkpoint = make_checkpoint(folder / "model")
    return checkpoint, write_rows(folder / "pairs.jsonl", rows), trl_history(checkpoint, rows, folder / "out")


@pytest.mark.parametrize("tensor, pipeline", [(1, 1), (2, 2)])
def test_twenty_steps_equal_trl(pool: WorkerPool, setting: Setting, tmp_path: Path, tensor: int, pipeline: int) -> None:
    checkpoint, data, history = setting
    argv = flags(
        checkpoint,
        data,
        train_iters=STEPS,
        global_batch_size=BATCH,
        seed=SEED,
        lr=LR,
        lr_decay_style="cosine",
        lr_warmup_fraction=5 / STEPS,
        simpo_beta=BETA,
        simpo_gamma=GAMMA,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
    )
    rows = run_and_read(pool, tensor * pipeline, argv, tmp_path / "run")
    assert len(rows) == len(history) == STEPS
    for ours, theirs in zip(rows, history, strict=True):
        assert math.isclose(ours["learning_rate"], theirs["learning_rate"], rel_tol=1e-6, abs_tol=1e-12)
        for name in ("loss", "grad_norm", *NAMES):
            assert math.isclose(ours[name], theirs[name], rel_tol=1e-4, abs_tol=2e-5), (ours["step"], name)
    assert history[-1]["loss"] < 0.8 * history[0]["loss"], "the steps must have changed something"
