"""The command line of the study; `run.sh` calls it.

    python -m examples.study [--quick] [--data FILE [--held-out FILE]] [--output DIR]

From the root of the repository. It makes data and a small model, trains SFT, computes the reference log-probs, trains
and measures all runs, measures the cost of a step, and writes OUTPUT/table.md, study.json and index.html. A second call
goes on where the first one stopped.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from examples.quickstart_data import prepare, write_rows
from examples.study import cost, report
from examples.study.measure import read_rows
from examples.study.plan import QUICK, SEEDS, VARIANTS, Plan, choose
from examples.study.runs import cores, finished, measure_sft, run_all, sha256, train_sft
from simpo_megatron.errors import UserError
from simpo_megatron.files import atomic_write
from simpo_megatron.program import Parser, exit_code
from simpo_megatron.settings import path_value
from tools.preprocess_preferences import main as prepare_set
from tools.score_reference import main as score_reference

WEIGHTS = (1, 1, 1), (1, 1, 1)  # all phrasings are alike: the length of a response says nothing of its quality
OUTPUT = Path(__file__).resolve().parents[2] / "runs" / "study"
RANKED = 200  # training pairs that are ranked by each model
MARKER = "data.json"  # written when the data are complete; it marks the folder of a study


def build_parser() -> Parser:
    """The flags."""
    parser = Parser("bash examples/study/run.sh", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--output", type=path_value, default=OUTPUT, help="folder (default: runs/study)")
    parser.add_argument("--data", type=path_value, help="preferences to use instead of made-up questions")
    parser.add_argument("--held-out", type=path_value, help="with --data: the preferences to evaluate on")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} with one seed")
    parser.add_argument("--objectives", nargs="+", default=list(VARIANTS), metavar="NAME", help="some of the table")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs of each objective (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="of each run (default: 60; with --data 45)")
    parser.add_argument("--sft-steps", type=int, default=0, help="of the SFT (default: 400; with --data 140)")
    parser.add_argument("--lr", type=float, default=0.0, help="of all runs (default: 2e-4; with --data 5e-5)")
    return parser


def make_data(plan: Plan, data: Path | None, held_out: Path | None) -> None:
    """Writes pairs, model and prepared sets, unless they are there.

    Raises:
        UserError: the folder holds something else, or a file cannot be read.
    """
    marker = plan.output / MARKER
    settings = [str(WEIGHTS) if file is None else sha256(file) for file in (data, held_out)]
    if finished(marker, settings):
        return
    if marker.exists():
        raise UserError(f"--output {plan.output} holds a study of other data; choose another folder")
    begun = {"data", "model"}  # what a killed call may have left
    if plan.output.exists() and {path.name for path in plan.output.iterdir()} - begun:
        raise UserError(f"--output {plan.output} holds other files; choose another folder")
    prepare(plan.output, data, 0, held_out, WEIGHTS)
    write_rows(plan.data("ranked"), read_rows(plan.data("train"))[:RANKED])
    for name in ("train", "ranked", "heldout"):
        source, prefix = str(plan.data(name)), str(plan.prefix(name))
        flags = ["--data", source, "--hf-checkpoint", str(plan.model), "--output-prefix", prefix]
        _call(prepare_set, [*flags, "--max-length", str(plan.max_length), "--workers", "1"])
    atomic_write(marker, json.dumps({"settings": settings}))


def score(plan: Plan) -> None:
    """Computes the log-probs of all pairs under the SFT model, once for all runs."""
    for name in ("train", "heldout"):
        flags = ["--hf-checkpoint", str(plan.sft), "--data", str(plan.prefix(name)), *plan.row_flags()]
        _call(score_reference, flags)


def _call(program: Callable[[list[str]], int], flags: list[str]) -> None:
    if program(flags):
        raise UserError("a step of the study has failed; its line is above")


def run(argv: list[str] | None = None) -> None:
    """The study.

    Raises:
        UserError: a flag is wrong, or a step of the study is refused.
    """
    given = build_parser().parse_args(argv)
    if given.held_out is not None and given.data is None:
        raise UserError("--held-out needs --data, the preferences to train on")
    for flag in ("data", "held_out"):
        file = getattr(given, flag)
        if file is not None and not file.is_file():
            raise UserError(f"--{flag.replace('_', '-')} {file}: there is no such file")
    variants = choose(list(QUICK) if given.quick else given.objectives)
    seeds = 1 if given.quick else given.seeds
    if seeds < 1:
        raise UserError(f"--seeds {seeds} must be at least 1")
    plan = Plan(given.output, given.data is not None, tuple(variants), seeds, given.steps, given.sft_steps, given.lr)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(cores())
    load = report.load()
    _stage("1/5 Data and a model with random weights", lambda: make_data(plan, given.data, given.held_out))
    _stage("2/5 SFT", lambda: train_sft(plan))
    _stage("3/5 Reference log-probs, once for all runs", lambda: score(plan))
    results = _stage("4/5 The runs", lambda: run_all(plan, range(1, seeds + 1)))
    costs = _stage("5/5 Time and memory of a step", lambda: cost.measure(plan))
    report.write(plan, measure_sft(plan), results, costs, load)
    print(f"Table: {plan.output / 'table.md'}; page with plots: {plan.output / 'index.html'}")


def _stage(title: str, action: Callable[[], report.T]) -> report.T:
    print(f"== {title}", flush=True)
    started = time.perf_counter()
    result = action()
    print(f"== done in {time.perf_counter() - started:.0f} s", flush=True)
    return result


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return exit_code("study", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
