"""Counts the faults of a preference set (`checks.py`), with examples and fixes; `tools/inspect_data.py` runs it.

A source is read as training reads it. A prepared set is read back from its ids. Some faults block training at the first
pair, others (a response that is cut, a duplicate) only when many pairs have them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simpo_megatron.data.checks import CHECKS, Form
from simpo_megatron.data.encode import EncodedPair, PairEncoder, TemplateError, truncate
from simpo_megatron.data.options import DataOptions
from simpo_megatron.data.pairs import CHOSEN_CUT, REJECTED_CUT
from simpo_megatron.data.prepared_format import is_prepared
from simpo_megatron.data.prepared_set import PreparedPairs
from simpo_megatron.data.reading import Row, read_rows, row_blocks
from simpo_megatron.data.schema import Preference, parse_preference

EXAMPLES = 5
# Control characters other than tab and line ends, the replacement character (a wrong encoding), non-characters.
_ODD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffd-\uffff]")


@dataclass
class Finding:
    """A fault that was found: in how many rows, and in which ones (the first `EXAMPLES`)."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class View:
    """A pair as the loss sees it.

    Attributes:
        where: place of its row, and the faults it is an example of.
        chosen: (text, kind) of every token of prompt and chosen response; the kind is prompt, scored or eos.
        rejected: as `chosen`.
    """

    where: str
    chosen: list[tuple[str, str]]
    rejected: list[tuple[str, str]]


