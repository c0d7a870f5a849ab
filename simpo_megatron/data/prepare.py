"""Source -> prepared set, on one or several processes. The files are the same for any number of them.

Blocks of rows go to the processes in order and their results come back in order. The number of blocks under way is
limited, so memory does not grow with the source.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from simpo_megatron.data.clean import CrossBlockFilter, EncodedRows, encode_rows
from simpo_megatron.data.counts import DataReport, nothing_left
from simpo_megatron.data.encode import PairEncoder
from simpo_megatron.data.options import DataOptions
from simpo_megatron.data.prepared_writer import Writer
from simpo_megatron.data.reading import Row, read_rows, row_blocks, with_progress
from simpo_megatron.data.tokenizer import fingerprint, load_tokenizer
from simpo_megatron.errors import UserError
from simpo_megatron.files import end_of_turn_ids

FEW_ROWS = 500  # a source of fewer rows is tokenized in this process: to start others takes longer
_AHEAD = 3  # blocks of rows that wait, per process


def prepare(
    source: str | Path,
    checkpoint: Path,
    prefix: Path,
    options: DataOptions,
    *,
    workers: int = 1,
    progress: bool = False,
) -> DataReport:
    """Tokenizes the pairs of a source into a prepared set (`prepared_format.py`).

    Args:
        source: the rows, see `reading.py`.
        checkpoint: folder of the model. Only the tokenizer and the ids that end a turn are read.
        prefix: of the files to write. Where preparing fails, an earlier set of this prefix stays.
        options: how to tokenize and to truncate, and which pairs to keep.
        workers: processes; one for a small source.
        progress: show a bar on stderr.

    Returns:
        Counts of what became of the rows.

    Raises:
        UserError: the source or a row cannot be read, no pair is left, or the files cannot be written.
    """
    if Path(source) == prefix:
        raise UserError(f"--output-prefix {prefix} is the source itself; choose another prefix")
    rows = read_rows(source)
    first = list(islice(rows, FEW_ROWS))
    if len(first) < FEW_ROWS:
        workers = 1
    rows = chain(first, rows)
    eos_ids = end_of_turn_ids(checkpoint)
    encoder = PairEncoder(load_tokenizer(checkpoint), options, eos_ids)
    cross_block_filter = CrossBlockFilter()
    report = cross_block_filter.report
    with encoding(encoder, workers) as encode, Writer(prefix) as writer:
        for encoded in encode(row_blocks(with_progress(rows, f"Preparing {source}") if progress else rows)):
            writer.add(cross_block_filter(encoded).pairs)
        if not report.pairs:
            raise nothing_left(source, report)
        writer.finish(str(source), options, fingerprint(encoder.tokenizer, eos_ids), report)
    return report


@contextmanager
def encoding(encoder: PairEncoder, workers: int) -> Iterator[Callable[[Iterable[list[Row]]], Iterator[EncodedRows]]]:
    """Gives a function that encodes blocks of rows in order, in this process (`workers` 1) or in others."""
    if workers == 1:
        yield lambda blocks: (encode_rows(rows, encoder) for rows in blocks)
        return
    # A forked process has the tokenizer at once. Threads of the tokenizer would only compete with the other processes.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _Worker.encoder = encoder
    executor = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork"))
    try:
        executor.submit(os.getpid).result()  # fork now, before a progress bar starts a thread
        yield lambda blocks: _in_order(executor, blocks, _AHEAD * workers)
    finally:
        executor.shutdown(cancel_futures=True)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


class _Worker:
    """What a forked process inherits."""

    encoder: Any = None


def _encode(rows: list[Row]) -> EncodedRows:
    return encode_rows(rows, _Worker.encoder)


def _in_order(executor: ProcessPoolExecutor, blocks: Iterable[list[Row]], ahead: int) -> Iterator[EncodedRows]:
    waiting: deque[Future[EncodedRows]] = deque()
    for rows in blocks:
        waiting.append(executor.submit(_encode, rows))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
