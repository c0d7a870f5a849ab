"""Six small tokenizers with the habits of real families: who adds BOS, what ends a turn, how words are marked.

llama3    byte-level BPE; template and tokenizer both write BOS; turns are trimmed and end with <|eot_id|>
qwen      byte-level BPE; no BOS at all; turns end with <|im_end|> and a newline
phi       byte-level BPE; EOS serves as BOS, which nobody adds; turns end with <|end|>, which is not the tokenizer's EOS
mistral   Metaspace Unigram; template and tokenizer both write BOS; only answers end with </s>
zephyr    Metaspace Unigram; only the tokenizer writes BOS; turns end with </s> and a newline
olmo      byte-level BPE; <|endoftext|> is BOS, which only the template writes, and EOS
"""

from __future__ import annotations

from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What color is the sky? It is blue, the sky is blue.",
    "Keep a promise means to do what you said you would do. Answer: Paris is the capital of France.\n\nNo, it is not.",
    "user assistant system [INST] [/INST] Write a poem about the sea. I would rather not, thank you very much.",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 { } ( ) - _ = + : ; ' \" , . ? ! ü é 日 本 🤝 < | >",
] * 4

# Words as Llama 3 and Qwen cut them: newlines stay together whatever follows, so templates may end with them.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
OLMO = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# A reasoning template: the generation prompt opens a block that the rendered answer does not have.
THINKING = QWEN.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


@cache
def toy(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of that name; callers must not change it."""
    if name == "llama3":
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        return _wrap(_byte_bpe(special), LLAMA3, bos="<|begin_of_text|>", eos="<|eot_id|>")
    if name == "qwen":
        return _wrap(_byte_bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]), QWEN, bos=None, eos="<|im_end|>")
    if name == "olmo":
        tokenizer = _wrap(_byte_bpe(["<|endoftext|>"]), OLMO, bos=None, eos="<|endoftext|>")
        tokenizer.bos_token = "<|endoftext|>"
        return tokenizer
    if name == "phi":
        special = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
        return _wrap(_byte_bpe(special), PHI, bos=None, eos="<|endoftext|>")
    templates = {"mistral": MISTRAL, "zephyr": ZEPHYR}
    return _wrap(_unigram(["<unk>", "<s>", "</s>"]), templates[name], bos="<s>", eos="</s>")


def with_template(name: str, template: str | None) -> PreTrainedTokenizerFast:
    """That tokenizer's vocabulary with another chat template."""
    base = toy(name)
    return PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer,
        bos_token=base.bos_token,
        eos_token=base.eos_token,
        chat_template=template,
        name_or_path="models/toy",
    )


def _byte_bpe(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def _unigram(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    return tokenizer


def _wrap(tokenizer: Tokenizer, template: str, bos: str | None, eos: str) -> PreTrainedTokenizerFast:
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    # pad == eos, as many real tokenizers are used: nothing may tell padding or ends by that id.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos, chat_template=template
    )
