"""The run: data in, steps, evaluations and checkpoints, model out.

run = start_run(config, hf, transformer)         # Megatron's process groups exist
if run is not None:
    run.execute()
"""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import replace

import psutil
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig

from simpo_megatron import compat
from simpo_megatron.batch.packer import GlobalBatch
from simpo_megatron.checkpoint.folder import iteration_folder
from simpo_megatron.config.arguments import flat
from simpo_megatron.config.presets import describe
from simpo_megatron.config.run import Config
from simpo_megatron.data import Pairs
from simpo_megatron.models.export import check_target, export_hf
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.models.spec import use_transformer_engine
from simpo_megatron.parallel.config import describe_layout
from simpo_megatron.parallel.together import host_group, raise_on_all_ranks
from simpo_megatron.planning.checkpoint_size import check_disk
from simpo_megatron.settings import require
from simpo_megatron.trainer import loading
from simpo_megatron.trainer.checkpointing import CheckpointWriter
from simpo_megatron.trainer.console import Logger, print_line
from simpo_megatron.trainer.data import load_data
from simpo_megatron.trainer.engine import Engine
from simpo_megatron.trainer.environment import connection_warnings
from simpo_megatron.trainer.folders import check_folders, export_record, is_export_of
from simpo_megatron.trainer.progress import Length, Progress, new_progress, run_length
from simpo_megatron.trainer.remarks import remarks
from simpo_megatron.trainer.resume import (
    check_optimizer,
    check_pairs,
    find_saved_run,
    follow,
    step_to_resume,
    weights_folder,
)
from simpo_megatron.trainer.setup import build_engine


def start_run(config: Config, hf: HFCheckpoint, transformer: TransformerConfig) -> Run | None:
    """Loads data and model, resumes if --load asks for it, and prints what the run is.

    Args:
        config: of the run.
        hf: the Hugging Face checkpoint.
        transformer: from `setup.build_transformer_config`; Megatron's groups exist for it.

    Returns:
        The run; None if the run that is resumed has ended and --export-hf is its export.

    Raises:
        UserError: data or checkpoint cannot be read, or the run cannot be resumed; the same on every rank.
    """
    with raise_on_all_ranks():
        check_folders(config)
        saved = find_saved_run(config.checkpoint)
        config, changes = follow(config, saved)
    train_pairs, valid_pairs, messages = load_data(config.data, hf)
    state = new_progress(config, train_pairs)
    if saved is not None:
        check_pairs(saved, state)
        state = saved.progress
    length = run_length(config, len(train_pairs))
    if saved is not None and not length.is_reached(state):
        check_optimizer(saved)
    export = config.model.export_hf
    if export is not None and length.is_reached(state) and is_export_of(export, state):
        require(
            not changes,
            f"the run of {config.checkpoint.load} has ended, and this command differs from it ({'; '.join(changes)}): "
            "nothing would be trained; choose another --save and --export-hf, or give the settings of that run",
        )
        print_line(f"nothing is left to do: the run of {config.checkpoint.load} has ended, and {export} is its export")
        return None
    with raise_on_all_ranks():
        if export is not None:
            check_target(export)  # it may be the export of a checkpoint that this run goes on from
    engine = build_engine(config, hf, transformer, length.steps)
    if saved is not None:
        loading.load(engine, saved.folder)
    with raise_on_all_ranks():
        disk = check_disk(config, hf.architecture, length.steps, state.step) if dist.get_rank() == 0 else []
        logger = Logger(config, length.steps, state.step)
    run = Run(engine, train_pairs, valid_pairs, length, state, logger)
    data_parallel = parallel_state.get_data_parallel_world_size()
    found = [*remarks(config, hf, len(train_pairs), data_parallel), *connection_warnings(config.parallel)]
    warnings = [f"warning: {text}" for text in found]
    for line in (*messages, *_describe_run(run), *disk, _describe_start(run), *changes, *warnings):
        logger.message(line)
    return run


def _describe_start(run: Run) -> str:
    """One line: the checkpoint that the run starts from."""
    settings = run.config.checkpoint
    load, step = settings.load, step_to_resume(settings)
    if load is None or step is None:
        folder = weights_folder(settings)
        return f"starting from {run.engine.hf.path if folder is None else f'the weights of {folder}'}"
    done = "; that is the whole run, nothing is left to train" if run.length.is_reached(run.state) else ""
    return f"resumed from {iteration_folder(load, step)}, after {run.state.consumed_pairs} pairs{done}"


def _describe_run(run: Run) -> list[str]:
    """The lines at the start: model, layout, kernels, objective, preset and length."""
    config, transformer = run.config, run.engine.transformer
    layout = describe_layout(config.parallel, parallel_state.get_data_parallel_world_size())
    device = torch.device(torch.cuda.current_device()).type
    precision = "bf16" if config.train.bf16 else "fp32"
    lines = [
        f"{run.engine.hf.architecture.family.name} model, {precision}, {layout} on {device}",
        _describe_kernels(config, transformer),
        config.objective.describe(),
    ]
    if config.train.preset is not None:
        lines.append(describe(config.train.preset, flat(config)))
    if config.train.deterministic_mode:
        lines.append(f"deterministic: torch's algorithms, NCCL_ALGO {os.environ.get('NCCL_ALGO')}")
    if coefficient := config.train.moe_aux_loss_coeff:
        lines.append(f"balancing loss of the experts: coefficient {coefficient:g}")
    epochs = run.length.pairs / len(run.train_pairs)
    lines.append(f"{run.length.steps} steps of {config.train.global_batch_size} pairs: {epochs:.2f} epochs")
    return lines


