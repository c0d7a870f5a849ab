"""What a preference set would do to training: every fault by name, counted, with examples and the flag that mends it.

A source is read as training reads it; a prepared set is read back from its ids. A finding spoils training when more than its
share of the pairs has it (`CHECKS`): some faults at the first pair, others (a cut response, a duplicate) only in numbers.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simpo_megatron.data.clean import Row, row_blocks
from simpo_megatron.data.encode import EncodedPair, PairEncoder, TemplateError, truncate
from simpo_megatron.data.options import DataOptions
from simpo_megatron.data.packing import pack_rows
from simpo_megatron.data.pairs import CHOSEN_CUT, REJECTED_CUT
from simpo_megatron.data.prepared_set import PreparedPairs, is_prepared
from simpo_megatron.data.reading import read_rows
from simpo_megatron.data.schema import Preference, parse_preference

EXAMPLES = 5
BATCH = 128  # pairs of a global batch, for the figures of packing
# Control characters other than tab and line ends, the replacement character (a wrong encoding), non-characters.
_ODD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffd-\uffff]")


@dataclass(frozen=True)
class Check:
    """A fault: its name, what mends it, and the share of pairs from which it spoils training (None: never)."""

    title: str
    mend: str
    spoils: float | None = None


CHECKS = {
    "template": Check(
        "the template writes the prompt differently before a response",
        "--assistant-header response, or the template",
        0,
    ),
    "double_bos": Check("two BOS at the start", "remove one from the template, and prepare again", 0),
    "missing_bos": Check("no BOS, though the tokenizer has one", "right for some models; else add it to the template"),
    "missing_eos": Check("a whole response that does not end with EOS", "give the tokenizer an eos_token", 0),
    "eos_lost": Check("responses cut, their EOS lost", "--max-length", 0.1),
    "prompt_cut": Check("prompts cut", "--max-length or --max-prompt-length"),
    "too_long": Check("pairs that may outgrow a row", "--seq-length, or prepare with a smaller --max-length", 0),
    "boundary": Check("a token straddles prompt and response", "no space at the end of prompts", 0.1),
    "special": Check(
        "special tokens written out inside the texts", "strip chat markup from prompts and responses", 0.05
    ),
    "empty": Check("an empty response (dropped)", "fill or remove the rows", 0.2),
    "identical": Check("identical responses (dropped)", "remove the rows", 0.2),
    "tie": Check("equal scores", "--tie-policy drop or zero-margin"),
    "inverted": Check("the rejected response has the higher score", "--min-score-gap 0", 0.01),
    "duplicate": Check("pairs that repeat an earlier row", "--duplicates drop", 0.1),
    "contradictory": Check("the same two responses preferred the other way round", "remove both rows", 0.01),
    "odd_text": Check("control, replacement or non-characters", "save the source as UTF-8 and clean it", 0.05),
    "leak": Check("prompts of the validation data that stand here too", "remove those rows", 0),
    "length_bias": Check("chosen responses far longer than rejected ones", "--max-length-ratio, or other pairs"),
}


@dataclass
class Finding:
    """Where a fault was seen."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class View:
    """A pair as the loss sees it: (text, kind) of every token of both sequences; kind is prompt, scored or eos."""

    where: str
    chosen: list[tuple[str, str]]
    rejected: list[tuple[str, str]]


