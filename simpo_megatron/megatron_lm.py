"""SimPO in Megatron-LM's own `pretrain()`, from an unmodified checkout (core_v0.16.1).

    pretrain(train_valid_test_datasets_provider, with_logprob_head(your_model_provider), ModelType.encoder_or_decoder,
             forward_step, extra_args_provider=add_simpo_args, args_defaults=ARGS_DEFAULTS)

The whole script is `examples/megatron_lm/pretrain_simpo.py`, and its README explains it. Arguments, checkpoints,
logging, evaluation and resuming are Megatron-LM's. Batch, head, step and loss are those of our trainer.

A sample is a pair: `--global-batch-size 128` is 128 pairs, and `consumed_train_samples` counts pairs. Megatron-LM
always runs global-batch-size / data-parallel-size microbatches of `--micro-batch-size 1`. The pairs are packed into as
few packed rows of `--seq-length` as they need; the other microbatches run empty rows. These have one or two tokens.
With pipeline parallelism all rows have `--seq-length` tokens, the empty ones too: Megatron-LM tells its schedule one
length. Then `--seq-length` should be no longer than the longest pair needs, or `--variable-seq-lengths` lets the stages
exchange the shapes, for which they wait at every transfer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_current_global_batch_size, get_num_microbatches
from torch import Tensor

from simpo_megatron.batch.packer import RowPacker
from simpo_megatron.batch.row import PreferenceBatch
from simpo_megatron.config.arguments import add_objectives, add_settings, build_objective, check_owner, settable
from simpo_megatron.config.data import OPTIONS, DataConfig
from simpo_megatron.config.megatron_lm import check_values, moe_aux_loss_coeff, notes
from simpo_megatron.config.run import ModelConfig
from simpo_megatron.data import Pairs
from simpo_megatron.errors import UserError
from simpo_megatron.head.layer import LogProbHead
from simpo_megatron.models.attention import PackedAttention
from simpo_megatron.objectives import OBJECTIVES, Objective
from simpo_megatron.parallel.config import ParallelConfig
from simpo_megatron.parallel.limits import check_rows, check_shared_prompts
from simpo_megatron.settings import parse_size
from simpo_megatron.step import PreferenceStep
from simpo_megatron.trainer.data import load_data
from simpo_megatron.trainer.megatron_lm_baseline import carried, note
from simpo_megatron.trainer.megatron_lm_model import check_architecture, hf_checkpoint
from simpo_megatron.trainer.reference_source import known_reference

ARGS_DEFAULTS = {"dataloader_type": "external", "micro_batch_size": 1, "tokenizer_type": "HuggingFaceTokenizer"}
_DATA = [*OPTIONS, "share_prompts"]
_HEAD = ["head", "head_slab_bytes"]


def add_simpo_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the flags of the objectives, the data and the head, spelled as in our trainer: an `extra_args_provider`."""
    add_objectives(parser, with_defaults=True)
    add_settings(parser.add_argument_group("preferences"), DataConfig, _DATA)  # a flag that is not given is None
    add_settings(parser.add_argument_group("head"), ModelConfig, _HEAD, with_defaults=True)
    # Megatron-LM sets `variable_seq_lengths` to False itself (validate_args), so the flag is kept under another name.
    parser.add_argument_group("packed rows").add_argument(
        "--variable-seq-lengths",
        dest="simpo_variable_seq_lengths",
        action="store_true",
        help="with pipeline parallelism: rows end after their last pair, and the stages tell each other the shape of "
        "all that they send (default: off, every row has --seq-length tokens)",
    )
    return parser


def objective(args: Any) -> Objective:
    """The objective that Megatron-LM's arguments ask for.

    Raises:
        UserError: a setting of another objective is not at its default, or settings contradict each other.
    """
    fields = {field.name: field.default for cls in OBJECTIVES.values() for field in settable(cls)}
    given = [name for name, default in fields.items() if getattr(args, name) != default]
    check_owner(given, args.objective)
    return build_objective(vars(args))


