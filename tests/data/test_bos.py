"""BOS of plain text, against TRL, with a tokenizer that has a BOS and does not add it."""

from __future__ import annotations

import pytest

from tests.data.test_encode import CHAT, TEXT, encode, trl_row
from tests.support.toy_tokenizers import MISTRAL, with_template


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("prompt", [TEXT["prompt"], "<s>What color", "<s><s>"])
def test_text_begins_with_bos_as_in_trl_where_the_tokenizer_adds_none(prompt: str) -> None:
    tokenizer = with_template("mistral", MISTRAL.replace("{{ bos_token }}", ""))
    tokenizer.backend_tokenizer.post_processor = None
    row = {**TEXT, "prompt": prompt}
    pair, expected = encode(tokenizer, row), trl_row(tokenizer, row)
    assert pair.prompt[0] == tokenizer.bos_token_id and pair.prompt.count(tokenizer.bos_token_id) == 1
    if not prompt.startswith("<s><s>"):  # TRL leaves two where the text has two
        assert pair.prompt == expected["prompt_input_ids"]
        assert pair.prompt + pair.chosen == expected["chosen_input_ids"]
        assert pair.prompt + pair.rejected == expected["rejected_input_ids"]
    assert encode(tokenizer, CHAT).prompt[0] != tokenizer.bos_token_id, "nobody writes one into conversations"
