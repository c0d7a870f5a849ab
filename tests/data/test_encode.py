"""Token ids against TRL's CPO tokenization and the tokenizers themselves."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from simpo_megatron.data.encode import EncodedPair, PairEncoder, truncate
from simpo_megatron.data.options import DataOptions
from simpo_megatron.data.schema import parse_preference
from simpo_megatron.errors import UserError
from tests.support.toy_tokenizers import MISTRAL, THINKING, toy, with_template

FAMILIES = ["llama3", "qwen", "mistral", "zephyr"]
HEADERS = {
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen": "<|im_start|>assistant\n",
    "mistral": "",
    "zephyr": "<|assistant|>\n",
}
OPTIONS = DataOptions()
CHAT = {
    "prompt": [
        {"role": "user", "content": "What color is the sky?"},
        {"role": "assistant", "content": "Which sky?"},
        {"role": "user", "content": "Ours. Keep it brief."},
    ],
    "chosen": [{"role": "assistant", "content": "It is blue.\n\nThank you 🤝"}],
    "rejected": [{"role": "assistant", "content": "I would rather not say (green)."}],
}
TEXT = {"prompt": "What color is the sky? Answer:", "chosen": " It is blue.", "rejected": " 日本, not you."}


def encode(
    tokenizer: PreTrainedTokenizerFast,
    row: dict[str, Any],
    options: DataOptions = OPTIONS,
    eos_token_ids: Sequence[int] = (),
) -> EncodedPair:
    (pair,) = PairEncoder(tokenizer, options, eos_token_ids).encode([parse_preference(row, "f.jsonl:3")])
    return pair


def error_of(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], options: DataOptions = OPTIONS) -> str:
    with pytest.raises(UserError) as caught:
        encode(tokenizer, row, options)
    return str(caught.value)


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def trl_row(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> dict[str, list[int]]:
    """What TRL's CPO trainer, whose loss SimPO is one of, makes of the row."""
    from trl.data_utils import maybe_apply_chat_template
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(processing_class=tokenizer, is_encoder_decoder=False, max_length=10**6)
    trainer.build_tokenized_answer = lambda *args: CPOTrainer.build_tokenized_answer(trainer, *args)
    return CPOTrainer.tokenize_row(trainer, maybe_apply_chat_template(row, tokenizer))


# Prompt, response, BOS and EOS


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("family", "row"),
    # TRL appends a second EOS after Qwen's and Zephyr's "EOS newline"; those are compared with the templates below.
    [("llama3", CHAT), ("mistral", CHAT), *((family, TEXT) for family in FAMILIES)],
)
def test_same_ids_as_trl(family: str, row: dict[str, Any]) -> None:
    tokenizer = toy(family)
    pair, expected = encode(tokenizer, row), trl_row(tokenizer, row)
    assert pair.boundary_merges == 0
    assert pair.prompt == expected["prompt_input_ids"]
    assert pair.prompt + pair.chosen == expected["chosen_input_ids"]
    assert pair.prompt + pair.rejected == expected["rejected_input_ids"]
    assert pair.chosen == [label for label in expected["chosen_labels"] if label != -100]


