"""Pairs -> packed rows -> the microbatches of this rank.

whole_row.py       one packed row on the host: its sequences, padding, and what every position scores
row.py             one packed row as a microbatch: tokens, segments and targets, or this rank's slices of them
transfer.py        the arrays of a microbatch, sent to the device in one copy
packer.py          the pairs of a global batch, packed into rows and dealt to the data-parallel ranks
"""
