"""An output layer in the files of a model whose config.json ties it to the embedding. No torch, no Megatron."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simpo_megatron.errors import UserError

if TYPE_CHECKING:
    from simpo_megatron.models.hf_checkpoint import HFCheckpoint
    from simpo_megatron.models.weight_files import HFTensor

OUTPUT_LAYER = "lm_head.weight"
_BLOCK = 2**24  # bytes that are compared at a time


def check_tied_output(hf: HFCheckpoint) -> None:
    """Refuses an output layer with other bytes than the embedding: transformers 5 does not tie such a model.

    Both tensors are read where the files have both, which few tied checkpoints do.

    Raises:
        UserError: they differ.
    """
    embedding, output = (hf.tensors.get(name) for name in (hf.architecture.weights[0].hf[0], OUTPUT_LAYER))
    if not hf.architecture.tied or embedding is None or output is None or _same(embedding, output):
        return
    raise UserError(
        f"config.json of {hf.path} sets tie_word_embeddings, or leaves it to its default, true, but {OUTPUT_LAYER} in "
        f"{output.file} is not the embedding; set it to false if the model has an output layer of its own, else remove "
        "that tensor"
    )


def _same(one: HFTensor, other: HFTensor) -> bool:
    if (one.shape, one.dtype, one.length) != (other.shape, other.dtype, other.length) or one.length is None:
        return False
    with one.file.open("rb") as ours, other.file.open("rb") as theirs:
        ours.seek(one.start)
        theirs.seek(other.start)
        for done in range(0, one.length, _BLOCK):
            size = min(_BLOCK, one.length - done)
            if ours.read(size) != theirs.read(size):
                return False
    return True