@pytest.mark.parametrize("family", FAMILIES)
def test_conversation_is_the_rendered_one_up_to_eos(family: str) -> None:
    tokenizer = toy(family)
    pair = encode(tokenizer, CHAT)
    for name, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        rendered = tokenizer.apply_chat_template(CHAT["prompt"] + CHAT[name], tokenize=False)
        bos = [tokenizer.bos_token_id] if family == "zephyr" else []
        assert pair.prompt + response == bos + ids(tokenizer, rendered.rstrip("\n"))
        assert response.count(tokenizer.eos_token_id) == 1
        assert response[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(pair.prompt).endswith(HEADERS[family] or "[/INST]")


@pytest.mark.parametrize("row", [CHAT, TEXT])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_bos_or_none(family: str, row: dict[str, Any]) -> None:
    tokenizer = toy(family)
    prompt = encode(tokenizer, row).prompt
    if family == "qwen":
        assert None not in prompt
    else:
        assert prompt[0] == tokenizer.bos_token_id
        assert prompt.count(tokenizer.bos_token_id) == 1


def test_doubled_bos_collapses() -> None:
    tokenizer = with_template("mistral", "{{ bos_token }}" + MISTRAL)
    assert encode(tokenizer, CHAT) == encode(toy("mistral"), CHAT)
    assert encode(toy("mistral"), {**TEXT, "prompt": "<s>[INST]"}).prompt.count(1) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_assistant_header_in_the_response(family: str) -> None:
    tokenizer = toy(family)
    usual = encode(tokenizer, CHAT)
    pair = encode(tokenizer, CHAT, DataOptions(assistant_header="response"))
    assert pair.prompt + pair.chosen == usual.prompt + usual.chosen
    assert pair.prompt + pair.rejected == usual.prompt + usual.rejected
    assert tokenizer.decode(pair.chosen).startswith(HEADERS[family] + tokenizer.decode(usual.chosen)[:5])


@pytest.mark.parametrize(
    "ending", ["", "</s>", "</s>\n", "</s> \n </s>\n", "</s></s>"], ids=["none", "eos", "newline", "spaced", "twice"]
)
def test_eos_exactly_once(ending: str) -> None:
    tokenizer = toy("mistral")
    response = encode(tokenizer, {**TEXT, "chosen": " Blue." + ending}).chosen
    assert response == encode(tokenizer, {**TEXT, "chosen": " Blue."}).chosen
    assert response.count(tokenizer.eos_token_id) == 1


def test_eos_inside_a_response_does_not_end_it() -> None:
    pair = encode(toy("mistral"), {**TEXT, "chosen": " It</s> is"})
    assert toy("mistral").decode(pair.chosen) == "It</s> is</s>"


def test_whitespace_that_no_eos_follows_stays() -> None:
    assert toy("llama3").decode(encode(toy("llama3"), {**TEXT, "chosen": " It \n"}).chosen) == " It \n<|eot_id|>"


def test_extra_eos_ids_end_a_response() -> None:
    tokenizer = toy("llama3")
    base = with_template("llama3", tokenizer.chat_template)
    base.eos_token = "<|end_of_text|>"  # as base models have it; turns still end with <|eot_id|>
    both = [base.eos_token_id, tokenizer.eos_token_id]
    assert encode(base, CHAT).chosen[-2:] == both[::-1]
    assert encode(base, CHAT, eos_token_ids=both) == encode(tokenizer, CHAT)


def test_no_eos_token_appends_none() -> None:
    tokenizer = with_template("qwen", None)
    tokenizer.eos_token = None
    assert encode(tokenizer, TEXT).chosen == ids(tokenizer, TEXT["chosen"])


# The boundary


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_across_the_boundary_keeps_one_prompt(family: str) -> None:
    tokenizer = toy(family)
    row = {"prompt": "No, the ", "chosen": "sky is blue.", "rejected": "dog. What"}
    full, prompt = ids(tokenizer, row["prompt"] + row["chosen"]), ids(tokenizer, row["prompt"])
    assert full[: len(prompt)] != prompt, "the case needs a merge"
    pair = encode(tokenizer, row)
    assert pair.boundary_merges == 2
    assert pair.prompt[-len(prompt) :] == prompt
    # Decoded together there is one space: no word-start marker came in with the response.
    assert tokenizer.decode(pair.prompt + pair.chosen, skip_special_tokens=True) == "No, the sky is blue."
    assert tokenizer.decode(pair.prompt + pair.rejected, skip_special_tokens=True) == "No, the dog. What"


def test_merge_of_one_response_only() -> None:
    tokenizer = toy("llama3")
    pair = encode(tokenizer, {"prompt": "No, the ", "chosen": "sky", "rejected": "\nsky"})
    assert pair.boundary_merges == 1
    assert pair.prompt[1:] == ids(tokenizer, "No, the ")


words = st.lists(st.text(max_size=5) | st.sampled_from([" the", "\n", "blue", " "]), min_size=1, max_size=6).map(
    "".join
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["llama3", "qwen"]), words, words, words)
def test_any_conversation_is_reproduced(family: str, question: str, chosen: Any, rejected: Any) -> None:
    tokenizer = toy(family)
    row = {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    pair = encode(tokenizer, row)
    for name, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        rendered = tokenizer.apply_chat_template(row["prompt"] + row[name], tokenize=False).removesuffix("\n")
        assert tokenizer.decode(pair.prompt + response, clean_up_tokenization_spaces=False) == rendered
        if pair.boundary_merges == 0:
            assert pair.prompt + response == ids(tokenizer, rendered)
        assert sum(token == tokenizer.eos_token_id for token in response) == 1


def test_a_batch_equals_its_rows() -> None:
    tokenizer = toy("mistral")
    rows = [CHAT, TEXT, {**TEXT, "chosen": " No."}]
    preferences = [parse_preference(row, "f") for row in rows]
    assert PairEncoder(tokenizer, OPTIONS).encode(preferences) == [encode(tokenizer, row) for row in rows]
    assert PairEncoder(tokenizer, OPTIONS).encode([]) == []


# Truncation


def pair_of(prompt: int, chosen: int, rejected: int) -> EncodedPair:
    return EncodedPair(list(range(prompt)), list(range(100, 100 + chosen)), list(range(200, 200 + rejected)))


@pytest.mark.parametrize(
    ("lengths", "expected", "cut"),
    [
        ((6, 4, 2), (6, 4, 2), (False, False, False)),  # fits exactly: a prompt over its maximum is left alone
        ((6, 5, 2), (4, 5, 2), (True, False, False)),  # the longer response decides for both
        ((6, 2, 5), (4, 2, 5), (True, False, False)),
        ((4, 7, 2), (4, 6, 2), (False, True, False)),
        ((2, 9, 9), (2, 8, 8), (False, True, True)),  # a short prompt leaves its room to the responses
        ((50, 1, 60), (4, 1, 6), (True, False, True)),
    ],
)
@pytest.mark.parametrize("keep", ["keep_end", "keep_start"])
def test_truncation(
    lengths: tuple[int, int, int], expected: tuple[int, int, int], cut: tuple[bool, bool, bool], keep: str
) -> None:
    options = DataOptions(max_length=10, max_prompt_length=4, prompt_truncation=keep)
    whole = pair_of(*lengths)
    pair = truncate(whole, options, bos=None)
    assert (len(pair.prompt), len(pair.chosen), len(pair.rejected)) == expected
    assert (pair.prompt_cut, pair.chosen_cut, pair.rejected_cut) == cut
    kept = whole.prompt[: expected[0]] if keep == "keep_start" else whole.prompt[-expected[0] :]
    assert pair.prompt == kept
    assert pair.chosen == whole.chosen[: expected[1]]
    assert pair.rejected == whole.rejected[: expected[2]]


def test_keep_end_keeps_bos() -> None:
    options = DataOptions(max_length=10, max_prompt_length=3)
    assert truncate(pair_of(8, 5, 5), options, bos=0).prompt == [0, 6, 7]
    assert truncate(pair_of(8, 5, 5), options, bos=9).prompt == [5, 6, 7]
    assert truncate(pair_of(8, 5, 5), DataOptions(max_length=2, max_prompt_length=1), bos=0).prompt == [0]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(2, 30), st.data())
