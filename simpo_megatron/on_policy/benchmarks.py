"""The files that AlpacaEval 2, Arena-Hard-Auto and MT-Bench read: their questions, and what they want of a model.

benchmark = BENCHMARKS["alpaca_eval"]
questions = benchmark.read(Path("alpaca_eval.json"))
...                                                   # every turn is answered
benchmark.write(output, questions, answered, "my-model")

Sampling defaults are those of the authors of SimPO (AlpacaEval 2 with Llama-3, Arena-Hard) and of FastChat (MT-Bench).
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpo_megatron.data.reading import read_rows
from simpo_megatron.data.schema import Message, check_json
from simpo_megatron.errors import UserError
from simpo_megatron.on_policy.arena_style import style
from simpo_megatron.on_policy.prompts import Prompt, digest
from simpo_megatron.program import write_report

Answered = Mapping[str, Mapping[str, Any]]  # id of a prompt -> its row of responses

# FastChat, llm_judge/common.py: temperature_config.
_MT_BENCH_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Attributes:
        id: unique in the benchmark.
        turns: what the user says, turn by turn.
        row: of the benchmark's file.
        where: place of the row, for errors.
        temperature: that the benchmark wants for it; None for that of the run.
    """

    id: str
    turns: tuple[str, ...]
    row: dict[str, Any]
    where: str
    temperature: float | None = None

    def known_prompts(self, answered: Answered) -> list[Prompt]:
        """The prompts of all turns whose earlier turns are answered."""
        turns = range(len(self.turns))
        return [self.prompt(n, answered) for n in turns if all(self.turn_id(i) in answered for i in range(n))]

    def turn_id(self, turn: int) -> str:
        """The id of the prompt of a turn, from 0."""
        return self.id if turn == 0 else f"{self.id}#{turn + 1}"

    def prompt(self, turn: int, answered: Answered) -> Prompt:
        """The conversation up to a turn, with the model's own answers to those before.

        Args:
            turn: from 0.
            answered: rows of the earlier turns.
        """
        messages: list[Message] = []
        for number, text in enumerate(self.turns[: turn + 1]):
            messages.append({"role": "user", "content": text})
            if number < turn:
                messages.append({"role": "assistant", "content": self.answer(number, answered)})
        return Prompt(self.turn_id(turn), messages, self.where)

    def answer(self, turn: int, answered: Answered) -> str:
        """The model's answer in a turn."""
        return str(answered[self.turn_id(turn)]["responses"][0]["content"])


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: value of `--for`.
        turns: of every question.
        defaults: of the sampling settings.
        question: reads a row of its questions; raises KeyError, TypeError, IndexError or ValueError where it is of
            another form.
        text: the content of its file, from the questions, the rows of responses and the model's name.
        command: what to run next, with {file} and {name}.
        named_by_file: the benchmark takes the model's name from the name of the file.
    """

    name: str
    turns: int
    defaults: Mapping[str, Any]
    question: Callable[[dict[str, Any], str], Question]
    text: Callable[[Sequence[Question], Answered, str], str]
    command: str
    named_by_file: bool = True

    def read(self, path: Path) -> list[Question]:
        """Reads the benchmark's own file of questions, a JSON array or JSON lines.

        Raises:
            UserError: it cannot be read, or a row is of another form.
        """
        questions: list[Question] = []
        for where, row in _rows(path):
            try:
                questions.append(self.question(row, where))
            except (KeyError, TypeError, IndexError, ValueError) as error:
                raise UserError(
                    f"--questions {where}: not a question of {self.name} ({error}); give the benchmark's own file"
                ) from None
            check_json(row, f"--questions {where}: the row")
        repeated = len(questions) - len({question.id for question in questions})
        if repeated or not questions:
            what = f"{repeated} questions that repeat an earlier one" if repeated else "no questions"
            raise UserError(f"--questions {path} has {what}; give the benchmark's own file")
        return questions

    def name_of(self, output: Path, checkpoint: Path) -> str:
        """The model's name where the user gives none."""
        return output.stem if self.named_by_file else checkpoint.resolve().name

    def write(self, output: Path, questions: Sequence[Question], answered: Answered, name: str) -> None:
        """Writes the file that the benchmark reads, in the order of its questions.

        Raises:
            UserError: it cannot be written.
        """
        write_report("--output", output, self.text(questions, answered, name))


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a JSON array or of JSON lines, and where they stand."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            return [(f"{path} row {number}", row) for number, row in enumerate(json.loads(text), start=1)]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--questions {path} cannot be read ({error}); give the benchmark's own file") from None
    return list(read_rows(path))


