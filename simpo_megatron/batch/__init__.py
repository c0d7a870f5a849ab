"""Pairs -> packed rows -> the microbatches of this rank.

row.py             one packed row: tokens, positions, segments and targets, or this rank's slices of them
packer.py          the pairs of a global batch, packed into rows and dealt to the data-parallel ranks
"""
