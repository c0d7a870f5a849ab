"""What a run starts from, and what may differ when it resumes another run. Reads files alone; builds no model.

One rule holds for every setting when a run is resumed. It is in exactly one of three classes:

* `REFUSED`: it must be that of the checkpoint. So must the training pairs (`check_pairs`).
* `NOT_OF_THE_RUN`: paths, logging and the like. It may differ without a word.
* All others: the value of this run wins, and the difference is printed.

README.md in this folder has the table for users.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from simpo_megatron.checkpoint.folder import TRACKER, iteration_folder, latest_step, release_folder
from simpo_megatron.checkpoint.formats.safe_pickle import Record
from simpo_megatron.checkpoint.formats.torch_save_file import read_torch_file
from simpo_megatron.config.arguments import flat
from simpo_megatron.config.checkpoint import CheckpointConfig
from simpo_megatron.config.layers import in_place_of
from simpo_megatron.config.run import Config
from simpo_megatron.errors import UserError
from simpo_megatron.settings import flag, require
from simpo_megatron.trainer.progress import Progress

REFUSED = (
    *("objective", "seed", "use_distributed_optimizer", "reference_checkpoint"),
    *("lora_rank", "lora_alpha", "lora_targets", "use_rslora", "load_adapter"),
)
NOT_OF_THE_RUN = (
    *("train_data", "save", "load", "finetune", "export_hf", "export_adapter", "tensorboard_dir", "wandb_project"),
    *("save_interval", "save_retain_interval", "keep_last", "keep_best", "async_save", "save_optim"),
    *(
        "dist_ckpt_optim_fully_reshardable",
        "eval_interval",
        "log_interval",
        "preset",
        "dry_run",
        "distributed_timeout_minutes",
    ),
    *("exit_signal_handler", "exit_duration_in_mins", "exit_interval", "stop_on_alarm"),
    "peak_tflops",
    *("profile", "profile_step_start", "profile_step_end", "profile_ranks", "profile_dir"),
    *("record_memory_history", "manual_gc", "manual_gc_interval"),
)
# What --use-checkpoint-opt-param-scheduler takes from the checkpoint. The length of the decay goes with it.
SCHEDULE = ("lr", "min_lr", "lr_decay_style", "lr_warmup_fraction", "weight_decay")
_LENGTH = ("train_iters", "train_epochs", "global_batch_size")
# What moves parameters between ranks: an optimizer state in the default form does not follow.
LAYOUT = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage"),
    *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size"),
    "main_grads_dtype",  # Megatron's names of the buffers have it
)
DP_RESHARDABLE = "dp_reshardable"  # Megatron's name for that form
OTHER_LAYOUT = (
    "resume with the same (the data-parallel and context-parallel size may differ), and save once with "
    "--dist-ckpt-optim-fully-reshardable: that checkpoint loads in any layout; or start a new run from its weights "
    "with --finetune"
)


@dataclass(frozen=True)
class SavedRun:
    """What a checkpoint says about the run that wrote it.

    Attributes:
        folder: of the checkpoint.
        settings: of the run, by name: what `flat` gave.
        progress: where the run stood.
        any_layout: whether the optimizer state loads in any layout (`optimizer_format.py`).
    """

    folder: Path
    settings: dict[str, Any]
    progress: Progress
    any_layout: bool = True


def weights_folder(settings: CheckpointConfig) -> Path | None:
    """The checkpoint of --load whose weights alone are taken: a converted one, or that of any run with --finetune.

    Raises:
        UserError: --load names a checkpoint that is not complete, or with --finetune none.
    """
    load = settings.load
    if load is None:
        return None
    release = release_folder(load)
    if release is not None or not settings.finetune:
        return release
    step = latest_step(load)
    if step is None:
        raise UserError(f"--finetune: --load {load} has no {TRACKER}; give the --save folder of another run")
    return iteration_folder(load, step)


def step_to_resume(settings: CheckpointConfig) -> int | None:
    """The step that --load resumes from; None if the run starts from weights alone, with a new optimizer.

    Raises:
        UserError: --load names a folder without a complete checkpoint, and it is not the folder of --save.
    """
    load = settings.load
    if load is None or weights_folder(settings) is not None:
        return None
    step = latest_step(load)
    if step is None and load != settings.save:
        raise UserError(f"--load {load} has no {TRACKER}; give the --save folder of another run, or drop --load")
    return step


def find_saved_run(settings: CheckpointConfig) -> SavedRun | None:
    """The run that --load resumes; None if the run starts from weights alone.

    Raises:
        UserError: the checkpoint is not complete, cannot be read, or was not saved by this program.
    """
    step = step_to_resume(settings)
    if step is None or settings.load is None:
        return None
    folder = iteration_folder(settings.load, step)
    try:
        content = read_torch_file(folder / "common.pt").content
    except UserError as error:
        raise UserError(f"{error}; or resume from another step") from error
    args, progress = (content.get(name) if isinstance(content, dict) else None for name in ("args", "progress"))
    known = {field.name for field in fields(Progress)}
    if not isinstance(args, Record) or not isinstance(progress, dict) or not progress.keys() <= known:
        raise UserError(
            f"{folder} was not saved by this program: it has no position in the data; start a new run from its weights "
            "with --finetune"
        )
    form = content.get("content_metadata", {}).get("distrib_optim_sharding_type")
    return SavedRun(folder, vars(args), Progress(**progress), any_layout=form != DP_RESHARDABLE)


def follow(config: Config, saved: SavedRun | None) -> tuple[Config, list[str]]:
    """Applies the rule for settings that differ from those of the run that is resumed.

    Args:
        config: of this run.
        saved: the run that it resumes, or None.

    Returns:
        The configuration to train with, and a line for every setting that differs.

    Raises:
        UserError: a setting differs that must not.
    """
    if saved is None:
        return config, []
    _refuse(config, saved)
    lines = []
    if config.optimizer.use_checkpoint_opt_param_scheduler:
        kept = {name: saved.settings[name] for name in SCHEDULE if name in saved.settings}
        given = vars(config.optimizer)
        lines = [
            f"kept {name} {value} of the checkpoint, not {given[name]}"
            for name, value in kept.items()
            if value != given[name]
        ]
        config = replace(config, optimizer=replace(config.optimizer, **kept))
    return config, [*lines, *changes(config, saved).values()]


def changes(config: Config, saved: SavedRun) -> dict[str, str]:
    """A line for every setting that differs; one line for two settings of which one takes the place of the other.

    Args:
        config: of this run.
        saved: the run that it resumes.
    """
    now, before = flat(config), saved.settings
    unprinted = {*REFUSED, *NOT_OF_THE_RUN}
    changed = [name for name in now if name not in unprinted and before.get(name, now[name]) != now[name]]
    lines = {}
    for name in changed:
        if in_place_of(name, now) in changed:
            continue  # the line of the setting that takes its place names it
        was = in_place_of(name, before)
        old = f"{was} {before[was]}" if was in changed else _spelled(before[name])
        lines[name] = f"resumed with {name} {_spelled(now[name])}, was {old}"
    return lines


def changes_of_training(config: Config, saved: SavedRun) -> dict[str, str]:
    """Those of `changes` that concern the objective, the schedule or Adam: they change nothing but the training."""
    names = {field.name for group in (config.objective, config.optimizer) for field in fields(group)}
    names.add("moe_aux_loss_coeff")
    return {name: line for name, line in changes(config, saved).items() if name in names}


def _spelled(value: Any) -> str:
    return "not set" if value is None else str(value)


def _refuse(config: Config, saved: SavedRun) -> None:
    now, before = flat(config), saved.settings
    load, objective = config.checkpoint.load, before.get("objective", now["objective"])
    require(
        objective == now["objective"],
        f"--load {load} is a run of --objective {objective}, not {now['objective']}; continue it with --objective "
        f"{objective}, or start a new run from its weights with --finetune",
    )
    must = REFUSED
    if config.optimizer.override_opt_param_scheduler is False and not now["use_checkpoint_opt_param_scheduler"]:
        must += (*SCHEDULE, *_LENGTH)
    for name in must:
        saved_value = before.get(name, now[name])
        require(
            saved_value == now[name],
            f"{saved.folder} was saved with {_as_flag(name, saved_value)}, not {_as_flag(name, now[name])}; resume "
            "with the same" + (" (or with --override-opt-param-scheduler)" if name not in REFUSED else ""),
        )
    for name in () if saved.any_layout else LAYOUT:
        value = _effective(name, now)
        saved_value = _effective(name, before) if name in before else value
        require(
            saved_value == value,
            f"{saved.folder} was saved with {_as_flag(name, saved_value)}, not {_as_flag(name, value)}, in a form that "
            f"serves no other layout; {OTHER_LAYOUT}",
        )
    bf16 = before.get("bf16", now["bf16"])
    require(
        bf16 == now["bf16"] or saved.any_layout,
        f"{saved.folder} was saved in {'bf16' if bf16 else 'fp32'}, in a form that serves no other precision; "
        f"{OTHER_LAYOUT}",
    )
    require(
        bf16 == now["bf16"] or now["use_distributed_optimizer"],
        f"{saved.folder} was saved in {'bf16' if bf16 else 'fp32'} without the distributed optimizer, which cannot "
        "change the precision; resume in the same, or start a new run from its weights with --finetune",
    )


def _effective(name: str, settings: dict[str, Any]) -> Any:
    """The value of a setting of the layout: experts are split as the other layers where nothing is said."""
    value = settings.get(name)
    return settings["tensor_model_parallel_size"] if value is None and name == "expert_tensor_parallel_size" else value


def _as_flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    return f"no {flag(name)}" if value is None else f"{flag(name)} {value}"


def check_optimizer(saved: SavedRun) -> None:
    """Makes sure that a run with steps left can go on from the checkpoint.

    Args:
        saved: the run that is resumed.

    Raises:
        UserError: the checkpoint has no optimizer state.
    """
    require(
        saved.settings.get("save_optim", True),
        f"{saved.folder} was saved with --no-save-optim and has no optimizer state to go on with; start a new run from "
        "its weights with --finetune",
    )


def check_pairs(saved: SavedRun, new: Progress) -> None:
    """Makes sure that a resumed run goes on with the training pairs of the saved one.

    Args:
        saved: the run that is resumed.
        new: where a new run on the pairs and the base at hand stands.

    Raises:
        UserError: the pairs are others, or an adapter has another base.
    """
    where = saved.progress.base_folder or "--hf-checkpoint"
    require(
        saved.progress.base == new.base,
        f"{saved.folder} holds adapters for other weights than those of {where}; "
        "resume with the model that the run started from",
    )
    for name, what in (
        ("num_pairs", "the number of training pairs"),
        ("tokens_crc32", "the checksum of the training data"),
    ):
        before, now = getattr(saved.progress, name), getattr(new, name)
        require(
            before == now,
            f"{saved.folder}: {what} was {before} when the checkpoint was saved and is {now} now, so resuming would "
            "repeat or skip pairs; resume with the same data, or start a new run from its weights with --finetune",
        )
