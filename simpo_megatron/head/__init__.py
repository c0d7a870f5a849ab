"""From hidden states to the loss, without the [tokens, vocabulary] logits; no objective is known here.

task.py            what one pass is to score: positions, targets, and the loss of the sums
layer.py           `LogProbHead`, Megatron's output layer with a task; its autograd function
slabs.py           the arithmetic: slabs of whole pairs, their log-probs and both gradients
kernels.py         the element-wise work on a slab, in torch
triton_kernels.py  the same in Triton, for GPUs
logprobs.py        log-probs from all logits at once: the plain form, and the oracle of the others
"""
