"""Conversion between Hugging Face checkpoints and Megatron's: no Megatron import, no process group, no model in memory.

A conversion is planned completely before the first byte moves: every tensor's bytes, from which place of which file to
which. Running the plan is reading and writing byte ranges, in pieces of bounded size that are hashed on the way.
README.md is for users.

cli.py          what the programs in tools/ share: flags, the last line
folder.py       Megatron-LM's checkpoint folder: the tracker, the folder of an iteration, its saved arguments
source.py       the tensors of a Hugging Face checkpoint, safetensors or .bin: names, shapes and places
parameters.py   Megatron parameters and the blocks of them in files, which both formats and both directions use
saved_args.py   the Megatron-LM arguments in a checkpoint: as args, as YAML, as flags, and back to a config.json
manifest.py     conversion.json: what a converted checkpoint holds, and the trainer's check of it
to_megatron.py  Hugging Face -> Megatron: the plan, and what is written with the weights
adapter.py      a run's checkpoint with adapters -> PEFT's folder
to_hf.py        Megatron -> Hugging Face: the same
estimate.py     --plan: what a conversion would do, with time, disk and memory
verify.py       reads a checkpoint again, inverts the map and compares hashes
formats/        `torch_dist` and `torch`, a writer and a reader each
transfer/       runs a plan: pieces, buffers, hashes, journal, processes, publication
"""
