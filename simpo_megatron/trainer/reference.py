"""Log-probs of the pairs under a reference model, computed once, for objectives that compare with one.

    train, valid, lines = with_reference(engine, train, valid, resumed=False)     # every rank, before step 0

They are taken from the first of these that there is:

* `--reference-checkpoint`: a file of that model beside a prepared set, else the model is loaded, scores and is freed
* the columns `ref_chosen_logps` and `ref_rejected_logps` of the data
* `PREFIX.reference` beside a prepared set, if it was made with the weights that the run starts from
* the weights that the run starts from, which score the pairs before step 0; with adapters the base without them

A resumed run has other weights. It takes them from the columns or from LOAD/reference.

Training pairs are scored in the batches of the first epoch, and validation pairs in the batch of an evaluation. So the
first step computes bit for bit the same sums on the layout that scored.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig

from simpo_megatron.adapters.install import without_adapters
from simpo_megatron.checkpoint.source import read_model
from simpo_megatron.config.adapter import AdapterConfig
from simpo_megatron.config.checkpoint import CheckpointConfig
from simpo_megatron.config.run import Config
from simpo_megatron.data import Pairs
from simpo_megatron.data.prepared_set import PreparedPairs
from simpo_megatron.data.reference_file import ReferenceFile
from simpo_megatron.data.tokenizer import fingerprint, load_tokenizer
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.parallel.together import raise_on_all_ranks
from simpo_megatron.settings import required
from simpo_megatron.trainer.adapter import base_checkpoint, base_files
from simpo_megatron.trainer.data import check_ids
from simpo_megatron.trainer.engine import Engine
from simpo_megatron.trainer.reference_scoring import (
    ScoringEngine,
    complete,
    evaluation_batches,
    training_batches,
)
from simpo_megatron.trainer.reference_source import (
    broadcast_sums,
    from_prefixes,
    has_columns,
    prepared_made_of,
    reference_path,
    run_made_of,
    tokens_made_of,
    weights_fingerprint,
    weights_fingerprint_of,
)
from simpo_megatron.trainer.resume import weights_folder
from simpo_megatron.trainer.setup import build_transformer_config

FOLDER = "reference"  # in --save


def with_reference(
    engine: Engine, train: Pairs, valid: Pairs | None, resumed: bool
) -> tuple[Pairs, Pairs | None, list[str]]:
    """The pairs with reference log-probs, if the objective needs them; else the pairs as they are.

    Collectives: broadcasts of the numbers; those of `score_batch` for every batch that is scored.

    Args:
        engine: with the weights that the run starts from, or of the checkpoint that it resumes.
        train: the training pairs.
        valid: the validation pairs, or None.
        resumed: the weights are those of a checkpoint of the run.

    Returns:
        Both, and one message on where the numbers come from for each.

    Raises:
        UserError: numbers are there and do not fit, or a resumed run has none; the same on every rank.
    """
    if not engine.config.objective.needs_reference:
        return train, valid, []
    found = _Finder(engine, resumed)
    train = found.attach("train", train)
    valid = None if valid is None else found.attach("valid", valid)
    messages = found.messages
    del found  # and with it the reference model
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return train, valid, messages


class _Finder:
    """Finds or computes the numbers of the data sets of one run.

    Attributes:
        messages: one for each data set.
    """

    def __init__(self, engine: Engine, resumed: bool) -> None:
        self.engine, self.config, self.resumed = engine, engine.config, resumed
        self.checkpoint = self.config.model.reference_checkpoint
        self.messages: list[str] = []
        self._scorer: Engine | None = None
        precision = "bf16" if self.config.train.bf16 else "fp32"
        weights = None
        with raise_on_all_ranks():
            if dist.get_rank() == 0:
                if self.checkpoint is not None:
                    weights = weights_fingerprint_of(self.checkpoint)
                elif not resumed:
                    start = base_checkpoint if self.config.adapter.trains_adapters else weights_folder
                    weights = weights_fingerprint(base_files(engine.hf, start(self.config.checkpoint)))
        self.made_of = run_made_of(weights, precision)

    def attach(self, name: str, pairs: Pairs) -> Pairs:
        """The pairs with their numbers."""
        source, found = self._find(name, pairs)
        self.messages.append(f"reference log-probs of the {name} pairs: {source}")
        return found

    def _find(self, name: str, pairs: Pairs) -> tuple[str, Pairs]:
        with raise_on_all_ranks():
            brought = self.checkpoint is None and has_columns(pairs)
        if brought:
            return "the columns of the data", pairs
        if self.resumed:
            earlier = self._of_the_saved_run(name, pairs)
            if earlier is not None:
                return earlier
        else:
            beside = from_prefixes(pairs, lambda: self.made_of)
            if beside is not None:
                self._keep(name, beside)
                return "PREFIX.reference beside the prepared set", beside
        return self._score(name, pairs)

    def _of_the_saved_run(self, name: str, pairs: Pairs) -> tuple[str, Pairs] | None:
        """Those that the run computed before its first step; None where they are to be computed."""
        load = required(self.config.checkpoint.load, "a run that is resumed has --load")
        path, sums = load / FOLDER / f"{name}.npz", None
        with raise_on_all_ranks():
            if dist.get_rank() == 0 and path.is_file():
                file = ReferenceFile.read(path)
                file.check(tokens_made_of(pairs), "resume with the data of the run")
                sums = None if file.missing else file.sums
            known = self.checkpoint is not None or self.config.adapter.trains_adapters
            if dist.get_rank() == 0 and sums is None and not known:
                raise UserError(
                    f"{path} is missing: a resumed run cannot compute the reference log-probs of its {name} pairs, "
                    "because its weights are no longer those it started from; copy the file there, or give the "
                    "reference model as --reference-checkpoint from the start"
                )
        sums = broadcast_sums(sums)
        if sums is None:
            return None
        found = pairs.with_reference_sums(sums)
        if self.config.checkpoint.save != load:
            self._keep(name, found)
        return str(path), found

    def _file(self, name: str, pairs: Pairs) -> ReferenceFile | None:
        """The file of --save, new where there is none; None without --save. For rank 0."""
        made_of = self._of(pairs)
        if self.config.checkpoint.save is None:
            return None
        path = self.config.checkpoint.save / FOLDER / f"{name}.npz"
        if not path.is_file():
            return ReferenceFile.new(path, made_of, len(pairs))
        file = ReferenceFile.read(path)
        file.check(made_of, "remove it to score the pairs again, or choose another --save")
        return file

    def _of(self, pairs: Pairs) -> dict[str, str]:
        """What numbers for these pairs are made of. For rank 0, which loads the tokenizer."""
        hf = self.engine.hf
        return {**self.made_of, **fingerprint(load_tokenizer(hf.path), hf.eos_token_ids), **tokens_made_of(pairs)}

    def _keep(self, name: str, pairs: Pairs) -> None:
        """Writes numbers that the data brought along into --save, from which the run resumes."""
        with raise_on_all_ranks():
            if dist.get_rank() == 0 and self.config.checkpoint.save is not None:
                path = self.config.checkpoint.save / FOLDER / f"{name}.npz"
                ReferenceFile(path, self._of(pairs), pairs.reference_sums(np.arange(len(pairs)))).write()

    def _score(self, name: str, pairs: Pairs) -> tuple[str, Pairs]:
        file: ReferenceFile | None = None
        with raise_on_all_ranks():
            if dist.get_rank() == 0:
                file = self._file(name, pairs)
        batches = evaluation_batches(pairs) if name == "valid" else training_batches(pairs, self.config)
        with without_adapters(self.engine.models if self.checkpoint is None else ()):
            sums = complete(file, lambda: self._engine(pairs), pairs, batches, f"Scoring the {name} pairs")
        start = "the base" if self.config.adapter.trains_adapters else "the weights that the run starts from"
        model = start if self.checkpoint is None else self.checkpoint
        return f"computed with {model}", pairs.with_reference_sums(sums)

    def _engine(self, pairs: Pairs) -> Engine:
        """The engine of the run, or one of --reference-checkpoint."""
        if self.checkpoint is None:
            return self.engine
        if self._scorer is None:
            with raise_on_all_ranks():
                hf = read_model(self.checkpoint, loaded=False, dry_run=False)
                check_ids(pairs, hf, "--reference-checkpoint")
                if dist.get_rank() == 0:
                    _check_tokenizer(self.checkpoint, hf, self.engine.hf)
                model = replace(self.config.model, hf_checkpoint=self.checkpoint)
                config = replace(self.config, model=model, checkpoint=CheckpointConfig(), adapter=AdapterConfig())
                transformer = build_transformer_config(config, hf)
            self._scorer = ScoringEngine.build(config, hf, transformer)
        return self._scorer


def score_prepared(config: Config, hf: HFCheckpoint, transformer: TransformerConfig, pairs: Pairs) -> Path:
    """Scores a prepared set and writes `PREFIX.reference`. A file that is not complete is completed.

    Collectives: those of `ScoringEngine.build` and `complete`.

    Args:
        config: of layout and batch.
        hf: the reference model.
        transformer: from `build_transformer_config`; Megatron's groups exist for it.
        pairs: the prepared set.

    Returns:
        The file.

    Raises:
        UserError: the file is there and was made of something else, or it cannot be written; the same on every rank.
    """
    assert isinstance(pairs, PreparedPairs)
    path, file = reference_path(pairs.prefix), None
    precision = "bf16" if config.train.bf16 else "fp32"
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            made_of = {**run_made_of(weights_fingerprint_of(hf.path), precision), **prepared_made_of(pairs)}
            file = ReferenceFile.read(path) if path.is_file() else ReferenceFile.new(path, made_of, len(pairs))
            file.check(made_of, "remove it to score the pairs again")
    batches = training_batches(pairs, config)
    complete(file, lambda: ScoringEngine.build(config, hf, transformer), pairs, batches, f"Scoring {pairs.prefix}")
    return path


def _check_tokenizer(checkpoint: Path, reference: HFCheckpoint, hf: HFCheckpoint) -> None:
    """Compares the vocabulary of the reference model with that of the model. The template is not used."""
    both = [fingerprint(load_tokenizer(one.path), ())["tokenizer"] for one in (reference, hf)]
    if both[0] != both[1]:
        raise UserError(
            f"--reference-checkpoint {checkpoint} has another tokenizer than --hf-checkpoint {hf.path}, so the ids of "
            "the pairs mean something else to it; give a reference model with the same tokenizer"
        )