def _alpaca_question(row: dict[str, Any], where: str) -> Question:
    return Question(digest(row["instruction"]), (_text(row["instruction"]),), row, where)


def _alpaca_text(questions: Sequence[Question], answered: Answered, name: str) -> str:
    # The length-controlled win rate joins rows by their index, so the order of the questions is kept.
    rows = [
        {
            **{key: question.row[key] for key in ("dataset", "instruction") if key in question.row},
            "output": question.answer(0, answered),
            "generator": name,
        }
        for question in questions
    ]
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def _arena_question(row: dict[str, Any], where: str) -> Question:
    return Question(str(row["uid"]), (_text(row["prompt"]),), row, where)


def _arena_text(questions: Sequence[Question], answered: Answered, name: str) -> str:
    return _lines(
        {
            "uid": question.row["uid"],
            "ans_id": uuid.uuid4().hex[:22],
            "model": name,
            "messages": [
                {"role": "user", "content": question.turns[0]},
                {"role": "assistant", "content": {"answer": question.answer(0, answered)}},
            ],
            "tstamp": time.time(),
            "metadata": style(question.answer(0, answered), "gpt-4o"),
        }
        for question in questions
    )


def _old_arena_question(row: dict[str, Any], where: str) -> Question:
    return Question(str(row["question_id"]), (_text(row["turns"][0]["content"]),), row, where)


def _old_arena_text(questions: Sequence[Question], answered: Answered, name: str) -> str:
    return _lines(
        {
            **_answer_head(question, name),
            "choices": [{"index": 0, "turns": [{"content": question.answer(0, answered)}]}],
            "tstamp": time.time(),
            "conv_metadata": style(question.answer(0, answered), "gpt-3.5-turbo"),
        }
        for question in questions
    )


def _mt_question(row: dict[str, Any], where: str) -> Question:
    first, second = row["turns"]
    heat = _MT_BENCH_TEMPERATURES.get(row["category"], 0.7)
    return Question(str(row["question_id"]), (_text(first), _text(second)), row, where, heat)


def _mt_text(questions: Sequence[Question], answered: Answered, name: str) -> str:
    return _lines(
        {
            **_answer_head(question, name),
            "choices": [{"index": 0, "turns": [question.answer(turn, answered) for turn in range(2)]}],
            "tstamp": time.time(),
        }
        for question in questions
    )


def _answer_head(question: Question, name: str) -> dict[str, Any]:
    return {"question_id": question.row["question_id"], "answer_id": uuid.uuid4().hex[:22], "model_id": name}


def _lines(rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{value!r} is not a text")
    return value


_GREEDY = {"num_responses": 1, "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 4096}
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "alpaca_eval",
            1,
            {**_GREEDY, "temperature": 0.9},
            _alpaca_question,
            _alpaca_text,
            "alpaca_eval --model_outputs {file}",
            named_by_file=False,
        ),
        Benchmark(
            "arena_hard",
            1,
            _GREEDY,
            _arena_question,
            _arena_text,
            "in arena-hard-auto, with the file in data/BENCH/model_answer/ and {name} in "
            "config/gen_judgment_config.yaml: python gen_judgment.py && python show_result.py",
        ),
        Benchmark(
            "arena_hard_v0.1",
            1,
            _GREEDY,
            _old_arena_question,
            _old_arena_text,
            "in arena-hard-auto at 8f2f44d, with the file in data/arena-hard-v0.1/model_answer/ and {name} in "
            "config/judge_config.yaml: python gen_judgment.py && python show_result.py",
        ),
        Benchmark(
            "mt_bench",
            2,
            {**_GREEDY, "max_new_tokens": 1024},
            _mt_question,
            _mt_text,
            "in FastChat/fastchat/llm_judge, with the file in data/mt_bench/model_answer/: "
            "python gen_judgment.py --model-list {name} && python show_result.py --model-list {name}",
        ),
    )
}
