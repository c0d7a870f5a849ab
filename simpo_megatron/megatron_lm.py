"""SimPO in Megatron-LM's own `pretrain()`, from an unmodified checkout: `examples/megatron_lm/pretrain_simpo.py`.

    pretrain(train_valid_test_datasets_provider, with_logprob_head(your_model_provider), ModelType.encoder_or_decoder,
             forward_step, extra_args_provider=add_simpo_args, args_defaults=ARGS_DEFAULTS)

Arguments, checkpoints, logging, evaluation and resuming stay Megatron-LM's; batch, head, step and loss are those of our
trainer. A sample is a pair: `--global-batch-size 128` is 128 pairs, `consumed_train_samples` counts pairs. Megatron-LM runs
global-batch-size / data-parallel-size microbatches of `--micro-batch-size 1` whatever the data: the pairs are packed into as
few rows of `--seq-length` as they take, and the microbatches that are left run empty packs of a token or two. Checked against
core_v0.16.1.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_current_global_batch_size, get_num_microbatches
from torch import Tensor

from simpo_megatron.batch.packer import RowPacker
from simpo_megatron.batch.row import PreferenceBatch
from simpo_megatron.config.arguments import add_objectives, add_settings, build_objective
from simpo_megatron.config.data import OPTIONS, DataConfig
from simpo_megatron.config.run import ModelConfig
from simpo_megatron.data import Pairs
from simpo_megatron.errors import UserError
from simpo_megatron.head.layer import LogProbHead
from simpo_megatron.models.attention import PackedAttention
from simpo_megatron.models.hf_checkpoint import HFCheckpoint, read_hf_checkpoint
from simpo_megatron.objectives import Metric, Objective
from simpo_megatron.parallel.limits import check_shared_prompts
from simpo_megatron.settings import parse_size, required
from simpo_megatron.step import PreferenceStep
from simpo_megatron.trainer.data import load_data

ARGS_DEFAULTS = {"dataloader_type": "external", "micro_batch_size": 1, "tokenizer_type": "HuggingFaceTokenizer"}
_DATA = [*OPTIONS, "share_prompts"]
_HEAD = ["head", "head_slab_bytes"]


def add_simpo_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """An `extra_args_provider`: the flags of the objectives, the data and the head, as our trainer spells them."""
    add_objectives(parser, with_defaults=True)
    add_settings(parser.add_argument_group("preferences"), DataConfig, _DATA)  # None tells what was not given
    add_settings(parser.add_argument_group("head"), ModelConfig, _HEAD, with_defaults=True)
    return parser


def objective(args: Any) -> Objective:
    """The objective that Megatron-LM's arguments ask for."""
    return build_objective(vars(args))


def moe_aux_loss_coeff(args: Any) -> float:
    """Megatron-LM's --moe-aux-loss-coeff, a number or one for each of several losses; 0 without experts."""
    coefficient = args.moe_aux_loss_coeff if args.num_experts else 0.0
    return float(sum(coefficient)) if isinstance(coefficient, list) else coefficient


def data_config(args: Any) -> DataConfig:
    """The data that Megatron-LM's arguments ask for; --train-data-path takes what our --train-data does."""
    paths = {"train_data": args.train_data_path, "valid_data": args.valid_data_path}
    sources = {name: tuple(given) if given else None for name, given in paths.items()}
    given = {name: value for name in _DATA if (value := getattr(args, name)) is not None}
    return DataConfig(**sources, seq_length=args.seq_length, **given, given=frozenset(given))


def check_args(args: Any) -> None:
    """Refuses what the normaliser of the loss or the batch cannot serve.

    Raises:
        UserError: naming the flag, its value and the mend.
    """
    for flag, value, accepted, mend in (
        ("--micro-batch-size", args.micro_batch_size, 1, "a microbatch is one packed row; set it to 1"),
        (
            "--dataloader-type",
            args.dataloader_type,
            "external",
            "the datasets provider yields batches; set it to external",
        ),
        ("--calculate-per-token-loss", args.calculate_per_token_loss, False, "the loss is a mean over pairs; drop it"),
        ("--fp16", args.fp16, False, "a log-prob sum leaves fp16's range; use --bf16"),
        ("--sft", args.sft, False, "it changes how losses are averaged; use --objective sft"),
        ("--mtp-num-layers", args.mtp_num_layers, None, "the head scores one token ahead; drop it"),
    ):
        if value != accepted:
            raise UserError(f"{flag} {value} cannot be used with SimPO: {mend}")
    if args.num_experts and args.moe_token_dispatcher_type != "alltoall":
        raise UserError(
            f"--moe-token-dispatcher-type {args.moe_token_dispatcher_type} cannot take rows of changing length; use alltoall"
        )
    if args.attention_dropout or args.hidden_dropout:
        raise UserError(
            "--attention-dropout and --hidden-dropout must be 0: the two responses of a pair must not see different noise"
        )
    if args.tokenizer_type != "HuggingFaceTokenizer":
        raise UserError(f"--tokenizer-type {args.tokenizer_type} has no chat template; use HuggingFaceTokenizer")
    objective(args)  # it checks itself
    required(args.train_data_path, "--train-data-path is missing; give preferences: a prepared prefix or a .jsonl file")
    data = data_config(args)
    if data.share_prompts:
        fused = args.transformer_impl != "local"
        check_shared_prompts(objective(args).responses, args.context_parallel_size, fused)
    hf = hf_checkpoint(args)
    _check_architecture(args, hf)


