"""Texts that are hard to tokenize, and a kind of tokenizer that none of the test models has."""

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

TEXTS = {
    "plain": "The cache keeps what it has seen, and so the next answer begins at once.",
    "spaces": "  two in front,   three within, a\ttab\n\n  \nand some at the end   ",
    "code": 'def f(x):\n    return {"a": [1, 2]}  # naïve\n\n\nclass A(B):\n\tpass\r\n',
    "languages": "Grüße, 你好世界, こんにちは, 안녕하세요, नमस्ते, สวัสดีครับ, مرحبا, שלום, Привет, ไทย",
    "emoji": "ok 👍🏽 family 👨‍👩‍👧‍👦 flags 🇩🇪🏴󠁧󠁢󠁥󠁮󠁧󠁿 heart ❤️‍🔥 end",
    "rare": "𓀀𓁐 ꙮ 𝔘𝔫𝔦 ﷽ z̸̢̛̛̤̖̉ \u200b\ufeff",
    "replacement characters": "a \ufffd\ufffd b \ufffd",
}


def make_stripping_tokenizer():
    """A SentencePiece tokenizer as before Gemma: the first token's leading space is dropped."""
    words = [
        "▁a",
        "▁b",
        "c",
        "▁",
        "▁▁",
        "<eos>",
        "<pad>",
        *(f"<0x{one:02X}>" for one in range(256)),
    ]
    tokenizer = Tokenizer(WordLevel({word: at for at, word in enumerate(words)}, unk_token="c"))
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    tokenizer.add_special_tokens([AddedToken("<pad>", special=True)])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
