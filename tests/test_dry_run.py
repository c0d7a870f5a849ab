"""`--dry-run`: what a run would refuse is refused on one process, whatever the layout; nothing is written or built."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from tests import test_wrong_input as wrong_input
from tests.support.checkpoints import to_megatron
from tests.support.distributed import WorkerPool
from tests.support.runs import Inputs, flags, run_main, train
from tests.support.tiny import make_checkpoint
from tests.test_wrong_input import Wrong

BIG = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}


def dry(pool: WorkerPool, argv: list[str]) -> tuple[int, str, str]:
    [outcome] = pool.run(1, run_main, [*argv, "--dry-run"])
    return outcome


def test_a_layout_of_many_processes_on_one(pool: WorkerPool, inputs: Inputs) -> None:
    folder = inputs.folder / "run"
    settings = {**BIG, "context_parallel_size": 2, "save": folder, "load": folder, "export_hf": inputs.folder / "out"}
    code, out, err = dry(pool, flags(inputs.checkpoint, inputs.data, valid_data=inputs.data, **settings))
    assert (code, err) == (0, "")
    assert "tensor 2 x context 2 x pipeline 2 x data 1" in out and "8; a multiple of 8 is needed" in out
    assert f"starts from:     {inputs.checkpoint}" in out and "nothing is wrong" in out
    assert sorted(inputs.folder.iterdir()) == []


def test_it_finds_the_checkpoint_to_resume(pool: WorkerPool, inputs: Inputs) -> None:
    folder = inputs.folder / "run"
    argv = flags(inputs.checkpoint, inputs.data, train_iters=1, save=folder, dist_ckpt_optim_fully_reshardable=True)
    assert pool.run(1, train, argv) == [None]
    code, out, _ = dry(pool, [*argv, "--load", str(folder), "--tensor-model-parallel-size", "2"])
    assert code == 0 and f"{folder}/iter_0000001" in out
    for change in (["--seed", "7"], ["--no-use-distributed-optimizer"]):
        code, _, err = dry(pool, [*argv, "--load", str(folder), *change])
        assert code == 2 and f"iter_0000001 was saved with {change[0].replace('no-', '')}" in err
    other = make_checkpoint(inputs.folder / "other", num_hidden_layers=2)
    code, _, err = dry(pool, [*argv, "--load", str(folder), "--hf-checkpoint", str(other)])
    assert code == 2 and f"--load {folder} does not fit {other}: decoder.layers" in err and "[4, 32]" in err
    (folder / "iter_0000001" / "metadata.json").unlink()
    code, _, err = dry(pool, [*argv, "--load", str(folder)])
    assert code == 2 and "iter_0000001 is not a complete checkpoint" in err


def test_shared_prompts_where_transformer_engine_is_not_installed(pool: WorkerPool, inputs: Inputs) -> None:
    settings = {"transformer_impl": "transformer_engine"}
    code, out, _ = dry(pool, flags(inputs.checkpoint, inputs.data, **settings))
    assert code == 0 and "the machines of the run need it" in out
    code, _, err = dry(pool, [*flags(inputs.checkpoint, inputs.data, **settings), "--share-prompts"])
    assert (
        code == 2 and "--share-prompts: Transformer Engine's attention cannot let two responses see one prompt" in err
    )


def test_prepared_data(pool: WorkerPool, inputs: Inputs) -> None:
    from tools.preprocess_preferences import main as preprocess

    prefix = inputs.folder / "set"
    argv = ["--input", str(inputs.data), "--hf-checkpoint", str(inputs.checkpoint), "--output-prefix", str(prefix)]
    assert preprocess([*argv, "--max-length", "256"]) == 0
    raw = dry(pool, flags(inputs.checkpoint, inputs.data))
    assert raw[0] == 0 and dry(pool, flags(inputs.checkpoint, prefix)) == raw
    code, _, err = dry(pool, flags(inputs.checkpoint, prefix, seq_length=8, max_length=4))
    assert code == 2 and str(prefix) in err


def mis_shaped(inputs: Inputs) -> Wrong:
    checkpoint = inputs.copy_checkpoint()
    make_checkpoint(checkpoint, intermediate_size=64)
    (checkpoint / "config.json").write_text((inputs.checkpoint / "config.json").read_text())
    return Wrong({"hf_checkpoint": checkpoint}, ["has shape [64, 32], but config.json implies [48, 32]"])


def tokenizer_of_another_model(inputs: Inputs) -> Wrong:
    checkpoint = make_checkpoint(inputs.folder / "small", vocab_size=200)
    return Wrong({"hf_checkpoint": checkpoint}, ["gives token id", "the model's vocab_size is 200"])


SEEN = [
    wrong_input.missing_data,
    wrong_input.missing_validation_data,
    wrong_input.empty_data,
    wrong_input.truncated_line,
    wrong_input.row_without_chosen,
    wrong_input.no_chat_template,
    wrong_input.no_tokenizer,
    wrong_input.stages_do_not_divide_layers,
    wrong_input.chunks_do_not_divide_layers,
    wrong_input.expert_parallel_of_a_dense_model,
    wrong_input.missing_shard,
    wrong_input.missing_checkpoint,
    wrong_input.export_over_something,
    wrong_input.save_without_permission,
    wrong_input.save_among_the_checkpoints_of_another_run,
    wrong_input.save_into_the_model,
    wrong_input.save_into_a_checkpoint,
    wrong_input.export_into_a_checkpoint_to_come,
    wrong_input.export_where_the_run_logs,
    wrong_input.export_above_the_run,
    wrong_input.resume_from_nothing,
    mis_shaped,
    tokenizer_of_another_model,
]


@pytest.mark.parametrize("mistake", SEEN)
def test_mistakes_show_on_one_process(pool: WorkerPool, inputs: Inputs, mistake: Callable[[Inputs], Wrong]) -> None:
    wrong = mistake(inputs)
    outputs = {"save": inputs.folder / "run", "export_hf": inputs.folder / "out"}
    before = sorted(inputs.folder.rglob("*"))
    code, _, err = dry(pool, flags(inputs.checkpoint, inputs.data, **{**outputs, **wrong.settings}))
    assert code == 2
    [line] = err.splitlines()
    for words in wrong.words:
        assert words in line
    assert sorted(inputs.folder.rglob("*")) == before


def count_processes(argv: list[str], world: str) -> tuple[int, str, str]:
    """On a rank: a dry run under a launcher's WORLD_SIZE."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", world)
        return run_main(argv)


