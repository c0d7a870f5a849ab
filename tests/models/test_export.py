"""Export is the inverse of loading in every layout, and a failed export leaves nothing behind."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from simpo_megatron.errors import UserError
from tests.support import families as tiny
from tests.support.distributed import LOCAL, NEWEST

TP2 = {"tensor_model_parallel_size": 2}
SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}


def _needs(name: str) -> dict[str, Any]:
    """Settings that a family needs under tensor parallelism."""
    whole = {"expert_tensor_parallel_size": 1} if name == "gpt_oss" else {}
    return {"sequence_parallel": True, **whole} if name in tiny.WITH_EXPERTS else {}


def load_and_export(source: Path, target: Path, bf16: bool, layout: dict[str, Any], max_file_bytes: int) -> None:
    from simpo_megatron.models.export import export_hf

    hf, _, models = tiny.build(source, bf16=bf16, **layout)
    export_hf(models, hf, target, max_file_bytes=max_file_bytes)


def fail_to_export(source: Path, target: Path, layout: dict[str, Any]) -> str:
    """On a rank: exports while the disk of the second pipeline stage is full; returns the error that is raised."""
    from megatron.core import parallel_state

    from simpo_megatron.models import export

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    hf, _, models = tiny.build(source, **layout)
    original = export.save_file
    if parallel_state.get_pipeline_model_parallel_rank() == 1:
        export.save_file = full_disk
    try:
        with pytest.raises(UserError) as raised:
            export.export_hf(models, hf, target)
    finally:
        export.save_file = original
    return str(raised.value)


def read(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


ROUND_TRIPS: list[tuple[str, int, dict[str, Any]]] = [
    *((name, 4, {**TP2, **PP2, **_needs(name)}) for name in tiny.MODELS),
    ("mixtral", 4, {**SP, "expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1}),
    ("qwen3_moe", 4, {**SP, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
    ("gpt_oss", 4, {"expert_model_parallel_size": 4}),
    *((name, world, layout) for name in ("llama_tied", "qwen2") for world, layout in ((1, {}), (2, {}), (2, VPP2))),
]


# Models with every kind of module that Transformer Engine's layers name in their own way.
OF_TE = ("llama_tied", "llama_biases", "phi3", "glm4", "qwen3", "olmo2", "gemma3", *tiny.WITH_EXPERTS)


@pytest.mark.parametrize(
    "pool, name, world, layout",
    [
        *((LOCAL, *case) for case in ROUND_TRIPS),
        *(pytest.param(NEWEST, *case, marks=pytest.mark.te) for case in ROUND_TRIPS if case[0] in OF_TE),
    ],
    ids=str,
    indirect=["pool"],
)
def test_round_trip_keeps_every_bit(name: str, world: int, layout: dict[str, Any], pool: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    model = tiny.make(name, source, torch.bfloat16)
    pool.run(world, load_and_export, source, target, True, layout, 20_000)
    before, after = read(source), read(target)
    assert before.keys() == after.keys()
    for key in before:
        assert after[key].dtype == before[key].dtype
        assert torch.equal(before[key], after[key]), key
    for file in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        assert (target / file).read_bytes() == (source / file).read_bytes()
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in before.values())
    assert {path.name for path in target.glob("*.safetensors")} == set(index["weight_map"].values())

    again = type(model).from_pretrained(target)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_one_file_needs_no_index(pool: Any, tmp_path: Path) -> None:
    tiny.make("llama", tmp_path / "source")
    pool.run(2, load_and_export, tmp_path / "source", tmp_path / "target", False, TP2, 2**30)
    assert sorted(path.name for path in (tmp_path / "target").glob("model*")) == ["model.safetensors"]
    assert not list(tmp_path.glob(".target*"))


def export_beside_others(source: Path, target: Path) -> list[Path]:
    """On a rank: exports, and returns what is flushed to the disk. Two other processes began an export before."""
    from simpo_megatron.models import export

    host = socket.gethostname()
    for pid in (1, 2**22 + 1):  # one is running, and one number is too large for a process
        target.with_name(f".{target.name}.{host}.{pid}.partial").mkdir()
    flushed, sync = [], export.sync

    def record(path: Path) -> None:
        sync(path)
        flushed.append(path)

    export.sync = record
    try:
        load_and_export(source, target, False, {}, 2**30)
    finally:
        export.sync = sync
    return flushed


def test_a_partial_folder_is_its_process_own_and_flushed(pool: Any, tmp_path: Path) -> None:
    tiny.make("llama", tmp_path / "source")
    [flushed] = pool.run(1, export_beside_others, tmp_path / "source", tmp_path / "target")
    assert [path.name for path in tmp_path.glob(".target*")] == [f".target.{socket.gethostname()}.1.partial"]
    *files, partial, parent = flushed
    assert parent == tmp_path and {path.parent for path in files} == {partial}
    assert {path.name for path in files} == {path.name for path in (tmp_path / "target").iterdir()}


def test_sharded_checkpoints_load(pool: Any, tmp_path: Path) -> None:
    tiny.make("qwen3", tmp_path / "source")
    pool.run(1, load_and_export, tmp_path / "source", tmp_path / "sharded", False, {}, 20_000)
    pool.run(2, load_and_export, tmp_path / "sharded", tmp_path / "single", False, TP2, 2**30)
    before, after = read(tmp_path / "source"), read(tmp_path / "single")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_full_disk_is_an_error_on_every_rank(pool: Any, tmp_path: Path) -> None:
    tiny.make("llama", tmp_path / "source")
    target = tmp_path / "target"
    messages = pool.run(4, fail_to_export, tmp_path / "source", target, {**TP2, **PP2})
    assert len(set(messages)) == 1
    assert "--export-hf: " in messages[0] and "model-00002-of-00002.safetensors cannot be written" in messages[0]
    assert messages[0].endswith("No space left on device; free space there, or export elsewhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def refuse_export(source: Path, target: Path) -> str:
    from simpo_megatron.models.export import export_hf

    hf, _, models = tiny.build(source)
    with pytest.raises(UserError) as raised:
        export_hf(models, hf, target)
    return str(raised.value)


def test_a_target_that_holds_something_is_refused(pool: Any, tmp_path: Path) -> None:
    tiny.make("llama", tmp_path / "source")
    for message in pool.run(2, refuse_export, tmp_path / "source", tmp_path / "source"):
        assert "is not empty" in message
