"""Rounds of generate, score, build, train and evaluate; `tools/iterate.py` runs them.

Every stage is a program of its own, so that the models of a round never share memory. A stage that has ended leaves
`ROUND/done/STAGE.json` with its command. A loop that is started again skips those, and each program goes on by itself
where it was stopped.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import io
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from simpo_megatron.disk import cannot_write
from simpo_megatron.errors import UserError
from simpo_megatron.files import atomic_write, read_json
from simpo_megatron.on_policy.lengths import LengthReport
from simpo_megatron.on_policy.loop_config import LoopConfig, command_line
from simpo_megatron.on_policy.prompts import Prompt, read_prompts
from simpo_megatron.settings import expand
from simpo_megatron.trainer.lock import locked

_SET_PDEATHSIG = 1  # of prctl
TOOLS = Path(__file__).resolve().parents[2] / "tools"
# Section of the loop's file -> the program that gets its flags.
PROGRAMS = {
    "generate": "generate_responses",
    "evaluate": "generate_responses",
    "score": "score_responses",
    "build": "build_pairs",
}


@dataclass(frozen=True)
class Stage:
    """A program of a round.

    Attributes:
        name: unique in the round.
        section: of the loop's file, which its flags come from.
        launch: the command without its flags.
        flags: of the program.
        result: the file or folder that it makes.
    """

    name: str
    section: str
    launch: list[str]
    flags: list[str]
    result: Path

    @property
    def command(self) -> list[str]:
        """What runs it."""
        return [*self.launch, *self.flags]


class Loop:
    """A loop.

    Args:
        config: of the loop.
        checks: section of the loop's file -> what raises UserError for flags of its program that are wrong.
    """

    def __init__(self, config: LoopConfig, checks: Mapping[str, Callable[[list[str]], Any]]) -> None:
        self._config, self._checks, self._folder = config, checks, Path(config.folder)

    def run(self) -> list[dict[str, Any]]:
        """Runs all rounds that are not done, and returns the table.

        Raises:
            UserError: a flag of a stage is wrong, another process runs the loop, a stage fails, or a stage was done
                with other settings.
        """
        config = self._config
        self._check_flags()
        with locked("folder", self._folder, self._folder / ".lock"):
            exclude = [expand(str(config.evaluate["prompts"]))] if config.evaluate else []
            prompts, report = read_prompts(config.prompts, exclude)
            print(report.summary(config.prompts), flush=True)
            model, rows = Path(config.hf_checkpoint), []
            for number in range(config.rounds + 1):
                folder = self._folder / f"round_{number}"
                stages = [] if number == 0 else self._training_stages(number, folder, model)
                model = folder / "model" if number else model
                if number:
                    self._write_prompts(folder / "prompts.jsonl", self._prompts_of(number, prompts))
                for stage in (*stages, *self._evaluation_stages(folder, model)):
                    self._run_stage(number, folder, stage)
                rows.append(_measured(number, folder))
                self._write_table(rows)
        return rows

    def _check_flags(self) -> None:
        """Checks the flags of all stages before the first one starts, which may take hours."""
        folder, model = self._folder / "round_1", Path(self._config.hf_checkpoint)
        for stage in (*self._training_stages(1, folder, model), *self._evaluation_stages(folder, model)):
            try:
                self._checks[stage.section](stage.flags)
            except UserError as error:
                raise UserError(f"--config: {stage.section}: {error}") from error

    def _prompts_of(self, number: int, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts of a round, from 1. After the last prompt the first one comes again."""
        size = self._config.prompts_per_round
        if size is None:
            return list(prompts)
        if size > len(prompts):
            raise UserError(
                f"--config: prompts_per_round {size} is more than there are prompts; use at most {len(prompts)}"
            )
        start = (number - 1) * size
        return [prompts[(start + i) % len(prompts)] for i in range(size)]

    def _training_stages(self, number: int, folder: Path, model: Path) -> list[Stage]:
        config = self._config
        responses, scored, pairs = (folder / f"{name}.jsonl" for name in ("responses", "scored", "pairs"))
        train = {
            "hf_checkpoint": model,
            "train_data": pairs,
            "save": folder / "run",
            "load": folder / "run",
            "export_hf": folder / "model",
        }
        generate = {
            "prompts": folder / "prompts.jsonl",
            "hf_checkpoint": model,
            "output": responses,
            "seed": config.seed + number,
        }
        return [
            _tool("generate", "generate", {**config.generate, **generate}, responses),
            _tool("score", "score", {**config.score, "responses": responses, "output": scored}, scored),
            _tool("build", "build", {**config.build, "data": scored, "output": pairs}, pairs),
            Stage(
                "train", "train", _torchrun(config.processes), command_line({**config.train, **train}), folder / "model"
            ),
        ]

    def _evaluation_stages(self, folder: Path, model: Path) -> list[Stage]:
        config = self._config
        if not config.evaluate:
            return []
        responses, scored = folder / "eval_responses.jsonl", folder / "eval_scored.jsonl"
        generate = {**config.evaluate, "hf_checkpoint": model, "output": responses}
        score = {**config.score, "responses": responses, "output": scored}
        return [
            _tool("eval_generate", "evaluate", generate, responses),
            _tool("eval_score", "score", score, scored),
        ]

    def _write_prompts(self, path: Path, prompts: Iterable[Prompt]) -> None:
        rows = ({"id": prompt.id, "prompt": prompt.messages, **prompt.columns} for prompt in prompts)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with _writing(path):
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(path, text)
        if path.read_text(encoding="utf-8") != text:
            raise UserError(f"{path} holds other prompts than this loop's; give another folder in --config")

    def _run_stage(self, number: int, folder: Path, stage: Stage) -> None:
        """Runs a program, unless it has been done."""
        record, what = folder / "done" / f"{stage.name}.json", f"round {number}: {stage.name}"
        done = read_json(record)["command"] if record.exists() else None
        command = [Path(stage.command[1]).name, *stage.command[2:]]  # wherever Python and this repository are
        if done is not None and done != command:
            before, after = (shlex.join(map(str, words)) for words in (done, command))
            raise UserError(
                f"{what} was done with other settings; give another folder in --config, or the same settings "
                f"(done: {before}; asked for: {after})"
            )
        if done is not None and stage.result.exists():
            return
        print(f"== {what}", flush=True)
        code = _run(stage.command)
        if code != 0:
            raise UserError(
                f"{what} ended with exit code {code} (its own message is above); correct it and start the loop again, "
                f"which goes on there; the command was {shlex.join(stage.command)}"
            )
        with _writing(record):
            record.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(record, json.dumps({"command": command}, indent=1) + "\n")

    def _write_table(self, rows: Sequence[dict[str, Any]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
        with _writing(self._folder / "rounds.csv"):
            self._folder.mkdir(parents=True, exist_ok=True)
            atomic_write(self._folder / "rounds.csv", text.getvalue())


def show_table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the table over the rounds, a column each. Round 0 is the model that the loop starts from."""
    table = Table("round", *(str(row["round"]) for row in rows))
    for name in dict.fromkeys(name for row in rows for name in row if name != "round"):
        table.add_row(name, *("" if row.get(name) is None else _shown(row[name]) for row in rows))
    Console(highlight=False).print(table)


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def _measured(number: int, folder: Path) -> dict[str, Any]:
    """One line of the table."""
    row: dict[str, Any] = {"round": number}
    pairs = folder / "pairs.jsonl"
    if pairs.exists():
        row["pairs"] = len(_lines(pairs))
        row |= _of_responses("train", folder / "scored.jsonl")
    metrics = folder / "run" / "metrics.jsonl"
    if metrics.exists():
        last = _lines(metrics)
        row["loss"] = next((found["loss"] for found in reversed(last) if "loss" in found), None)
    if (scored := folder / "eval_scored.jsonl").exists():
        row |= _of_responses("eval", scored)
    return row


def _of_responses(kind: str, scored: Path) -> dict[str, Any]:
    rows = _lines(scored)
    scores = [response["score"] for row in rows for response in row["responses"]]
    means = LengthReport.of(rows).means()
    return {f"{kind}/score": sum(scores) / len(scores), **{f"{kind}/{name}": value for name, value in means.items()}}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that a stage wrote. A file's lines end with a newline alone; a text's with U+2028 too."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _tool(name: str, section: str, settings: dict[str, Any], result: Path) -> Stage:
    launch = [sys.executable, str(TOOLS / f"{PROGRAMS[section]}.py")]
    return Stage(name, section, launch, command_line(settings), result)


def _torchrun(processes: int) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launch, "-m", "simpo_megatron.train"]


def _run(command: list[str]) -> int:
    """Runs a program to its end. Where this process is stopped, the program gets SIGTERM and is waited for.

    Where this process is killed, Linux sends the SIGTERM: a training that went on would hold the lock of its folder.
    """
    with subprocess.Popen(command, preexec_fn=_end_with_parent if sys.platform == "linux" else None) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            raise


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot_write(str(path), error, "give another folder in --config") from error
