"""Parallel layouts: what a user asks for, what a model allows, and which layers and tokens a rank holds.

config.py    the group of settings of a parallel layout
limits.py    layouts that a model cannot have, each refused with the nearest values that it can have
stages.py    the layers of every pipeline stage, and the rows of Megatron's padded embedding
context.py   the tokens of a packed row that a context-parallel rank holds
together.py  an error of one rank becomes an error of all ranks
"""

from __future__ import annotations
