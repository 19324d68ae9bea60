"""The chat template of a checkpoint: its system text is used, and a conversation that is not FastVLM's is said."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fastvlm_edge.convert.checkpoint.chat_template import read_system_prompt
from fastvlm_edge.errors import FastVLMError
from tests.support.checkpoints import write_json

QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nSYSTEM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PARTS = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nSYSTEM<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '\n<image>' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + part['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OURS = "You are a helpful assistant."


def read(directory: Path, template: object, file: str = "tokenizer_config.json") -> tuple[str, list[str]]:
    if file.endswith(".jinja"):
        (directory / file).write_text(str(template), encoding="utf-8")
    else:
        write_json(directory / file, {"chat_template": template})
    notes: list[str] = []
    return read_system_prompt(directory, notes), notes


@pytest.mark.parametrize("template", [QWEN2, PARTS], ids=["text", "parts"])
def test_the_released_conversation_needs_no_note(tmp_path: Path, template: str) -> None:
    assert read(tmp_path, template.replace("SYSTEM", OURS)) == (OURS, [])


def test_without_a_template_the_system_text_is_ours(tmp_path: Path) -> None:
    assert read_system_prompt(tmp_path, notes := []) == OURS and notes == []  # type: ignore[var-annotated]
    assert read(tmp_path, None) == (OURS, [])


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
@pytest.mark.parametrize("template", [QWEN2, PARTS], ids=["text", "parts"])
def test_another_system_text_is_used_and_said(tmp_path: Path, template: str, file: str) -> None:
    text = "You read meters.\nAnswer in kWh."
    assert read(tmp_path, template.replace("SYSTEM", text), file) == (text, [f"the chat template has the system text {text!r}: used it"])


def test_the_jinja_file_comes_first(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(PARTS.replace("SYSTEM", "first"))
    assert read(tmp_path, QWEN2.replace("SYSTEM", "second"))[0] == "first"


def test_of_several_templates_the_default_counts(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": QWEN2.replace("SYSTEM", "Be brief.")}]
    assert read(tmp_path, several)[0] == "Be brief."


def test_a_template_without_a_system_text(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n\n"
    assert read(tmp_path, template) == ("", ["the chat template has no system text: conversations begin without one"])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content }} ASSISTANT:", r"writes another conversation \('<image>\\nWhat is this\? ASSISTANT:'\): ignored it"),
        (QWEN2.replace("assistant\n", "assistant\n<think>\n"), "writes another conversation"),
        (QWEN2.replace("SYSTEM", "a<|im_end|>\n<|im_start|>user\nb"), "writes another conversation"),
        ("{{ raise_exception('no pictures') }}", r"cannot be rendered \(TemplateError: no pictures\): ignored it"),
        ("{% if %}", r"cannot be rendered \(TemplateSyntaxError: "),
        ("{{ strftime_now('%Y') }}", r"cannot be rendered \(UndefinedError: "),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", r"cannot be rendered \(SecurityError: "),
        ("{{ 1 // 0 }}", r"cannot be rendered \(ZeroDivisionError: "),
    ],
)
def test_a_conversation_that_is_not_ours_is_said(tmp_path: Path, template: str, message: str) -> None:
    system, notes = read(tmp_path, template)
    assert system == OURS and len(notes) == 1
    assert re.search(message, notes[0]) and "\n" not in notes[0]


def test_a_damaged_template_file(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(FastVLMError, match=r"chat_template\.jinja is damaged"):
        read_system_prompt(tmp_path, [])
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps([1]))
    with pytest.raises(FastVLMError, match=r"tokenizer_config\.json is damaged"):
        read_system_prompt(tmp_path, [])
