"""A diagnosis of two checkpoints against a plain loop in fp64, and the program around it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from simpo_megatron.diagnose import Scored, figures, load_model, score
from simpo_megatron.objectives import OBJECTIVES
from tests.support.pairs import make_pairs
from tests.support.steps import one_thread
from tests.support.tiny import make_checkpoint, make_rows, make_tokenizer, randomize, write_rows
from tools import diagnose

LENGTHS = [(4, 3, 5), (20, 40, 12), (6, 9, 1), (1, 2, 3), (16, 20, 12), (3, 1, 4), (8, 9, 4), (2, 7, 2)]
KINDS: dict[str, Any] = dict(OBJECTIVES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    policy, reference = make_checkpoint(root / "policy"), make_checkpoint(root / "reference")
    randomize(AutoModelForCausalLM.from_pretrained(reference), seed=1).save_pretrained(reference)
    return policy, reference


@torch.no_grad()
def plain_loop(policy: Any, reference: Any, pairs: Any) -> Scored:
    """Every sequence alone, all logits at once, in fp64."""
    found = np.zeros((3, len(pairs), 2))
    for i in range(len(pairs)):
        prompt, *responses = pairs.pair(i)
        for side, response in enumerate(responses):
            ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
            logps = [model(ids).logits[0].log_softmax(-1) for model in (policy, reference)]
            for t in range(len(prompt) - 1, ids.shape[1] - 1):
                here = [values[t] for values in logps]
                kl = (here[0].exp() * (here[0] - here[1])).sum()
                found[:, i, side] += [here[0][ids[0, t + 1]].item(), here[1][ids[0, t + 1]].item(), kl.item()]
    lengths = np.stack([pairs.chosen_length, pairs.rejected_length], axis=1).astype(np.int64)
    return Scored(found[0], found[1], found[2], lengths)


def test_scores_equal_a_plain_loop(folders: tuple[Path, Path]) -> None:
    """In small batches and blocks, so that sequences and positions are cut in every way."""
    models = [load_model("--hf-checkpoint", folder, torch.float64) for folder in folders]
    pairs = make_pairs(LENGTHS, vocab_size=len(make_tokenizer()))
    with one_thread():
        wanted = plain_loop(*models, pairs)
    assert wanted.kl_sums.min() > 0
    for batch_tokens, block_bytes in ((8192, 2**26), (64, 50_000), (1, 100_000)):
        with one_thread():
            found = score(*models, pairs, batch_tokens, block_bytes)
        for name, values in vars(wanted).items():
            np.testing.assert_allclose(getattr(found, name), values, rtol=1e-9, atol=1e-12, err_msg=name)
    same = score(models[0], models[0], pairs)
    assert not same.kl_sums.any() and (same.policy_sums == same.reference_sums).all()


def test_what_every_number_means() -> None:
    policy = np.array([[-4.0, -9.0], [-8.0, -3.0], [-6.0, -6.0], [-20.0, -12.0]])
    reference = np.array([[-5.0, -9.0], [-7.0, -5.0], [-9.0, -7.0], [-24.0, -8.0]])
    lengths, kl = np.array([[2, 3], [4, 3], [3, 3], [10, 3]]), np.array([[1.0, 2], [3, 4], [5, 6], [7, 8]])
    found = figures(Scored(policy, reference, kl, lengths), KINDS["dpo"](dpo_beta=0.5))
    # averages: -2 and -3, -2 and -1, -2 and -2, -2 and -4; log-ratios: 1 and 0, -1 and 2, 3 and 1, 4 and -4
    assert found["rankings"] == {"both": 2, "reward_alone": 1, "likelihood_alone": 0, "neither": 1}
    assert found["reward_accuracy"] == 0.75 and found["likelihood_accuracy"]["policy"] == 0.5
    assert found["likelihood_accuracy"]["reference"] == 0.5, "-2.5, -3; -1.75, -1.67; -3, -2.33; -2.4, -2.67"
    assert found["kl_exact"] == {"all": 36 / 31, "chosen": 16 / 19, "rejected": 20 / 12}
    assert found["kl_on_given_text"] == {"all": 6 / 8, "chosen": 7 / 4, "rejected": -1 / 4}
    assert found["reward"] == {"chosen": 0.875, "rejected": -0.125}
    ranks = np.corrcoef([5, 2, 5, 8, 5, 5, 5, 1], [1, 4, 7, 4, 4, 4, 8, 4])  # of the averages, of the lengths
    assert found["length_spearman"]["policy"] == pytest.approx(ranks[0, 1])
    assert found["length_spearman"]["margin"] == pytest.approx(0.4), "of 0.5, -1.5, 1, 4 with -1, 1, 0, 7"
    bins = found["margin_by_length_difference"]
    assert [(one["shortest"], one["margin"]) for one in bins] == [(-1, 0.5), (0, 1.0), (1, -1.5), (7, 4.0)]
    simpo = figures(Scored(policy, reference, kl, lengths), KINDS["simpo"]())["rankings"]
    assert simpo["reward_alone"] == simpo["likelihood_alone"] == 0, "its reward is the likelihood"


def flags(folders: tuple[Path, Path], data: Path, **more: Any) -> list[str]:
    settings = {"hf_checkpoint": folders[0], "reference_checkpoint": folders[1], "data": data, "device": "cpu", **more}
    return [str(word) for name, value in settings.items() for word in ("--" + name.replace("_", "-"), value)]


def test_the_program_writes_a_page_and_json(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", make_rows(12))
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    assert diagnose.main(flags(folders, data, report=page, json=numbers, objective="dpo", dpo_beta=0.2)) == 0
    found, printed = json.loads(numbers.read_text()), capsys.readouterr()
    assert found["pairs"] == 12 and sum(found["rankings"].values()) == 12 and found["kl_exact"]["chosen"] > 0
    assert "DPO: beta 0.2" in found["objective"] and "kl_exact/chosen" in printed.out and "0:00:00 left" in printed.err
    text = page.read_text()
    assert text.count("<svg") == 6 and "<script" not in text and "http" not in text and "NaN" not in text


def test_mistakes_are_one_line(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", make_rows(2))
    other = make_checkpoint(tmp_path / "other", vocab_size=512)
    foreign = make_checkpoint(tmp_path / "foreign", num_hidden_layers=1)
    make_tokenizer("{{ messages[0]['content'] }}").save_pretrained(foreign)
    broken = tmp_path / "broken"
    broken.mkdir()
    for settings, words in (
        ({"reference_checkpoint": tmp_path / "absent"}, "--reference-checkpoint"),
        ({"reference_checkpoint": broken}, "has no tokenizer"),
        ({"reference_checkpoint": other}, "logits: KL needs the same vocabulary"),
        ({"data": tmp_path / "absent.jsonl"}, "there is no such file"),
        ({"batch_tokens": 0}, "--batch-tokens 0 must be at least 1"),
        ({"report": data}, "would write over what is read"),
        ({"objective": "simpo", "dpo_beta": 0.1}, "--dpo-beta belongs to --objective dpo"),
    ):
        assert diagnose.main(flags(folders, **{"data": data, **settings})) == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diagnose.py: ")]
        assert words in line
