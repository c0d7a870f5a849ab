"""Source -> prepared set, on several processes; the files are the same whatever their number.

Chunks of rows go out to the workers in order and come back in order, a bounded number at a time: memory grows with neither.
"""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simpo_megatron.data.clean import (
    CrossBlockFilter,
    DataReport,
    EncodedRows,
    Row,
    encode_rows,
    nothing_left,
    row_blocks,
    with_progress,
)
from simpo_megatron.data.encode import PairEncoder
from simpo_megatron.data.options import DataOptions
from simpo_megatron.data.prepared_set import Writer
from simpo_megatron.data.reading import read_rows
from simpo_megatron.data.tokenizer import fingerprint, load_tokenizer
from simpo_megatron.files import end_of_turn_ids

_AHEAD = 3  # blocks of rows a worker has waiting


def prepare(
    source: str | Path,
    checkpoint: Path,
    prefix: Path,
    options: DataOptions,
    *,
    workers: int = 1,
    progress: bool = False,
) -> DataReport:
    """Tokenizes the pairs of a source into a prepared set (`prepared.py`).

    `checkpoint` is the model's folder, of which only the tokenizer and the ids that end a turn are read. `progress` shows a
    bar on stderr. Raises UserError for a row that cannot be read, naming it, for a source that keeps no pair, and for a prefix
    that cannot be written; an earlier set of that prefix is then still there.
    """
    eos_ids = end_of_turn_ids(checkpoint)
    encoder = PairEncoder(load_tokenizer(checkpoint), options, eos_ids)
    gate = CrossBlockFilter(options)
    with encoding(encoder, options, workers) as encode, Writer(prefix) as writer:
        rows = read_rows(source)
        for encoded in encode(row_blocks(with_progress(rows, f"Preparing {source}") if progress else rows)):
            writer.add(gate(encoded))
        if not gate.report.pairs:
            raise nothing_left(source, gate.report)
        writer.finish(str(source), options, fingerprint(encoder.tokenizer, eos_ids), gate.report)
    return gate.report


@contextmanager
def encoding(
    encoder: PairEncoder, options: DataOptions, workers: int
) -> Iterator[Callable[[Iterable[list[Row]]], Iterator[EncodedRows]]]:
    """Gives a function that encodes lists of rows in order, here (`workers` 1) or on processes of its own."""
    if workers == 1:
        yield lambda lists: (encode_rows(rows, encoder, options) for rows in lists)
        return
    # Forked, a worker has its tokenizer at once; its threads would only compete with the other workers.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _Worker.encoder, _Worker.options = encoder, options
    executor = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork"))
    try:
        executor.submit(os.getpid).result()  # fork now, before a progress bar starts a thread
        yield lambda lists: _in_order(executor, lists, _AHEAD * workers)
    finally:
        executor.shutdown(cancel_futures=True)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


class _Worker:
    """What a forked process finds."""

    encoder: Any = None
    options: Any = None


def _encode(rows: list[Row]) -> EncodedRows:
    return encode_rows(rows, _Worker.encoder, _Worker.options)


def _in_order(executor: ProcessPoolExecutor, lists: Iterable[list[Row]], ahead: int) -> Iterator[EncodedRows]:
    waiting: deque[Future[EncodedRows]] = deque()
    for rows in lists:
        waiting.append(executor.submit(_encode, rows))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