def _describe_kernels(config: Config, transformer: TransformerConfig) -> str:
    """One line: which package runs the layers, Adam and the accumulation of weight gradients."""
    fused = use_transformer_engine(config.model.transformer_impl)
    layers = "Transformer Engine's" if fused else "Megatron's on plain torch"
    if not compat.have_transformer_engine():
        layers += " (Transformer Engine is not installed)"
    package = "Transformer Engine" if fused else "Apex"
    weight_gradients = f"fused, by {package}" if transformer.gradient_accumulation_fusion else "not fused"
    return f"layers: {layers}; Adam: {compat.adam()}; accumulation of weight gradients: {weight_gradients}"


class Run:
    """One training run; `start_run` makes it.

    Args:
        engine: with the weights that the run starts from.
        train_pairs: to train on.
        valid_pairs: to evaluate on, or None.
        length: how far it goes.
        state: where the run stands.
        logger: reports metrics and messages.

    Attributes:
        evaluations: metrics of the held-out pairs, by step.
    """

    def __init__(
        self,
        engine: Engine,
        train_pairs: Pairs,
        valid_pairs: Pairs | None,
        length: Length,
        state: Progress,
        logger: Logger,
    ) -> None:
        self.config, self.engine, self.logger = engine.config, engine, logger
        self.train_pairs, self.valid_pairs = train_pairs, valid_pairs
        self.length, self.state = length, state
        self.evaluations: dict[int, dict[str, float]] = {}
        self.writer = CheckpointWriter(engine)

    @property
    def unfinished(self) -> bool:
        """Whether steps and pairs are left."""
        return not self.length.is_reached(self.state)

    def execute(self) -> None:
        """Trains to the end: evaluates, logs, saves and exports as configured."""
        self.logger.start()
        try:
            with self.writer:
                if self.state.step == 0:  # a resumed run has logged this evaluation already
                    self._evaluate()
                while self.unfinished:
                    self._step()
                self._finish()
        finally:
            self.logger.close()

    def _step(self) -> None:
        started = time.perf_counter()
        batch = self._next_batch()
        metrics = self.engine.train_step(batch)
        consumed = self.state.consumed_pairs + batch.counts.pairs
        self.state = replace(self.state, step=self.state.step + 1, consumed_pairs=consumed)
        metrics["tokens_per_second"] = batch.tokens / (time.perf_counter() - started)
        metrics |= _memory()
        metrics["epoch"] = consumed / len(self.train_pairs)
        if self._is_due(self.config.log.log_interval) or not self.unfinished:
            self.logger.record(self.state.step, metrics)
            self.logger.step_line(self.state.step, metrics)
        self.logger.advance(self.state.step)
        if self._is_due(self.config.log.eval_interval):
            self._evaluate()
        self.writer.poll()
        folder = self.config.checkpoint.save
        if folder is not None and (self._is_due(self.config.checkpoint.save_interval) or not self.unfinished):
            self.state = replace(self.state, checkpoint=_random_name())
            self.writer.save(folder, self.state)

    def _next_batch(self) -> GlobalBatch:
        position = self.state.consumed_pairs
        size = min(self.config.train.global_batch_size, self.length.pairs - position)
        indices = self.train_pairs.order(position, size, self.config.train.seed)
        return self.engine.packer.pack(self.train_pairs, indices)

    def _is_due(self, interval: int | None) -> bool:
        """Whether something that happens every `interval` steps (None: never) happens after this step."""
        return interval is not None and self.state.step % interval == 0

    def _evaluate(self) -> None:
        if self.valid_pairs is None:
            return
        indices = self.valid_pairs.order(0, len(self.valid_pairs), seed=0, shuffle=False)
        metrics = self.engine.evaluate(self.engine.packer.pack(self.valid_pairs, indices))
        self.evaluations[self.state.step] = metrics
        self.logger.record(self.state.step, {f"eval/{name}": value for name, value in metrics.items()})
        self.logger.eval_line(self.state.step, metrics)

    def _finish(self) -> None:
        if not self._is_due(self.config.log.eval_interval):  # else the last step has evaluated
            self._evaluate()
        folder = self.config.model.export_hf
        if folder is not None:
            self.engine.sync_parameters()
            record = export_record(self.config, self.state)
            first = dist.get_rank() == 0
            export_hf(self.engine.models, self.engine.hf, folder, progress=first, more_files=record)
            self.logger.message(f"exported to {folder}")
        self.logger.summary(self.evaluations)
        memory = _memory()
        if (reserved := memory.get("memory_reserved_gib")) is not None:
            allocated = memory["memory_gib"]
            self.logger.message(f"GPU memory of rank 0: {allocated:.1f} GiB allocated, {reserved:.1f} GiB reserved")


def _random_name() -> str:
    """A random name, the same on all ranks. Collectives: one broadcast."""
    name: list[str | None] = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, src=0, group=host_group())
    return str(name[0])


def _memory() -> dict[str, float]:
    """Memory of this rank in GiB: the most of the GPU so far, or what the process holds now on the CPU.

    What torch reserves on a GPU and has not allocated is free for tensors that fit into its gaps only.
    """
    if torch.cuda.is_initialized():
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"memory_gib": allocated / 2**30, "memory_reserved_gib": reserved / 2**30}
    return {"memory_gib": psutil.Process().memory_info().rss / 2**30}
