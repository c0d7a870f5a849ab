"""How the process groups of a run are made: the device is named, and waits on the host have a group of their own."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from simpo_megatron.errors import UserError
from tests.support.distributed import WorkerPool
from tests.support.pairs import make_pairs


class Initialised(Exception):
    """Ends `initialize` after torch's groups were asked for."""


@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize("device, backend", [("cuda", "nccl"), ("cpu", "gloo")])
def test_the_device_is_named(monkeypatch: pytest.MonkeyPatch, launched: bool, device: str, backend: str) -> None:
    """Without it NCCL guesses the GPU, and builds its communicators in the first step."""
    from simpo_megatron.trainer import distributed

    asked: dict[str, Any] = {}

    def init(*args: Any, **options: Any) -> None:
        asked.update(options, backend=args[0])
        raise Initialised

    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    if launched:
        monkeypatch.setenv("RANK", "3")
    else:
        monkeypatch.delenv("RANK", raising=False)
    transformer: Any = None
    with pytest.raises(Initialised):
        distributed.initialize(transformer, 7, device, 0)
    assert asked["backend"] == backend and asked["timeout"] == timedelta(minutes=7)
    assert asked["device_id"] == (torch.device("cuda", 3) if device == "cuda" else None)


PAIRS = make_pairs([(3, 4, 5), (2, 6, 1)])


def waits_on_the_host() -> tuple[bool, float, str, bool]:
    """On a rank: how it waits before and after `start_host_group`.

    Returns:
        Whether there was no such group before, its timeout in seconds, the error that another rank raised, and whether
        every collective of `raise_on_all_ranks` and `broadcast_pairs` went over it.
    """
    from simpo_megatron.parallel import together
    from simpo_megatron.trainer.distributed import broadcast_pairs

    before = together.host_group() is None
    together.start_host_group()
    group: Any = together.host_group()
    timeout = group._get_backend(torch.device("cpu")).options._timeout
    groups, error = [], ""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather_object", "broadcast_object_list", "broadcast"):
            original = getattr(dist, name)

            def spy(*args: Any, original: Any = original, **options: Any) -> Any:
                groups.append(options.get("group"))
                return original(*args, **options)

            patch.setattr(dist, name, spy)
        try:
            with together.raise_on_all_ranks():
                if dist.get_rank() == 1:
                    raise UserError("rank 1 cannot read it")
        except UserError as raised:
            error = str(raised)
        arrays = broadcast_pairs(PAIRS if dist.get_rank() == 0 else None).arrays()
    assert arrays.keys() == PAIRS.arrays().keys()
    assert all(np.array_equal(arrays[name], array, equal_nan=True) for name, array in PAIRS.arrays().items())
    return before, timeout.total_seconds(), error, len(groups) > 2 and all(used is group for used in groups)


def test_waits_on_the_host_have_a_long_timeout(pool: WorkerPool) -> None:
    """Rank 0 may tokenize for longer than a collective of training may take."""
    assert pool.run(2, waits_on_the_host) == [(True, 86400.0, "rank 1 cannot read it", True)] * 2
