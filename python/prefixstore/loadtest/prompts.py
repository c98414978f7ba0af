"""The forms in which a conversation is sent: chat messages, text, or token ids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefixstore.errors import ConfigError
from prefixstore.loadtest.workloads import Message

ENDPOINTS = ("chat", "completions", "token-ids")

# The path below the server's URL, and the part of the body that says what to answer.
MakePrompt = Callable[[list[Message]], tuple[str, dict[str, Any]]]


def make_prompts(endpoint: str, tokenizer: Any = None) -> MakePrompt:
    """How conversations are sent.

    Args:
        endpoint: One of ENDPOINTS. "chat" leaves the chat template to the server; with the others
            servers whose templates differ get the same text, or the same tokens.
        tokenizer: A Hugging Face tokenizer with a chat template. Without one text is in ChatML.

    Raises:
        ConfigError: If token ids are asked for without a tokenizer.
    """
    if endpoint == "chat":
        return lambda messages: ("/chat/completions", {"messages": messages})
    if endpoint == "completions":
        render = _template_of(tokenizer) if tokenizer is not None else render_chatml
        return lambda messages: ("/completions", {"prompt": render(messages)})
    if tokenizer is None:
        raise ConfigError("endpoint: expected --tokenizer beside token-ids, got none")
    render = _template_of(tokenizer)
    return lambda messages: (
        "/completions",
        {"prompt": tokenizer(render(messages), add_special_tokens=False)["input_ids"]},
    )


def render_chatml(messages: list[Message]) -> str:
    """Messages and the beginning of an answer in ChatML, as SmolLM2 and Qwen read them."""
    turns = (f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in messages)
    return "".join(turns) + "<|im_start|>assistant\n"


def load_tokenizer(path: Path) -> Any:
    """A tokenizer from the folder of a transformers model.

    Raises:
        ConfigError: If there is none, or it has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer: expected a model's folder, got {path} ({error})") from error
    if tokenizer.chat_template is None:
        raise ConfigError(f"tokenizer: expected one with a chat template, got {path}")
    return tokenizer


def _template_of(tokenizer: Any) -> Callable[[list[Message]], str]:
    def render(messages: list[Message]) -> str:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return text

    return render
