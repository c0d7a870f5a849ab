"""The program as the user meets it: wrong input ends in one line and leaves nothing behind, good input trains.

Wrong input runs `train.main` inside the worker pool; three runs are processes of their own, two of them under torchrun.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed import free_environment
from tests.tiny import make_checkpoint, make_rows, make_tokenizer, write_rows
from tests.trainer.runs import flags, read_rows, run_and_read

ROOT = Path(__file__).parent.parent
MEMBERS = ("chosen", "rejected")
TP2 = {"tensor_model_parallel_size": 2}


@dataclass(frozen=True)
class Inputs:
    """A checkpoint and preferences with nothing wrong, and a folder for what is."""

    checkpoint: Path
    data: Path
    folder: Path

    def with_rows(self, rows: list[dict[str, Any]]) -> Path:
        return write_rows(self.folder / "wrong.jsonl", rows)

    def copy_checkpoint(self) -> Path:
        return Path(shutil.copytree(self.checkpoint, self.folder / "wrong"))


@dataclass(frozen=True)
class Wrong:
    """Flags that differ from a good run, what the line must say, and the ranks it takes."""

    settings: dict[str, Any]
    words: list[str]
    world: int = 1
    argv: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("good")
    return make_checkpoint(folder / "model"), write_rows(folder / "pairs.jsonl", make_rows(10))


@pytest.fixture
def inputs(good: tuple[Path, Path], tmp_path: Path) -> Inputs:
    return Inputs(*good, tmp_path)


def run_main(argv: list[str]) -> tuple[int, str, str]:
    """On a rank: exit code, stdout and stderr of the program."""
    from simpo_megatron.train import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return code, out.getvalue(), err.getvalue()


def missing_data(inputs: Inputs) -> Wrong:
    path = inputs.folder / "absent.jsonl"
    return Wrong({"train_data": path}, [f"{path}: there is no such file", "check the path"])


def missing_validation_data(inputs: Inputs) -> Wrong:
    path = inputs.folder / "absent.jsonl"
    return Wrong({"valid_data": path}, [f"{path}: there is no such file"])


def empty_data(inputs: Inputs) -> Wrong:
    path = inputs.with_rows([])
    return Wrong({"train_data": path}, [f"{path}: the file has no rows"])


def truncated_line(inputs: Inputs) -> Wrong:
    path = inputs.with_rows(make_rows(3))
    path.write_text(path.read_text()[:-30])
    return Wrong({"train_data": path}, [f"{path}:3: not valid JSON", "mend or remove the line"])


def truncated_line_seen_by_rank_0_alone(inputs: Inputs) -> Wrong:
    return Wrong({**truncated_line(inputs).settings, **TP2}, ["wrong.jsonl:3: not valid JSON"], world=2)


def row_without_chosen(inputs: Inputs) -> Wrong:
    rows = make_rows(3)
    del rows[1]["chosen"]
    path = inputs.with_rows(rows)
    return Wrong({"train_data": path}, [f"{path}:2: no `chosen`", "`prompt`, `rejected`"])


def all_responses_empty(inputs: Inputs) -> Wrong:
    rows = [{**row, "chosen": [{"role": "assistant", "content": " "}]} for row in make_rows(3)]
    path = inputs.with_rows(rows)
    return Wrong({"train_data": path}, [f"{path}: no pair is left of 3 rows: dropped 3 with an empty response", "mend"])


def no_chat_template(inputs: Inputs) -> Wrong:
    checkpoint = inputs.copy_checkpoint()
    for path in (*checkpoint.glob("tokenizer*"), *checkpoint.glob("chat_template*")):
        path.unlink()
    make_tokenizer(chat_template=None).save_pretrained(checkpoint)
    return Wrong({"hf_checkpoint": checkpoint}, ["chat template", str(inputs.data)])


def no_tokenizer(inputs: Inputs) -> Wrong:
    checkpoint = inputs.copy_checkpoint()
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    return Wrong({"hf_checkpoint": checkpoint}, [f"--hf-checkpoint {checkpoint} has no tokenizer"])


def two_gammas(inputs: Inputs) -> Wrong:
    settings = {"simpo_gamma": 1, "simpo_gamma_beta_ratio": 0.5}
    return Wrong(settings, ["--simpo-gamma and --simpo-gamma-beta-ratio", "give one of them"])


def tensor_parallel_does_not_divide_heads(inputs: Inputs) -> Wrong:
    return Wrong({"tensor_model_parallel_size": 3}, ["--tensor-model-parallel-size 3 does not divide", "use 1 or 2"])


def tensor_parallel_does_not_divide_query_groups(inputs: Inputs) -> Wrong:
    """It divides the four heads."""
    words = ["--tensor-model-parallel-size 4 does not divide num_query_groups 2; use 1 or 2"]
    return Wrong({"tensor_model_parallel_size": 4}, words)


def stages_do_not_divide_layers(inputs: Inputs) -> Wrong:
    return Wrong({"pipeline_model_parallel_size": 3}, ["4 layers", "--pipeline-model-parallel-size"])


def chunks_do_not_divide_layers(inputs: Inputs) -> Wrong:
    settings = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 3}
    return Wrong(settings, ["--num-layers-per-virtual-pipeline-stage 3", "4 layers"])


def world_does_not_fit(inputs: Inputs) -> Wrong:
    return Wrong(TP2, ["3 processes", "--tensor-model-parallel-size 2", "start a multiple of 2"], world=3)


def missing_shard(inputs: Inputs) -> Wrong:
    checkpoint = inputs.copy_checkpoint()
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(checkpoint, max_shard_size="100KB")
    (checkpoint / "model.safetensors").unlink(missing_ok=True)
    shard = sorted(checkpoint.glob("model-*.safetensors"))[1]
    shard.unlink()
    words = ["model.safetensors.index.json", f"{shard.name}, which does not exist; download that shard"]
    return Wrong({"hf_checkpoint": checkpoint}, words)


def missing_checkpoint(inputs: Inputs) -> Wrong:
    path = inputs.folder / "absent"
    return Wrong({"hf_checkpoint": path}, [f"{path} is not a directory", "download it"])


def unsupported_model(inputs: Inputs) -> Wrong:
    checkpoint = inputs.copy_checkpoint()
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    words = ["model_type 'mamba'; supported are llama, mistral, qwen2, qwen3"]
    return Wrong({"hf_checkpoint": checkpoint}, words)


def save_below_a_file(inputs: Inputs) -> Wrong:
    folder = inputs.data / "run"
    return Wrong({"save": folder}, [f"--save {folder} cannot be written", "choose a folder that can"])


def save_without_permission(inputs: Inputs) -> Wrong:
    """The superuser may write everywhere but here."""
    return Wrong({"save": "/proc/x"}, ["--save /proc/x cannot be written", "choose a folder that can"])


def export_below_a_file(inputs: Inputs) -> Wrong:
    folder = inputs.data / "run"
    return Wrong({"export_hf": folder}, [f"--export-hf {folder} cannot be written"])


def export_over_something(inputs: Inputs) -> Wrong:
    """Known before training, not after it: `--save` stays empty."""
    checkpoint = inputs.copy_checkpoint()
    return Wrong({"export_hf": checkpoint, **TP2}, [f"{checkpoint} is not empty; export to a new directory"], world=2)


def save_among_the_checkpoints_of_another_run(inputs: Inputs) -> Wrong:
    folder = inputs.folder / "other"
    folder.mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    return Wrong({"save": folder}, [f"--save {folder} holds another run; resume it with --load {folder}"])


def resume_from_nothing(inputs: Inputs) -> Wrong:
    folder = inputs.folder / "absent"
    return Wrong({"load": folder}, [f"--load {folder} has no latest_checkpointed_iteration.txt"])


def half_precision(inputs: Inputs) -> Wrong:
    return Wrong({}, ["--fp16 is not supported", "use bf16"], argv=["--fp16"])


def unknown_flag(inputs: Inputs) -> Wrong:
    return Wrong({"simpo_gama": 1}, ["--simpo-gama 1", "--help lists the flags"])


def unknown_setting(inputs: Inputs) -> Wrong:
    path = inputs.folder / "run.yaml"
    path.write_text("simpo_gama: 1\n")
    return Wrong({"config": path}, [f"--config {path}: simpo_gama is not a setting"])


def no_cuda(inputs: Inputs) -> Wrong:
    return Wrong({"device": "cuda"}, ["--device cuda finds no CUDA device; use --device cpu"])


WRONG: list[Callable[[Inputs], Wrong]] = [
    missing_data,
    missing_validation_data,
    empty_data,
    truncated_line,
    truncated_line_seen_by_rank_0_alone,
    row_without_chosen,
    all_responses_empty,
    no_chat_template,
    no_tokenizer,
    two_gammas,
    tensor_parallel_does_not_divide_heads,
    tensor_parallel_does_not_divide_query_groups,
    stages_do_not_divide_layers,
    chunks_do_not_divide_layers,
    world_does_not_fit,
    missing_shard,
    missing_checkpoint,
    unsupported_model,
    save_below_a_file,
    save_without_permission,
    export_below_a_file,
    export_over_something,
    save_among_the_checkpoints_of_another_run,
    resume_from_nothing,
    half_precision,
    unknown_flag,
    unknown_setting,
    pytest.param(no_cuda, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")),  # type: ignore[list-item]
]


@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_input_is_one_line(pool, inputs: Inputs, mistake: Callable[[Inputs], Wrong]) -> None:
    wrong = mistake(inputs)
    outputs = {"save": inputs.folder / "run", "export_hf": inputs.folder / "out"}
    argv = [*flags(inputs.checkpoint, inputs.data, **{**outputs, **wrong.settings}), *wrong.argv]
    before = sorted(inputs.folder.rglob("*"))
    for code, _, stderr in pool.run(wrong.world, run_main, argv):
        assert code == 2
        [line] = stderr.splitlines()
        assert line.startswith("simpo_megatron.train: ")
        for words in wrong.words:
            assert words in line
    assert sorted(inputs.folder.rglob("*")) == before


@pytest.mark.parametrize(
    "rank, local_rank, waits, says", [(0, 0, False, True), (1, 1, True, False), (8, 0, True, True)]
)
def test_who_says_it(monkeypatch: pytest.MonkeyPatch, rank: int, local_rank: int, waits: bool, says: bool) -> None:
    """Rank 0 at once; a rank that is still alive after that only if it is the first of another node."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    code, _, stderr = run_main(["--fp16"])
    assert (code, bool(waited)) == (2, waits)
    assert stderr.count("simpo_megatron.train: ") == says


