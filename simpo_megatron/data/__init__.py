"""Preference data: files -> `Pairs` -> the packs of each batch. Needs no GPU or process group."""

from simpo_megatron.data.clean import DataReport, load_preferences
from simpo_megatron.data.options import DataOptions
from simpo_megatron.data.order import pairs_of_batch
from simpo_megatron.data.packing import pack_batch, pack_rows, pair_costs
from simpo_megatron.data.pairs import CHOSEN_CUT, REJECTED_CUT, BlendedPairs, InMemoryPairs, Pairs

__all__ = [
    "CHOSEN_CUT",
    "REJECTED_CUT",
    "BlendedPairs",
    "DataOptions",
    "DataReport",
    "InMemoryPairs",
    "Pairs",
    "load_preferences",
    "pack_batch",
    "pack_rows",
    "pair_costs",
    "pairs_of_batch",
]
