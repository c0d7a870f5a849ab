"""Broken and hostile input: one sentence, exit code 2, and nothing that looks complete."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from simpo_megatron.files import WRITTEN
from tests.support import families as tiny
from tests.support.checkpoints import PROGRAMS, argv, to_megatron
from tools import verify_checkpoint


class Bomb:
    """Makes a file when it is unpickled by a reader that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A source in two shards, and its conversions."""
    folder = tmp_path_factory.mktemp("hostile")
    tiny.make("qwen2", folder / "hf")
    tensors = load_file(folder / "hf" / "model.safetensors")
    (folder / "hf" / "model.safetensors").unlink()
    names = sorted(tensors)
    held = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file, own in held.items():
        save_file({name: tensors[name] for name in own}, folder / "hf" / file)
    index = {"weight_map": {name: file for file, own in held.items() for name in own}}
    (folder / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    dist = to_megatron(folder / "hf", folder / "dist")
    ranks = to_megatron(folder / "hf", folder / "ranks", format="torch", tensor_model_parallel_size=2)
    return folder / "hf", dist, ranks


def edit_json(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def edit_index(hf: Path, **entries: str) -> None:
    path = hf / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= entries
    path.write_text(json.dumps(index))


def edit_tensors(hf: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = hf / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def edit_header(hf: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = hf / "model-00001-of-00002.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


SHARD = "model-00001-of-00002.safetensors"
SOURCES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (lambda hf: (hf / SHARD).unlink(), SHARD),
    "truncated header": (lambda hf: os.truncate(hf / SHARD, 100), "truncated"),
    "truncated data": (lambda hf: os.truncate(hf / SHARD, (hf / SHARD).stat().st_size - 1), "truncated"),
    "index names an absent file": (lambda hf: edit_index(hf, **{"model.norm.weight": "absent.safetensors"}), "absent"),
    "index leaves the folder": (lambda hf: edit_index(hf, **{"model.norm.weight": "../x.safetensors"}), "../x"),
    "index is no map": (lambda hf: edit_json(hf / "model.safetensors.index.json", weight_map=[1]), "weight_map"),
    "integers": (
        lambda hf: edit_tensors(hf, lambda t: t.update({name: t[name].to(torch.int64) for name in [*t][:1]})),
        "I64",
    ),
    "two dtypes in one parameter": (
        lambda hf: edit_tensors(
            hf, lambda t: t.update({n: t[n].half() for n in t if n.endswith("layers.0.self_attn.k_proj.weight")})
        ),
        "different dtypes",
    ),
    "shapes against config": (lambda hf: edit_json(hf / "config.json", intermediate_size=64), "shape"),
    "layers against config": (
        lambda hf: edit_json(hf / "config.json", num_hidden_layers=5, layer_types=None),
        "layers.4",
    ),
    "fewer layers than weights": (
        lambda hf: edit_json(hf / "config.json", num_hidden_layers=3, layer_types=None),
        "does not use",
    ),
    "unknown architecture": (lambda hf: edit_json(hf / "config.json", model_type="gemma3"), "gemma3"),
    "unknown rope": (lambda hf: edit_json(hf / "config.json", rope_parameters={"rope_type": "yarn"}), "yarn"),
    "a tensor too many": (lambda hf: edit_tensors(hf, lambda t: t.update(spare=torch.zeros(2))), "spare"),
    "header lies about a size": (
        lambda hf: edit_header(hf, lambda h: next(iter(h.values())).update(data_offsets=[0, 4])),
        "bytes",
    ),
    "header lies about a place": (
        lambda hf: edit_header(hf, lambda h: h["lm_head.weight"].update(data_offsets=[-38976, 0])),
        "not a safetensors file",
    ),
    "config is no JSON": (lambda hf: (hf / "config.json").write_text("{"), "config.json"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_bad_source(
    case: str, models: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_it, message = SOURCES[case]
    shutil.copytree(models[0], tmp_path / "hf")
    break_it(tmp_path / "hf")
    check_refused(PROGRAMS["to_megatron"], argv(hf_checkpoint=tmp_path / "hf", save=tmp_path / "out"), message, capsys)
    assert not (tmp_path / "out").exists()


def check_refused(
    program: Callable[[list[str]], int], line: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert program(line) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error, error


def edit_metadata(folder: Path, edit: Callable[[Any], Any]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def move_file(metadata: Any) -> None:
    for place in metadata.storage_data.values():
        place.relative_path = "../" + place.relative_path


def drop_chunk(metadata: Any) -> None:
    index = next(index for index in metadata.storage_data if index.fqn == "output_layer.weight")
    del metadata.storage_data[index]


def add_key(metadata: Any) -> None:
    metadata.state_dict_metadata["decoder.spare"] = metadata.state_dict_metadata["decoder.final_layernorm.weight"]


CHECKPOINTS: dict[str, tuple[int, Callable[[Path, Path], Any], str]] = {
    "metadata runs code": (1, lambda at, bomb: (at / ".metadata").write_bytes(pickle.dumps(Bomb(bomb))), "mkdir"),
    "common.pt runs code": (1, lambda at, bomb: torch.save({"args": Bomb(bomb)}, at / "common.pt"), "mkdir"),
    "rank file runs code": (
        2,
        lambda at, bomb: torch.save({"model": Bomb(bomb)}, at / "mp_rank_00" / "model_optim_rng.pt"),
        "mkdir",
    ),
    "metadata is garbage": (1, lambda at, _: (at / ".metadata").write_bytes(b"\x80\x04]"), ".metadata"),
    "metadata is another object": (1, lambda at, _: (at / ".metadata").write_bytes(pickle.dumps({1: 2})), ".metadata"),
    "path leaves the folder": (1, lambda at, _: edit_metadata(at, move_file), "not in that folder"),
    "missing data file": (1, lambda at, _: (at / "__0_0.distcp").unlink(), "lacks __0_0.distcp"),
    "truncated data file": (1, lambda at, _: os.truncate(at / "__0_0.distcp", 5000), "__0_0.distcp"),
    "missing chunk": (1, lambda at, _: edit_metadata(at, drop_chunk), "output_layer"),
    "unmapped tensor": (1, lambda at, _: edit_metadata(at, add_key), "decoder.spare"),
    "not complete": (1, lambda at, _: (at / "metadata.json").unlink(), "not a complete checkpoint"),
    "another format": (1, lambda at, _: edit_json(at / "metadata.json", sharded_backend="zarr"), "zarr"),
    "tracker is garbage": (1, lambda at, _: (at.parent / "latest_checkpointed_iteration.txt").write_text("x/y"), "x/y"),
    "missing rank": (2, lambda at, _: shutil.rmtree(at / "mp_rank_00"), "lacks the file of tensor"),
    "truncated rank": (
        2,
        lambda at, _: os.truncate(at / "mp_rank_01" / "model_optim_rng.pt", 9000),
        "not a torch.save file",
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_bad_checkpoint(
    case: str, models: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    which, break_it, message = CHECKPOINTS[case]
    shutil.copytree(models[which], tmp_path / "load")
    break_it(tmp_path / "load" / "release", tmp_path / "bomb")
    line = argv(load=tmp_path / "load", hf_reference=models[0], save=tmp_path / "out")
    if "common" in case:
        line = argv(load=tmp_path / "load", vocab_size=tiny.VOCAB, save=tmp_path / "out")
        check_refused(PROGRAMS["to_hf"], line, message, capsys)
    else:
        check_refused(PROGRAMS["to_hf"], line, message, capsys)
        check_refused(verify_checkpoint.main, argv(load=tmp_path / "load", hf_checkpoint=models[0]), message, capsys)
    assert not (tmp_path / "out").exists() and not (tmp_path / "bomb").exists()


def test_bin_that_runs_code(
    models: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hf").mkdir()
    shutil.copy(models[0] / "config.json", tmp_path / "hf")
    torch.save({"model.norm.weight": Bomb(tmp_path / "bomb")}, tmp_path / "hf" / "pytorch_model.bin")
    check_refused(PROGRAMS["to_megatron"], argv(hf_checkpoint=tmp_path / "hf", save=tmp_path / "out"), "mkdir", capsys)
    assert not (tmp_path / "bomb").exists() and not (tmp_path / "out").exists()


def test_trained_padding_is_not_dropped_silently(tmp_path: Path, capsys: pytest.CaptureFixture[str], pool: Any) -> None:
    tiny.make("llama", tmp_path / "hf")
    ranks = to_megatron(tmp_path / "hf", tmp_path / "ranks", format="torch")
    path = ranks / "release" / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    state["model"]["output_layer.weight"][tiny.VOCAB + 3] = 1.0
    torch.save(state, path)
    line = argv(load=ranks, hf_reference=tmp_path / "hf", save=tmp_path / "out")
    check_refused(PROGRAMS["to_hf"], line, "output_layer.weight has 1 rows beyond the vocabulary", capsys)
    assert PROGRAMS["to_hf"]([*line, "--drop-trained-padding"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_memory": "lots"}, "256MiB"),
        ({"max_memory": "5"}, "--max-memory 5 is 5 bytes; give the unit too, as in 5G"),
        ({"max_memory": "5MiB", "workers": 2}, "--max-memory 5.0 MiB is too little for 2 workers; give at least 14MiB"),
        ({"shard": "3/2"}, "3/2"),
        ({"tensor_model_parallel_size": 2}, "torch_dist loads at every layout"),
        ({"format": "torch", "tensor_model_parallel_size": 5}, "does not divide"),
        ({"format": "torch", "pipeline_model_parallel_size": 3}, "do not divide"),
        ({"format": "torch", "expert_model_parallel_size": 2}, "experts"),
        ({"resume": True, "overwrite": True}, "not allowed with"),
    ],
)
def test_bad_flags(
    flags: dict[str, Any],
    message: str,
    models: tuple[Path, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = argv(hf_checkpoint=models[0], save=tmp_path / "out", **flags)
    check_refused(PROGRAMS["to_megatron"], line, message, capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else(
    models: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    for program, flags in (
        ("to_megatron", {"hf_checkpoint": models[0]}),
        ("to_hf", {"load": models[1], "hf_reference": models[0]}),
    ):
        check_refused(PROGRAMS[program], argv(save=tmp_path / "out", **flags), "not empty", capsys)
        check_refused(PROGRAMS[program], argv(save=tmp_path / "out", overwrite=True, **flags), "did not write", capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_overwrite_replaces_no_model_that_came_from_elsewhere(
    models: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names tell nothing: a downloaded model has those of a converted one."""
    downloaded = tmp_path / "downloaded"
    shutil.copytree(models[0], downloaded)
    before = {path.name: path.read_bytes() for path in downloaded.iterdir()}
    flags = {"load": models[1], "hf_reference": models[0], "overwrite": True}
    check_refused(PROGRAMS["to_hf"], argv(save=downloaded, **flags), "did not write", capsys)
    assert {path.name: path.read_bytes() for path in downloaded.iterdir()} == before
    for folder in (tmp_path / "empty", tmp_path / "out"):
        assert PROGRAMS["to_hf"](argv(save=folder, **flags)) == 0
    out = tmp_path / "out"
    assert PROGRAMS["to_hf"](argv(save=out, **flags)) == 0, "what a conversion wrote is replaced"
    whole = {path.name for path in out.iterdir()}
    weights = next(out.glob("*.safetensors"))
    latest = (out / WRITTEN).stat().st_mtime_ns
    for change in (
        lambda: (out / "notes.txt").write_text("x"),
        lambda: (out / "runs").mkdir(),
        lambda: os.truncate(weights, weights.stat().st_size + 1),
        lambda: os.utime(weights, ns=(latest + 1, latest + 1)),  # another model of the same size
        lambda: (out / WRITTEN).unlink(),
    ):
        change()
        check_refused(PROGRAMS["to_hf"], argv(save=out, **flags), "did not write", capsys)
        assert {path.name for path in out.iterdir()} | {WRITTEN} >= whole
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "empty", out, copy_function=shutil.copy2)


def test_overwrite_keeps_what_was_added_to_a_converted_checkpoint(
    models: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = to_megatron(models[0], tmp_path / "out")
    (out / "release" / "notes.txt").write_text("x")
    line = argv(hf_checkpoint=models[0], save=out, overwrite=True)
    check_refused(PROGRAMS["to_megatron"], line, "did not write", capsys)
    (out / "release" / "notes.txt").unlink()
    assert PROGRAMS["to_megatron"](line) == 0


def test_a_vocabulary_given_twice(
    models: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = argv(load=models[1], hf_checkpoint=models[0], vocab_size=5, save=tmp_path / "out")
    check_refused(PROGRAMS["to_hf"], line, "--vocab-size 5 is for conversions without --hf-checkpoint", capsys)
