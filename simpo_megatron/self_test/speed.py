"""Rows that measure: the head beside the matrix products that no head can avoid, a training step, its host waits.

The shapes are scaled to the device: on a CPU they only show that the code runs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state

from simpo_megatron.batch.packer import GlobalBatch
from simpo_megatron.checkpoint.source import imagine_weights
from simpo_megatron.config.run import Config
from simpo_megatron.disk import human
from simpo_megatron.head.layer import LogProbHead, split_output
from simpo_megatron.models.build import build_model
from simpo_megatron.models.hf_checkpoint import HFCheckpoint, read_hf_config
from simpo_megatron.models.spec import use_transformer_engine
from simpo_megatron.parallel.limits import layout_arguments
from simpo_megatron.planning.memory import Workload, estimate
from simpo_megatron.self_test.heads import make_head, make_task
from simpo_megatron.self_test.models import SEED, free, layout_config, tiny_config, write_config
from simpo_megatron.self_test.ranks import leave_layout
from simpo_megatron.self_test.rows import Bench, Outcome, Row
from simpo_megatron.trainer.distributed import initialize
from simpo_megatron.trainer.engine import Engine
from simpo_megatron.trainer.setup import build_transformer_config
from simpo_megatron.verify.random_weights import random_pairs

# Pairs, tokens of a response, hidden size, vocabulary. On a GPU that of `tools/bench_head.py`.
HEAD_SHAPES = {"cpu": (2, 32, 128, 4096), "cuda": (8, 512, 4096, 128256)}
# What the config.json of the measured step sets beside the tiny sizes; tokens of a packed row; pairs of a rank.
STEP_MODELS: dict[str, dict[str, int]] = {
    "cpu": {},
    "cuda": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
}
STEP_ROWS = {"cpu": (128, 4), "cuda": (8192, 16)}
REPEATS = 3
MOST_TIMES_FLOOR = 2.0  # a head that takes longer is slow
MOST_OF_ESTIMATE = 1.1  # memory beyond this multiple of the estimate is a warning
MOST_WAITS = 5  # host waits of a microbatch
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")  # `cudaMemcpy` waits


def speed_rows(bench: Bench) -> Iterator[Row]:
    """The rows of this file."""
    yield Row("speed: head", _head)
    yield Row("speed: training step", _step)
    yield Row("speed: host waits of a step", _host_waits, gpu=True)


def _seconds(bench: Bench, action: Callable[[], Any]) -> float:
    """The best of some runs after one that is not timed: it compiles kernels and fills caches."""
    times = []
    for _ in range(1 + REPEATS):
        _wait(bench)
        started = time.perf_counter()
        action()
        _wait(bench)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _wait(bench: Bench) -> None:
    if bench.on_gpu:
        torch.cuda.synchronize()


def _peaks(bench: Bench) -> tuple[int, int] | None:
    """The largest memory, allocated and reserved, since the statistics were reset; None on a CPU."""
    return (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if bench.on_gpu else None


def _reset(bench: Bench) -> int:
    """Forgets the largest memory so far; returns what is allocated now."""
    if not bench.on_gpu:
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _head(bench: Bench) -> Outcome:
    pairs, length, hidden, vocab = HEAD_SHAPES[bench.device]
    device = torch.device(torch.cuda.current_device())
    dtype = torch.bfloat16 if bench.on_gpu else torch.float32
    try:
        parallel_state.initialize_model_parallel(1)
        generator = torch.Generator(device).manual_seed(SEED)
        count = 2 * pairs * length
        given = torch.randn(count, 1, hidden, generator=generator, device=device, dtype=dtype).requires_grad_()
        weight_VH = torch.randn(vocab, hidden, generator=generator, device=device, dtype=dtype).mul_(hidden**-0.5)
        targets_R = torch.randint(vocab, (count,), generator=generator, device=device)
        head, task = make_head(weight_VH, 1, 256 * 2**20), make_task(targets_R, pairs, vocab)
        weight: Any = head.weight
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight, dtype=torch.float32), False
        task = replace(task, loss_gradient=1.0)

        def once() -> None:
            with head.scoring(task):
                output, _ = head(given)
            split_output(output, 2)[0].backward()
            given.grad = weight.grad = None

        floor = _seconds(bench, _products(given.detach()[:, 0], weight_VH))
        base = _reset(bench)
        seconds = _seconds(bench, once)
        peaks = _peaks(bench)
    finally:
        leave_layout()
    times = seconds / floor
    measured = {"head_milliseconds": 1e3 * seconds, "head_times_floor": times}
    memory = "memory not measured"
    if peaks is not None:
        measured["head_extra_bytes"] = peaks[0] - base
        memory = f"{human(peaks[0] - base)} beyond inputs"
    figure = f"{1e3 * seconds:.1f} ms, {times:.2f}x the three products, {memory}"
    if bench.on_gpu and times > MOST_TIMES_FLOOR:
        return Outcome("slow", figure, "install Triton; raise --head-slab-bytes", measured)
    return Outcome("proved", figure, measured=measured)


def _products(hidden_RH: torch.Tensor, weight_VH: torch.Tensor) -> Callable[[], None]:
    """The three matrix products that every head needs."""
    logits_RV = hidden_RH.new_empty(len(hidden_RH), len(weight_VH))
    grad_RH, grad_VH = torch.empty_like(hidden_RH), torch.empty_like(weight_VH)

    def once() -> None:
        torch.mm(hidden_RH, weight_VH.T, out=logits_RV)
        torch.mm(logits_RV, weight_VH, out=grad_RH)
        torch.mm(logits_RV.T, hidden_RH, out=grad_VH)

    return once


def _prepare(bench: Bench) -> tuple[Engine, GlobalBatch, Config, HFCheckpoint]:
    """An engine with random weights, data-parallel over all ranks, and a batch. Nothing is written to a disk."""
    seq_length, per_rank = STEP_ROWS[bench.device]
    pairs_of_step = per_rank * bench.processes
    settings = {
        "transformer_impl": bench.implementations[-1],
        "bf16": bench.on_gpu,
        "seq_length": seq_length,
        "max_length": seq_length // 4,
        "global_batch_size": pairs_of_step,
    }
    path = write_config(bench.models / "step", tiny_config("llama", **STEP_MODELS[bench.device]))
    hf = imagine_weights(read_hf_config(path))
    config = layout_config(bench, path, settings)
    transformer = build_transformer_config(config, hf)
    initialize(transformer, config.parallel.distributed_timeout_minutes, bench.device, SEED)
    models = build_model(hf, transformer, transformer_impl=config.model.transformer_impl)
    with torch.no_grad():
        for model in models:
            for name, parameter in model.named_parameters():
                parameter.fill_(1.0) if parameter.ndim == 1 and "norm" in name else parameter.normal_(0.0, 0.02)
            LogProbHead.install(model, config.model.slab_bytes)
    engine = Engine(config, hf, models, transformer, train_iters=2 + REPEATS)
    pairs = random_pairs(hf.architecture.vocab_size, seq_length // 4, pairs_of_step, SEED)
    return engine, engine.packer.pack(pairs, pairs.order(0, pairs_of_step, SEED)), config, hf


def _step(bench: Bench) -> Outcome:
    try:
        _reset(bench)
        engine, batch, config, hf = _prepare(bench)
        seconds = _seconds(bench, lambda: engine.train_step(batch))
        peaks = _peaks(bench)
        free(engine)
    finally:
        leave_layout()
    tflops = 1e-12 * _flops(hf, batch) / bench.processes / seconds
    measured = {"step_seconds": seconds, "tokens_per_second": batch.tokens / seconds, "tflops_of_a_rank": tflops}
    figure = f"{batch.tokens / seconds:,.0f} tokens/s, {tflops:.2g} TFLOP/s a rank"
    if peaks is None:
        return Outcome("proved", f"{figure}, memory not measured", measured=measured)
    expected = _expected_bytes(bench, config, hf, batch)
    allocated, reserved = peaks
    measured |= {"allocated_bytes": allocated, "reserved_bytes": reserved, "estimated_bytes": expected}
    figure += f"; allocated {human(allocated)}, reserved {human(reserved)}, estimated {human(expected)}"
    if allocated > MOST_OF_ESTIMATE * expected:
        return Outcome("slow", figure, f"plan with --gpu-memory {expected / allocated:.0%} of a GPU's", measured)
    return Outcome("proved", figure, measured=measured)


def _flops(hf: HFCheckpoint, batch: GlobalBatch) -> float:
    """Of a step: 6 for each weight and token that it sees. The output layer sees responses alone; no attention."""
    vocabulary = hf.architecture.vocab_size * hf.config["hidden_size"]
    pairs = batch.pairs
    scored = int(pairs.chosen_length.sum() + pairs.rejected_length.sum())  # the batch holds all pairs
    return 6.0 * ((hf.architecture.num_parameters - 2 * vocabulary) * batch.tokens + vocabulary * scored)


def _expected_bytes(bench: Bench, config: Config, hf: HFCheckpoint, batch: GlobalBatch) -> int:
    work = Workload(
        world_size=bench.processes,
        seq_length=config.data.seq_length,
        microbatches=len(batch.microbatches),
        slab_bytes=config.model.slab_bytes,
        bf16=config.train.bf16,
        fused=use_transformer_engine(config.model.transformer_impl),
    )
    layout = layout_arguments(config.parallel, hf.architecture.num_layers)
    return estimate(hf.architecture, layout, work).total


def _host_waits(bench: Bench) -> Outcome:
    try:
        engine, batch, _, _ = _prepare(bench)
        engine.train_step(batch)  # compiles kernels, and makes communicators
        _wait(bench)
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
            engine.compute_gradients(batch)
        free(engine)
    finally:
        leave_layout()
    return judge_waits(count_waits(event.name for event in profile.events() or ()), len(batch.microbatches))


def count_waits(names: Iterable[str]) -> dict[str, int]:
    """How often the host waited for the device, by the CUDA function, from the names of a profile's events."""
    return dict(Counter(name for name in names if name in WAITS))


def judge_waits(waits: dict[str, int], microbatches: int) -> Outcome:
    """The outcome of a count of forward and backward passes."""
    a_microbatch = sum(waits.values()) / max(1, microbatches)
    kinds = ", ".join(f"{name} {count}" for name, count in sorted(waits.items())) or "none"
    measured = {"host_waits_of_a_microbatch": a_microbatch}
    figure = f"{a_microbatch:.1f} a microbatch ({kinds})"
    if a_microbatch > MOST_WAITS:
        return Outcome("slow", figure, "see which call waits with nsys or torch.profiler", measured)
    return Outcome("proved", figure, measured=measured)
