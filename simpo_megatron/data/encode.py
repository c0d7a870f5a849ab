"""Preferences -> token ids: chat template, prompt/response boundary, BOS, EOS and truncation.

One prompt, tokenized once, serves both members of a pair, so the boundary is at the same place in both:

    text    prompt = template(messages, generation prompt)     response = template(messages + answer)[len(prompt):]
    ids     [BOS] prompt                                       response EOS
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from simpo_megatron.data.options import DataOptions
from simpo_megatron.data.schema import Message, Preference
from simpo_megatron.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TemplateError(UserError):
    """The chat template writes a prompt in two ways."""


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of one pair. A response without a single token before EOS is left empty."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    boundary_merges: int = 0
    """Responses tokenized on their own because a token straddles their boundary with the prompt."""
    prompt_cut: bool = False
    chosen_cut: bool = False
    rejected_cut: bool = False


class PairEncoder:
    """Tokenizes preferences the way `options` says; a response ends with one of the EOS ids, once."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", options: DataOptions, eos_token_ids: Iterable[int] = ()
    ) -> None:
        """`eos_token_ids`: ids that end a response besides tokenizer.eos_token_id (those of generation_config.json)."""
        self.tokenizer = tokenizer
        self._options = options
        self._name = tokenizer.name_or_path or "in use"
        self.bos = cast("int | None", tokenizer.bos_token_id)
        self._eos = cast("int | None", tokenizer.eos_token_id)
        self.eos_ids = {*eos_token_ids, *([] if self._eos is None else [self._eos])}
        self._adds_bos = self.bos is not None and tokenizer("a")["input_ids"][:1] == [self.bos]
        self._is_blank = lru_cache(maxsize=None)(lambda token: not str(tokenizer.decode([token])).strip())

    def encode(self, preferences: Sequence[Preference]) -> list[EncodedPair]:
        """Token ids of each preference, at full length. Raises UserError naming the row that cannot be encoded."""
        texts = [self._texts(preference) for preference in preferences]
        flat = [text for prompt, chosen, rejected in texts for text in (prompt, prompt + chosen, prompt + rejected)]
        ids = self._ids(flat)
        # ids[3n] is the prompt of pair n. Where its tokens do not begin a member's, one token straddles the boundary.
        merged = [i for i, full in enumerate(ids) if full[: len(ids[i - i % 3])] != ids[i - i % 3]]
        alone = dict(zip(merged, self._alone([texts[i // 3][i % 3] for i in merged]), strict=True))

        def response(i: int) -> list[int]:
            return self._close(alone[i] if i in alone else ids[i][len(ids[i - i % 3]) :])

        return [
            EncodedPair(
                prompt=self._open(ids[i], preference.where),
                chosen=response(i + 1),
                rejected=response(i + 2),
                boundary_merges=(i + 1 in alone) + (i + 2 in alone),
            )
            for i, preference in zip(range(0, len(ids), 3), preferences, strict=True)
        ]

    def _texts(self, preference: Preference) -> tuple[str, str, str]:
        """(prompt, chosen response, rejected response) as strings, through the chat template for conversations."""
        if isinstance(preference.prompt, str):
            return preference.prompt, *preference.texts
        header_in_prompt = self._options.assistant_header == "prompt"
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
                "chat_template.jinja to its folder, or give `prompt`, `chosen` and `rejected` as strings."
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except Exception as error:  # a template may raise anything: its own refusals, but also type errors
            raise UserError(
                f"{where}: the chat template of {self._name} refuses the conversation ({error}); "
                "change the row's messages or the template."
            ) from error

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []  # transformers has no empty batches
        backend: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        if hasattr(backend, "encode_batch_fast"):  # the same ids without their offsets in the text
            backend.no_truncation()
            backend.no_padding()
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        # verbose=False: no warning about model_max_length; lengths are the caller's `max_length`.
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _alone(self, responses: list[str]) -> list[list[int]]:
        """Ids of responses by themselves, without the word-start marker that SentencePiece puts before a text."""
        (newline,) = self._ids(["\n"])
        after = self._ids(["\n" + text for text in responses])
        return [
            ids[len(newline) :] if ids[: len(newline)] == newline else alone
            for ids, alone in zip(after, self._ids(responses), strict=True)
        ]

    def _open(self, prompt: list[int], where: str) -> list[int]:
        """The prompt with one BOS where the template or the tokenizer wants one, and at least one token long."""
        if self.bos is None:
            if not prompt:
                raise UserError(
                    f"{where}: the prompt is empty and the tokenizer {self._name} has no BOS token, so nothing "
                    "predicts the first token of the response; give the row a `prompt`."
                )
            return prompt
        start = next((i for i, token in enumerate(prompt) if token != self.bos), len(prompt))
        return [self.bos, *prompt[start:]] if start or self._adds_bos or not prompt else prompt

    def _close(self, response: list[int]) -> list[int]:
        """The response up to the first EOS of those that end it (whitespace may follow), or with EOS appended."""
        end = None
        for i in range(len(response) - 1, -1, -1):
            if response[i] in self.eos_ids:
                end = i + 1
            elif not self._is_blank(response[i]):
                break
        if end is not None:
            return response[:end]
        return [*response, self._eos] if response and self._eos is not None else response


def truncate(pair: EncodedPair, options: DataOptions, bos: int | None) -> EncodedPair:
    """The pair within options.max_length: first the prompt is cut, the same for both, then each response on its own.

    A cut response has lost its EOS; none is emptied, because max_prompt_length < max_length.
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
    mend = "make the template write the prompt the same way in both"
    if header_in_prompt:
        mend += ", or use --assistant-header response if only the generation prompt differs"
    return (
        f"{where}: the chat template renders the prompt differently when a response follows: {prompt[at : at + 40]!r} "
        f"became {full[at : at + 40]!r} at character {at + 1}; {mend}."
    )
