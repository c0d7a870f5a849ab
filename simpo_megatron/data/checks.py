"""The faults that the data doctor (`doctor.py`) looks for, and what fixes each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Form = Literal["conversation", "text", "text without prompt"]  # of the rows of a source


@dataclass(frozen=True)
class Check:
    """A fault.

    Attributes:
        title: its name in the report.
        fix: flags that fix it, or what to do to the data.
        fixes: the same for rows of one form, where that is something else.
        limit: the fault blocks training when more than this share of the rows has it; None: it never does.
    """

    title: str
    fix: str
    limit: float | None = None
    fixes: Mapping[Form | None, str] = field(default_factory=dict)


CHECKS = {
    "template": Check(
        "the template writes the prompt differently before a response",
        "--assistant-header response, or change the template",
        0,
    ),
    "double_bos": Check("two BOS at the start", "remove one from the template, and prepare again", 0),
    "missing_bos": Check(
        "no BOS, though the tokenizer has one",
        "right for some models; else prepare it again, with BOS in the template if these are conversations",
        fixes={"conversation": "right for some models; else add it to the template"},
    ),
    "missing_eos": Check("a whole response that does not end with EOS", "give the tokenizer an eos_token", 0),
    "eos_lost": Check("responses cut, their EOS lost", "--max-length", 0.1),
    "prompt_cut": Check("prompts cut", "--max-length or --max-prompt-length"),
    "too_long": Check(
        "pairs that may be longer than a packed row", "--seq-length, or prepare with a smaller --max-length", 0
    ),
    "boundary": Check(
        "one token spans the end of the prompt and the response",
        "no space at the end of prompts",
        0.1,
        {
            "text without prompt": "give the rows an explicit `prompt` that ends where a word ends",
            "conversation": "no space at the end of the template's generation prompt",
        },
    ),
    "special": Check(
        "special tokens written out inside the texts", "remove chat markup from prompts and responses", 0.05
    ),
    "empty": Check("an empty response (dropped)", "fill or remove the rows", 0.2),
    "identical": Check("identical responses (dropped)", "remove the rows", 0.2),
    "tie": Check("equal scores", "--tie-policy drop or zero-margin"),
    "inverted": Check("the rejected response has the higher score", "--min-score-gap 0", 0.01),
    "duplicate": Check("pairs that repeat an earlier pair", "--duplicates drop", 0.1),
    "contradictory": Check("the same two responses preferred the other way round", "remove both rows", 0.01),
    "odd_text": Check(
        "control, replacement or non-characters", "save the source as UTF-8 and remove the characters", 0.05
    ),
    "leak": Check("prompts that are in the validation data too", "remove those rows", 0),
    "length_bias": Check("chosen responses far longer than rejected ones", "--max-length-ratio, or other pairs"),
}
