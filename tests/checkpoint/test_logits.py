"""`--logits` agrees for right weights, and names the layer for weights that were changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from simpo_megatron.checkpoint.source import read_source
from simpo_megatron.checkpoint.to_hf import read_checkpoint
from tests.support import families as tiny
from tests.support.checkpoints import to_megatron
from tests.support.distributed import free_environment

PROGRAM = """
import sys
from pathlib import Path
from simpo_megatron.checkpoint.source import read_source
from simpo_megatron.checkpoint.to_hf import read_checkpoint
from simpo_megatron.verify.layers import compare_forward
for pair in sys.argv[1:]:
    hf, release = map(Path, pair.split(":"))
    source = read_source(hf)
    print("code", compare_forward(source, read_checkpoint(release, source)))
"""


def test_layer_by_layer(tmp_path: Path) -> None:
    pairs = []
    for name in (
        "llama3",
        "qwen3_windows",
        "llama_biases",
        "glm4",
        "gemma2",
        "gemma3",
        "olmo3",
        "deepseek_v3",
        "deepseek_v2",
    ):
        tiny.make(name, tmp_path / name)
        release = to_megatron(tmp_path / name, tmp_path / f"{name}.megatron") / "release"
        pairs.append(f"{tmp_path / name}:{release}")
    torch.save(load_file(tmp_path / "llama3" / "model.safetensors"), tmp_path / "llama3" / "pytorch_model.bin")
    (tmp_path / "llama3" / "model.safetensors").unlink()
    last = read_checkpoint(release, read_source(tmp_path / name))
    stored = next(
        one for one in last.parameters if one.parameter.name.endswith("layers.2.self_attention.linear_proj.weight")
    )
    twin = tmp_path / "changed"
    twin.mkdir()
    for file in release.iterdir():
        (twin / file.name).write_bytes(file.read_bytes())
    path = twin / Path(stored.tiles[0].file).name
    data = bytearray(path.read_bytes())
    data[stored.tiles[0].offset + 3] ^= 0x02  # the exponent of one weight
    path.write_bytes(data)
    pairs.append(f"{tmp_path / name}:{twin}")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *pairs], capture_output=True, text=True, env=free_environment(), timeout=250
    )
    assert done.returncode == 0, done.stderr
    codes = [line for line in done.stdout.splitlines() if line.startswith("code")]
    assert codes == ["code 0"] * (len(pairs) - 1) + ["code 1"], done.stdout
    assert "1 of 6 differ, the first is layer 2" in done.stdout
