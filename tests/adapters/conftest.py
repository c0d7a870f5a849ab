"""What the tests of adapters share."""

from __future__ import annotations

import pytest

from tests.support.adapters import MODELS, Oracle, train_oracle
from tests.support.steps import one_thread
from tests.support.tiny import make_checkpoint


@pytest.fixture(scope="session")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Oracle]:
    """The oracle of every model."""
    folder, found = tmp_path_factory.mktemp("adapters"), {}
    with one_thread():
        for name, (family, own, lora) in MODELS.items():
            found[name] = train_oracle(make_checkpoint(folder / name / "base", family, **own), folder / name, lora)
    return found