def test_truncated_pairs_fit_and_are_never_empty(
    prompt: int, chosen: Any, rejected: Any, max_length: int, data: st.DataObject
) -> None:
    options = DataOptions(max_length, data.draw(st.integers(1, max_length - 1)))
    pair = truncate(pair_of(prompt, chosen, rejected), options, bos=0)
    for response, length in ((pair.chosen, chosen), (pair.rejected, rejected)):
        assert 1 <= len(response) <= length
        assert len(pair.prompt) + len(response) <= max_length
    if not pair.prompt_cut:  # each response has the room its own prompt leaves
        assert len(pair.chosen) == min(chosen, max_length - prompt)


# Errors and empty prompts


def test_empty_prompt_is_bos_where_there_is_one() -> None:
    assert encode(toy("llama3"), {**TEXT, "prompt": ""}).prompt == [toy("llama3").bos_token_id]
    tokenizer = with_template("qwen", None)
    row = {"chosen": "Yes", "rejected": "No"}
    assert error_of(tokenizer, row) == (
        "f.jsonl:3: the prompt is empty and the tokenizer models/toy has no BOS token, so nothing predicts the first "
        "token of the response; give the row a `prompt`"
    )


def test_no_chat_template() -> None:
    assert error_of(with_template("qwen", None), CHAT) == (
        "f.jsonl:3: the row is a conversation but the tokenizer models/toy has no chat template; add "
        "chat_template.jinja to its folder, or give `prompt`, `chosen` and `rejected` as strings"
    )


def test_template_that_refuses() -> None:
    row = {**CHAT, "prompt": [{"role": "tool", "content": "x"}]}
    assert error_of(with_template("mistral", MISTRAL), row) == (
        "f.jsonl:3: the chat template of models/toy refuses the conversation (only user and assistant roles are "
        "supported); change the row's messages or the template"
    )


def test_template_whose_generation_prompt_is_not_in_the_conversation() -> None:
    tokenizer = with_template("qwen", THINKING)
    row = {**CHAT, "prompt": [{"role": "user", "content": "q"}]}
    assert error_of(tokenizer, row) == (
        "f.jsonl:3: the chat template renders the prompt differently when a response follows: '<think>\\n' became "
        "'It is blue.\\n\\nThank you 🤝<|im_end|>\\n' at character 93; make the template write the prompt the same way "
        "in both, or use --assistant-header response if only the generation prompt differs"
    )
    # The fix works.
    assert encode(tokenizer, row, DataOptions(assistant_header="response")).chosen[-1] == tokenizer.eos_token_id


def test_template_that_changes_the_prompt_itself() -> None:
    tokenizer = with_template("qwen", "{{ messages | length }}")
    message = error_of(tokenizer, CHAT, DataOptions(assistant_header="response"))
    assert message.endswith("'3' became '4' at character 1; make the template write the prompt the same way in both")
