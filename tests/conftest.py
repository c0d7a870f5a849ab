"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed import WorkerPool


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """The session's gloo workers (see `tests/distributed.py`)."""
    workers = WorkerPool()
    yield workers
    workers.close()