def hf_checkpoint(args: Any) -> HFCheckpoint:
    """The Hugging Face checkpoint that --tokenizer-model names: its tokenizer, chat template and true vocabulary are used."""
    if args.tokenizer_model is None:
        raise UserError(
            "--tokenizer-model is missing; give the folder of the Hugging Face checkpoint the weights came from"
        )
    return _read_once(Path(args.tokenizer_model))


@functools.cache
def _read_once(path: Path) -> HFCheckpoint:
    """Every microbatch asks for the vocabulary: the headers of a large model are hundreds of files."""
    return read_hf_checkpoint(path)


def _check_architecture(args: Any, hf: HFCheckpoint) -> None:
    """Compares Megatron-LM's arguments with config.json, where both say something."""
    wanted = hf.architecture.transformer
    names = {"num_layers": "num_layers", "hidden_size": "hidden_size", "num_attention_heads": "num_attention_heads"}
    names |= {"num_query_groups": "num_query_groups", "kv_channels": "kv_channels", "num_moe_experts": "num_experts"}
    for key, name in names.items():
        given = getattr(args, name, None)
        if name == "num_query_groups" and not args.group_query_attention:
            given = args.num_attention_heads
        if key in wanted and given != wanted[key]:
            raise UserError(
                f"--{name.replace('_', '-')} {given}, but {hf.path} has {wanted[key]}; use the arguments of that model "
                "(tools/hf_to_megatron.py writes them beside the weights)"
            )


def with_logprob_head(model_provider: Callable[..., Any]) -> Callable[..., Any]:
    """A model provider whose models score pairs: the output layer of the last stage becomes a `LogProbHead`.

    The layer keeps its parameter, its name and its checkpoint key. Where the model has Megatron's local attention, which
    refuses packed rows, `PackedAttention` takes its place; it has no parameters.
    """

    def provider(*args: Any, **kwargs: Any) -> Any:
        settings = _args()
        check_args(settings)
        # Empty packs must not cost a whole row. Megatron-LM leaves the field to whoever brings the data (validate_args).
        settings.variable_seq_lengths = True
        settings.moe_token_dispatcher_type = "alltoall"  # the config asks for it with variable lengths, experts or not
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
        old = getattr(module, "core_attention", None)
        if isinstance(old, DotProductAttention):
            module.core_attention = PackedAttention(old.config, softmax_scale=old.config.softmax_scale)


def train_valid_test_datasets_provider(
    train_val_test_num_samples: Any, vp_stage: int | None = None
) -> tuple[Any, Any, None]:
    """The datasets provider: endless iterators over packed rows, from where the checkpoint stopped; no test set.

    Collectives: those of `trainer.data.load_data`.
    """
    args = _args()
    stores = _stores(args)
    train, valid = (
        None if store is None else _rows(args, store, consumed)
        for store, consumed in zip(stores, (args.consumed_train_samples, args.consumed_valid_samples), strict=True)
    )
    return train, valid, None


train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # every rank has an iterator


_loaded: list[tuple[Pairs, Pairs | None]] = []


def _stores(args: Any) -> tuple[Pairs, Pairs | None]:
    """Training and validation pairs, read once whatever the number of virtual stages."""
    if not _loaded:
        train, valid, messages = load_data(data_config(args), hf_checkpoint(args))
        for line in messages:
            print(line, flush=True)
        _loaded.append((train, valid))
    return _loaded[0]


def _rows(args: Any, pairs: Pairs, position: int) -> Iterator[PreferenceBatch]:
    """The rows of one global batch after the other, this rank's, `num_microbatches` of each."""
    packer = RowPacker(
        seq_length=args.seq_length,
        responses=objective(args).responses,
        hidden_size=args.hidden_size,
        share_prompts=bool(args.share_prompts),
        sequence_parallel=args.sequence_parallel,
    )
    while True:
        size = get_current_global_batch_size()
        yield from packer.microbatches(
            packer.pack(pairs, pairs.order(position, size, args.seed), get_num_microbatches())
        )
        position += size


def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Megatron-LM's `forward_step_func`."""
    from megatron.training import get_timers

    args, timers = _args(), get_timers()
    timers("batch-generator", log_level=2).start()
    batch = next(data_iterator)
    timers("batch-generator").stop()
    chosen = objective(args)
    step = PreferenceStep(
        chosen, hf_checkpoint(args).architecture.vocab_size, get_num_microbatches(), moe_aux_loss_coeff(args)
    )
    output, loss_func = step(iter((batch,)), model)
    return output, partial(_report, args, chosen.metrics, loss_func)


def _report(args: Any, metrics: tuple[Metric, ...], loss_func: Any, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and every metric as the [sum, divisor] that Megatron-LM adds up over microbatches, DP and CP."""
    loss, sums = loss_func(output)
    if args.check_for_nan_in_loss_and_grad:
        _validate(loss)
    # A sum without a divisor is divided by the global batch already: what is given adds up to 1 (times CP, as sums do).
    sums["none"] = torch.full_like(
        sums["pairs"], 1.0 / (get_num_microbatches() * parallel_state.get_data_parallel_world_size())
    )
    return loss, {metric.name: torch.stack((sums[metric.name], sums[metric.divisor])).float() for metric in metrics}


def _validate(loss: Tensor) -> None:
    """Hands the loss to Megatron's rerun state machine, as Megatron-LM's own forward steps do."""
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    checks: Any = ((torch.isnan, "NaN"), (torch.isinf, "Inf"))
    for rejected, name in checks:
        get_rerun_state_machine().validate_result(
            result=loss, rejection_func=rejected, message=f"found {name} in the SimPO loss", tolerance=0.0, fatal=True
        )


def _args() -> Any:
    from megatron.training import get_args

    return get_args()
