"""A small chat model with random weights and its tokenizer, made on the spot: no model hub."""

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 384
SPECIALS = ("<|end|>", "<|start|>", "<|pad|>")
# Refuses roles out of turn, as real templates do.
TEMPLATE = """{% for message in messages %}\
{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\
{{ '<|start|>' + message.role + '\n' + message.content + '<|end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""
TEXT = """A block is sixteen tokens of all layers. The pool keeps blocks, the tiers keep records.
What was computed once is not computed again, if it can be found, and read, and is right.
""".splitlines()


@cache
def chat_tokenizer():
    """A byte-level BPE with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", bos_token="<|start|>"
    )
    made.add_special_tokens({"additional_special_tokens": list(SPECIALS)})
    made.chat_template = TEMPLATE
    return made


def chat_model():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        eos_token_id=0,
        bos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()
