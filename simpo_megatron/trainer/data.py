"""The pairs of a run on every rank: all map prepared sets; rank 0 tokenizes raw files and sends their pairs."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from simpo_megatron.config.data import DataConfig
from simpo_megatron.data import InMemoryPairs, Pairs, load_preferences
from simpo_megatron.data.blend import Blend, parse_blend
from simpo_megatron.data.prepared_format import is_prepared
from simpo_megatron.data.prepared_set import PreparedPairs
from simpo_megatron.data.tokenizer import fingerprint, load_tokenizer
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.parallel.together import host_group, raise_on_all_ranks
from simpo_megatron.trainer.distributed import broadcast_pairs


def load_data(data: DataConfig, hf: HFCheckpoint) -> tuple[Pairs, Pairs | None, list[str]]:
    """Loads the training and the validation pairs.

    Collectives: for each source one broadcast (whether it is prepared), and those of `raise_on_all_ranks` and
    `broadcast_pairs`.

    Args:
        data: the settings.
        hf: the model, whose tokenizer is used.

    Returns:
        The training pairs, the validation pairs or None, and one message on each source (on rank 0; none elsewhere).

    Raises:
        UserError: a source cannot be read, or was prepared for another model; the same on every rank.
    """
    loader = _Loader(data, hf)
    train = loader.load(parse_blend(data.training_sources, "--train-data"))
    valid = None if data.valid_data is None else loader.load(parse_blend(data.valid_data, "--valid-data"))
    return train, valid, loader.messages


class _Loader:
    def __init__(self, data: DataConfig, hf: HFCheckpoint) -> None:
        self.data, self.hf = data, hf
        self.messages: list[str] = []
        self.tokenizer: Any = None
        with raise_on_all_ranks():
            if dist.get_rank() == 0:
                self.tokenizer = load_tokenizer(hf.path)

    def load(self, blend: Blend) -> Pairs:
        return blend.join([self._load(source) for source in blend.sources])

    def _load(self, source: str) -> Pairs:
        first = dist.get_rank() == 0
        prepared = [is_prepared(source)]
        # All ranks take rank 0's answer, so that a node without the files fails.
        dist.broadcast_object_list(prepared, src=0, group=host_group())
        pairs: Pairs | None = None
        with raise_on_all_ranks():
            if prepared[0]:
                pairs = open_prepared(source, self.data, self.hf, self.tokenizer)
                if first:
                    self.messages.append(pairs.report.summary(source))
            elif first:
                pairs, report = load_preferences(
                    source, self.tokenizer, self.data.options, eos_token_ids=self.hf.eos_token_ids, progress=True
                )
                self.messages.append(report.summary(source))
            if first:
                assert pairs is not None
                check_ids(pairs, self.hf, source)
        if isinstance(pairs, PreparedPairs):
            return pairs
        return broadcast_pairs(pairs if isinstance(pairs, InMemoryPairs) else None)


def open_prepared(prefix: str, data: DataConfig, hf: HFCheckpoint, tokenizer: Any) -> PreparedPairs:
    """Maps a prepared set.

    Args:
        prefix: of its files.
        data: the settings of the run.
        hf: the model of the run.
        tokenizer: of the model; None: neither the model nor the checksums are compared (ranks other than 0).

    Raises:
        UserError: the set cannot be read, was prepared for another model or with other options than those given, or
            holds a sequence that is too long for a packed row.
    """
    pairs = PreparedPairs(prefix, verify=tokenizer is not None)
    if tokenizer is not None:
        pairs.check(fingerprint(tokenizer, hf.eos_token_ids), data.given_options, hf.path)
    if 2 * pairs.longest_sequence > data.seq_length:
        raise UserError(
            f"{prefix} holds a sequence of {pairs.longest_sequence} tokens, but a packed row of --seq-length "
            f"{data.seq_length} takes sequences of at most {data.seq_length // 2}; raise --seq-length to at least "
            f"{2 * pairs.longest_sequence}, or prepare the set with --max-length {data.seq_length // 2}"
        )
    return pairs


def check_ids(pairs: Pairs, hf: HFCheckpoint, source: str) -> None:
    """Compares the largest token id with the vocabulary.

    Args:
        pairs: of a source.
        hf: the model.
        source: its name, for the error.

    Raises:
        UserError: the model does not have the id.
    """
    if pairs.largest_token >= hf.architecture.vocab_size:
        raise UserError(
            f"the tokenizer of {hf.path} gives token id {pairs.largest_token} for {source}, but the model's "
            f"vocab_size is {hf.architecture.vocab_size}; use the tokenizer the model was made with"
        )
