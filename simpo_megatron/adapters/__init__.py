"""Low-rank adapters (LoRA) on a frozen base: PEFT's parametrisation on Megatron's layers. See README.md.

lora.py         the shape of an adapter, and its entries of the weight table. No torch, no Megatron
layer.py        the factors of one linear layer, and what they add to its output under tensor parallelism
dropout.py      which elements of the input of a layer dropout keeps
install.py      the factors on a built model: drawing or reading them, freezing the base, marking them for Megatron
merge.py        the base weights with the adapter added
merge_files.py  a base in files with an adapter added, and two adapters compared. No Megatron
export.py       the factors of all ranks -> one PEFT folder
peft_folder.py  PEFT's folder, read and written. No Megatron
peft_config.py  its adapter_config.json
joined_experts.py  the factors of experts as PEFT joins them with transformers 5. No Megatron
settings.py     the adapter that a run's settings ask for
"""

from __future__ import annotations
