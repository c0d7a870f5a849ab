"""Whole templates of model families, and any conversation in them: ids, boundary, BOS, EOS and mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpo_megatron.batch.row import BatchCounts, RowFormat, pack_row
from simpo_megatron.data import DataOptions, InMemoryPairs
from simpo_megatron.data.clean import encode_rows
from simpo_megatron.data.encode import PairEncoder
from simpo_megatron.errors import UserError
from tests.support.real_templates import ANSWER, FAMILIES, FINAL, LOSSLESS, QUESTION, REPLY, ends_of, tokenizer_of

OPTIONS = DataOptions(max_length=4000, max_prompt_length=2000)


def chat(*turns: str) -> list[dict[str, str]]:
    """Turns of user and assistant in turn, the user's first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def encoded(name: str, prompt: Any, chosen: str, rejected: str, **options: Any) -> InMemoryPairs:
    row = {"chosen": [*prompt, *chat("", chosen)[1:]], "rejected": [*prompt, *chat("", rejected)[1:]]}
    encoder = PairEncoder(tokenizer_of(name), replace(OPTIONS, **options), ends_of(name))
    return encode_rows([("f:1", row)], encoder).pairs


def text_of(name: str, ids: np.ndarray) -> str:
    return tokenizer_of(name).decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_written_out(name: str) -> None:
    pairs = encoded(name, chat(QUESTION, REPLY, FINAL), ANSWER, "No.")
    prompt, chosen, _ = pairs.pair(0)
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    # The marker of a word's start that sentencepiece puts before a text decodes to a space.
    assert text_of(name, prompt).replace("<s> ", "<s>") == family.prompt
    assert text_of(name, chosen) == family.chosen
    if tokenizer.bos_token_id is not None:
        assert prompt[0] == tokenizer.bos_token_id
        assert prompt.tolist().count(tokenizer.bos_token_id) == (2 if name == "olmo2" else 1)  # its EOS, of an answer
    # The ids are those of the whole rendered conversation, cut where the response begins.
    rendered = family.prompt.removeprefix("<s>" if name == "zephyr" else "") + family.chosen
    whole = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert [*prompt.tolist(), *chosen.tolist()][-len(whole) :] == whole


def test_what_ends_an_answer_behind_which_the_template_writes_nothing() -> None:
    def end_of(row: Any, eos_token_ids: list[int]) -> str:
        encoder = PairEncoder(tokenizer_of("glm4"), OPTIONS, eos_token_ids)
        return text_of("glm4", encode_rows([("f:1", row)], encoder).pairs.pair(0)[1][-1:])

    conversation = {"chosen": chat(QUESTION, ANSWER), "rejected": chat(QUESTION, "No.")}
    text = {"prompt": QUESTION, "chosen": ANSWER, "rejected": "No."}
    assert end_of(conversation, ends_of("glm4")) == "<|user|>"
    assert end_of(conversation, []) == "<|endoftext|>", "generation does not stop at <|user|>"
    assert end_of(text, ends_of("glm4")) == "<|endoftext|>"


@pytest.mark.parametrize("name", ["mistral", "gemma"])
def test_roles_that_a_template_refuses(name: str) -> None:
    asked = [{"role": "system", "content": "Be brief."}, *chat(QUESTION)]
    with pytest.raises(UserError, match=r"f:1: the chat template of .* refuses .* give --system-message first_user"):
        encoded(name, asked, ANSWER, "No.")
    folded = encoded(name, asked, ANSWER, "No.", system_message="first_user")
    written = encoded(name, chat(f"Be brief.\n\n{QUESTION}"), ANSWER, "No.")
    for found, wanted in zip(folded.pair(0), written.pair(0), strict=True):
        assert found.tolist() == wanted.tolist()
    with pytest.raises(UserError, match="f:1: no user message follows the system message"):
        encoded(name, [asked[0], *chat("", REPLY)[1:]], ANSWER, "No.", system_message="first_user")


texts = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<>|"), min_size=1, max_size=30
).filter(lambda text: bool(text.strip()))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(LOSSLESS),
    st.lists(texts, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2),
    texts,
    texts,
)
def test_prompt_and_response_are_the_rendered_conversation(
    name: str, turns: list[str], chosen: str, rejected: str
) -> None:
    if tokenizer_of(name)(chosen.strip())["input_ids"] == tokenizer_of(name)(rejected.strip())["input_ids"]:
        return
    pairs = encoded(name, chat(*turns), chosen, rejected)
    prompt, *responses = pairs.pair(0)
    tokenizer, ends = tokenizer_of(name), {*ends_of(name), tokenizer_of(name).eos_token_id}
    for answer, response in zip((chosen, rejected), responses, strict=True):
        rendered = tokenizer.apply_chat_template(chat(*turns, answer), tokenize=False)
        assert text_of(name, prompt) + text_of(name, response) == rendered.rstrip("\n")
        assert text_of(name, prompt) == tokenizer.apply_chat_template(
            chat(*turns), tokenize=False, add_generation_prompt=True
        )
        assert response[-1] in ends and not ends & set(response[:-1].tolist()), "EOS once, at the end"
    check_mask(pairs, prompt, responses)


def check_mask(pairs: InMemoryPairs, prompt: Any, responses: list[np.ndarray]) -> None:
    """What is scored in a plain and in a shared row: the response and its EOS, each by the token before it."""
    wanted = np.concatenate(responses).tolist()
    for shared in (False, True):
        batch = pack_row(pairs, [0], BatchCounts(1, 1, 1), RowFormat(share_prompts=shared))
        assert batch.scored.targets_R.tolist() == wanted
        assert batch.lengths.tolist() == [len(response) for response in responses]
        tokens = batch.tokens[0].tolist()
        before = [prompt[-1], *responses[0][:-1], prompt[-1], *responses[1][:-1]]
        assert [tokens[row] for row in batch.scored.positions_R.tolist()] == [int(token) for token in before]
        assert len(tokens) == len(prompt) * (1 if shared else 2) + len(wanted)
