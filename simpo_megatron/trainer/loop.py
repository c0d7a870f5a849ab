"""The run: data in, steps, evaluations and checkpoints, model out."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import psutil
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig

from simpo_megatron import compat
from simpo_megatron.batch.packer import GlobalBatch
from simpo_megatron.checkpoint.folder import iteration_folder, release_folder
from simpo_megatron.config.arguments import flat
from simpo_megatron.config.presets import describe
from simpo_megatron.config.run import Config
from simpo_megatron.errors import UserError
from simpo_megatron.models.export import export_hf
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.models.spec import use_transformer_engine
from simpo_megatron.parallel.config import describe_layout
from simpo_megatron.parallel.together import raise_on_all_ranks
from simpo_megatron.trainer import checkpointing
from simpo_megatron.trainer.checkpointing import Progress
from simpo_megatron.trainer.console import Logger
from simpo_megatron.trainer.data import load_data
from simpo_megatron.trainer.setup import build_engine, step_to_resume


def total_pairs(config: Config, num_pairs: int) -> int:
    """Pairs the whole run sees, repeats counted, from --train-iters or from --train-epochs."""
    train = config.train
    if train.train_epochs is not None:
        return max(1, round(train.train_epochs * num_pairs))
    return (train.train_iters or 0) * train.global_batch_size  # `TrainConfig` requires one of the two


class Run:
    """One training run, from its configuration to its last checkpoint. Megatron's groups must exist."""

    def __init__(self, config: Config, hf: HFCheckpoint, transformer: TransformerConfig) -> None:
        self.config, self.hf = config, hf
        self.train_pairs, self.valid_pairs, messages = load_data(config.data, hf)
        self.limit = total_pairs(config, len(self.train_pairs))
        self.total = math.ceil(self.limit / config.train.global_batch_size)
        self.engine = build_engine(config, hf, transformer, self.total)
        fingerprint = self.train_pairs.fingerprint
        self.state = Progress(num_pairs=len(self.train_pairs), tokens_crc32=fingerprint, seed=config.train.seed)
        resumed = self._resume()
        with raise_on_all_ranks():
            self.logger = Logger(config, self.total, self.state.step)
        for line in (
            *messages,
            *self._opening(),
            resumed,
            *(f"warning: {text}" for text in self._warnings()),
        ):
            self.logger.say(line)
        self.first_eval: dict[str, float] = {}
        self.last_eval: dict[str, float] = {}

    def _resume(self) -> str:
        root = self.config.checkpoint.load
        step = step_to_resume(self.config.checkpoint)
        if root is None or step is None:
            converted = None if root is None else release_folder(root)
            return f"starting from {converted or self.hf.path}"
        saved = checkpointing.load(self.engine, root, step)
        for name in ("num_pairs", "tokens_crc32", "seed"):
            before, now = getattr(saved, name), getattr(self.state, name)
            if before != now:
                raise UserError(
                    f"--load {root}: {name} of the training data was {before} when it was saved and is {now} now; resuming "
                    "would repeat or lose pairs. Start a new run from an export instead"
                )
        self.state = saved
        done = "" if self._unfinished() else "; that is the whole run, nothing is left to train"
        return f"resumed from {iteration_folder(root, step)}, after {saved.consumed_pairs} pairs{done}"

    def _unfinished(self) -> bool:
        return self.state.step < self.total and self.state.consumed_pairs < self.limit

    def _warnings(self) -> list[str]:
        longest = self.hf.config.get("max_position_embeddings")
        tokens = self.config.data.options.max_length
        found = self.config.objective.warnings(self.config.optimizer.lr, self.hf.num_parameters)
        if longest and tokens > longest:
            found.append(
                f"--max-length {tokens} (half of --seq-length unless set) exceeds the {longest} positions the model was made "
                "for"
            )
        return found

    def _opening(self) -> list[str]:
        layout = describe_layout(self.config.parallel, parallel_state.get_data_parallel_world_size())
        device = torch.device(torch.cuda.current_device()).type
        precision = "bf16" if self.config.train.bf16 else "fp32"
        lines = [
            f"{self.hf.architecture.family.name} model, {precision}, {layout} on {device}",
            self._kernels(),
            self.config.objective.describe(),
        ]
        if self.config.train.preset is not None:
            lines.append(describe(self.config.train.preset, flat(self.config)))
        if coefficient := self.config.train.moe_aux_loss_coeff:
            lines.append(f"balancing loss of the experts: coefficient {coefficient:g}")
        lines.append(
            f"{self.total} steps of {self.config.train.global_batch_size} pairs: "
            f"{self.limit / len(self.train_pairs):.2f} epochs"
        )
        return lines

    def _kernels(self) -> str:
        """Whose code runs what the optional packages speed up."""
        fused = use_transformer_engine(self.config.model.transformer_impl)
        layers = "Transformer Engine's" if fused else "Megatron's on plain torch"
        if not compat.have_transformer_engine():
            layers += " (Transformer Engine is not installed)"
        weight_gradients = "fused, by Apex" if self.engine.transformer.gradient_accumulation_fusion else "not fused"
        return f"layers: {layers}; Adam: {compat.adam()}; accumulation of weight gradients: {weight_gradients}"

    def _next_batch(self) -> GlobalBatch:
        position = self.state.consumed_pairs
        size = min(self.config.train.global_batch_size, self.limit - position)
        indices = self.train_pairs.order(position, size, self.config.train.seed)
        return self.engine.packer.pack(self.train_pairs, indices)

    def execute(self) -> None:
        """Trains to the end: evaluates, logs, saves and exports as configured."""
        self.logger.start()
        try:
            if self.state.step == 0:  # a resumed run has logged it
                self._evaluate()
            while self._unfinished():
                self._step()
            self._finish()
        finally:
            self.logger.close()

    def _step(self) -> None:
        config = self.config
        started = time.perf_counter()
        batch = self._next_batch()
        metrics = self.engine.train_step(batch)
        self.state = replace(
            self.state, step=self.state.step + 1, consumed_pairs=self.state.consumed_pairs + batch.counts.pairs
        )
        step = self.state.step
        metrics["tokens_per_second"] = batch.tokens / (time.perf_counter() - started)
        metrics["memory_gib"] = _memory_gib()
        metrics["epoch"] = self.state.consumed_pairs / len(self.train_pairs)
        if step % config.log.log_interval == 0 or not self._unfinished():
            self.logger.row(step, metrics)
            self.logger.step_line(step, metrics)
        self.logger.advance(step)
        if config.log.eval_interval and step % config.log.eval_interval == 0:
            self._evaluate()
        save = config.checkpoint
        if save.save is not None and (
            not self._unfinished() or (save.save_interval and step % save.save_interval == 0)
        ):
            checkpointing.save(self.engine, save.save, self.state)

    def _evaluate(self) -> None:
        if self.valid_pairs is None:
            return
        indices = self.valid_pairs.order(0, len(self.valid_pairs), seed=0, shuffle=False)
        batch = self.engine.packer.pack(self.valid_pairs, indices)
        self.last_eval = {f"eval/{name}": value for name, value in self.engine.evaluate(batch).items()}
        self.first_eval = self.first_eval or self.last_eval
        self.logger.row(self.state.step, self.last_eval)
        self.logger.eval_line(self.state.step, {name[5:]: value for name, value in self.last_eval.items()})

    def _finish(self) -> None:
        interval = self.config.log.eval_interval
        if not interval or self.state.step % interval:
            self._evaluate()
        if self.config.model.export_hf is not None:
            self.engine.sync_parameters()
            export_hf(self.engine.models, self.hf, self.config.model.export_hf, progress=dist.get_rank() == 0)
            self.logger.say(f"exported to {self.config.model.export_hf}")
        self.logger.summary(self.first_eval, self.last_eval)


def _memory_gib() -> float:
    """Peak memory of this rank: allocated on the GPU, or resident on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30
