"""A tiny model and prompts for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tests.support.tiny import make_checkpoint, make_rows, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its generation_config.json asks for a penalty, as Qwen2.5's does. Responses are drawn by our settings alone."""
    folder = make_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=2, max_position_embeddings=128)
    transformers.GenerationConfig(bos_token_id=0, eos_token_id=1, repetition_penalty=5.0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"id": f"p{i}", "prompt": row["prompt"], "answer": i} for i, row in enumerate(make_rows(7))]
    return write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows)
