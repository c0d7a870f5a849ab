"""Mistakes that a user can make: each ends `train.main` with one line and exit code 2, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.distributed import WorkerPool
from tests.support.runs import Inputs, flags, run_main
from tests.support.tiny import EXPERTS, make_checkpoint, make_rows, make_tokenizer

ROOT = Path(__file__).parent.parent
TP2 = {"tensor_model_parallel_size": 2}


@dataclass(frozen=True)
class Wrong:
    """Flags that differ from a good run, what the line must say, and the ranks it takes."""

    settings: dict[str, Any]
    words: list[str]
    world: int = 1
    argv: list[str] = field(default_factory=list)


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
    return Wrong({"train_data": path}, [f"{path}:3: not valid JSON", "fix or remove the line"])


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
    return Wrong({"train_data": path}, [f"{path}: no pair is left of 3 rows: dropped 3 with an empty response", "fix"])


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


def reference_column_that_is_nan(inputs: Inputs) -> Wrong:
    rows = make_rows(3)
    rows[1] |= {"ref_chosen_logps": float("nan"), "ref_rejected_logps": -3.0}
    path = inputs.with_rows(rows)
    return Wrong({"objective": "dpo", "train_data": path}, [f"{path}:2: `ref_chosen_logps`", "a finite number"])


def too_few_pairs_for_the_baseline_of_kto(inputs: Inputs) -> Wrong:
    words = ["--global-batch-size 1 is too small for --objective kto", "give at least 2"]
    return Wrong({"objective": "kto", "global_batch_size": 1}, words)


def a_flag_of_another_objective(inputs: Inputs) -> Wrong:
    settings = {"objective": "dpo", "kto_beta": 0.1}
    return Wrong(settings, ["--kto-beta belongs to --objective kto and has no effect with --objective dpo; drop it"])


def tensor_parallel_does_not_divide_heads(inputs: Inputs) -> Wrong:
    return Wrong({"tensor_model_parallel_size": 3}, ["--tensor-model-parallel-size 3 does not divide", "use 1, 2 or 4"])


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
    words = ["model_type 'mamba'; supported are ", " llama, mistral, mixtral, "]
    return Wrong({"hf_checkpoint": checkpoint}, words)


def longer_than_the_scaled_context(inputs: Inputs) -> Wrong:
    checkpoint = inputs.copy_checkpoint()
    config = json.loads((checkpoint / "config.json").read_text())
    scaling = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64}
    (checkpoint / "config.json").write_text(json.dumps({**config, **scaling}))
    words = ["--max-length 65: with the 'dynamic' rope scaling", "more than 64 tokens", "set it to 64 or less"]
    return Wrong({"hf_checkpoint": checkpoint, "seq_length": 256, "max_length": 65}, words)


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
    return Wrong(
        {"export_hf": checkpoint, **TP2}, [f"--export-hf {checkpoint} is not empty; export to a new directory"], world=2
    )


def save_among_the_checkpoints_of_another_run(inputs: Inputs) -> Wrong:
    folder = inputs.folder / "other"
    folder.mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    return Wrong({"save": folder}, [f"--save {folder} holds another run; resume it with --load {folder}"])


def save_into_the_model(inputs: Inputs) -> Wrong:
    checkpoint = inputs.copy_checkpoint()
    return Wrong({"hf_checkpoint": checkpoint, "save": checkpoint}, [f"--save {checkpoint} is the folder of a model"])


def save_into_a_checkpoint(inputs: Inputs) -> Wrong:
    folder = inputs.folder / "run" / "iter_0000001"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text("{}")
    return Wrong({"save": folder}, [f"--save {folder} is the folder of a checkpoint"])


def export_into_a_checkpoint_to_come(inputs: Inputs) -> Wrong:
    folder = inputs.folder / "run" / "iter_0000001"
    return Wrong({"export_hf": folder}, [f"--export-hf {folder} is in iter_0000001 of --save", "run/hf"])


def export_where_the_run_logs(inputs: Inputs) -> Wrong:
    folder = inputs.folder / "run" / "tensorboard"
    return Wrong({"export_hf": folder}, [f"--export-hf {folder} is where the run writes --tensorboard-dir {folder}"])


def export_above_the_run(inputs: Inputs) -> Wrong:
    folder, run = inputs.folder / "new", inputs.folder / "new" / "run"
    return Wrong({"export_hf": folder, "save": run}, [f"--export-hf {folder} is where the run writes --save {run}"])


def resume_from_nothing(inputs: Inputs) -> Wrong:
    folder = inputs.folder / "absent"
    return Wrong({"load": folder}, [f"--load {folder} has no latest_checkpointed_iteration.txt"])


def half_precision(inputs: Inputs) -> Wrong:
    return Wrong({}, ["--fp16 is not supported", "use bf16"], argv=["--fp16"])


def unknown_flag(inputs: Inputs) -> Wrong:
    return Wrong({"simpo_gama": 1}, ["--simpo-gama is not a flag; did you mean --simpo-gamma?"])


def unknown_setting(inputs: Inputs) -> Wrong:
    path = inputs.folder / "run.yaml"
    path.write_text("simpo_gama: 1\n")
    return Wrong({"config": path}, [f"--config {path}: simpo_gama is not a setting"])


def no_cuda(inputs: Inputs) -> Wrong:
    return Wrong({"device": "cuda"}, ["--device cuda finds no CUDA device; use --device cpu"])


def expert_parallel_of_a_dense_model(inputs: Inputs) -> Wrong:
    return Wrong(
        {"expert_model_parallel_size": 2}, ["--expert-model-parallel-size 2 needs a model with experts"], world=2
    )


def world_does_not_fit_context(inputs: Inputs) -> Wrong:
    return Wrong(
        {**TP2, "context_parallel_size": 2}, ["2 processes", "--context-parallel-size 2", "a multiple of 4"], world=2
    )


def world_does_not_fit_experts(inputs: Inputs) -> Wrong:
    checkpoint = make_checkpoint(inputs.folder / "experts", "Mixtral", **EXPERTS)
    return Wrong(
        {"hf_checkpoint": checkpoint, "expert_model_parallel_size": 4},
        [
            "2 processes cannot be cut into --expert-tensor-parallel-size 1",
            "--expert-model-parallel-size 4",
            "a multiple of 4",
        ],
        world=2,
    )


def rows_that_context_parallelism_cannot_cut(inputs: Inputs) -> Wrong:
    settings = {"context_parallel_size": 2, "seq_length": 508}
    return Wrong(settings, ["--seq-length 508 must be a multiple of 8", "use 504 or 512"], world=2)


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
    reference_column_that_is_nan,
    too_few_pairs_for_the_baseline_of_kto,
    a_flag_of_another_objective,
    tensor_parallel_does_not_divide_heads,
    stages_do_not_divide_layers,
    chunks_do_not_divide_layers,
    world_does_not_fit,
    world_does_not_fit_context,
    world_does_not_fit_experts,
    rows_that_context_parallelism_cannot_cut,
    expert_parallel_of_a_dense_model,
    missing_shard,
    missing_checkpoint,
    unsupported_model,
    longer_than_the_scaled_context,
    save_below_a_file,
    save_without_permission,
    export_below_a_file,
    export_over_something,
    save_among_the_checkpoints_of_another_run,
    save_into_the_model,
    save_into_a_checkpoint,
    export_into_a_checkpoint_to_come,
    export_where_the_run_logs,
    export_above_the_run,
    resume_from_nothing,
    half_precision,
    unknown_flag,
    unknown_setting,
    pytest.param(no_cuda, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")),  # type: ignore[list-item]
]


@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_input_is_one_line(pool: WorkerPool, inputs: Inputs, mistake: Callable[[Inputs], Wrong]) -> None:
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
