"""Verification finds every flipped byte and names its tensor; equal checkpoints pass with and without their source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from simpo_megatron.checkpoint.manifest import check_manifest
from simpo_megatron.checkpoint.source import read_source
from simpo_megatron.checkpoint.to_hf import read_checkpoint
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import read_hf_config
from tests.support import families as tiny
from tests.support.checkpoints import argv, to_megatron
from tools import verify_checkpoint

FORMATS = {
    "torch_dist": {},
    "torch": {"format": "torch", "tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
}


@pytest.fixture(scope="module", params=FORMATS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and its conversion."""
    folder = tmp_path_factory.mktemp("verify")
    tiny.make("qwen3_moe", folder / "hf", torch.bfloat16, num_hidden_layers=2)
    return folder / "hf", to_megatron(folder / "hf", folder / "megatron", **FORMATS[request.param])


def verify(capsys: pytest.CaptureFixture[str], **flags: Path) -> tuple[int, str]:
    capsys.readouterr()
    code = verify_checkpoint.main(argv(**flags))
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_equal(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    hf, megatron = pair
    assert verify(capsys, hf_checkpoint=hf, load=megatron)[0] == 0
    assert verify(capsys, load=megatron)[0] == 0
    assert verify(capsys, hf_checkpoint=hf, load=megatron / "release")[0] == 0


def test_a_flipped_bit_of_any_tensor_is_named(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    hf, megatron = pair
    saved = read_checkpoint(megatron / "release", read_source(hf))
    for stored in saved.parameters[:: max(1, len(saved.parameters) // 12)]:
        for block in (stored.tiles[-1], *stored.replicas[-1:]):
            path = Path(block.file)
            flip(path, block.offset)
            code, output = verify(capsys, load=megatron)
            assert code == 1
            assert any(name in output for name in stored.parameter.hf), output
            flip(path, block.offset)
    assert verify(capsys, load=megatron)[0] == 0


def test_a_flipped_bit_of_any_file_is_found(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    hf, megatron = pair
    for path in sorted(path for path in megatron.rglob("*") if path.is_file()):
        size = path.stat().st_size
        for at in sorted({0, 1, size // 3, size // 2, size - 30, size - 1} & set(range(size))):
            flip(path, at)
            code, output = verify(capsys, hf_checkpoint=hf, load=megatron)
            assert code in (1, 2), (path, at)
            assert any(name in output for name in (path.name, "model.layers", "decoder.layers", str(path.parent))), (
                output
            )
            assert "Traceback" not in output
            flip(path, at)
    assert verify(capsys, hf_checkpoint=hf, load=megatron)[0] == 0


def test_another_source_and_no_manifest(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, megatron = pair
    shutil.copytree(hf, tmp_path / "hf")
    tensors = load_file(hf / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name][3, 5] += 1
    save_file(tensors, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    code, output = verify(capsys, hf_checkpoint=tmp_path / "hf", load=megatron)
    assert code == 1 and name in output and "1 differences" in output
    shutil.copytree(megatron, tmp_path / "megatron")
    (tmp_path / "megatron" / "release" / "conversion.json").unlink()
    assert verify(capsys, hf_checkpoint=hf, load=tmp_path / "megatron")[0] == 0
    assert verify(capsys, load=tmp_path / "megatron")[0] == 2


def test_zeros_do_not_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a comparison with a tolerance lets through: a checkpoint of zeros of the right shapes."""
    tiny.make("llama", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    megatron = to_megatron(tmp_path / "hf", tmp_path / "megatron")
    save_file({name: tensor * 0 for name, tensor in tensors.items()}, tmp_path / "hf" / "model.safetensors")
    code, output = verify(capsys, hf_checkpoint=tmp_path / "hf", load=megatron)
    assert code == 1 and f"{len(tensors)} differences" in output


def test_the_manifest_is_compared_with_the_model(tmp_path: Path) -> None:
    tiny.make("llama3", tmp_path / "hf")
    release = to_megatron(tmp_path / "hf", tmp_path / "megatron") / "release"
    check_manifest(release, read_source(tmp_path / "hf"))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    changed = {
        "rope": {"rope_parameters": {**config["rope_parameters"], "factor": 4.0}},
        "transformer": {"rms_norm_eps": 1e-3},
        "tied": {"tie_word_embeddings": True},
    }
    for name, settings in changed.items():
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config | settings))
        with pytest.raises(UserError, match=f"says {name} "):
            check_manifest(release, read_hf_config(tmp_path / "hf"))
