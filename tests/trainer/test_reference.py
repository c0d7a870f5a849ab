"""Reference log-probs: computed once before step 0, kept, resumed after a kill, and refused where they do not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simpo_megatron.data.options import DataOptions
from simpo_megatron.data.prepare import prepare
from simpo_megatron.data.reference_file import ReferenceFile
from tests.support.distributed import WorkerPool
from tests.support.runs import Inputs, flags, read_rows, train, without_speed
from tests.support.tiny import make_checkpoint, make_rows, write_rows

PAIRS = 14
DPO: dict[str, Any] = {"objective": "dpo", "train_iters": 2, "global_batch_size": 4}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("reference")
    data = write_rows(folder / "pairs.jsonl", make_rows(PAIRS))
    return Inputs(make_checkpoint(folder / "model"), data, folder)


def other_model(inputs: Inputs) -> Path:
    """A checkpoint with the same tokenizer and other weights."""
    folder = inputs.folder / "other"
    if folder.exists():
        return folder
    return make_checkpoint(folder, num_hidden_layers=2)


def run(pool: WorkerPool, inputs: Inputs, save: Path, world: int = 1, **settings: Any) -> str | None:
    argv = flags(inputs.checkpoint, inputs.data, **{**DPO, "save": save, **settings})
    return pool.run(world, train, argv)[0]


def test_the_first_step_is_log_2_exactly_and_a_run_resumes(pool: WorkerPool, inputs: Inputs, tmp_path: Path) -> None:
    save = tmp_path / "run"
    settings = {"valid_data": inputs.data, "tensor_model_parallel_size": 2}
    assert run(pool, inputs, save, 2, **settings) is None
    before, first = read_rows(save)[:2]
    for row, prefix in ((before, "eval/"), (first, "")):
        assert row[f"{prefix}rewards/margins"] == 0 and row[f"{prefix}rewards/ties"] == 1
        assert row[f"{prefix}loss"] == pytest.approx(math.log(2), rel=1e-7)
    assert before["eval/likelihood_accuracy"] <= 1 and -1 <= before["eval/length_spearman"] <= 1
    assert read_rows(save)[-1]["eval/rewards/margins"] != 0
    found = ReferenceFile.read(save / "reference" / "train.npz")
    assert found.missing == 0 and found.sums.shape == (PAIRS, 2) and found.sums.max() < 0
    assert {"weights", "tokenizer", "template", "tokens", "precision"} == found.made_of.keys()
    assert run(pool, inputs, save, 2, **settings, load=save, train_iters=3) is None, "with the numbers of the run"
    (save / "reference" / "train.npz").unlink()
    message = run(pool, inputs, save, 2, **settings, load=save, train_iters=4)
    assert message is not None and "train.npz is missing: a resumed run cannot compute" in message


def test_a_scoring_that_was_killed_goes_on_and_another_model_is_refused(
    pool: WorkerPool, inputs: Inputs, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(pool, inputs, whole) is None
    path = whole / "reference" / "train.npz"
    found = ReferenceFile.read(path)
    planted = found.sums.copy()
    planted[:5] -= 1  # shows which pairs are not scored again
    planted[9:] = np.nan
    ReferenceFile(killed / "reference" / "train.npz", found.made_of, planted).write()
    assert run(pool, inputs, killed) is None
    finished = ReferenceFile.read(killed / "reference" / "train.npz").sums
    np.testing.assert_array_equal(finished[:9], planted[:9])
    np.testing.assert_allclose(finished[9:], found.sums[9:], rtol=1e-5)
    for other in ("weights", "tokens"):
        ReferenceFile(tmp_path / other / "reference" / "train.npz", found.made_of | {other: "x"}, planted).write()
        message = run(pool, inputs, tmp_path / other)
        assert message is not None and f"reference log-probs for other {other} (x) than those of this run" in message


def test_a_resumed_kto_run_goes_on_with_its_baseline(pool: WorkerPool, inputs: Inputs, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"objective": "kto", "nll_weight": 1.0, "lr_decay_style": "constant"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(pool, inputs, whole, **settings, train_iters=3) is None
    rows = without_speed(read_rows(whole))
    assert rows[0]["loss"] - rows[0]["nll_loss"] == pytest.approx(1, rel=1e-6), "half of each weight"
    assert rows[1]["kl_on_given_text"] > 0, "the baseline of the last step"
    assert run(pool, inputs, parts, **settings) is None
    assert run(pool, inputs, parts, **settings, train_iters=3, load=parts) is None
    assert without_speed(read_rows(parts)) == rows


def test_another_model_scores(pool: WorkerPool, inputs: Inputs, tmp_path: Path) -> None:
    assert run(pool, inputs, tmp_path / "run", reference_checkpoint=other_model(inputs)) is None
    assert abs(read_rows(tmp_path / "run")[0]["rewards/margins"]) > 0


def test_columns_of_the_data_are_read(pool: WorkerPool, inputs: Inputs, tmp_path: Path) -> None:
    rows = [{**row, "ref_chosen_logps": -9.5, "ref_rejected_logps": -4} for row in make_rows(PAIRS)]
    data = write_rows(tmp_path / "known.jsonl", rows)
    assert run(pool, inputs, tmp_path / "run", train_data=data) is None
    assert not (tmp_path / "run" / "reference").exists()
    first = read_rows(tmp_path / "run")[0]
    assert first["rewards/chosen"] == pytest.approx(0.1 * (first["logps/chosen"] + 9.5), rel=1e-5)
    some = write_rows(tmp_path / "some.jsonl", [*rows[:-1], make_rows(PAIRS)[-1]])
    message = run(pool, inputs, tmp_path / "second", train_data=some)
    assert message is not None and "1 of 14 pairs have no `ref_chosen_logps` and `ref_rejected_logps`" in message


def score(argv: list[str]) -> int:
    """On a rank: the exit code of tools/score_reference.py."""
    from tools.score_reference import main

    return main(argv)


def test_a_file_beside_a_prepared_set(pool: WorkerPool, inputs: Inputs, tmp_path: Path) -> None:
    prefix = tmp_path / "set"
    prepare(inputs.data, inputs.checkpoint, prefix, DataOptions(max_length=256, max_prompt_length=128))
    layout = ["--seq-length", "512", "--global-batch-size", "4", "--device", "cpu", "--fp32"]
    argv = ["--hf-checkpoint", str(inputs.checkpoint), "--data", str(prefix), *layout]
    assert pool.run(1, score, argv) == [0]
    assert run(pool, inputs, tmp_path / "run", train_data=prefix) is None
    assert read_rows(tmp_path / "run")[0]["rewards/margins"] == 0, "the sums of the tool are those of the first step"
    assert (tmp_path / "run" / "reference" / "train.npz").is_file(), "from which the run resumes"
    message = run(pool, inputs, tmp_path / "next", train_data=prefix, reference_checkpoint=other_model(inputs))
    assert message is not None and "set.reference holds reference log-probs for other weights" in message
    about = json.loads((tmp_path / "set.json").read_text())
    about["fingerprint"]["template"] = "of before"
    file = ReferenceFile.read(tmp_path / "set.reference")
    ReferenceFile(file.path, file.made_of | {"template": "of before"}, file.sums).write()
    message = run(pool, inputs, tmp_path / "last", train_data=prefix)
    assert message is not None and "set.reference holds reference log-probs for other template (of before)" in message
