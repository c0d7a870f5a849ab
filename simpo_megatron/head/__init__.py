"""From hidden states to the loss, without the [tokens, vocabulary] logits. Nothing here depends on an objective.

task.py            what one pass scores: positions, targets, and the loss as a function of the sums
layer.py           `LogProbHead`, Megatron's output layer with a task, and its autograd function
slabs.py           the pass: slabs of whole pairs, their log-probs, then their gradients
segments.py        sums over the tokens of each response, the same in every run
projection.py      the three GEMMs, and the precision they run in
kernels.py         the element-wise work on a slab, in torch
triton_kernels.py  the same in Triton, for GPUs
logprobs.py        log-probs from all logits at once: the plain form, which the others are compared with

README.md says what the head costs and how it is tested.
"""