class Doctor:
    """Examines pairs one after the other.

    Attributes:
        findings: by the names of `CHECKS`.
        rows: rows seen.
        lengths: (prompt, chosen, rejected) tokens of every pair that would be trained on, cut as `options` says.
        views: of the pair asked for, and of one example of every fault that is seen in ids.
    """

    def __init__(
        self, tokenizer: Any, options: DataOptions, eos_ids: Sequence[int], seq_length: int, show: int = 1
    ) -> None:
        self.options, self.seq_length, self.show = options, seq_length, show
        self.encoder = PairEncoder(tokenizer, options, eos_ids)
        self.tokenizer, self.bos = tokenizer, self.encoder.bos
        self.eos = self.encoder.eos_ids
        self.findings = {name: Finding() for name in CHECKS}
        self.rows = 0
        self.lengths: list[tuple[int, int, int]] = []
        self.whole: list[int] = []  # tokens of the longer member of every pair before it was cut
        self.views: list[View] = []
        self._shown: set[str] = set()
        self._seen: set[bytes] = set()
        self._leaks: set[bytes] = set()
        self._special = [token for token in map(str, tokenizer.all_special_tokens) if len(token) > 2]

    def note(self, name: str, where: str) -> None:
        """Counts a fault."""
        finding = self.findings[name]
        finding.count += 1
        if len(finding.examples) < EXAMPLES:
            finding.examples.append(where)

    def remember_prompts(self, source: str) -> None:
        """The prompts of the validation data, raw or prepared, which must not stand in what is examined next."""
        if is_prepared(source):
            pairs = PreparedPairs(source)
            self._leaks |= {_digest(pairs.pair(i)[0].tolist()) for i in range(len(pairs))}
            return
        for block in row_blocks(read_rows(source)):
            encoded = self.encoder.encode([parse_preference(row, where) for where, row in block])
            self._leaks |= {_digest(pair.prompt) for pair in encoded}

    def examine_rows(self, rows: Iterator[Row]) -> None:
        """Reads rows as training would. Raises UserError for one that training would refuse for more than its template."""
        for block in row_blocks(rows):
            preferences = [parse_preference(row, where) for where, row in block]
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
                    self._look_at_pair(preference.where, pair, cut, usable and all(t.strip() for t in preference.texts))

    def examine_prepared(self, pairs: PreparedPairs) -> None:
        """Reads a prepared set back from its ids."""
        self.options = DataOptions(**pairs.about["options"])
        for i in range(len(pairs)):
            where = f"{pairs.prefix} row {int(pairs.records['row'][i])}"
            prompt, chosen, rejected = (ids.tolist() for ids in pairs.pair(i))
            bits = int(pairs.truncated[i])
            pair = EncodedPair(
                prompt,
                chosen,
                rejected,
                prompt_cut=bool(pairs.records["prompt_cut"][i]),
                chosen_cut=bool(bits & CHOSEN_CUT),
                rejected_cut=bool(bits & REJECTED_CUT),
            )
            self.rows += 1
            scores = float(pairs.records["score_chosen"][i]), float(pairs.records["score_rejected"][i])
            self._look_at_scores(where, *scores)
            self._look_at_texts(where, str(self.tokenizer.decode(prompt)), self._texts(chosen, rejected), special=False)
            self._look_at_pair(where, pair, pair, usable=True)

    def finish(self) -> None:
        """What only all pairs together tell. Call it once, last."""
        table = np.array(self.lengths, np.int64).reshape(-1, 3)
        if len(table) >= 20 and np.median(table[:, 1]) > 1.5 * np.median(table[:, 2]):
            share = int((table[:, 1] > table[:, 2]).sum())
            self.findings["length_bias"] = Finding(
                share, [f"{share} of {len(table)} chosen responses are the longer one"]
            )

    def spoils(self, name: str) -> bool:
        """Whether the fault is frequent enough to spoil training."""
        limit, count = CHECKS[name].spoils, self.findings[name].count
        return limit is not None and count > limit * max(self.rows, 1)

    def mend(self, name: str) -> str:
        """What mends a fault, with a number where there is one."""
        if name in ("eos_lost", "prompt_cut") and self.whole:
            needed = int(np.percentile(self.whole, 99, method="higher"))
            if needed > self.options.max_length:
                return f"{CHECKS[name].mend} {needed} (99 % of the pairs fit)"
            if max(self.whole) > self.options.max_length:
                return f"{CHECKS[name].mend} {max(self.whole)} (all pairs fit)"
            return f"{CHECKS[name].mend} above {self.options.max_length}"
        return CHECKS[name].mend

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
        # Prompts given as plain strings may hold markup by right: somebody else applied the template.
        texts = (prompt, *responses) if special else responses
        if any(token in text for text in texts for token in self._special) and special:
            self.note("special", where)
        if any(_ODD.search(text) for text in (prompt, *responses)):
            self.note("odd_text", where)

    def _look_at_pair(self, where: str, pair: EncodedPair, cut: EncodedPair, usable: bool) -> None:
        lost = (cut.chosen_cut, cut.rejected_cut)
        whole = [ids for ids, gone in zip((cut.chosen, cut.rejected), lost, strict=True) if not gone]
        faults = {
            "double_bos": self.bos is not None and cut.prompt[:2] == [self.bos] * 2,
            "missing_bos": self.bos is not None and cut.prompt[:1] != [self.bos] and not cut.prompt_cut,
            "missing_eos": usable and any(ids[-1:] and ids[-1] not in self.eos for ids in whole),
            "eos_lost": any(lost),
            "prompt_cut": cut.prompt_cut,
            "boundary": bool(pair.boundary_merges),
            "too_long": 2 * (len(cut.prompt) + max(len(cut.chosen), len(cut.rejected))) > self.seq_length,
        }
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
            self.views.append(self._view(where + "".join(f", {CHECKS[name].title}" for name in sorted(new)), cut))

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


def packing_figures(lengths: np.ndarray, seq_length: int, batch: int = BATCH) -> dict[str, float]:
    """What packing makes of pairs in their order, a global batch at a time.

    lengths: int [P, 3], tokens of prompt, chosen and rejected; none longer than a row with its pair. Shares are of all
    positions computed: rows of `seq_length`; sequences padded to the longest of every four pairs, as without packing.
    """
    if not len(lengths):
        return {}
    members = np.stack([lengths[:, 0] + lengths[:, 1], lengths[:, 0] + lengths[:, 2]], axis=1)
    pairs = members.sum(axis=1)
    fit = np.minimum(pairs, seq_length)
    rows = sum(len(pack_rows(fit[start : start + batch], seq_length)) for start in range(0, len(fit), batch))
    padded = sum(
        members[start : start + 4].max() * members[start : start + 4].size for start in range(0, len(members), 4)
    )
    tokens = int(pairs.sum())
    return {
        "pairs": len(pairs),
        "tokens": tokens,
        "rows": rows,
        "fewest_rows": sum(
            -(-int(fit[start : start + batch].sum()) // seq_length) for start in range(0, len(fit), batch)
        ),
        "tokens_per_row": int(fit.sum()) / rows,
        "padding_packed": 1 - int(fit.sum()) / (rows * seq_length),
        "padding_unpacked": 1 - tokens / float(padded),
        "saved_by_shared_prompts": float(lengths[:, 0].sum()) / tokens,
    }


def _prompt_text(preference: Preference) -> str:
    if isinstance(preference.prompt, str):
        return preference.prompt
    return "\n".join(f"{message['role']}: {message.get('content')}" for message in preference.prompt)


def _digest(ids: list[int]) -> bytes:
    return hashlib.blake2b(np.array(ids, np.int32).tobytes(), digest_size=12).digest()
