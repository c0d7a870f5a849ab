"""Makes the data and the starting model of the quick start: preferences, a tokenizer and a Llama with random weights.

    python examples/quickstart_data.py --output runs/quickstart                       # made-up questions
    python examples/quickstart_data.py --output runs/mine --data preferences.jsonl    # your own preferences

`--held-out FILE` names the pairs to evaluate on; without it a tenth of your prompts is held out.

It takes seconds on one core and downloads nothing. It writes OUTPUT/data/{sft,train,heldout}.jsonl and OUTPUT/model.
Held-out questions never occur in the other two files.

The made-up questions ask for one of two numbers or words. Chosen responses are right and rejected ones wrong. Both come
in the same three phrasings, the rejected ones more often in the longest. A quarter of the demonstrations in sft.jsonl
are wrong, as demonstrations often are, so SimPO has something to correct. With your own data SFT takes the chosen
responses as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from simpo_megatron.data.reading import read_rows
from simpo_megatron.data.schema import parse_preference
from simpo_megatron.errors import UserError
from simpo_megatron.program import exit_code

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from toy_tokenizer import train_tokenizer

Row = dict[str, Any]
Weights = tuple[int, ...]

NUMBERS = range(10, 50)
REPEATS = 5  # questions about the same two items, in either order and direction
HELD_OUT_ROWS = 200  # at most; of your own data a tenth, if that is less
OWN_ROWS = 1500  # two cores train the small model on so many in minutes
VOCABULARY = 2000

_WORDS = (
    "acorn anchor basket candle cedar dune ember falcon garden harbor island jungle kettle ladder maple needle orchid "
    "pebble quill river saddle tulip violet willow"
)
WORDS = _WORDS.split()
# (question, what is asked for, whether the right answer is the first of the two in order)
QUESTIONS = {
    "number": (("is smaller", "smaller number", True), ("is larger", "larger number", False)),
    "word": (
        ("comes first in the alphabet", "first word", True),
        ("comes last in the alphabet", "last word", False),
    ),
}
PHRASINGS = (
    "It is {answer}.",
    "The {what} is {answer}.",
    "I am not quite sure, but I think that the {what} is {answer}.",
)
WEIGHTS = (5, 4, 1), (4, 4, 2)  # how often chosen and rejected responses come in each phrasing
WRONG_DEMONSTRATIONS = 0.25

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BEGIN, END = "<|begin|>", "<|end|>"
SPECIAL_TOKENS = [BEGIN, END, "<|system|>", "<|user|>", "<|assistant|>"]


def made_up_rows(seed: int, weights: tuple[Weights, Weights] = WEIGHTS) -> tuple[list[Row], list[Row]]:
    """(train, held-out) questions as TRL's conversational rows. No two items that meet in one meet in the other.

    Args:
        seed: of all that is drawn.
        weights: how often chosen and rejected responses come in each phrasing.
    """
    choose = random.Random(seed)
    items = [("number", str(low), str(high)) for low, high in itertools.combinations(NUMBERS, 2)]
    items += [("word", first, last) for first, last in itertools.combinations(WORDS, 2)]
    choose.shuffle(items)
    held_out = [_question(choose, weights, *drawn) for drawn in items[:HELD_OUT_ROWS]]
    train = [_question(choose, weights, *drawn) for drawn in items[HELD_OUT_ROWS:] * REPEATS]
    return train, held_out


def _question(choose: random.Random, weights: tuple[Weights, Weights], kind: str, first: str, last: str) -> Row:
    question, what, wants_first = choose.choice(QUESTIONS[kind])
    right, wrong = (first, last) if wants_first else (last, first)
    one, other = choose.sample((first, last), 2)

    def say(answer: str, weights: Weights) -> list[dict[str, str]]:
        (phrasing,) = choose.choices(PHRASINGS, weights)
        return [{"role": "assistant", "content": phrasing.format(what=what, answer=answer)}]

    return {
        "prompt": [{"role": "user", "content": f"Which {kind} {question}, {one} or {other}?"}],
        "chosen": say(right, weights[0]),
        "rejected": say(wrong, weights[1]),
        "answer": right,
    }


def demonstrations(rows: list[Row], seed: int) -> list[Row]:
    """The rows, with chosen and rejected exchanged in some: SFT learns from `chosen`."""
    choose = random.Random(seed)
    wrong = [choose.random() < WRONG_DEMONSTRATIONS for _ in rows]
    return [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if swap else row
        for row, swap in zip(rows, wrong, strict=True)
    ]


def own_rows(path: Path) -> list[Row]:
    """The preferences of a file in TRL's explicit-prompt form, without empty responses, equal responses and ties.

    Raises:
        UserError: the file or one of its rows cannot be read.
    """
    rows: list[Row] = []
    left_out = 0
    for where, source in read_rows(path):
        pair = parse_preference(source, where)
        if pair.tie or pair.chosen == pair.rejected or not all(text.strip() for text in pair.texts):
            left_out += 1
            continue
        responses = {"chosen": pair.chosen, "rejected": pair.rejected}
        row = {name: [response] if pair.conversational else response for name, response in responses.items()}
        kept = {name: source[name] for name in ("weight", "margin") if source.get(name) is not None}
        rows.append({"prompt": pair.prompt, **row, **kept})
    if left_out:
        print(f"{path}: left out {left_out} rows with empty or equal responses or equal scores.")
    if len(rows) > OWN_ROWS:
        print(f"{path}: using {OWN_ROWS} of {len(rows)} pairs, so that the quick start stays quick.")
    return sorted(rows, key=lambda row: _digest(row["prompt"]))[:OWN_ROWS]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def split(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Splits by prompt into (train, held-out), in the order of digests, so the same rows are always split the same way.

    Raises:
        UserError: there are fewer than two different prompts.
    """
    wanted = min(HELD_OUT_ROWS, len(rows) // 10 + 1)
    by_prompt = itertools.groupby(sorted(rows, key=lambda row: _digest(row["prompt"])), lambda row: row["prompt"])
    train: list[Row] = []
    held_out: list[Row] = []
    for _, group in by_prompt:
        (held_out if len(held_out) < wanted else train).extend(group)
    if not train:
        raise UserError("the preferences need at least two different prompts, one of them to be held out")
    return train, held_out


def texts(rows: Iterable[Row]) -> Iterable[str]:
    """What a tokenizer learns from: every prompt and every response."""
    for row in rows:
        for value in (row["prompt"], row["chosen"], row["rejected"]):
            yield from (value,) if isinstance(value, str) else (message["content"] for message in value)


def make_tokenizer(rows: list[Row]) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the rows, with a chat template."""
    return train_tokenizer(texts(rows), VOCABULARY, SPECIAL_TOKENS, CHAT_TEMPLATE, min_frequency=2)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of about a million parameters with random weights, which tensor 2 x pipeline 2 can divide."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=SPECIAL_TOKENS.index(BEGIN),
        eos_token_id=SPECIAL_TOKENS.index(END),
        pad_token_id=SPECIAL_TOKENS.index(END),
    )
    return LlamaForCausalLM(config)


def write_rows(path: Path, rows: list[Row]) -> None:
    """Writes JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def prepare(
    output: Path,
    data: Path | None,
    seed: int,
    held_out_data: Path | None = None,
    weights: tuple[Weights, Weights] = WEIGHTS,
) -> None:
    """Writes data and model below `output`.

    Args:
        output: folder to write into.
        data: preferences to use; None for made-up questions.
        seed: of the made-up questions and the random weights.
        held_out_data: preferences to evaluate on; None to hold out a part of `data`.
        weights: see `made_up_rows`.

    Raises:
        UserError: a file cannot be read, or has too few prompts, or the disk is full.
    """
    if data is None:
        train, held_out = made_up_rows(seed, weights)
    elif held_out_data is None:
        train, held_out = split(own_rows(data))
    else:
        train, held_out = own_rows(data), own_rows(held_out_data)
    write_rows(output / "data" / "sft.jsonl", demonstrations(train, seed) if data is None else train)
    write_rows(output / "data" / "train.jsonl", train)
    write_rows(output / "data" / "heldout.jsonl", held_out)
    tokenizer = make_tokenizer(train)
    model = make_model(tokenizer, seed)
    transformers.utils.logging.disable_progress_bar()
    try:
        model.save_pretrained(output / "model")
    except SafetensorError as error:
        raise UserError(
            f"--output {output} cannot be written: {error}; free space there, or give another folder"
        ) from error
    tokenizer.save_pretrained(output / "model")
    print(
        f"{len(train)} pairs to train on, {len(held_out)} held out, {len(tokenizer)} tokens, "
        f"{model.num_parameters() / 1e6:.1f} M parameters with random values."
    )


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--data", type=Path, help="preferences to use instead of made-up ones")
    parser.add_argument("--held-out", type=Path, help="with --data: the preferences to evaluate on")
    parser.add_argument("--seed", type=int, default=0, help="of the made-up questions and the random weights")
    options = parser.parse_args()
    return exit_code("quickstart_data", lambda: prepare(options.output, options.data, options.seed, options.held_out))


if __name__ == "__main__":
    sys.exit(main())
