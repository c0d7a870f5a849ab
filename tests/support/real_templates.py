"""Chat templates of model families as their checkpoints have them, over small vocabularies, and one conversation.

llama3    byte-level BPE; BOS once, before the first turn; turns are trimmed and end with <|eot_id|>
qwen2     byte-level BPE; no BOS; a system turn is added where there is none
mistral   sentencepiece-like Unigram; nothing between [/INST] and the answer; alternating roles only
zephyr    sentencepiece-like Unigram; the template is laid out over lines
phi3      byte-level BPE here; turns end with <|end|>, and a conversation with the tokenizer's EOS behind a newline
phi4      byte-level BPE; the turn of the user writes the header of the answer, with or without generation prompt
glm4      byte-level BPE; nothing ends an answer but the <|user|> of the next turn; the newline behind <|assistant|>
          belongs to the answer
gemma     sentencepiece-like BPE with bytes for unknown characters; answers belong to "model"; turns end with
          <end_of_turn>, which is not the tokenizer's EOS
olmo2     byte-level BPE; one token is BOS, which the template alone writes, and EOS, which only answers end with
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.toy_tokenizers import CORPUS, with_template


@dataclass(frozen=True)
class Family:
    """A chat template, and what it must make of one conversation.

    Attributes:
        base: name of the `toy` tokenizer with its vocabulary.
        template: the chat template.
        prompt: text of the prompt of QUESTION, REPLY and FINAL.
        chosen: text of the response ANSWER.
        eos_token_ids: tokens that end a turn besides the tokenizer's EOS.
    """

    base: str
    template: str
    prompt: str
    chosen: str
    eos_token_ids: tuple[str, ...] = ()


QUESTION, REPLY, FINAL, ANSWER = "What color is the sky?", "Which sky?", "The sky.", "It is blue.\n\nThank you"

FAMILIES = {
    "llama3": Family(
        "llama3",
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
        "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}"
        "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat color is the sky?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nWhich sky?<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nThe "
        "sky.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "It is blue.\n\nThank you<|eot_id|>",
    ),
    "qwen2": Family(
        "qwen",
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhat color is the "
        "sky?<|im_end|>\n"
        "<|im_start|>assistant\nWhich sky?<|im_end|>\n<|im_start|>user\nThe sky.<|im_end|>\n<|im_start|>assistant\n",
        "It is blue.\n\nThank you<|im_end|>",
    ),
    "mistral": Family(
        "mistral",
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
        "<s>[INST] What color is the sky? [/INST]Which sky?</s>[INST] The sky. [/INST]",
        "It is blue.\n\nThank you</s>",
    ),
    "zephyr": Family(
        "zephyr",
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
        "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
        "{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        "<s><|user|>\nWhat color is the sky?</s>\n<|assistant|>\nWhich sky?</s>\n<|user|>\nThe "
        "sky.</s>\n<|assistant|>\n",
        "It is blue.\n\nThank you</s>",
    ),
    "olmo2": Family(
        "olmo",
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ '<|assistant|>\n' + message['content'] + eos_token + ('' if loop.last else '\n') }}"
        "{% else %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "<|endoftext|><|user|>\nWhat color is the sky?\n<|assistant|>\nWhich sky?<|endoftext|>\n<|user|>\nThe sky.\n"
        "<|assistant|>\n",
        "It is blue.\n\nThank you<|endoftext|>",
    ),
    "phi3": Family(
        "phi",
        "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
        "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
        "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<|user|>\nWhat color is the sky?<|end|>\n<|assistant|>\nWhich sky?<|end|>\n<|user|>\nThe sky.<|end|>\n"
        "<|assistant|>\n",
        "It is blue.\n\nThank you<|end|>",
        ("<|end|>",),
    ),
    "phi4": Family(
        "qwen",
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] + '<|im_end|>' }}"
        "{% else %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}{% endfor %}",
        "<|im_start|>user<|im_sep|>What color is the sky?<|im_end|><|im_start|>assistant<|im_sep|>Which sky?<|im_end|>"
        "<|im_start|>user<|im_sep|>The sky.<|im_end|><|im_start|>assistant<|im_sep|>",
        "It is blue.\n\nThank you<|im_end|>",
    ),
    "glm4": Family(
        "phi",
        "[gMASK]<sop>{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "[gMASK]<sop><|user|>\nWhat color is the sky?<|assistant|>\nWhich sky?<|user|>\nThe sky.<|assistant|>",
        "\nIt is blue.\n\nThank you<|user|>",
        ("<|user|>",),
    ),
    "gemma": Family(
        "gemma",
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}"
        "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
        "{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
        "<bos><start_of_turn>user\nWhat color is the sky?<end_of_turn>\n<start_of_turn>model\nWhich sky?<end_of_turn>\n"
        "<start_of_turn>user\nThe sky.<end_of_turn>\n<start_of_turn>model\n",
        "It is blue.\n\nThank you<end_of_turn>",
        ("<end_of_turn>",),
    ),
}
LOSSLESS = ("llama3", "qwen2", "gemma", "olmo2")  # families whose vocabulary can write any text


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the family; callers must not change it."""
    family = FAMILIES[name]
    return _gemma(family.template) if family.base == "gemma" else with_template(family.base, family.template)


def ends_of(name: str) -> list[int]:
    """The ids of generation_config.json that end a turn besides the tokenizer's EOS."""
    return [tokenizer_of(name).convert_tokens_to_ids(token) for token in FAMILIES[name].eos_token_ids]


def _gemma(template: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    special += [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", chat_template=template
    )