def test_useless_rows_are_dropped_counted_and_reported(pool, inputs: Inputs) -> None:
    def message(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    rows = make_rows(10)
    rows[0]["chosen"] = message("")
    rows[3]["rejected"] = message(" \n")
    rows[4]["rejected"] = rows[4]["chosen"]
    rows[8]["chosen"] = rows[8]["rejected"]
    rows[9]["chosen"] = rows[9]["rejected"]
    path = inputs.with_rows(rows)
    save = inputs.folder / "run"
    argv = flags(inputs.checkpoint, path, train_iters=1, global_batch_size=5, save=save)
    [(code, stdout, stderr)] = pool.run(1, run_main, argv)
    assert (code, stderr) == (0, "")
    assert f"{path}: 5 pairs of 10 rows; dropped 2 with an empty response, 3 with identical responses" in stdout
    assert [row["epoch"] for row in read_rows(save)] == [1.0]


def test_an_epoch_sees_every_pair_once(pool, inputs: Inputs) -> None:
    """Ten pairs in batches of four: the last batch has two, and is averaged over two."""
    argv = flags(inputs.checkpoint, inputs.data, train_epochs=1, global_batch_size=4)
    at = argv.index("--train-iters")
    rows = run_and_read(pool, 2, argv[:at] + argv[at + 2 :], inputs.folder / "run")
    assert [row["epoch"] for row in rows] == [0.4, 0.8, 1.0]
    tokenizer = AutoTokenizer.from_pretrained(inputs.checkpoint)
    for member in ("chosen", "rejected"):
        texts = [row[member][-1]["content"] for row in make_rows(10)]
        tokens = sum(len(tokenizer(text).input_ids) + 1 for text in texts)  # and the end of the turn
        lengths = [row[f"response_length/{member}"] for row in rows]
        assert 4 * lengths[0] + 4 * lengths[1] + 2 * lengths[2] == pytest.approx(tokens)


def launch(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=free_environment(), capture_output=True, text=True, timeout=300
    )


def torchrun(ranks: int, logs: Path, argv: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs the program under torchrun; `logs` gets a file a rank and stream."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return launch([*launcher, "--tee", "3", "--log-dir", str(logs), "-m", "simpo_megatron.train", *argv])


def stream(logs: Path, rank: int, name: str) -> str:
    [path] = logs.glob(f"*/attempt_0/{rank}/{name}.log")
    return path.read_text()


def test_one_process_needs_no_launcher(inputs: Inputs) -> None:
    wrong = truncated_line(inputs)
    save = inputs.folder / "run"
    done = launch(["simpo_megatron.train", *flags(inputs.checkpoint, wrong.settings["train_data"], save=save)])
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert wrong.words[0] in line
    assert not save.exists()


def test_an_error_under_torchrun_is_said_once(inputs: Inputs) -> None:
    wrong = truncated_line(inputs)
    logs = inputs.folder / "logs"
    done = torchrun(2, logs, flags(inputs.checkpoint, wrong.settings["train_data"], **TP2))
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count(wrong.words[0]) == 1
    [line] = stream(logs, 0, "stderr").splitlines()
    assert wrong.words[0] in line
    assert stream(logs, 1, "stderr") == ""


def test_a_run_under_torchrun(inputs: Inputs) -> None:
    """In bf16, the default: trains, logs, saves and exports."""
    save, export, logs = (inputs.folder / name for name in ("run", "out", "logs"))
    settings = {"train_iters": 2, "valid_data": inputs.data, "save": save, "export_hf": export, **TP2}
    argv = [word for word in flags(inputs.checkpoint, inputs.data, **settings) if word != "--fp32"]
    done = torchrun(2, logs, argv)
    assert done.returncode == 0, done.stderr
    assert stream(logs, 0, "stderr") == stream(logs, 1, "stderr") == stream(logs, 1, "stdout") == ""
    assert "step 2/2" in stream(logs, 0, "stdout")

    before, first, second, after = read_rows(save)
    assert [row["step"] for row in (before, first, second, after)] == [0, 1, 2, 2]
    pairs = [f"{name}/{member}" for name in ("rewards", "logps", "response_length", "truncated") for member in MEMBERS]
    names = {*pairs, "loss", "nll_loss", "rewards/margins", "rewards/accuracies", "rewards/above_gamma", "rewards/ties"}
    extra = {"grad_norm", "learning_rate", "tokens_per_second", "memory_gib", "epoch"}
    for row in (first, second):
        assert row.keys() == {"step", *names, *extra}
    for row in (before, after):
        assert row.keys() == {"step", *(f"eval/{name}" for name in names)}
    assert after["eval/loss"] < before["eval/loss"]

    assert (save / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert list((save / "tensorboard").glob("events*"))
    start, trained = (load_file(path / "model.safetensors") for path in (inputs.checkpoint, export))
    assert start.keys() == trained.keys()
    assert all(tensor.dtype == torch.bfloat16 for tensor in trained.values())
    assert not any(torch.equal(start[name].bfloat16(), trained[name]) for name in start if "norm" not in name)
    loaded = AutoModelForCausalLM.from_pretrained(export).state_dict()
    assert all(torch.equal(loaded[name], trained[name].to(loaded[name].dtype)) for name in trained)
    assert AutoTokenizer.from_pretrained(export).chat_template
