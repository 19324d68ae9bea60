"""The demo's byte-level BPE tokenizer, its prompt, and token rows for training.

The tokenizer has a few hundred tokens: 256 bytes, the words of the prompts and four special tokens. Digits and capital letters never merge,
so answers are spelled character by character.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.demo_training.drawing.picture import Question
from examples.demo_training.scenes import make_scene

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
SYSTEM_PROMPT = "You are a helpful assistant."
BEFORE_IMAGE = f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n"
AFTER_IMAGE = "\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
ANSWER_END = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n" + SYSTEM_PROMPT + "<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A space belongs to the word after it; capitals, digits and line ends are separate pieces.
PIECES = r"[A-Z0-9]| ?[a-z]+|\n| ?[^\sa-zA-Z0-9]|\s"
IGNORE = -100


def build_tokenizer(vocab: int, *, pictures: int = 3000) -> Tokenizer:
    """Train the tokenizer on the prompts and answers of `pictures` training scenes and on the chat template; at most `vocab` ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_training_text(pictures), trainer)
    return tokenizer


def _training_text(pictures: int) -> Iterable[str]:
    for index in range(pictures):
        # The picture itself is not needed: the smallest allowed one is quick to draw.
        for question in make_scene("train", 0, index, size=64, questions=4).questions:
            yield f"system\n{SYSTEM_PROMPT}\nuser\n\n{question.prompt}\nassistant\n{question.answer}"


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, context: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": context,
        "padding_side": "left",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "image_token": "<image>",
        "extra_special_tokens": {"image_token": "<image>"},
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class Prompter:
    """Token ids of prompts and answers, encoded as in the runtime: the texts before and after `<image>` separately, no token added."""

    def __init__(self, tokenizer: Tokenizer, visual_tokens: int) -> None:
        self.tokenizer = tokenizer
        end_id = tokenizer.token_to_id(ANSWER_END)
        assert end_id is not None
        self.end_id = end_id
        self.beginning = [*self._encode(BEFORE_IMAGE), *(-1 - k for k in range(visual_tokens))]
        self._cache: dict[str, list[int]] = {}

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def prompt(self, prompt: str) -> list[int]:
        """Ids after the picture, up to where the answer starts."""
        if prompt not in self._cache:
            self._cache[prompt] = self._encode(AFTER_IMAGE.format(prompt=prompt))
        return self._cache[prompt]

    def answer(self, answer: str) -> list[int]:
        return [*self._encode(answer), self.end_id]

    def pack(self, questions: Sequence[Question]) -> npt.NDArray[np.int64]:
        """One row for all questions about a picture, [4, length] int64: ids, positions, question number, labels.

        Ids below zero are visual tokens. Each question continues from the shared beginning as if it were alone.
        """
        begin = len(self.beginning)
        ids, positions, number, labels = [*self.beginning], list(range(begin)), [0] * begin, [IGNORE] * begin
        for index, question in enumerate(questions, start=1):
            prompt, answer = self.prompt(question.prompt), self.answer(question.answer)
            ids += [*prompt, *answer[:-1]]
            length = len(prompt) + len(answer) - 1
            positions += range(begin, begin + length)
            number += [index] * length
            labels += [IGNORE] * (len(prompt) - 1) + answer
        return np.array([ids, positions, number, labels], dtype=np.int64)


def stack_rows(rows: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Pad packed rows to one length: [rows, 4, length]."""
    length = max(row.shape[1] for row in rows)
    length = -(-length // 8) * 8
    out = np.empty((len(rows), 4, length), dtype=np.int64)
    out[:] = np.array([0, 0, -1, IGNORE])[None, :, None]
    for row, target in zip(rows, out, strict=True):
        target[:, : row.shape[1]] = row
    return out