def test_the_number_of_processes(pool: WorkerPool, inputs: Inputs) -> None:
    argv = [*flags(inputs.checkpoint, inputs.data, **BIG), "--dry-run"]
    [(code, out, _)] = pool.run(1, count_processes, argv, "8")
    assert code == 0 and "pipeline 2 x data 2" in out
    [(code, _, err)] = pool.run(1, count_processes, argv, "6")
    assert code == 2 and "6 processes cannot be cut into" in err and "start a multiple of 4" in err
    for world in ("0", "-4", "many", ""):
        [(code, _, err)] = pool.run(1, count_processes, argv, world)
        assert code == 2 and f"WORLD_SIZE is {world!r}, which is not a number of processes" in err


@pytest.mark.parametrize("tokenizer", [True, False])
def test_a_config_alone(pool: WorkerPool, inputs: Inputs, tokenizer: bool) -> None:
    """A model too large for this machine: the weights, and even the tokenizer, are not there."""
    alone = inputs.folder / "alone"
    alone.mkdir()
    for file in inputs.checkpoint.iterdir():
        if file.name == "config.json" or (tokenizer and file.suffix != ".safetensors"):
            shutil.copy(file, alone)
    code, out, err = dry(pool, flags(alone, inputs.data, **BIG))
    assert (code, err) == (0, "")
    assert "no weights here to check" in out
    assert ("has no tokenizer: raw data was not tokenized" in out) == (not tokenizer)
    code, _, err = dry(pool, flags(alone, inputs.folder / "none.jsonl"))
    assert code == 2 and "there is no such file" in err
    [(code, _, err)] = pool.run(1, run_main, flags(alone, inputs.data))
    assert code == 2 and "has neither model.safetensors nor" in err
    config = alone / "config.json"
    code, out, _ = dry(pool, flags(config, inputs.data))
    assert code == 0 and f"starts from:     {config}" in out


def test_bin_weights_serve_where_nothing_is_read_from_them(pool: WorkerPool, inputs: Inputs) -> None:
    model = inputs.copy_checkpoint()
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    argv = flags(model, inputs.data, train_iters=1)
    for more in ([], ["--dry-run"]):
        [(code, _, err)] = pool.run(1, run_main, [*argv, *more])
        assert code == 2 and "convert them with tools/hf_to_megatron.py" in err
    converted = to_megatron(model, inputs.folder / "converted")
    assert dry(pool, [*argv, "--load", str(converted)])[0] == 0
    export = inputs.folder / "out"
    assert pool.run(1, train, [*argv, "--load", str(converted), "--export-hf", str(export)]) == [None]
    assert (export / "model.safetensors").is_file()
