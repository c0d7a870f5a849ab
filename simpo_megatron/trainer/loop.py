"""The run: data in, steps, evaluations and checkpoints, model out.

run = start_run(config, hf, transformer)         # Megatron's process groups exist
if run is not None:
    run.execute()
"""

from __future__ import annotations

import time
import uuid
from dataclasses import replace

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig

from simpo_megatron.adapters.export import export_adapter
from simpo_megatron.adapters.merge import MergedWeights
from simpo_megatron.adapters.settings import lora_of, run_table
from simpo_megatron.batch.packer import GlobalBatch
from simpo_megatron.config.run import Config
from simpo_megatron.data import Pairs
from simpo_megatron.files import check_empty
from simpo_megatron.models.export import export_hf
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.parallel.together import host_group, raise_on_all_ranks
from simpo_megatron.planning.checkpoint_size import check_disk
from simpo_megatron.planning.flops import step_flops
from simpo_megatron.trainer import loading
from simpo_megatron.trainer.adapter import adapter_progress, check_adapters_of
from simpo_megatron.trainer.alarms import Alarms
from simpo_megatron.trainer.checkpointing import CheckpointWriter
from simpo_megatron.trainer.console import Logger, print_line
from simpo_megatron.trainer.data import load_data
from simpo_megatron.trainer.ended import describe_end, is_anything_left
from simpo_megatron.trainer.engine import Engine
from simpo_megatron.trainer.environment import connection_warnings
from simpo_megatron.trainer.folders import check_folders, export_record, exports, missing_exports
from simpo_megatron.trainer.model_card import model_card
from simpo_megatron.trainer.opening import describe_run, describe_start
from simpo_megatron.trainer.profiling import Profiling, check_profiling, check_window
from simpo_megatron.trainer.progress import Length, Progress, new_progress, run_length
from simpo_megatron.trainer.record import write_record
from simpo_megatron.trainer.reference import with_reference
from simpo_megatron.trainer.remarks import remarks
from simpo_megatron.trainer.resume import (
    check_optimizer,
    check_pairs,
    find_saved_run,
    follow,
    weights_folder,
)
from simpo_megatron.trainer.scoring import evaluate_pairs
from simpo_megatron.trainer.setup import build_engine
from simpo_megatron.trainer.signals import Stopping
from simpo_megatron.trainer.timing import Seconds, Speed, memory


def start_run(
    config: Config, hf: HFCheckpoint, transformer: TransformerConfig, stopping: Stopping | None = None
) -> Run | None:
    """Loads data and model, resumes if --load asks for it, and prints what the run is.

    Args:
        config: of the run.
        hf: the Hugging Face checkpoint.
        transformer: from `setup.build_transformer_config`; Megatron's groups exist for it.
        stopping: from `signals.watch`; None: no signal stops the run before its end.

    Returns:
        The run; None if the run that is resumed has ended and nothing is left to do.

    Raises:
        UserError: data or checkpoint cannot be read, or the run cannot be resumed; the same on every rank.
    """
    with raise_on_all_ranks():
        check_folders(config)
        check_profiling(config)
        saved = find_saved_run(config.checkpoint)
        config, changes = follow(config, saved)
    train_pairs, valid_pairs, messages = load_data(config.data, hf)
    state = new_progress(config, train_pairs, **adapter_progress(config, hf))
    if saved is not None:
        check_pairs(saved, state)
        state = replace(saved.progress, adapter=state.adapter)
    elif (weights := weights_folder(config.checkpoint)) is not None:
        with raise_on_all_ranks():
            check_adapters_of(weights, lora_of(config.adapter, hf.architecture), state.base)
    length = run_length(config, len(train_pairs))
    window = check_window(config, length.steps, state.step)
    if saved is not None and not length.is_reached(state):
        check_optimizer(saved)
    ended = saved is not None and length.is_reached(state)
    if saved is not None and ended and not is_anything_left(config, saved):
        print_line(describe_end(config))
        return None
    with raise_on_all_ranks():
        for flag, export in (missing_exports(config, state) if ended else exports(config)).items():
            check_empty(flag, export)  # it may be the export of a checkpoint that this run goes on from
    engine = build_engine(config, hf, transformer, length.steps)
    if saved is not None:
        loading.load(engine, saved.folder)
        engine.baseline = state.baseline
    train_pairs, valid_pairs, scored = with_reference(engine, train_pairs, valid_pairs, resumed=saved is not None)
    with raise_on_all_ranks():
        disk = check_disk(config, hf.architecture, length.steps, state.step) if dist.get_rank() == 0 else []
        logger = Logger(config, length.steps, state.step)
        if config.checkpoint.save is not None and not ended and dist.get_rank() == 0:
            write_record(config, config.checkpoint.save)
    stopping = Stopping(config.stop, handles_signals=False) if stopping is None else stopping
    run = Run(engine, train_pairs, valid_pairs, length, state, logger, stopping)
    data_parallel = parallel_state.get_data_parallel_world_size()
    found = [*remarks(config, hf, len(train_pairs), data_parallel), *window, *connection_warnings(config.parallel)]
    warnings = [f"warning: {text}" for text in found]
    for line in (
        *messages,
        *scored,
        *describe_run(engine, length, len(train_pairs)),
        *disk,
        describe_start(engine, length, state),
        *changes,
        *warnings,
    ):
        logger.message(line)
    return run


