"""Fields of OpenAI's that nothing here serves: refused, unless their value asks for nothing."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationInfo
from pydantic_core import PydanticCustomError

from prefixstore.server.errors import UNSUPPORTED

# By name, the values that ask for nothing.
UNSERVED_OF_BOTH: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
}
UNSERVED_OF_CHAT: dict[str, tuple[Any, ...]] = {
    **UNSERVED_OF_BOTH,
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
UNSERVED_OF_COMPLETIONS: dict[str, tuple[Any, ...]] = {
    **UNSERVED_OF_BOTH,
    "best_of": (1,),
    "suffix": ("",),
}


def check_unserved(value: Any, info: ValidationInfo, neutral: dict[str, tuple[Any, ...]]) -> Any:
    """`value`, if it asks for nothing."""
    assert info.field_name is not None
    allowed = neutral[info.field_name]
    if value is None or any(type(value) in (type(x), float) and value == x for x in allowed):
        return value
    raise PydanticCustomError(UNSUPPORTED, "not served; leave it out")
