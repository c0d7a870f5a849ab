"""The working set stays within --max-memory, whatever the size of the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from safetensors import safe_open

from tests.support.checkpoints import argv
from tests.support.distributed import free_environment

MIB = 2**20
# Prints the peak resident bytes before and after the work itself.
PROGRAM = """
import resource, sys
from simpo_megatron.checkpoint import estimate, to_hf, to_megatron, verify
from simpo_megatron.checkpoint.formats.torch_save_file import skeleton_of
from simpo_megatron.checkpoint.transfer import progress
import torch
skeleton_of(lambda: torch.empty(4))
from torch.distributed.checkpoint import filesystem
from tools import hf_to_megatron, megatron_to_hf, verify_checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
program = {"to_megatron": hf_to_megatron, "to_hf": megatron_to_hf, "verify": verify_checkpoint}[sys.argv[1]]
assert program.main(sys.argv[2:]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def make_sparse(folder: Path) -> int:
    """A Llama of 200 MiB in one file of zeros, most of them in the embeddings; returns its bytes."""
    config = {
        "model_type": "llama",
        "vocab_size": 64000,
        "hidden_size": 512,
        "intermediate_size": 8192,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (64000, 512), "lm_head.weight": (64000, 512), "model.norm.weight": (512,)}
    for layer in range(3):
        own = {
            "input_layernorm": (512,),
            "post_attention_layernorm": (512,),
            "self_attn.q_proj": (512, 512),
            "self_attn.k_proj": (256, 512),
            "self_attn.v_proj": (256, 512),
            "self_attn.o_proj": (512, 512),
            "mlp.gate_proj": (8192, 512),
            "mlp.up_proj": (8192, 512),
            "mlp.down_proj": (512, 8192),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + at)
    return at


def growth(program: str, **flags: object) -> int:
    """Bytes by which a program's peak exceeds what its imports take."""
    line = [sys.executable, "-c", PROGRAM, program, *argv(**flags)]
    done = subprocess.run(line, capture_output=True, text=True, env=free_environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1]) * 1024


def test_peak_memory_follows_the_flag_and_not_the_model(tmp_path: Path) -> None:
    size = make_sparse(tmp_path / "hf")
    limit = 32 * MIB
    assert size > 5 * limit
    slack = 24 * MIB  # the plan, and what Python keeps
    flags = {"max_memory": "32MiB"}
    hf, dist, ranks, back = (tmp_path / name for name in ("hf", "dist", "ranks", "back"))
    assert growth("to_megatron", hf_checkpoint=hf, save=dist, **flags) < limit + slack
    layout = {"format": "torch", "tensor_model_parallel_size": 2, "transformer_impl": "local"}
    assert growth("to_megatron", hf_checkpoint=hf, save=ranks, **layout, **flags) < limit + slack
    assert growth("to_hf", load=dist, hf_reference=hf, save=back, dtype="float32", **flags) < limit + slack
    assert growth("verify", load=ranks, hf_checkpoint=hf, **flags) < limit + slack
    with safe_open(back / "model.safetensors", framework="pt") as file:
        assert file.get_slice("lm_head.weight").get_shape() == [64000, 512]
