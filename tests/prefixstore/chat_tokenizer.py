"""A byte-level BPE tokenizer with a chat template, made on the spot: no files, no model hub."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 384
SPECIALS = ("<|end|>", "<|start|>", "<|pad|>")
# Refuses what real templates refuse: roles out of turn.
TEMPLATE = """{% for message in messages %}\
{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\
{{ '<|start|>' + message.role + '\n' + message.content + '<|end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""
TEXT = """A block is sixteen tokens of all layers. The pool keeps blocks, the tiers keep records.
What was computed once is not computed again, if it can be found, and read, and is right.
""".splitlines()


@cache
def chat_tokenizer() -> PreTrainedTokenizerFast:
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
