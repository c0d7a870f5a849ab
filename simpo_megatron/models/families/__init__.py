"""The families: what each adds to `dense.py` or `moe.py`, and the registry that finds them.

registry.py   the list of families; finds the family of a config.json, and of Megatron-LM's arguments
dense.py      what the dense families share: RMSNorm, grouped-query attention with RoPE, SwiGLU
biases.py     `attention_bias` and `mlp_bias`
windows.py    sliding windows of some layers
moe.py        what the mixture-of-experts families share: router and experts
routed.py     what DeepSeek and GLM-4.5 share: dense layers first, shared experts, groups of experts
latent.py     what DeepSeek-V2 and V3 share: multi-latent attention
deepseek_v2.py  DeepSeek-V2 and V2-Lite
deepseek_v3.py  DeepSeek-V3 and R1
gemma2.py     Gemma-2, and what Gemma-3 shares with it
gemma3.py     the text models of Gemma-3
glm.py        GLM-4
glm4_moe.py   GLM-4.5 and GLM-4.5-Air
gpt_oss.py    gpt-oss
llama.py      Llama 2, 3, 3.1, 3.2
mistral.py    Mistral, with its optional sliding window; Ministral, with one in some layers
mixtral.py    Mixtral
olmo2.py      OLMo-2
olmo3.py      OLMo-3: windows, and two rotary embeddings
phi3.py       Phi-3, Phi-3.5 and Phi-4
qwen2.py      Qwen2 and Qwen2.5
qwen3.py      Qwen3, dense
qwen3_moe.py  Qwen3 with experts
"""

from __future__ import annotations
