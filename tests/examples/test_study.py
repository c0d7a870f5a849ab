"""The study: its plan, that finished runs are not repeated, what it measures, and its table."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from examples.quickstart_data import made_up_rows
from examples.study import __main__ as study
from examples.study import cost, report, runs
from examples.study.plan import QUICK, VARIANTS, Plan, choose
from simpo_megatron.config.arguments import parse
from simpo_megatron.errors import UserError
from simpo_megatron.files import read_json
from simpo_megatron.objectives import OBJECTIVES, SimPO
from tests.support.tiny import make_rows, write_rows

ROOT = Path(__file__).parents[2]
COSTS = {name: {"seconds": 0.5, "mib": 80.0} for name in VARIANTS} | {cost.RESIDENT: {"seconds": 1.0, "mib": 100.0}}


def test_the_plan_has_every_objective_and_the_ablations(tmp_path: Path) -> None:
    plan = Plan(tmp_path, own_data=False, variants=tuple(VARIANTS.values()))
    assert {variant.objective for variant in plan.variants} == set(OBJECTIVES) - {"sft"}
    configs = {name: parse(plan.run_flags(variant, 2)) for name, variant in VARIANTS.items()}
    for name, config in configs.items():
        one = configs["simpo"]
        assert config.objective.name == VARIANTS[name].objective
        assert (config.data, config.train, config.optimizer) == (one.data, one.train, one.optimizer)
    without, zero = configs["simpo-sum"].objective, configs["simpo-gamma-0"].objective
    assert without == SimPO(simpo_length_normalization=False) and zero == SimPO(simpo_gamma=0.0)
    assert set(QUICK) < set(VARIANTS) and parse(plan.sft_flags()).objective.name == "sft"
    with pytest.raises(UserError, match="did you mean simpo-sum"):
        choose(["simpo_sum"])


def test_length_says_nothing_of_quality() -> None:
    rows, _ = made_up_rows(0, study.WEIGHTS)
    words = [[len(row[name][0]["content"].split()) for name in ("chosen", "rejected")] for row in rows]
    longer = [(chosen > rejected) - (chosen < rejected) for chosen, rejected in words]
    assert abs(sum(longer)) < 3 * math.sqrt(len(rows)) and longer.count(0) == pytest.approx(len(rows) / 3, rel=0.1)


def test_a_result_of_other_settings_is_not_used(tmp_path: Path) -> None:
    file = tmp_path / runs.RESULT
    assert runs.finished(file, ["a"]) is None
    file.write_text(json.dumps({"settings": ["a"], "figures": {}}))
    assert runs.finished(file, ["a"]) and runs.finished(file, ["b"]) is None


def test_a_run_that_is_refused_ends_with_its_sentence_and_no_result(tmp_path: Path) -> None:
    plan = Plan(tmp_path, own_data=False, variants=(), steps=-1)
    with pytest.raises(UserError, match=r"--train-iters -1 .*; the log is .*log\.txt"):
        runs.train(plan.run_flags(VARIANTS["simpo"], 1), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [runs.LOG]


def test_a_study_from_pairs_to_table_and_its_second_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs from pairs of one's own. The second call repeats the one run whose result is missing."""
    monkeypatch.setattr(cost, "measure", lambda plan: COSTS)
    monkeypatch.setattr(study, "cores", lambda: 1)
    monkeypatch.setattr(runs, "cores", lambda: 1)
    data, output = write_rows(tmp_path / "pairs.jsonl", make_rows(40)), tmp_path / "study"
    flags = ["--output", str(output), "--data", str(data), "--objectives", "simpo", "dpo", "--seeds", "1"]
    assert study.main([*flags, "--steps", "2", "--sft-steps", "1"]) == 0
    found = read_json(output / "study.json")["figures"]
    names = ("train_ranking", "heldout_ranking", "reward_accuracy", "chosen_logp", "kl", "length", "greedy_length")
    names += ("relative_length",)
    assert set(found) == {"sft", "simpo", "dpo"} and set(found["simpo"]) == set(names)
    assert found["sft"]["kl"] == [pytest.approx(0, abs=1e-6)] and found["dpo"]["kl"][0] > 1e-6
    assert found["simpo"]["reward_accuracy"] == found["simpo"]["heldout_ranking"]
    page = (output / "index.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3 and "<script" not in page and "src=" not in page

    (output / "runs" / "dpo-seed-1" / runs.RESULT).unlink()  # as a kill leaves it
    capsys.readouterr()
    assert study.main([*flags, "--steps", "2", "--sft-steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert "1 of 2 runs are finished already" in printed and "1 of 1: dpo, seed 1" in printed
    assert read_json(output / "study.json")["figures"] == found

    assert study.main(["--output", str(output)]) == 2
    assert "holds a study of other data" in capsys.readouterr().err


def test_the_table_has_means_and_spreads(tmp_path: Path) -> None:
    plan = Plan(tmp_path, own_data=False, variants=tuple(choose(["simpo", "dpo"])))
    figures = {"train_ranking": 0.5, "heldout_ranking": 0.6, "kl": 0.1, "length": 9.0, "correct": 0.5}
    figures |= {"sampled_correct": 0.5, "chosen_logp": -0.4}
    results = {
        (name, seed): {"figures": {**figures, "kl": 0.1 * seed, "reward_accuracy": 0.75}}
        for name in ("dpo", "simpo")
        for seed in (1, 2, 3)
    }
    report.write(plan, figures, results, COSTS, 0.5)
    lines = [line.split(" | ") for line in (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()]
    columns = lines[0]
    rows = {line[0].strip("| "): line for line in lines if len(line) == len(columns)}
    assert list(rows) == ["", "---", "sft", "simpo", "dpo", cost.RESIDENT]
    kl, reward, step = (next(i for i, name in enumerate(columns) if word in name) for word in ("KL", "reward", "CPU"))
    assert rows["sft"][kl] == "0.100" and rows["simpo"][kl] == "0.200 ± 0.100" and rows["sft"][reward] == ""
    assert rows["dpo"][reward] == "75.0 ± 0.0" and rows["dpo"][step] == "50" and rows[cost.RESIDENT][step] == "100"


def test_the_cost_is_measured_beside_a_resident_reference(tmp_path: Path) -> None:
    """Its own process: it forks, which needs a process without threads."""
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", make_rows(8))
    code = (
        "import sys; from pathlib import Path; from examples.study import cost; from tests.support.tiny import *\n"
        "cost.SHAPE.update(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)\n"
        "cost.PASSES, cost.STEPS, cost.PAIRS, folder = 1, 2, 4, Path(sys.argv[1])\n"
        "make_tokenizer().save_pretrained(folder / 'model')\n"
        "print(sorted(cost.run(folder, ['simpo', 'dpo'])), min(map(min, map(dict.values, cost.run(folder, [])."
        "values()))) > 0)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[-2] == f"['dpo', '{cost.RESIDENT}', 'simpo'] True"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--held-out", "x"], "--held-out needs --data"),
        (["--data", "/no/such.jsonl"], "--data /no/such.jsonl: there is no such file"),
        (["--objectives", "dpoo"], "did you mean dpo?"),
        (["--seeds", "0"], "--seeds 0 must be at least 1"),
        (["--output", str(ROOT / "examples")], "holds other files; choose another folder"),
    ],
)
def test_wrong_arguments_end_with_a_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study.main(arguments) == 2
    assert sentence in capsys.readouterr().err
