"""Trains and measures the runs of the study, as many at a time as there are cores.

    results = run_all(plan, title)          # {(variant, seed): result}

A run is one call of the training program in a worker process, which then measures the model. Its files are in
OUTPUT/runs/NAME-seed-N: run/ (metrics), model/, log.txt and result.json. result.json is written last and whole. A run
with a result of the same settings is not repeated, and any other run starts anew.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from examples.study.measure import Measure
from examples.study.plan import Plan, Variant
from simpo_megatron.errors import UserError
from simpo_megatron.files import atomic_write, read_json
from simpo_megatron.objectives import SFT
from simpo_megatron.train import main as train_program

Result = dict[str, Any]
T = TypeVar("T")
LOG = "log.txt"
RESULT = "result.json"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sha256(path: Path) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def finished(file: Path, settings: list[str]) -> Result | None:
    """The result in a file, if it was made with these settings."""
    if not file.is_file():
        return None
    result = read_json(file)
    return result if result.get("settings") == settings else None


def train(flags: list[str], folder: Path) -> None:
    """Calls the training program, which writes `run/` and `model/` in a folder; its lines go to `log.txt`.

    Args:
        flags: without those of the files.
        folder: emptied first.

    Raises:
        UserError: the program refuses to run.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / LOG
    files = ["--save", str(folder / "run"), "--no-save-optim", "--export-hf", str(folder / "model")]
    if _quietly(lambda: train_program([*flags, *files]), log):
        last = log.read_text(encoding="utf-8").strip().rpartition("\n")[2]
        raise UserError(f"{last}; the log is {log}")


def _quietly(action: Callable[[], T], log: Path) -> T:
    """Calls something whose output goes to a file."""
    with log.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        return action()


def train_sft(plan: Plan) -> None:
    """Trains the SFT model, OUTPUT/sft, unless it is there."""
    settings = [*plan.sft_flags(), sha256(plan.data("sft")), sha256(plan.model / "model.safetensors")]
    done = plan.output / "sft.json"
    if finished(done, settings):
        return
    done.unlink(missing_ok=True)
    for name in ("train", "heldout"):
        plan.prefix(name).with_suffix(".reference").unlink(missing_ok=True)  # of an earlier SFT model
    train(plan.sft_flags(), plan.output / "sft_run")
    shutil.rmtree(plan.sft, ignore_errors=True)
    (plan.output / "sft_run" / "model").rename(plan.sft)
    atomic_write(done, json.dumps({"settings": settings}))


def run_all(plan: Plan, seeds: range) -> dict[tuple[str, int], Result]:
    """The results of all runs of a plan; those that are missing are trained and measured.

    Args:
        plan: of the study.
        seeds: of each variant.

    Raises:
        UserError: a run is refused.
    """
    weights = sha256(plan.sft / "model.safetensors")
    wanted = [(variant, seed) for seed in seeds for variant in plan.variants]
    results: dict[tuple[str, int], Result] = {}
    missing = []
    for variant, seed in wanted:
        settings = [*plan.run_flags(variant, seed), weights]
        found = finished(_folder(plan, variant, seed) / RESULT, settings)
        if found is None:
            missing.append((variant, seed, settings))
        else:
            results[variant.name, seed] = found
    if results:
        print(f"{len(results)} of {len(wanted)} runs are finished already")
    started = time.perf_counter()
    workers = max(1, min(cores(), len(missing)))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        futures = {
            pool.submit(_run, plan, variant, seed, settings): (variant.name, seed)
            for variant, seed, settings in missing
        }
        for number, future in enumerate(as_completed(futures), start=1):
            name, seed = futures[future]
            results[name, seed] = future.result()
            left = (time.perf_counter() - started) / number * (len(missing) - number)
            print(f"{number} of {len(missing)}: {name}, seed {seed}; about {left / 60:.0f} min left", flush=True)
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def measure_sft(plan: Plan) -> dict[str, float]:
    """The figures of the SFT model itself."""
    file = plan.output / "sft_figures.json"
    settings = [sha256(plan.sft / "model.safetensors")]
    found = finished(file, settings)
    if found is None:
        figures = _quietly(lambda: _measure(plan)(plan.sft, SFT()), plan.output / "sft_run" / LOG)
        figures.pop("reward_accuracy")  # SFT has no reward
        found = {"settings": settings, "figures": figures}
        atomic_write(file, json.dumps(found))
    return found["figures"]


def _folder(plan: Plan, variant: Variant, seed: int) -> Path:
    return plan.output / "runs" / f"{variant.name}-seed-{seed}"


def _start_worker() -> None:
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()  # a pool whose parent is killed waits for ever
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


@cache
def _measure(plan: Plan) -> Measure:
    """The SFT model and the pairs are read once in each process."""
    return Measure(plan)


def _run(plan: Plan, variant: Variant, seed: int, settings: list[str]) -> Result:
    """Trains and measures one run, in a worker."""
    folder = _folder(plan, variant, seed)
    train(plan.run_flags(variant, seed), folder)
    figures = _quietly(lambda: _measure(plan)(folder / "model", plan.objective(variant)), folder / LOG)
    result = {"settings": settings, "figures": figures}
    atomic_write(folder / RESULT, json.dumps(result))
    return result
