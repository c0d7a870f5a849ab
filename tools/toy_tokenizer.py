"""A byte-level BPE tokenizer trained on a few texts: for the quick start, the benchmarks and the tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str],
    chat_template: str | None,
    min_frequency: int = 0,
) -> PreTrainedTokenizerFast:
    """Trains a tokenizer.

    Args:
        texts: to learn from.
        vocab_size: most tokens that it may have: special tokens, the 256 bytes and merges.
        special_tokens: they get the first ids, in this order; the first is BOS, the second EOS and padding.
        chat_template: Jinja text, or None.
        min_frequency: a merge needs this many occurrences.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos, eos = special_tokens[:2]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos)
    fast.chat_template = chat_template
    return fast
