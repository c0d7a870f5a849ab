"""Weights and pairs at random, where --hf-checkpoint is a config.json without weights.

    with random_weights(hf, seed) as hf: ...                   # a whole checkpoint in a temporary folder
    pairs = random_pairs(hf.architecture.vocab_size, ...)      # where there is no tokenizer either

Weights are normal with the `initializer_range` of the config (0.02 without one); norms are 1.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from simpo_megatron.checkpoint.source import model_folder, tensor_bytes
from simpo_megatron.checkpoint.to_hf import safetensors_header
from simpo_megatron.data import InMemoryPairs
from simpo_megatron.disk import cannot_write, free_bytes, human
from simpo_megatron.errors import UserError
from simpo_megatron.models.dtypes import TORCH
from simpo_megatron.models.hf_checkpoint import HFCheckpoint, copied_files, read_hf_checkpoint
from simpo_megatron.models.weight_files import INDEX, MAX_FILE_BYTES, file_names, index_text, split_tensors
from simpo_megatron.parallel.together import host_group, raise_on_all_ranks

RANDOM_PAIRS = "random token ids"  # stands for a source in the settings
BLOCK = 2**22  # numbers that a thread draws at a time


def random_pairs(vocab_size: int, max_length: int, pairs: int, seed: int) -> InMemoryPairs:
    """Pairs of random token ids.

    Args:
        vocab_size: ids are below it.
        max_length: tokens of the longest prompt with one response; lengths are spread evenly up to it.
        pairs: how many.
        seed: of lengths and ids.
    """
    draw = np.random.default_rng(seed)
    half = max_length // 2
    lengths = draw.integers(1, [half + 1, max_length - half + 1, max_length - half + 1], (pairs, 3)).astype(np.int32)
    return InMemoryPairs.build(draw.integers(vocab_size, size=lengths.sum(), dtype=np.int32), lengths, {})


@contextmanager
def random_weights(hf: HFCheckpoint, seed: int) -> Iterator[HFCheckpoint]:
    """Draws the weights on rank 0, into a folder that is removed when the block ends.

    The folder is made where `tempfile` makes folders (TMPDIR), with config.json and what lies beside it.

    Collectives: a gather of errors twice, and a broadcast of the folder's name.

    Args:
        hf: with the tensors that its config implies (`checkpoint.source.imagine_weights`).
        seed: of the weights.

    Yields:
        The checkpoint in the folder.

    Raises:
        UserError: the disk has no room, or a rank does not see the folder; on every rank.
    """
    made: list[Path | None] = [None]
    with ExitStack() as stack:
        with raise_on_all_ranks():
            if dist.get_rank() == 0:
                made[0] = _write(hf, seed, stack)
        dist.broadcast_object_list(made, src=0, group=host_group())
        folder = made[0]
        assert folder is not None, "rank 0 has written"
        with raise_on_all_ranks():
            if not folder.is_dir():
                raise UserError(
                    f"rank {dist.get_rank()} does not see {folder}, where rank 0 wrote random weights; set TMPDIR to a "
                    "folder that all nodes share"
                )
            found = read_hf_checkpoint(folder)
        yield found


def _write(hf: HFCheckpoint, seed: int, stack: ExitStack) -> Path:
    """Writes the checkpoint into a new folder, which `stack` removes.

    Raises:
        UserError: the disk has no room, or fails.
    """
    sizes = {name: tensor_bytes(tensor) for name, tensor in hf.tensors.items()}
    parent = Path(tempfile.gettempdir())
    if (needed := sum(sizes.values())) > (free := free_bytes(parent)):
        raise UserError(
            f"the random weights of {hf.path} take {human(needed)}, but only {human(free)} are free in {parent}; "
            "free space there, or set TMPDIR to another folder"
        )
    try:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="simpo_random_weights.", dir=parent)))
        print(
            f"{hf.path} has no weights: random ones are used, {human(needed)} in {folder}, removed at the end",
            flush=True,
        )
        for file in copied_files(model_folder(hf.path)):
            shutil.copyfile(file, folder / file.name)
        shutil.copyfile(hf.path / "config.json" if hf.path.is_dir() else hf.path, folder / "config.json")
        _write_tensors(hf, sizes, folder, seed)
    except OSError as error:
        raise cannot_write(f"random weights in {parent}", error, "set TMPDIR to another folder") from error
    return folder


def _write_tensors(hf: HFCheckpoint, sizes: dict[str, int], folder: Path, seed: int) -> None:
    """Writes the tensors into safetensors files. At most one tensor is in memory."""
    seeds = count(seed)
    std = float(hf.config.get("initializer_range") or 0.02)
    files = split_tensors(sizes, MAX_FILE_BYTES)
    held = dict(zip(file_names(len(files)), files, strict=True))
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        for file, inside in held.items():
            with (folder / file).open("wb") as stream:
                stream.write(safetensors_header({name: hf.tensors[name] for name in inside})[0])
                for name in inside:
                    for block in _draw(name, hf, std, seeds, threads):
                        stream.write(block.view(torch.uint8).numpy().data)
    if len(files) > 1:
        index = index_text({name: file for file, inside in held.items() for name in inside}, sum(sizes.values()))
        (folder / INDEX).write_text(index, encoding="utf-8")


def _draw(
    name: str, hf: HFCheckpoint, std: float, seeds: Iterator[int], threads: ThreadPoolExecutor
) -> Iterator[Tensor]:
    """Yields the numbers of a tensor, a block [BLOCK] at a time; each block has a seed of its own."""
    tensor = hf.tensors[name]
    numbers, dtype = int(np.prod(tensor.shape)), TORCH[tensor.dtype]

    def block(size: int, own: int) -> Tensor:
        if "norm" in name:
            return torch.ones(size, dtype=dtype)
        return torch.empty(size).normal_(0, std, generator=torch.Generator().manual_seed(own)).to(dtype)

    lengths = [min(BLOCK, numbers - start) for start in range(0, numbers, BLOCK)]
    return threads.map(block, lengths, [next(seeds) for _ in lengths])
