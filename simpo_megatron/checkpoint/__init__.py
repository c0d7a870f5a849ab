"""Conversion between Hugging Face checkpoints and Megatron's: no Megatron import, no process group, no model.

A conversion is planned whole before the first byte moves: every tensor's bytes, from which place of which file to which.
Running the plan is reading and writing of byte ranges, in slabs of bounded size, hashed on the way.

source.py      the tensors of a Hugging Face checkpoint, safetensors or .bin: names, shapes and places
pickles.py     what Megatron pickles, read without importing or calling anything it names
zips.py        torch.save files as places of tensors: reading them, and laying one out before its bytes are there
items.py       Megatron parameters and the blocks of them that lie in files: the map both directions use
torch_dist.py  the torch_dist format: laying a checkpoint out
dist_reader.py finding the blocks of one
legacy.py      the torch format (mp_rank_XX): laying a checkpoint out
legacy_reader.py  finding the blocks of one
moves.py       the plan as data: bytes from which place of which file to which
slabs.py       the cuts: blocks -> slabs of bounded size
work.py        runs a plan: pipelined, hashed, journalled; plain files, no torch
processes.py   the same in several processes
run.py         a conversion from check to publication: resume, overwrite, shards, progress
to_megatron.py to_hf.py   the two directions: source, target and what is published with the weights
plan.py        what a conversion would do, with time, disk and memory
manifest.py    conversion.json: what a converted checkpoint holds, and the trainer's check of it
bundle.py      the Megatron-LM arguments of a model, among them those that --load does not restore
verify.py      re-reads a checkpoint, inverts the map and compares hashes
config_from_args.py  config.json of a checkpoint without a Hugging Face reference
progress.py    the progress bar
cli.py         what the programs in tools/ share
"""
