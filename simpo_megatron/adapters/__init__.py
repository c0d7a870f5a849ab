"""Low-rank adapters (LoRA) on a frozen base: PEFT's parametrisation on Megatron's layers. See README.md.

lora.py         the shape of an adapter, and its entries of the weight table. No torch, no Megatron
layer.py        the factors of one linear layer, and what they add to its output under tensor parallelism
install.py      the factors on a built model: drawing or reading them, freezing the base, marking them for Megatron
merge.py        the base weights with the adapter added
merge_files.py  a base in files with an adapter added, and two adapters compared. No Megatron
export.py       the factors of all ranks -> one PEFT folder
peft_folder.py  PEFT's folder: adapter_config.json and adapter_model.safetensors, read and written. No Megatron
joined_experts.py  the factors of experts as PEFT joins them with transformers 5. No Megatron
settings.py     the adapter that a run's settings ask for
"""

from __future__ import annotations
