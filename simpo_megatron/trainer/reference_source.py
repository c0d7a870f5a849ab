"""What reference log-probs are made of, and those that the data brings along.

train = known_reference(pairs, weights, "bf16")       # None where the data has none

A file of log-probs is refused where its fingerprints of weights, tokenizer, template or tokens are others.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch.distributed as dist

from simpo_megatron.checkpoint.source import read_model
from simpo_megatron.data import BlendedPairs, Pairs
from simpo_megatron.data.pairs import REFERENCE
from simpo_megatron.data.prepared_set import PreparedPairs
from simpo_megatron.data.reference_file import ReferenceFile
from simpo_megatron.errors import UserError
from simpo_megatron.parallel.together import host_group, raise_on_all_ranks

_SAMPLE, _STRIDE = 2**12, 2**23  # bytes of a file of weights that its fingerprint reads, in every so many


def known_reference(pairs: Pairs, weights: Path, precision: str) -> Pairs | None:
    """The pairs with the reference log-probs that the data brings along: its columns or `PREFIX.reference`.

    Collectives: those of `raise_on_all_ranks`, and a broadcast.

    Args:
        pairs: the data set.
        weights: folder of the reference model, with which `PREFIX.reference` must have been made.
        precision: "bf16" or "fp32", of the run.

    Returns:
        None where there are none.

    Raises:
        UserError: some pairs have none, or they do not fit; the same on every rank.
    """
    with raise_on_all_ranks():
        if has_columns(pairs):
            return pairs
    return from_prefixes(pairs, lambda: run_made_of(weights_fingerprint_of(weights), precision))


def has_columns(pairs: Pairs) -> bool:
    """Whether the columns of the data hold reference log-probs.

    Raises:
        UserError: some pairs have them, and some have not.
    """
    known = np.isfinite(pairs.columns[REFERENCE[0]][:])
    if known.any() and not known.all():
        row = int(pairs.columns["row"][:][~known][0])
        raise UserError(
            f"{int((~known).sum())} of {len(pairs)} pairs have no `ref_chosen_logps` and `ref_rejected_logps`, first "
            f"the pair of row {row}; give them to all pairs, or to none"
        )
    return bool(known.all())


def run_made_of(weights: str | None, precision: str) -> dict[str, str]:
    """What is the same for all data sets of a run. Without `weights` they are not compared."""
    return {"precision": precision} | ({} if weights is None else {"weights": weights})


def tokens_made_of(pairs: Pairs) -> dict[str, str]:
    """A fingerprint of the ids, and of where the responses begin."""
    lengths = np.stack([pairs.prompt_length[:], pairs.chosen_length[:], pairs.rejected_length[:]]).astype("<i4")
    return {"tokens": f"{pairs.fingerprint:08x}{zlib.crc32(lengths.tobytes()):08x}"}


def from_prefixes(pairs: Pairs, made_of: Callable[[], dict[str, str]]) -> Pairs | None:
    """The pairs with the numbers of `PREFIX.reference`, if each of their sources is a prepared set that has one.

    Collectives: those of `raise_on_all_ranks`, and a broadcast.

    Args:
        pairs: the data set.
        made_of: what the files must have been made of. Rank 0 calls it where there is a file: it may read weights.
    """
    parts = pairs.parts if isinstance(pairs, BlendedPairs) else [pairs]
    found: list[np.ndarray] = []
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            for part in parts:
                if isinstance(part, PreparedPairs) and (path := reference_path(part.prefix)).is_file():
                    found.append(_read_prefix(path, part, made_of()))
    sums = broadcast_sums(np.concatenate(found) if len(found) == len(parts) else None)
    return None if sums is None else pairs.with_reference_sums(sums)


def reference_path(prefix: str) -> Path:
    """The file of reference log-probs beside a prepared set."""
    return Path(f"{prefix}.reference")


def prepared_made_of(pairs: PreparedPairs) -> dict[str, str]:
    """What of a prepared set its reference log-probs are made of."""
    return {**pairs.about["fingerprint"], **tokens_made_of(pairs)}


def _read_prefix(path: Path, pairs: PreparedPairs, made_of: dict[str, str]) -> np.ndarray:
    file = ReferenceFile.read(path)
    file.check(
        {**made_of, **prepared_made_of(pairs)},
        "make it again with tools/score_reference.py, name its model as --reference-checkpoint, or remove it",
    )
    if file.missing:
        raise UserError(
            f"{path} is not complete: {file.missing} of {len(pairs)} pairs are missing; run tools/score_reference.py "
            "again, which goes on where it stopped"
        )
    return file.sums


def weights_fingerprint_of(folder: Path) -> str:
    """The fingerprint of the weights of a Hugging Face checkpoint.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    hf = read_model(folder, loaded=False, dry_run=False)
    return weights_fingerprint({tensor.file for tensor in hf.tensors.values()})


def weights_fingerprint_in(folder: Path) -> str | None:
    """The fingerprint of all files of weights in a folder, of any model; None where it has none."""
    files = {*folder.glob("*.safetensors"), *folder.glob("*.bin")}
    return weights_fingerprint(files) if files else None


def weights_fingerprint(files: Iterable[Path]) -> str:
    """A digest of files of weights: their names and sizes, and samples from end to end.

    Training changes a model everywhere, so samples tell two models apart and a large model is read in seconds.
    """
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for start in range(0, size, _STRIDE):
                file.seek(start)
                digest.update(file.read(_SAMPLE))
            file.seek(max(0, size - _SAMPLE))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:32]


def broadcast_sums(sums: np.ndarray | None) -> np.ndarray | None:
    """Rank 0's array on every rank. Collectives: one broadcast of an object, over the host's group."""
    sent = [sums if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(sent, src=0, group=host_group())
    return sent[0]
