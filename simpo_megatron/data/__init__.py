"""Preference data: files -> `Pairs` -> the packed rows of each batch. It needs no GPU and no process group.

From a source to pairs:

    reading.py           rows of JSON Lines, Parquet and `datasets`, each with the place it came from
    schema.py            one row, in any of the usual forms -> `Preference`
    options.py           settings of tokenizing, truncating and dropping
    tokenizer.py         the tokenizer of a checkpoint, and its fingerprint
    encode.py            `Preference` -> token ids: chat template, boundary, BOS, EOS, truncation
    clean.py             blocks of rows -> pairs in memory; drops what cannot be trained on
    counts.py            counts of what became of the rows

Pairs:

    pairs.py             the columns of a pair, and pairs in memory or blended
    prepare.py           source -> prepared set, on several processes
    prepared_format.py   the files of a prepared set
    prepared_writer.py   writes them
    prepared_set.py      opens them, and compares them with a run
    reference_file.py    log-probs of the pairs under a reference model, on disk
    blend.py             the values of `--train-data`

From pairs to batches:

    order.py             which pairs come at which position
    packing.py           which pairs of a batch are in which packed row, and figures of packing

Tools:

    pairing.py           several scored responses to a prompt -> pairs
    checks.py            the faults that the data doctor looks for
    doctor.py            counts them
    report.py            shows them, on the terminal and as HTML

For users: `README.md` in this folder.
"""

from __future__ import annotations

from simpo_megatron.data.clean import load_preferences
from simpo_megatron.data.counts import DataReport
from simpo_megatron.data.options import DataOptions
from simpo_megatron.data.order import pairs_of_batch
from simpo_megatron.data.packing import pack_batch, pack_rows, pair_costs
from simpo_megatron.data.pairs import CHOSEN_CUT, REJECTED_CUT, BlendedPairs, InMemoryPairs, Pairs

__all__ = [
    "CHOSEN_CUT",
    "REJECTED_CUT",
    "BlendedPairs",
    "DataOptions",
    "DataReport",
    "InMemoryPairs",
    "Pairs",
    "load_preferences",
    "pack_batch",
    "pack_rows",
    "pair_costs",
    "pairs_of_batch",
]
