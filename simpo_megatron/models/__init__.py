"""Hugging Face checkpoints as Megatron-Core models: reading, building, loading, and the way back. See README.md.

families/         one file for each family, and the registry
additions.py      what a model computes beyond Megatron's config. No torch, no Megatron
architecture.py   what a model computes, and what a family is. No torch, no Megatron
weight_table.py   which Hugging Face tensors form which Megatron parameter. No torch, no Megatron
part_layout.py    how Hugging Face tensors form one parameter, and its slices on tensor-parallel ranks
rope.py           rotary frequencies as the config asks for them
megatron_args.py  an architecture under Megatron-LM's argument names, and back. No torch, no Megatron
hf_checkpoint.py  a checkpoint directory: its config, and names, shapes and files of its tensors. No torch, no Megatron
weight_files.py   names and index of the weight files, and the headers of safetensors. No torch, no Megatron
tied_output.py    an output layer beside the embedding that it is tied to. No torch, no Megatron
dtypes.py         torch's dtypes by the names of safetensors
fusions.py        which fused kernels and which attention a model runs with
norms.py          norms of queries and keys over all heads
spec.py           the layers: Transformer Engine's, or Megatron's on plain torch with RMSNorm and packed attention
attention.py      attention over packed rows on plain torch, also under context parallelism
attention_blocks.py  the parts of it that no fused attention computes: blocks of queries, capped scores, sinks
latent_attention.py  multi-latent attention over packed rows
rotary.py         the rotary embedding of a built model; the layers with a window may have their own
routing.py        routing that is limited to groups of experts
shared_prompts.py what attention and rotary embedding need for rows in which a pair's prompt stands once
build.py          the TransformerConfig and the GPTModels of this rank
layer_limits.py   what the layers that a run asks for cannot compute
placement.py      the parameters of a built model, each with its entry of the weight table
load.py           Hugging Face weights -> the parameters of this rank
export.py         the parameters of all ranks -> a Hugging Face checkpoint
transformers_model.py  whole models of transformers on one device. No Megatron
"""

from __future__ import annotations
