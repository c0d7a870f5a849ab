"""Preferences -> token ids: chat template, prompt/response boundary, BOS, EOS and truncation.

The prompt of a pair is tokenized once and used with both responses, so the boundary is at the same place in both:

    text    prompt = template(messages, generation prompt)     response = template(messages + answer)[len(prompt):]
    ids     [BOS] prompt                                       response EOS
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

from simpo_megatron.data.options import DataOptions
from simpo_megatron.data.schema import Message, Preference
from simpo_megatron.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TemplateError(UserError):
    """The chat template writes a prompt differently when a response follows."""


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of one pair.

    Attributes:
        prompt: with BOS where there is one.
        chosen: with EOS; empty where the response has no other token.
        rejected: as `chosen`.
        boundary_merges: responses (0 to 2) that were tokenized alone, because one token spanned their boundary with the
            prompt.
        prompt_cut: the prompt was cut.
        chosen_cut: the chosen response was cut and lost its EOS.
        rejected_cut: the rejected response was cut and lost its EOS.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    boundary_merges: int = 0
    prompt_cut: bool = False
    chosen_cut: bool = False
    rejected_cut: bool = False


class PairEncoder:
    """Tokenizes preferences. Every response ends with one EOS id.

    Attributes:
        tokenizer: of the model.
        options: of the user.
        bos: id that begins a sequence, or None.
        eos_ids: ids that end a response.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, options: DataOptions, eos_token_ids: Iterable[int] = ()
    ) -> None:
        """An encoder for one model.

        Args:
            tokenizer: of the model.
            options: how to tokenize and to truncate, and which pairs to keep.
            eos_token_ids: ids that end a response besides tokenizer.eos_token_id (`files.end_of_turn_ids`).
        """
        self.tokenizer = tokenizer
        self.options = options
        self._name = tokenizer.name_or_path or "in use"
        self.bos = cast("int | None", tokenizer.bos_token_id)
        self._eos = cast("int | None", tokenizer.eos_token_id)
        self.eos_ids = {*eos_token_ids, *([] if self._eos is None else [self._eos])}
        self._adds_bos = self.bos is not None and tokenizer("a")["input_ids"][:1] == [self.bos]
        self._is_blank = lru_cache(maxsize=None)(lambda token: not str(tokenizer.decode([token])).strip())

    def encode(self, preferences: Sequence[Preference]) -> list[EncodedPair]:
        """Token ids of each preference, not truncated.

        Raises:
            UserError: a row cannot be encoded; it is named.
        """
        texts = [self._texts(preference) for preference in preferences]
        flat = [text for prompt, chosen, rejected in texts for text in (prompt, prompt + chosen, prompt + rejected)]
        ids = self._ids(flat)
        # ids[3n] is the prompt of pair n, ids[3n + 1] and ids[3n + 2] are the prompt with a response. Where these do
        # not begin with the prompt's ids, one token spans the boundary.
        merged = [i for i, full in enumerate(ids) if full[: len(ids[i - i % 3])] != ids[i - i % 3]]
        alone = dict(zip(merged, self._alone([texts[i // 3][i % 3] for i in merged]), strict=True))

        def response(i: int) -> list[int]:
            end = self._end_of_answer if preferences[i // 3].conversational else self._eos
            return self._close(alone[i] if i in alone else ids[i][len(ids[i - i % 3]) :], end)

        return [
            EncodedPair(
                prompt=self._open(ids[i], preference.conversational, preference.where),
                chosen=response(i + 1),
                rejected=response(i + 2),
                boundary_merges=(i + 1 in alone) + (i + 2 in alone),
            )
            for i, preference in zip(range(0, len(ids), 3), preferences, strict=True)
        ]

    def encode_prompts(self, prompts: Sequence[tuple[str, str | list[Message]]]) -> list[list[int]]:
        """Token ids of prompts that a model is to answer: those that `encode` gives a pair with the same prompt.

        Args:
            prompts: the place of each, for errors, and its text or messages.

        Raises:
            UserError: a prompt cannot be encoded; it is named.
        """
        texts = [prompt if isinstance(prompt, str) else self._render(prompt, True, where) for where, prompt in prompts]
        return [
            self._open(ids, isinstance(prompt, list), where)
            for (where, prompt), ids in zip(prompts, self._ids(texts), strict=True)
        ]

    def straddles(self, preference: Preference) -> bool:
        """Whether one token spans the end of the prompt and a response.

        The tokens of a prompt may change before a response although none spans the boundary: a prompt that ends with
        two newlines may end with one token alone, and with two where a response follows.
        """
        prompt, *responses = self._texts(preference)
        alone, *whole = self._ids([prompt, *(prompt + response for response in responses)])
        text = "".join(self._tokens(alone))
        for ids in whole:
            ends = accumulate(self._tokens(ids), initial="")
            if text not in ends:
                return True
        return False

    def _tokens(self, ids: list[int]) -> list[str]:
        """Tokens as the vocabulary spells them. Joined, they are the text in that spelling."""
        return [str(token) for token in cast("list[str]", self.tokenizer.convert_ids_to_tokens(ids))]

    def _texts(self, preference: Preference) -> tuple[str, str, str]:
        """Prompt, chosen and rejected response as strings; those of a conversation are written by the chat template."""
        if isinstance(preference.prompt, str):
            return preference.prompt, *preference.texts
        header_in_prompt = self.options.assistant_header == "prompt"
        prompt = self._render(preference.prompt, header_in_prompt, preference.where)
        responses = []
        for answer in (preference.chosen, preference.rejected):
            full = self._render([*preference.prompt, cast(Message, answer)], False, preference.where)
            if not full.startswith(prompt):
                raise TemplateError(_differing_prompt(preference.where, prompt, full, header_in_prompt))
            responses.append(full[len(prompt) :])
        return prompt, responses[0], responses[1]

    def _render(self, messages: list[Message], add_generation_prompt: bool, where: str) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{where}: the row is a conversation but the tokenizer {self._name} has no chat template; add "
                "chat_template.jinja to its folder, or give `prompt`, `chosen` and `rejected` as strings"
            )
        if self.options.system_message == "first_user":
            messages = _without_system(messages, where)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except Exception as error:  # a template raises errors of its own, and type errors
            fix = "change the row's messages or the template"
            if messages[0]["role"] == "system":
                fix += ", or give --system-message first_user, which puts the system message before that of the user"
            raise UserError(
                f"{where}: the chat template of {self._name} refuses the conversation ({error}); {fix}"
            ) from error

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []  # transformers refuses an empty batch
        backend: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        if hasattr(backend, "encode_batch_fast"):  # the same ids, without offsets in the text
            backend.no_truncation()
            backend.no_padding()
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        # verbose=False: no warning about model_max_length; `truncate` cuts to our own `max_length`.
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _alone(self, responses: list[str]) -> list[list[int]]:
        """Ids of responses alone, without the mark of a word's start that SentencePiece puts before a text."""
        (newline,) = self._ids(["\n"])
        after = self._ids(["\n" + text for text in responses])
        return [
            ids[len(newline) :] if ids[: len(newline)] == newline else alone
            for ids, alone in zip(after, self._ids(responses), strict=True)
        ]

    def _open(self, prompt: list[int], conversational: bool, where: str) -> list[int]:
        """The prompt with one BOS or none. It has at least one token.

        A conversation begins with BOS where the template or the tokenizer adds one, as it does when the model is used.
        Text begins with BOS wherever the tokenizer has one, as in TRL (`add_bos_token_if_needed`).

        Raises:
            UserError: the prompt is empty and the tokenizer has no BOS.
        """
        if self.bos is None:
            if not prompt:
                raise UserError(
                    f"{where}: the prompt is empty and the tokenizer {self._name} has no BOS token, so "
                    "nothing predicts the first token of the response; give the row a `prompt`"
                )
            return prompt
        start = next((i for i, token in enumerate(prompt) if token != self.bos), len(prompt))
        begins = start or self._adds_bos or not prompt or not conversational
        return [self.bos, *prompt[start:]] if begins else prompt

    @cached_property
    def _end_of_answer(self) -> int | None:
        """The id that ends an answer where the template writes none.

        GLM's templates write none, and its models end an answer with <|user|>, which begins the next turn. So it is the
        id that the template writes next, if that is one of those that end a response; else the tokenizer's EOS.
        """
        turns: list[Message] = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
        try:
            answered, asked = self._render(turns[:2], False, ""), self._render(turns, False, "")
        except UserError:  # the template wants other turns than these
            return self._eos
        (following,) = self._ids([asked[len(answered) :] if asked.startswith(answered) else ""])
        return following[0] if self.eos_ids & {*following[:1]} else self._eos

    def _close(self, response: list[int], closing: int | None) -> list[int]:
        """The response up to the first of the EOS ids at its end (whitespace may follow them), or with `closing`."""
        end = None
        for i in range(len(response) - 1, -1, -1):
            if response[i] in self.eos_ids:
                end = i + 1
            elif not self._is_blank(response[i]):
                break
        if end is not None:
            return response[:end]
        return [*response, closing] if response and closing is not None else response


def _without_system(messages: list[Message], where: str) -> list[Message]:
    """The messages with a system message in the first user message, as SimPO's templates and Gemma-3's write it.

    Raises:
        UserError: no message of the user follows it.
    """
    if messages[0]["role"] != "system":
        return messages
    if len(messages) < 2 or messages[1]["role"] != "user":
        raise UserError(f"{where}: no user message follows the system message, so --system-message first_user has none")
    first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def truncate(pair: EncodedPair, options: DataOptions, bos: int | None) -> EncodedPair:
    """Cuts a pair to options.max_length: first the prompt, the same for both responses, then each response alone.

    A response that is cut loses its EOS. It keeps at least one token, because max_prompt_length < max_length.

    Args:
        pair: at full length.
        options: the lengths, and the part of the prompt that is kept.
        bos: id that stays at the start of the prompt under `keep_end`, or None.
    """
    prompt = pair.prompt
    longest = max(len(pair.chosen), len(pair.rejected))
    if len(prompt) + longest > options.max_length and len(prompt) > options.max_prompt_length:
        prompt = _cut_prompt(prompt, options.max_prompt_length, options.prompt_truncation, bos)
    room = options.max_length - len(prompt)
    return replace(
        pair,
        prompt=prompt,
        chosen=pair.chosen[:room],
        rejected=pair.rejected[:room],
        prompt_cut=len(prompt) < len(pair.prompt),
        chosen_cut=len(pair.chosen) > room,
        rejected_cut=len(pair.rejected) > room,
    )


def _cut_prompt(prompt: list[int], length: int, keep: str, bos: int | None) -> list[int]:
    if keep == "keep_start":
        return prompt[:length]
    head = prompt[:1] if prompt[0] == bos else []
    return head + prompt[len(prompt) - length + len(head) :]


def _differing_prompt(where: str, prompt: str, full: str, header_in_prompt: bool) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), min(len(prompt), len(full)))
    fix = "make the template write the prompt the same way in both"
    if header_in_prompt:
        fix += ", or use --assistant-header response if only the generation prompt differs"
    return (
        f"{where}: the chat template renders the prompt differently when a response follows: {prompt[at : at + 40]!r} "
        f"became {full[at : at + 40]!r} at character {at + 1}; {fix}"
    )
