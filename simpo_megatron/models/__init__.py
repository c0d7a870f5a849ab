"""Hugging Face checkpoints as Megatron-Core models: one file a family, loading, and the way back.

hf.py        reads a checkpoint directory: config, tensor names and shapes. No torch, no Megatron
family.py    what a family is: its transformer arguments and its weight table. No torch, no Megatron
llama.py mistral.py qwen2.py qwen3.py, on dense.py, listed in registry.py: the families
rope.py      rotary embeddings as the config states them
spec.py      Megatron's layers on plain torch: RMSNorm and packed attention
build.py     the TransformerConfig and the GPTModels of this rank
place.py     the parameters of a built model and their rows of the weight table
layout.py    Hugging Face tensors <-> one rank's Megatron parameter
load.py      Hugging Face weights -> the parameters of this rank
forward_check.py  a converted checkpoint against its source in fp32, layer by layer
export.py    the parameters of all ranks -> a Hugging Face checkpoint
"""