def data_config(args: Any) -> DataConfig:
    """The data that Megatron-LM's arguments ask for; --train-data-path takes the same sources as our --train-data."""
    paths = {"train_data": args.train_data_path, "valid_data": args.valid_data_path}
    sources = {name: tuple(given) if given else None for name, given in paths.items()}
    given = {name: value for name in _DATA if (value := getattr(args, name)) is not None}
    return DataConfig(**sources, seq_length=args.seq_length, **given, given=frozenset(given))


def check_args(args: Any) -> None:
    """Refuses arguments that do not work with the loss or the batch.

    Args:
        args: Megatron-LM's.

    Raises:
        UserError: it names the flag, its value and what to do.
    """
    check_values(args)
    check_rows(args.seq_length, _layout(args))
    data_config(args)  # its settings check themselves, as those of the objective do
    chosen = objective(args)
    if args.share_prompts:
        check_shared_prompts(chosen.responses, args.context_parallel_size, args.transformer_impl != "local")
    check_architecture(args, hf_checkpoint(args))


def _layout(args: Any) -> ParallelConfig:
    """What packed rows depend on. Megatron-LM tells its pipeline schedule that all rows have --seq-length tokens."""
    return ParallelConfig(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        sequence_parallel=args.sequence_parallel,
        variable_seq_lengths=args.pipeline_model_parallel_size == 1 or args.simpo_variable_seq_lengths,
    )


