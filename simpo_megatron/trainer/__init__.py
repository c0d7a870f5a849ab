"""The training program's parts. `train.py` wires them; README.md in this folder is the user's guide.

loop.py            `Run`: data in, steps, evaluations, checkpoints, export
setup.py           configuration -> TransformerConfig -> models with weights and head -> engine
engine.py          `Engine`: DDP, optimizer, schedule; `train_step` and `evaluate`
scoring.py         summed log-probs of a whole data set
checkpointing.py   save and load in Megatron-LM's format
torch_adam.py      loads Megatron's optimizer checkpoints into torch's Adam
data.py            the pairs of a run on every rank
distributed.py     device, process groups, and pairs sent from rank 0
console.py         `Logger`: terminal, metrics.jsonl, TensorBoard, Weights & Biases
"""