class Run:
    """One training run; `start_run` makes it.

    Args:
        engine: with the weights that the run starts from.
        train_pairs: to train on.
        valid_pairs: to evaluate on, or None.
        length: how far it goes.
        state: where the run stands.
        logger: reports metrics and messages.
        stopping: whether the run stops before its end.

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
        stopping: Stopping,
    ) -> None:
        self.config, self.engine, self.logger = engine.config, engine, logger
        self.train_pairs, self.valid_pairs = train_pairs, valid_pairs
        self.table = run_table(self.config.adapter, engine.hf.architecture)  # None unless there are adapters
        self.length, self.state, self.stopping = length, state, stopping
        self._saved = state.step  # a run that has just been resumed needs no checkpoint
        self.save_seconds = Seconds()
        self.alarms, self.alarmed = Alarms(), False
        self.speed = Speed(self.config, length.steps - state.step)
        self.evaluations: dict[int, dict[str, float]] = {}
        self.writer = CheckpointWriter(engine)

    @property
    def unfinished(self) -> bool:
        """Whether steps and pairs are left."""
        return not self.length.is_reached(self.state)

    def execute(self) -> None:
        """Trains to the end, or until it is stopped: evaluates, logs, saves and exports as configured."""
        self.logger.start()
        try:
            with self.writer:
                self._train()
        finally:
            self.logger.close()

    def _train(self) -> None:
        with Profiling(self.config) as profiling:
            if self.state.step == 0:  # a resumed run has logged this evaluation already
                self._evaluate()
            while self.unfinished:
                profiling.before(self.state.step + 1)
                self._step()
                profiling.after(self.state.step)
                if self.unfinished and (reason := self.stopping.reason(self.state.step, self.alarmed)) is not None:
                    self._stop(reason)
                    return
        self._finish()

    def _step(self) -> None:
        started = time.perf_counter()
        with self.engine.seconds.of("data"):
            batch, flops = self._next_batch()
        metrics = self.engine.train_step(batch)
        consumed = self.state.consumed_pairs + batch.counts.pairs
        step, baseline = self.state.step + 1, self.engine.baseline
        self.state = replace(self.state, step=step, consumed_pairs=consumed, baseline=baseline)
        metrics |= self.speed.measure(time.perf_counter() - started, batch.tokens, flops)
        metrics |= self.engine.seconds.take()
        metrics["epoch"] = consumed / len(self.train_pairs)
        if self._is_due(self.config.log.log_interval) or not self.unfinished:
            self.logger.record(self.state.step, metrics | self.save_seconds.take())
            self.logger.step_line(self.state.step, metrics)
        self._alarm(self.alarms.check(metrics))
        self.logger.advance(self.state.step)
        if self._is_due(self.config.log.eval_interval):
            self._evaluate()
        self.writer.poll()
        if self._is_due(self.config.checkpoint.save_interval) or not self.unfinished:
            self._save()

    def _save(self) -> None:
        """Saves a checkpoint of this step, unless there is one or nothing is saved."""
        folder = self.config.checkpoint.save
        if folder is not None and self._saved != self.state.step:
            self.state = replace(self.state, checkpoint=_random_name())
            with self.save_seconds.of("save"), self.stopping.shielding_children():
                self.writer.save(folder, self.state)
            self._saved = self.state.step

    def _stop(self, reason: str) -> None:
        """Saves, and says how to resume."""
        self._save()
        self.writer.drain()
        settings, step = self.config.checkpoint, self.state.step
        folder = settings.save
        again = "start the same command again"
        if settings.load != folder or settings.finetune:
            again = f"give --load {folder} --save {folder}" + (", without --finetune" if settings.finetune else "")
        self.logger.message(
            f"stopped by {reason} after step {step} of {self.length.steps}, and saved in {folder}; to resume, {again}"
        )

    def _next_batch(self) -> tuple[GlobalBatch, int]:
        """The next global batch, and the floating-point operations that it needs."""
        position = self.state.consumed_pairs
        size = min(self.config.train.global_batch_size, self.length.pairs - position)
        indices = self.train_pairs.order(position, size, self.config.train.seed)
        pairs, packer = self.train_pairs, self.engine.packer
        prompt, chosen, rejected = (
            column[indices].astype(np.int64)
            for column in (pairs.prompt_length, pairs.chosen_length, pairs.rejected_length)
        )
        responses = (chosen, rejected)[: packer.responses]
        flops = step_flops(self.engine.hf.architecture, prompt, responses, packer.share_prompts, self.table)
        return packer.pack(pairs, indices), flops

    def _is_due(self, interval: int | None) -> bool:
        """Whether something that happens every `interval` steps (None: never) happens after this step."""
        return interval is not None and self.state.step % interval == 0

    def _evaluate(self) -> None:
        if self.valid_pairs is None:
            return
        metrics = evaluate_pairs(self.engine, self.valid_pairs)
        self.evaluations[self.state.step] = metrics
        self.logger.record(self.state.step, {f"eval/{name}": value for name, value in metrics.items()})
        self.logger.eval_line(self.state.step, metrics)
        self._alarm(self.alarms.check_evaluation(metrics, len(self.valid_pairs)))

    def _alarm(self, texts: list[str]) -> None:
        for text in texts:
            self.logger.message(f"alarm: step {self.state.step}: {text}")
            self.alarmed = True

    def _finish(self) -> None:
        if not self._is_due(self.config.log.eval_interval):  # else the last step has evaluated
            self._evaluate()
        self._export()
        self.logger.summary(self.evaluations)
        used = memory()
        if (reserved := used.get("memory_reserved_gib")) is not None:
            allocated = used["memory_gib"]
            self.logger.message(f"GPU memory of rank 0: {allocated:.1f} GiB allocated, {reserved:.1f} GiB reserved")

    def _export(self) -> None:
        engine = self.engine
        targets, record = missing_exports(self.config, self.state), export_record(self.config, self.state)
        first = dist.get_rank() == 0
        if targets:
            engine.sync_parameters()
        if (folder := targets.get("--export-hf")) is not None:
            merged = MergedWeights(engine.models) if self.config.adapter.trains_adapters else None
            card = {"README.md": model_card(self.config, self.state.tokens_crc32, self.evaluations)} if first else {}
            export_hf(engine.models, engine.hf, folder, progress=first, merged=merged, more_files={**record, **card})
        if (folder := targets.get("--export-adapter")) is not None:
            export_adapter(engine.models, engine.hf, folder, more_files=record)
        for folder in targets.values():
            self.logger.message(f"exported to {folder}")


def _random_name() -> str:
    """A random name, the same on all ranks. Collectives: one broadcast."""
    name: list[str | None] = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, src=0, group=host_group())
    return str(name[0])
