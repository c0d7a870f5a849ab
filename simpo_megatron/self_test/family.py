"""Rows on one checkpoint of a family: everything that a supported model must have been proved to do.

Layouts are compared with transformers on packed rows, each sequence alone in transformers. Conversions and exports are
compared byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from simpo_megatron.checkpoint.formats.rank_files_reader import read_rank_files
from simpo_megatron.checkpoint.formats.rank_files_writer import RankLayout
from simpo_megatron.checkpoint.formats.torch_dist_reader import read_torch_dist
from simpo_megatron.checkpoint.saved_args import checkpoint_of_args, megatron_args, namespace, not_expressible
from simpo_megatron.checkpoint.source import TOKENIZER, read_source
from simpo_megatron.checkpoint.to_hf import plan_to_hf
from simpo_megatron.checkpoint.to_megatron import plan_to_megatron
from simpo_megatron.checkpoint.transfer import publish
from simpo_megatron.data import DataOptions
from simpo_megatron.data.clean import encode_rows
from simpo_megatron.data.encode import PairEncoder
from simpo_megatron.data.tokenizer import load_tokenizer
from simpo_megatron.errors import UserError
from simpo_megatron.models.export import export_hf
from simpo_megatron.models.families.registry import family_of
from simpo_megatron.models.hf_checkpoint import HFCheckpoint, expected_tensors, read_hf_checkpoint
from simpo_megatron.models.weight_table import tensor_and_slice
from simpo_megatron.parallel.config import ParallelConfig
from simpo_megatron.parallel.limits import layout_arguments
from simpo_megatron.planning.parameters import stage_parameters
from simpo_megatron.self_test.checkpoints import differences
from simpo_megatron.self_test.gradients import DENSE, LAYOUTS, SP2, SPARSE, compare_at
from simpo_megatron.self_test.models import engine_in, layout_config
from simpo_megatron.self_test.rows import Bench, Outcome, Row
from simpo_megatron.trainer.setup import build_transformer_config

ADVICE = "the family is wrong about this checkpoint: simpo_megatron/models/README.md"
# Keys of config.json that change nothing that a forward pass computes.
_OTHERS = frozenset(
    "architectures auto_map bos_token_id dtype eos_token_id initializer_range model_type pad_token_id torch_dtype "
    "transformers_version unk_token_id use_cache _name_or_path".split()
)


def family_rows(bench: Bench, path: Path) -> Iterator[Row]:
    """The rows of a checkpoint.

    Raises:
        UserError: it cannot be read, or its model is not supported.
    """
    hf = read_hf_checkpoint(path)
    sparse = hf.architecture.num_experts is not None
    yield Row("config: every key is read", partial(_keys, hf), advice=ADVICE)
    yield Row("tensors: every one is used and planned for", partial(_tensors, path), advice=ADVICE)
    yield Row("arguments: Megatron-LM's, and back", partial(_arguments, hf), advice=ADVICE)
    yield Row("conversion: torch_dist and back", partial(_convert, path, None), advice=ADVICE)
    for name, layout in {"one rank": RankLayout(), "TP 2": RankLayout(tensor_model_parallel_size=2)}.items():
        yield Row(f"conversion: rank files of {name} and back", partial(_convert, path, layout), advice=ADVICE)
    split = SP2 if bench.processes % 2 == 0 else {}
    yield Row("weights: export" + (" from TP 2 + SP" if split else ""), partial(_export, path, split), advice=ADVICE)
    for implementation in bench.implementations:
        for name, layout in LAYOUTS.items():
            if layout.model_type in (DENSE, SPARSE if sparse else DENSE):
                title = " (Transformer Engine)" if implementation == "transformer_engine" else ""
                settings = {**layout.settings, "transformer_impl": implementation}
                function = partial(_compare, path, settings)
                yield Row(f"gradients: {name}{title}", function, layout.processes, advice=ADVICE)
    yield Row("tokenizer: the end of a turn", partial(_turns, hf), advice=ADVICE)


def unread_keys(config: dict[str, Any]) -> list[str]:
    """The keys of a config.json whose value makes no difference to the architecture, or to whether it is refused."""
    family = family_of(config)
    found = family.architecture(config)

    def is_read(key: str) -> bool:
        for other in ("?", None):
            try:
                if family.architecture({**config, key: other}) != found:
                    return True
            except Exception:  # the family's own, or of Python where it computes with the value
                return True
        return False

    return [key for key in config if key not in _OTHERS and not is_read(key)]


def _keys(hf: HFCheckpoint, bench: Bench) -> Outcome:
    unread = unread_keys(hf.config)
    figure = f"{hf.architecture.family.name}; {len(hf.config)} keys"
    if not unread:
        return Outcome("proved", figure)
    listed = ", ".join(f"{key} {hf.config[key]!r}" for key in unread)
    return Outcome("proved", f"{figure}, not read: {listed}", "make sure that transformers reads none of them either")


def _tensors(path: Path, bench: Bench) -> Outcome:
    hf = read_source(path)
    layout = layout_arguments(ParallelConfig(), hf.architecture.num_layers)
    planned = sum(stage.total for stage in stage_parameters(hf.architecture, layout, 1))
    counted = hf.architecture.num_parameters
    figure = f"{len(hf.tensors)} tensors, {counted:,} parameters, {planned:,} planned"
    return Outcome("proved" if planned == counted else "FAILED", figure, "" if planned == counted else ADVICE)


def _arguments(hf: HFCheckpoint, bench: Bench) -> Outcome:
    args = vars(namespace(megatron_args(hf.architecture)))
    back = checkpoint_of_args(hf.path, args, hf.architecture.vocab_size).architecture
    different = [name for name, value in vars(hf.architecture).items() if getattr(back, name) != value]
    if different:
        return Outcome("FAILED", f"other {', '.join(different)} after the way back", ADVICE)
    lost = not_expressible(hf.architecture)
    return Outcome("proved", "; ".join(lost) if lost else "Megatron-LM can compute the model")


def _convert(path: Path, layout: RankLayout | None, bench: Bench) -> Outcome | None:
    if bench.rank:
        return None
    source, options = read_source(path), publish.Options()
    name = "torch_dist" if layout is None else f"ranks{layout.tensor_model_parallel_size}"
    there, back = bench.save / f"megatron-{name}", bench.save / f"back-{name}"
    try:
        conversion = plan_to_megatron(source, layout, there, options)
    except UserError as refused:
        if layout is None or layout.tensor_model_parallel_size == 1:
            raise
        return Outcome("not here", str(refused))
    publish.run(conversion, options)
    saved = read_torch_dist(conversion.final, source) if layout is None else read_rank_files(conversion.final, source)
    publish.run(plan_to_hf(source, saved, back, options), options)
    return _same(path, back)


def _export(path: Path, settings: dict[str, Any], bench: Bench) -> Outcome | None:
    target = bench.save / "export"
    with engine_in(bench, path, settings) as made:
        export_hf(made.engine.models, made.hf, target)
    return _same(path, target, numbers=True) if bench.rank == 0 else None


def _same(path: Path, other: Path, numbers: bool = False) -> Outcome:
    # Others repeat what these hold.
    known = {tensor_and_slice(name)[0] for name, _ in expected_tensors(read_hf_checkpoint(path))}
    if found := [name for name in differences(path, other, numbers) if name in known]:
        return Outcome("FAILED", f"other bytes in {found[0]} ({len(found)} tensors)", ADVICE)
    return Outcome("proved", "every byte")


def _compare(path: Path, settings: dict[str, Any], bench: Bench) -> Outcome | None:
    if settings.keys() > {"transformer_impl"}:  # one rank without any option must do
        try:
            build_transformer_config(layout_config(bench, path, settings), read_hf_checkpoint(path))
        except UserError as refused:
            return Outcome("not here", str(refused))
    found = compare_at(path, settings, bench)
    return found if found is None or found.result != "FAILED" else replace(found, advice=ADVICE)


def _turns(hf: HFCheckpoint, bench: Bench) -> Outcome:
    """A conversation through the chat template: begun once, ended once, with the ids of the whole rendered text."""
    if not any((hf.path / name).exists() for name in TOKENIZER):
        return Outcome("not here", "the checkpoint has no tokenizer")
    tokenizer: Any = load_tokenizer(hf.path)
    if not tokenizer.chat_template:
        return Outcome("not here", "the tokenizer has no chat template")
    encoder = PairEncoder(tokenizer, DataOptions(), hf.eos_token_ids)
    turns = [
        {"role": "user" if turn % 2 == 0 else "assistant", "content": text}
        for turn, text in enumerate(("What color is the sky?", "Which sky?", "The sky.", "It is blue."))
    ]
    row = {"chosen": turns, "rejected": [*turns[:-1], {**turns[-1], "content": "No."}]}
    prompt, chosen, _ = (ids.tolist() for ids in encode_rows([("conversation", row)], encoder).pairs.pair(0))
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    whole = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    bos, end = encoder.bos, tokenizer.convert_ids_to_tokens(chosen[-1])
    given = [*prompt, *chosen] if whole[:1] == [bos] or prompt[:1] != [bos] else [*prompt[1:], *chosen]
    once = [token in encoder.eos_ids for token in chosen]
    if once != [False] * (len(chosen) - 1) + [True]:
        return Outcome("FAILED", f"the response does not end with one of {sorted(encoder.eos_ids)} alone", ADVICE)
    if whole[: len(given)] == given:
        return Outcome("proved", f"a response ends with {end}")
    if whole == given[:-1]:
        advice = "check that generation stops at it: the template itself ends no turn"
        return Outcome("proved", f"a response ends with {end}, which is appended", advice)
    return Outcome("FAILED", "the ids are not those of the rendered conversation", ADVICE)