def with_logprob_head(model_provider: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the models of a provider score pairs: the output layer of the last stage becomes a `LogProbHead`.

    The layer keeps its parameter, its name and its checkpoint key. Megatron's local attention refuses packed rows, so
    `PackedAttention` replaces it; attention has no parameters.

    Args:
        model_provider: returns a model of this rank.

    Returns:
        A provider that takes the same arguments.
    """

    def provider(*args: Any, **kwargs: Any) -> Any:
        settings = _args()
        check_args(settings)
        settings.variable_seq_lengths = settings.simpo_variable_seq_lengths
        if not settings.num_experts:
            settings.moe_token_dispatcher_type = "alltoall"  # TransformerConfig requires it with variable lengths
        if torch.distributed.get_rank() == 0:
            for line in notes(settings):
                print(line, flush=True)
        model = model_provider(*args, **kwargs)
        _pack_attention(model)
        if settings.head == "fused":
            for module in model.modules():
                if getattr(module, "output_layer", None) is not None:
                    LogProbHead.install(module, parse_size("--head-slab-bytes", settings.head_slab_bytes))
                    break
        return model

    return provider


def _pack_attention(model: torch.nn.Module) -> None:
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    for module in model.modules():
        old: Any = getattr(module, "core_attention", None)
        if isinstance(old, DotProductAttention):
            scale = old.config.softmax_scale
            module.core_attention = PackedAttention(old.config, old.layer_number, softmax_scale=scale)


def train_valid_test_datasets_provider(
    train_val_test_num_samples: Any, vp_stage: int | None = None
) -> tuple[Any, Any, None]:
    """The datasets provider: endless iterators over packed rows, from the position of the checkpoint; no test set.

    Collectives: those of `trainer.data.load_data`.

    Args:
        train_val_test_num_samples: not used; Megatron-LM passes it.
        vp_stage: not used; Megatron-LM passes it.

    Returns:
        The iterators of training, validation (or None) and test (None).
    """
    args = _args()
    train, valid = _load_pairs(args)
    return (
        _microbatches(args, train, args.consumed_train_samples),
        None if valid is None else _microbatches(args, valid, args.consumed_valid_samples),
        None,
    )


train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # every rank has an iterator


_loaded: list[tuple[Pairs, Pairs | None]] = []


def _load_pairs(args: Any) -> tuple[Pairs, Pairs | None]:
    """Training and validation pairs. Megatron-LM asks once for each virtual stage; they are read once."""
    if not _loaded:
        train, valid, messages = load_data(data_config(args), hf_checkpoint(args))
        if objective(args).needs_reference:
            train, valid = _with_reference(args, train), None if valid is None else _with_reference(args, valid)
        for line in messages:
            print(line, flush=True)
        _loaded.append((train, valid))
    return _loaded[0]


def _with_reference(args: Any, pairs: Pairs) -> Pairs:
    """The pairs with the reference log-probs that the data brings along: here no model computes them."""
    found = known_reference(pairs, hf_checkpoint(args).path, "bf16" if args.bf16 else "fp32")
    if found is None:
        raise UserError(
            f"--objective {objective(args).name} compares with a reference model, and the data has no log-probs of "
            "one; prepare it with tools/preprocess_preferences.py and score it with tools/score_reference.py, or give "
            "the rows the columns ref_chosen_logps and ref_rejected_logps"
        )
    return found


def _microbatches(args: Any, pairs: Pairs, position: int) -> Iterator[PreferenceBatch]:
    """Yields this rank's microbatches, global batch after global batch, `num_microbatches` of each."""
    packer = RowPacker(
        seq_length=args.seq_length,
        responses=objective(args).responses,
        hidden_size=args.hidden_size,
        share_prompts=bool(args.share_prompts),
        fixed_length=not _layout(args).variable_seq_lengths,
        sequence_parallel=args.sequence_parallel,
    )
    while True:
        size = get_current_global_batch_size()
        batch = packer.pack(pairs, pairs.order(position, size, args.seed), get_num_microbatches())
        # Without fixed rows the stages exchange shapes, so that an empty row need not be as long as the longest.
        yield from packer.microbatches(batch if packer.fixed_length else replace(batch, row_length=None))
        position += size


def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Runs one microbatch: Megatron-LM's `forward_step_func`.

    Args:
        data_iterator: from `train_valid_test_datasets_provider`.
        model: of this rank.

    Returns:
        The output of the model, and the function that makes loss and metrics of it.
    """
    from megatron.training import get_timers

    args, timers = _args(), get_timers()
    timers("batch-generator", log_level=2).start()
    batch = next(data_iterator)
    timers("batch-generator").stop()
    chosen = carried(args, objective(args), model)
    vocabulary = hf_checkpoint(args).architecture.vocab_size
    step = PreferenceStep(chosen, vocabulary, get_num_microbatches(), moe_aux_loss_coeff(args))
    output, loss_func = step(iter((batch,)), model)
    return output, partial(_report, args, chosen, loss_func)


def _report(args: Any, chosen: Objective, loss_func: Any, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and each metric as [sum, divisor], which Megatron-LM adds up over microbatches, DP and CP."""
    loss, sums = loss_func(output)
    note(chosen, sums)
    if args.check_for_nan_in_loss_and_grad:
        _check_finite(loss)
    # A metric without a divisor is already divided by the global batch. The divisors given for it add up to 1 over
    # microbatches and DP (times CP, like the sums).
    share = 1.0 / (get_num_microbatches() * parallel_state.get_data_parallel_world_size())
    sums["none"] = torch.full_like(sums["pairs"], share)
    return loss, {one.name: torch.stack((sums[one.name], sums[one.divisor])).float() for one in chosen.metrics}


def _check_finite(loss: Tensor) -> None:
    """Passes the loss to Megatron's rerun state machine, as Megatron-LM's own forward steps do."""
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    checks: Any = ((torch.isnan, "NaN"), (torch.isinf, "Inf"))
    for rejected, name in checks:
        get_rerun_state_machine().validate_result(
            result=loss, rejection_func=rejected, message=f"found {name} in the SimPO loss", tolerance=0.0, fatal=True
        )


def _args() -> Any:
    from megatron.training import get_args

    return get_args()