class Doctor:
    """Examines pairs one after the other. Call `finish` at the end.

    Attributes:
        findings: by the names of `CHECKS`.
        rows: rows examined.
        lengths: (prompt, chosen, rejected) tokens of every pair that training would use, after truncation.
        whole: tokens of the longer sequence of each of these pairs, before truncation.
        form: of the rows; None for a prepared set, which does not say.
        asked: view of the pair that was asked for; None where its template is at fault.
    """

    def __init__(
        self, tokenizer: Any, options: DataOptions, eos_ids: Sequence[int], seq_length: int, show: int = 1
    ) -> None:
        """A doctor for one model.

        Args:
            tokenizer: of the model.
            options: of the training run.
            eos_ids: ids that end a response besides tokenizer.eos_token_id.
            seq_length: tokens of a packed row.
            show: number of the pair to show token by token, from 1.
        """
        self.options, self.seq_length, self.show = options, seq_length, show
        self.encoder = PairEncoder(tokenizer, options, eos_ids)
        self.tokenizer, self.bos = tokenizer, self.encoder.bos
        self.eos = self.encoder.eos_ids
        self.findings = {name: Finding() for name in CHECKS}
        self.rows = 0
        self.lengths: list[tuple[int, int, int]] = []
        self.whole: list[int] = []
        self.form: Form | None = None
        self.asked: View | None = None
        self._examples: list[View] = []
        self._shown: set[str] = set()  # faults that have a view
        self._seen: set[bytes] = set()
        self._leaks: set[bytes] = set()
        self._special = [token for token in map(str, tokenizer.all_special_tokens) if len(token) > 2]

    def note(self, name: str, where: str) -> None:
        """Counts a fault of the row at `where`."""
        finding = self.findings[name]
        finding.count += 1
        if len(finding.examples) < EXAMPLES:
            finding.examples.append(where)

    def remember_prompts(self, source: str) -> None:
        """Reads the prompts of the validation data, raw or prepared. Pairs examined later must not have them."""
        if is_prepared(source):
            pairs = PreparedPairs(source)
            self._leaks |= {_digest(pairs.pair(i)[0].tolist()) for i in range(len(pairs))}
            return
        for block in row_blocks(read_rows(source)):
            encoded = self.encoder.encode([parse_preference(row, where) for where, row in block])
            self._leaks |= {_digest(pair.prompt) for pair in encoded}

    def examine_rows(self, rows: Iterator[Row]) -> None:
        """Reads rows as training does.

        Raises:
            UserError: training would refuse a row, for another reason than its template.
        """
        for block in row_blocks(rows):
            preferences = [parse_preference(row, where) for where, row in block]
            self.form = self.form or _form(block[0][1], preferences[0])
            try:
                pairs: list[EncodedPair | None] = [*self.encoder.encode(preferences)]
            except TemplateError:
                pairs = [self._encode_alone(preference) for preference in preferences]
            for preference, pair in zip(preferences, pairs, strict=True):
                self.rows += 1
                self._look_at_row(preference)
                if pair is not None:
                    cut = truncate(pair, self.options, self.bos)
                    usable = bool(pair.chosen and pair.rejected) and pair.chosen != pair.rejected
                    usable = usable and all(text.strip() for text in preference.texts)
                    straddles = pair.boundary_merges > 0 and self.encoder.straddles(preference)
                    self._look_at_pair(preference.where, pair, cut, usable, straddles)

    def examine_prepared(self, pairs: PreparedPairs) -> None:
        """Reads a prepared set back from its ids."""
        self.options = DataOptions(**pairs.about["options"])
        for i in range(len(pairs)):
            numbers = {name: column[i] for name, column in pairs.columns.items()}
            where = f"{pairs.prefix} row {int(numbers['row'])}"
            prompt, chosen, rejected = (ids.tolist() for ids in pairs.pair(i))
            bits = int(numbers["truncated"])
            pair = EncodedPair(
                prompt,
                chosen,
                rejected,
                prompt_cut=bool(numbers["prompt_cut"]),
                chosen_cut=bool(bits & CHOSEN_CUT),
                rejected_cut=bool(bits & REJECTED_CUT),
            )
            self.rows += 1
            self._look_at_scores(where, float(numbers["score_chosen"]), float(numbers["score_rejected"]))
            self._look_at_texts(where, str(self.tokenizer.decode(prompt)), self._texts(chosen, rejected), special=False)
            self._look_at_pair(where, pair, pair, usable=True, straddles=False)

    def finish(self) -> None:
        """Looks for faults of the whole set. Call it once, last."""
        table = np.array(self.lengths, np.int64).reshape(-1, 3)
        if len(table) >= 20 and np.median(table[:, 1]) > 1.5 * np.median(table[:, 2]):
            share = int((table[:, 1] > table[:, 2]).sum())
            self.findings["length_bias"] = Finding(
                share, [f"{share} of {len(table)} chosen responses are the longer one"]
            )

    @property
    def views(self) -> list[View]:
        """First the pair that was asked for, then one example of every fault that is found in ids."""
        return [*([self.asked] if self.asked else []), *self._examples]

    def blocks(self, name: str) -> bool:
        """Whether so many rows have the fault that training should not start."""
        limit, count = CHECKS[name].limit, self.findings[name].count
        return limit is not None and count > limit * max(self.rows, 1)

    def fix(self, name: str) -> str:
        """What fixes a fault in rows of this form; for truncation with the length that is needed."""
        if name in ("eos_lost", "prompt_cut") and self.whole:
            needed = int(np.percentile(self.whole, 99, method="higher"))
            if needed > self.options.max_length:
                return f"{CHECKS[name].fix} {needed} (99 % of the pairs fit)"
            if max(self.whole) > self.options.max_length:
                return f"{CHECKS[name].fix} {max(self.whole)} (all pairs fit)"
            return f"{CHECKS[name].fix} above {self.options.max_length}"
        return CHECKS[name].fixes.get(self.form, CHECKS[name].fix)

    def _encode_alone(self, preference: Preference) -> EncodedPair | None:
        try:
            return self.encoder.encode([preference])[0]
        except TemplateError:
            self.note("template", preference.where)
            return None

    def _look_at_row(self, preference: Preference) -> None:
        where = preference.where
        if not all(text.strip() for text in preference.texts):
            self.note("empty", where)
        elif preference.texts[0] == preference.texts[1]:
            self.note("identical", where)
        chosen, rejected = (np.nan if score is None else score for score in preference.scores)
        self._look_at_scores(where, chosen, rejected)
        self._look_at_texts(where, _prompt_text(preference), preference.texts, special=preference.conversational)

    def _look_at_scores(self, where: str, chosen: float, rejected: float) -> None:
        if chosen == rejected:
            self.note("tie", where)
        elif chosen < rejected:
            self.note("inverted", where)

    def _look_at_texts(self, where: str, prompt: str, responses: tuple[str, str], special: bool) -> None:
        # A prompt that is a plain string may hold special tokens: the template may have been applied before.
        texts = (prompt, *responses)
        if special and any(token in text for text in texts for token in self._special):
            self.note("special", where)
        if any(_ODD.search(text) for text in texts):
            self.note("odd_text", where)

    def _look_at_pair(self, where: str, pair: EncodedPair, cut: EncodedPair, usable: bool, straddles: bool) -> None:
        faults = self._faults_of_ids(cut, usable) | {"boundary": straddles}
        key = [_digest(ids) for ids in (pair.prompt, pair.chosen, pair.rejected)]
        faults["leak"] = key[0] in self._leaks
        if usable:
            faults["duplicate"] = b"".join(key) in self._seen
            faults["contradictory"] = b"".join((key[0], key[2], key[1])) in self._seen
            self._seen.add(b"".join(key))
            self.lengths.append((len(cut.prompt), len(cut.chosen), len(cut.rejected)))
            self.whole.append(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)))
        seen = [name for name, found in faults.items() if found]
        for name in seen:
            self.note(name, where)
        new = set(seen) - self._shown
        if self.rows == self.show or new:
            self._shown |= new
            view = self._view(where + "".join(f", {CHECKS[name].title}" for name in sorted(new)), cut)
            if self.rows == self.show:
                self.asked = view
            else:
                self._examples.append(view)

    def _faults_of_ids(self, cut: EncodedPair, usable: bool) -> dict[str, bool]:
        """Whether a pair, after truncation, has each of the faults that its own ids show."""
        lost = (cut.chosen_cut, cut.rejected_cut)
        whole = [ids for ids, gone in zip((cut.chosen, cut.rejected), lost, strict=True) if not gone]
        return {
            "double_bos": self.bos is not None and cut.prompt[:2] == [self.bos] * 2,
            "missing_bos": self.bos is not None and cut.prompt[:1] != [self.bos] and not cut.prompt_cut,
            "missing_eos": usable and any(ids[-1:] and ids[-1] not in self.eos for ids in whole),
            "eos_lost": any(lost),
            "prompt_cut": cut.prompt_cut,
            "too_long": 2 * (len(cut.prompt) + max(len(cut.chosen), len(cut.rejected))) > self.seq_length,
        }

    def _texts(self, chosen: list[int], rejected: list[int]) -> tuple[str, str]:
        return str(self.tokenizer.decode(chosen)), str(self.tokenizer.decode(rejected))

    def _view(self, where: str, pair: EncodedPair) -> View:
        def tokens(response: list[int]) -> list[tuple[str, str]]:
            kinds = ["prompt"] * len(pair.prompt)
            kinds += ["eos" if i == len(response) - 1 and t in self.eos else "scored" for i, t in enumerate(response)]
            return [(self._text(t), kind) for t, kind in zip(pair.prompt + response, kinds, strict=True)]

        return View(where, tokens(pair.chosen), tokens(pair.rejected))

    def _text(self, token: int) -> str:
        text = str(self.tokenizer.decode([token]))
        return str(self.tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text or not text else text


def _form(row: Mapping[str, Any], preference: Preference) -> Form:
    if preference.conversational:
        return "conversation"
    return "text without prompt" if row.get("prompt") is None else "text"


def _prompt_text(preference: Preference) -> str:
    if isinstance(preference.prompt, str):
        return preference.prompt
    return "\n".join(f"{message['role']}: {message.get('content')}" for message in preference.prompt)


def _digest(ids: list[int]) -> bytes:
    return hashlib.blake2b(np.array(ids, np.int32).tobytes(), digest_size=12).digest()
