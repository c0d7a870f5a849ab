"""The model card of an export: README.md with what the model is made of, and how it measured before and after."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from simpo_megatron.config.run import Config
from simpo_megatron.trainer.record import effective_settings, versions

_SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "likelihood_accuracy", "logps/chosen", "logps/rejected")


def model_card(config: Config, data_fingerprint: int, evaluations: Mapping[int, Mapping[str, float]]) -> str:
    """The text of README.md.

    Args:
        config: of the run.
        data_fingerprint: of the training pairs (`Pairs.fingerprint`).
        evaluations: metrics of the held-out pairs by step; the first and the last are shown.
    """
    base = Path(str(config.model.hf_checkpoint))
    objective = config.objective.name
    head = {"library_name": "transformers", "tags": ["preference-optimization", objective]}
    if hub_id := hub_id_of(base):
        head = {"base_model": hub_id, **head}
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {Path(str(config.model.export_hf)).name}",
        "",
        f"{hub_id or base} trained with `{objective}` by simpo_megatron.",
        "",
        f"* Objective: {config.objective.describe()}",
        f"* Training data: {', '.join(config.data.training_sources)}, fingerprint {data_fingerprint:08x}",
        f"* Command: `{shlex.join(sys.orig_argv)}`",
        f"* Versions: {', '.join(versions())}",
    ]
    if evaluations:
        first, last = min(evaluations), max(evaluations)
        names = [name for name in _SHOWN if name in evaluations[last]]
        lines += ["", "## Held-out pairs", "", f"| | step {first} | step {last} |", "|---|---|---|"]
        lines += [
            f"| {name} | {evaluations[first].get(name, float('nan')):.4f} | {evaluations[last][name]:.4f} |"
            for name in names
        ]
    settings = yaml.safe_dump(effective_settings(config), sort_keys=False, width=120).rstrip()
    lines += ["", "## Every setting", "", "```yaml", settings, "```", ""]
    return "\n".join(lines)


def hub_id_of(folder: Path) -> str | None:
    """The name on the Hugging Face hub of a folder in its cache; None for other folders.

    The hub refuses a card whose `base_model` is a path.

    >>> hub_id_of(Path("/cache/hub/models--meta-llama--Meta-Llama-3-8B/snapshots/8cde5ca"))
    'meta-llama/Meta-Llama-3-8B'
    """
    found = re.search(r"/models--([^/]+)/snapshots/[^/]+$", str(folder.absolute()))
    return found[1].replace("--", "/", 1) if found else None
