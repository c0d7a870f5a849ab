"""The parts of the training program, which wires them in `simpo_megatron.train`. README.md of this folder guides users.

loop.py            `Run`: data in, steps, evaluations, checkpoints, export
progress.py        where a run stands, and how far it goes
resume.py          what a run starts from, and which settings may differ on resume
setup.py           configuration -> TransformerConfig -> models with weights and head -> engine
engine.py          `Engine`: DDP, optimizer, schedule; `train_step` and `evaluate`
scoring.py         summed log-probs of a whole data set
checkpointing.py   `CheckpointWriter`: checkpoints in Megatron-LM's format, written by forked processes
loading.py         reads checkpoints: a run that goes on, or weights alone
optimizer_format.py  the two forms of a saved optimizer state, and what each loads into
retention.py       which checkpoints stay, and how folders are deleted
torch_adam.py      loads Megatron's optimizer checkpoints into torch's Adam
folders.py         checks of the folders that a run writes to
lock.py            one run at a time writes to a folder
data.py            the pairs of a run on every rank
environment.py     what is set before CUDA starts; the GPU of a process
distributed.py     device, process groups, and pairs sent from rank 0
remarks.py         warnings about settings that are probably not meant
console.py         `Logger`: terminal, metrics.jsonl, TensorBoard, Weights & Biases
"""
