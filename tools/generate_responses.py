r"""Answers prompts with a model: several responses to each, as JSON Lines, or the files that benchmarks read.

    python tools/generate_responses.py --prompts prompts.jsonl --hf-checkpoint MODEL --output responses.jsonl
    python tools/generate_responses.py --for alpaca_eval --questions alpaca_eval.json --hf-checkpoint MODEL \
        --output model_outputs.json

A row of the prompts has `prompt`, a text or messages, and `id` where it has one. Prompts become token ids as in
training. A run that was stopped goes on with the same command. --shard 1/4 answers a quarter of the prompts, so that
several processes share the work; `cat` joins their files. tools/score_responses.py is next.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from simpo_megatron.config.arguments import add_settings, build_group
from simpo_megatron.errors import UserError
from simpo_megatron.on_policy.backends import BACKENDS
from simpo_megatron.on_policy.benchmarks import BENCHMARKS, Benchmark
from simpo_megatron.on_policy.choice import add_choice, chosen_settings
from simpo_megatron.on_policy.generation import Generator
from simpo_megatron.on_policy.journal import Journal, read_journal
from simpo_megatron.on_policy.lengths import LengthReport
from simpo_megatron.on_policy.prompts import Shard, digest, read_prompts
from simpo_megatron.on_policy.sampling import SamplingSettings
from simpo_megatron.program import Parser, check_report, exit_code
from simpo_megatron.settings import path_value, required, source_value

SETTINGS = {name: entry.settings for name, entry in BACKENDS.items()}


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(
        "generate_responses.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--prompts", type=source_value, metavar="SOURCE", help="what is to be answered")
    parser.add_argument(
        "--hf-checkpoint", type=path_value, required=True, metavar="DIR", help="the model; for a server, its tokenizer"
    )
    parser.add_argument("--output", type=path_value, required=True, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--exclude-prompts",
        nargs="+",
        type=source_value,
        default=[],
        metavar="SOURCE",
        help="evaluation data whose prompts are left out and counted",
    )
    parser.add_argument("--shard", type=Shard.parse, default=Shard(), metavar="I/N", help="answer part I of N alone")
    parser.add_argument("--for", dest="benchmark", choices=tuple(BENCHMARKS), help="write the file of a benchmark")
    parser.add_argument("--questions", type=path_value, metavar="FILE", help="with --for: the benchmark's questions")
    parser.add_argument("--generator-name", metavar="NAME", help="with --for: the model's name there")
    add_settings(parser.add_argument_group("sampling"), SamplingSettings)
    add_choice(parser, "backend", SETTINGS, "what generates")
    return parser


def check(argv: Sequence[str]) -> None:
    """Raises UserError if a flag is wrong; nothing is loaded. tools/iterate.py asks before its first round."""
    args = build_parser().parse_args(argv)
    chosen_settings(args, "backend", SETTINGS)
    build_group(SamplingSettings, vars(args))


def run(args: argparse.Namespace) -> None:
    """Answers the prompts, and prints how long the responses are."""
    settings = chosen_settings(args, "backend", SETTINGS)
    if (name := getattr(args, "benchmark", None)) is not None:
        _answer_benchmark(args, BENCHMARKS[name], settings)
        return
    for flag in ("questions", "generator_name"):
        if hasattr(args, flag):
            raise UserError(f"--{flag.replace('_', '-')} belongs to --for; drop it")
    source = required(getattr(args, "prompts", None), "--prompts is missing; give the file of what is to be answered")
    sampling: SamplingSettings = build_group(SamplingSettings, vars(args))
    prompts, report = read_prompts(source, args.exclude_prompts, args.shard)
    print(report.summary(source), flush=True)
    generator = Generator(args.hf_checkpoint, args.backend, settings, sampling)
    with Journal.open("--output", args.output, generator.about()) as journal:
        journal.check_source({prompt.id: digest(prompt.messages) for prompt in prompts}, source, "prompt")
        progress = generator.answer(prompts, journal, f"Answering {source}")
    _finish(args.output, args.output, progress.tokens_per_second)


def _answer_benchmark(args: argparse.Namespace, benchmark: Benchmark, settings: object) -> None:
    """Answers a benchmark's questions, turn by turn, and writes its file."""
    if hasattr(args, "prompts") or args.exclude_prompts or args.shard != Shard():
        raise UserError("--for takes --questions alone; drop --prompts, --exclude-prompts and --shard")
    questions = benchmark.read(
        required(getattr(args, "questions", None), "--for needs --questions, the benchmark's own file of questions")
    )
    sampling: SamplingSettings = build_group(SamplingSettings, {**benchmark.defaults, **vars(args)})
    if sampling.num_responses != 1:
        raise UserError(f"--num-responses {sampling.num_responses}: a benchmark reads one response; drop the flag")
    generator = Generator(args.hf_checkpoint, args.backend, settings, sampling)  # type: ignore[arg-type]
    rows = args.output.with_name(f"{args.output.name}.responses.jsonl")
    own = hasattr(args, "temperature")  # the user's wins over that of a question
    heats = [
        sampling.temperature if own or question.temperature is None else question.temperature for question in questions
    ]
    about = {"benchmark": benchmark.name, **generator.about(), "temperature": sorted(set(heats))}
    speed = 0.0
    with Journal.open("--output", rows, about) as journal:
        check_report("--output", args.output, [args.questions])
        answered = {row["id"]: row for row in read_journal(rows)}
        known = [prompt for question in questions for prompt in question.known_prompts(answered)]
        journal.check_source({prompt.id: digest(prompt.messages) for prompt in known}, str(args.questions), "prompt")
        for turn in range(benchmark.turns):
            answered = {row["id"]: row for row in read_journal(rows)}
            prompts = [question.prompt(turn, answered) for question in questions]
            progress = generator.answer(prompts, journal, f"Answering turn {turn + 1}", heats)
            speed = progress.tokens_per_second or speed
    answered = {row["id"]: row for row in read_journal(rows)}
    name = getattr(args, "generator_name", benchmark.name_of(args.output, args.hf_checkpoint))
    benchmark.write(args.output, questions, answered, name)
    _finish(args.output, rows, speed)
    print(f"Next: {benchmark.command.format(file=args.output, name=name)}")


def _finish(output: Path, rows: Path, speed: float) -> None:
    print(f"{output}: {LengthReport.of(read_journal(rows)).line()}; {speed:,.0f} tokens/s", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return exit_code("generate_responses.py", lambda: run(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
