"""The parts of the training program, which wires them in `simpo_megatron.train`. README.md of this folder guides users.

loop.py            `Run`: data in, steps, evaluations, checkpoints, export
signals.py         stops a run before its end: signals, minutes, steps
record.py          `SAVE/run.yaml`: settings, versions, command
model_card.py      README.md of an export
timing.py          tokens, TFLOP/s, seconds and memory of a step
profiling.py       traces, memory snapshots, garbage collection
alarms.py          signs that a run goes wrong
progress.py        where a run stands, and how far it goes
adapter.py         what a run with adapters checks and says
opening.py         the first lines of a run
resume.py          what a run starts from, and which settings may differ on resume
ended.py           what is left to do of a run that is started again after its last step
setup.py           configuration -> TransformerConfig -> models with weights and head -> engine
low_precision.py   FP8 in the layers: what the model and the machine must have
optimizer.py       Megatron's optimizer: Adam's constants, dtypes and places of its state
engine.py          `Engine`: DDP, optimizer, schedule; `train_step` and `evaluate`
pass_through.py    fields of Megatron's configurations from text
megatron_lm_model.py  the model in Megatron-LM's `pretrain()`, and whether the arguments fit it
megatron_lm_baseline.py  the baseline of an objective in Megatron-LM's `pretrain()`
scoring.py         summed log-probs of a whole data set; its evaluation
reference.py       reference log-probs of the pairs, for objectives that compare with a reference model
reference_source.py   what they are made of, and those that the data brings along
reference_scoring.py  computes them with the reference model
checkpointing.py   `CheckpointWriter`: checkpoints in Megatron-LM's format, written by forked processes
writing.py         the processes that write them, and their end
loading.py         reads checkpoints: a run that goes on, or weights alone
optimizer_format.py  the two forms of a saved optimizer state, and what each loads into
retention.py       which checkpoints stay, and how folders are deleted
full_precision.py  the optimizer state of a checkpoint is fp32, whatever it is in memory
torch_adam.py      loads Megatron's optimizer checkpoints into torch's Adam
folders.py         checks of the folders that a run writes to
lock.py            one run at a time writes to a folder
data.py            the pairs of a run on every rank
environment.py     what is set before CUDA starts; the GPU of a process
distributed.py     device, process groups, and pairs sent from rank 0
remarks.py         warnings about settings that are probably not meant
console.py         `Logger`: terminal, metrics.jsonl, TensorBoard, Weights & Biases
"""
