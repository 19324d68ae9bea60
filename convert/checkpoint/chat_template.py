"""The chat template of a checkpoint: which system text it opens a conversation with, and whether it writes FastVLM's conversation.

A template is a Jinja document. It is rendered once, for one question, in Jinja's sandbox, as transformers does it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastvlm_edge.convert.checkpoint.files import read_optional_json, refuse_lfs_pointer
from fastvlm_edge.errors import FastVLMError

SYSTEM_PROMPT = "You are a helpful assistant."
QUESTION = "What is this?"
CONTENTS: tuple[Any, ...] = (f"<image>\n{QUESTION}", [{"type": "image"}, {"type": "text", "text": QUESTION}])
"""A question with a picture, as templates of text models take it and as those of transformers' processors do."""
CONVERSATION = re.compile(
    r"(?:<\|im_start\|>system\n(?P<system>(?:(?!<\|im_).)+)<\|im_end\|>\n)?"
    rf"<\|im_start\|>user\n<image>\n{re.escape(QUESTION)}<\|im_end\|>\n<\|im_start\|>assistant\n",
    re.DOTALL,
)
SHOWN = 120


def read_system_prompt(directory: Path, notes: list[str]) -> str:
    """The system text of the chat template, empty if the template has no system part; FastVLM's own without a template.

    Adds a note if the text is not FastVLM's, or if the template writes another conversation than FastVLM's `qwen_2`, which is then used all
    the same. Raises FastVLMError if a file is damaged.
    """
    template = _read_template(directory)
    if template is None:
        return SYSTEM_PROMPT
    rendered: list[str] = []
    failure = ""
    for content in CONTENTS:
        try:
            text = _render(template, content)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
            failure = f"cannot be rendered ({type(error).__name__}: {error})".replace("\n", " ")
            continue
        match = CONVERSATION.fullmatch(text)
        if match:
            system = match["system"] or ""
            if not system:
                notes.append("the chat template has no system text: conversations begin without one")
            elif system != SYSTEM_PROMPT:
                notes.append(f"the chat template has the system text {system!r}: used it")
            return system
        rendered.append(text)
    what = f"writes another conversation ({rendered[0][:SHOWN]!r})" if rendered else failure
    notes.append(f"the chat template {what}: ignored it, conversations are those of FastVLM, with the system text {SYSTEM_PROMPT!r}")
    return SYSTEM_PROMPT


def _read_template(directory: Path) -> str | None:
    """The template, from where transformers looks for it: `chat_template.jinja`, `chat_template.json`, `tokenizer_config.json`."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        refuse_lfs_pointer(path)
        try:
            return path.read_text(encoding="utf-8")
        except ValueError as error:
            raise FastVLMError(f"{path} is damaged ({error})", "copy or download it again") from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_optional_json(directory / name).get("chat_template")
        if isinstance(template, list):  # several with names
            named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return template
    return None


def _render(template: str, content: Any) -> str:
    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = raise_exception
    messages = [{"role": "user", "content": content}]
    return environment.from_string(template).render(
        messages=messages, add_generation_prompt=True, bos_token="", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
