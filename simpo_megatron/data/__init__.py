"""Preference data: files -> `PairStore` -> the packs of each batch. Needs no torch, GPU or process group."""

from simpo_megatron.data.options import DataOptions
from simpo_megatron.data.sampling import pack_rows, pairs_of_batch, plan_batch
from simpo_megatron.data.store import CHOSEN_CUT, REJECTED_CUT, DataReport, PairStore, load_preferences

__all__ = [
    "CHOSEN_CUT",
    "REJECTED_CUT",
    "DataOptions",
    "DataReport",
    "PairStore",
    "load_preferences",
    "pack_rows",
    "pairs_of_batch",
    "plan_batch",
]
