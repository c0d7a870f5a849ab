"""The data programs as a user runs them: exit codes, files, and one line for a mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simpo_megatron.data.prepared_set import PreparedPairs
from tests.support.tiny import make_rows, make_tokenizer, write_rows
from tools import build_pairs, inspect_data, preprocess_preferences


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {**row, "score_chosen": i, "score_rejected": 0} for i, row in enumerate(make_rows(30), 1)
    ]
    return write_rows(tmp_path / "pairs.jsonl", rows)


def run(program: Any, **flags: Any) -> int:
    argv = [str(word) for name, value in flags.items() for word in ("--" + name.replace("_", "-"), value)]
    return program.main(argv)


def test_prepare_and_inspect(model: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix, report = tmp_path / "sets" / "a", tmp_path / "report.html"
    settings = {"hf_checkpoint": model, "seq_length": 400}
    assert run(preprocess_preferences, input=source, output_prefix=prefix, workers=2, min_score_gap=11, **settings) == 0
    assert "20 pairs of 30 rows; dropped 10 with a score gap below --min-score-gap" in capsys.readouterr().out
    assert PreparedPairs(prefix).about["options"]["max_length"] == 200, "as training has it"
    assert run(inspect_data, data=prefix, report=report, **settings) == 0
    assert "<h2>Packing</h2>" in report.read_text()
    assert run(inspect_data, data=source, valid_data=source, **settings) == 1
    assert "prompts that are in the validation data too" in capsys.readouterr().out


def test_the_configuration_of_training(model: Path, source: Path, tmp_path: Path) -> None:
    """A prepared set fits the run that its --config describes, preset included; flags win."""
    config = tmp_path / "config.yaml"
    config.write_text("preset: llama3-instruct\nseq_length: 4096\ntensor_model_parallel_size: 2\n")
    settings = {"hf_checkpoint": model, "input": source, "config": config, "output_prefix": tmp_path / "set"}
    for flags, lengths in (({}, [2048, 1800]), ({"max_length": 100}, [100, 50])):
        assert run(preprocess_preferences, **settings, **flags) == 0
        options = PreparedPairs(tmp_path / "set").about["options"]
        assert [options[name] for name in ("max_length", "max_prompt_length")] == lengths


def test_mistakes_are_one_line(model: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = tmp_path / "a"
    good = {"hf_checkpoint": model, "input": source, "output_prefix": prefix, "workers": 1}
    assert run(preprocess_preferences, **good) == 0
    wrong = tmp_path / "latin1.jsonl"
    wrong.write_bytes(b'{"prompt": "a", "chosen": "\xe9", "rejected": "b"}\n')
    capsys.readouterr()
    for change, words in (
        ({"input": wrong}, f"{wrong}:1: byte 28 of the line is not UTF-8"),
        ({"input": prefix}, "is prepared already"),
        ({"input": tmp_path / "none.jsonl"}, "there is no such file"),
        ({"workers": 0}, "--workers 0 must be at least 1"),
        ({"config": tmp_path / "none.yaml"}, "none.yaml: there is no such file"),
        ({"hf_checkpoint": tmp_path / "none"}, "is not a folder"),
        ({"max_length": 4000}, "--max-length 4000 lets a pair outgrow its row"),
        ({"max_length_ratio": 0.5}, "--max-length-ratio 0.5"),
        ({"tie_policy": "x"}, "--tie-policy"),
        ({"output_prefix": source / "a"}, "cannot be written"),
        ({"output_prefix": source}, "is the source itself"),
        ({"output_prefix": ""}, "a path is empty"),
    ):
        assert run(preprocess_preferences, **{**good, **change}) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and error.startswith("preprocess_preferences.py: ")
    assert run(inspect_data, data=wrong, hf_checkpoint=model) == 2
    assert run(inspect_data, data=source, hf_checkpoint=model, report=source / "r.html") == 2
    for report in (source, model / "tokenizer.json"):
        before = report.read_bytes()
        assert run(inspect_data, data=source, hf_checkpoint=model, report=report) == 2
        assert report.read_bytes() == before and "would write over what is read" in capsys.readouterr().err
    for pair, words in ((31, "has 30 rows; give a number from 1 to 30"), (0, "--pair 0 must be at least 1")):
        for data in (source, prefix):
            capsys.readouterr()
            assert run(inspect_data, data=data, hf_checkpoint=model, pair=pair) == 2
            error = capsys.readouterr().err
            assert words in error and error.count("\n") == 1
    binary = Path(f"{prefix}.bin")
    binary.write_bytes(binary.read_bytes()[::-1])
    assert run(inspect_data, data=prefix, hf_checkpoint=model) == 2
    assert f"{binary} is damaged" in capsys.readouterr().err


def test_build_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    responses = [{"content": text, "score": score} for text, score in (("a", 1), ("b", 3), ("c", 2))]
    scored, out = (
        write_rows(tmp_path / "scored.jsonl", [{"prompt": "p", "responses": responses}]),
        tmp_path / "out.jsonl",
    )
    assert run(build_pairs, input=scored, output=out) == 0
    assert [json.loads(line)["score_rejected"] for line in out.read_text().splitlines()] == [1]
    assert run(build_pairs, input=scored, output=out, strategy="all", min_score_gap=1.5) == 0
    assert len(out.read_text().splitlines()) == 1
    capsys.readouterr()
    before = out.read_text()
    for rows, gap, words in (
        (
            scored,
            5,
            "left out 1 prompts whose scores are equal or too close, 0 with fewer than two different responses; lower "
            "--min-score-gap 5",
        ),
        (
            write_rows(tmp_path / "one.jsonl", [{"prompt": "p", "responses": responses[:1]}]),
            0,
            "; give each prompt two",
        ),
    ):
        assert run(build_pairs, input=rows, output=out, min_score_gap=gap) == 2
        stdout, error = capsys.readouterr()
        assert stdout == "" and error.startswith(f"build_pairs.py: {rows}: no pair of 1 prompts: ") and words in error
        assert error.count("\n") == 1 and out.read_text() == before
    assert run(build_pairs, input=scored, output=scored) == 2
    assert "is the input; choose another file" in capsys.readouterr().err
    for name in ("a.parquet", "a.jsonl.gz", "a.csv", "a"):
        assert run(build_pairs, input=scored, output=tmp_path / name) == 2
        assert f"{name}: pairs are written as JSON lines; give a name that ends in .jsonl" in capsys.readouterr().err
        assert not (tmp_path / name).exists()
