"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.distributed import LOCAL, Pools, WorkerPool
from tests.support.runs import Inputs
from tests.support.tiny import make_checkpoint, make_rows, write_rows


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """The gloo workers of the session by kind, see `tests/support/distributed.py`."""
    pools = Pools()
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def pool(request: pytest.FixtureRequest, pools: Pools) -> WorkerPool:
    """The workers of the kind that is the parameter of the test; without one, those with Megatron's plain layers."""
    return pools[getattr(request, "param", LOCAL)]


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a tiny Llama, and a file of 10 pairs."""
    folder = tmp_path_factory.mktemp("good")
    return make_checkpoint(folder / "model"), write_rows(folder / "pairs.jsonl", make_rows(10))


@pytest.fixture
def inputs(good: tuple[Path, Path], tmp_path: Path) -> Inputs:
    """The same, with a folder for outputs."""
    return Inputs(*good, tmp_path)
