"""The text side of a checkpoint: its tokenizer, the ids that end an answer, and the system prompt of the conversation."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from fastvlm_edge.convert.checkpoint.chat_template import SYSTEM_PROMPT, read_system_prompt
from fastvlm_edge.convert.checkpoint.checkpoint import Checkpoint
from fastvlm_edge.convert.checkpoint.files import read_json, read_optional_json, refuse_lfs_pointer
from fastvlm_edge.errors import FastVLMError

IMAGE_TOKEN = "<image>"
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
PROMPT_TOKENS = ("<|im_start|>", "<|im_end|>")
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Qwen2 splits text before byte-level BPE: the same in every tokenizer.json of Qwen2."""


@dataclass(frozen=True)
class TextAssets:
    """The text side of a model directory: tokenizer, special ids and system prompt."""

    tokenizer: Tokenizer
    stop_ids: list[int]
    """Ids that end an answer, sorted."""
    token_count: int
    """Number of ids that may be sampled: larger ones are padding rows of the embedding or the image token."""
    image_token_id: int | None
    """The id of the image token, which is never sampled. It is below `token_count` only in unusual vocabularies."""
    system_prompt: str = SYSTEM_PROMPT
    source: Path | None = field(default=None, repr=False)
    """The checkpoint's tokenizer.json if it can be copied unchanged."""
    notes: list[str] = field(default_factory=list)
    """What the files of the tokenizer contradict or have in vain, and what was used."""

    def write_tokenizer(self, path: Path) -> None:
        """Write `tokenizer.json`: a copy of the checkpoint's own file if it has one, otherwise the tokenizer built from its parts."""
        if self.source is not None:
            shutil.copyfile(self.source, path)
        else:
            self.tokenizer.save(str(path), pretty=False)


def read_text(checkpoint: Checkpoint) -> TextAssets:
    """Read the tokenizer and the special ids of a checkpoint.

    Raises FastVLMError if the tokenizer is missing or damaged, if it lacks the tokens of a conversation, or if an id has no row in the
    embedding.
    """
    directory, vocab = checkpoint.directory, checkpoint.text.vocab
    path = directory / "tokenizer.json"
    tokenizer = read_tokenizer(directory)
    source = path if path.is_file() and tokenizer.truncation is None and tokenizer.padding is None else None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for token in PROMPT_TOKENS:
        if tokenizer.token_to_id(token) is None:
            raise FastVLMError(
                f"the tokenizer of {directory} has no token {token}, which every FastVLM conversation needs",
                "use the tokenizer files that came with the checkpoint",
            )
    notes: list[str] = []
    named = tokenizer.token_to_id(IMAGE_TOKEN)
    image = named if checkpoint.image_token_id is None else checkpoint.image_token_id
    if named not in (None, image):
        notes.append(f"config.json gives {image} for the image token, but the tokenizer gives {IMAGE_TOKEN} the id {named}: used {image}")
    ids = tokenizer.get_vocab(with_added_tokens=True)
    token, largest = max(ids.items(), key=lambda item: item[1])
    if largest >= vocab:
        raise FastVLMError(
            f"the tokenizer of {directory} gives {token!r} the id {largest}, but the embedding has only {vocab} rows",
            "use the tokenizer files that came with the checkpoint",
        )
    stops = {*checkpoint.eos_ids, *(number for name in STOP_TOKENS if (number := tokenizer.token_to_id(name)) is not None)}
    if max(stops) >= vocab:
        raise FastVLMError(
            f"{directory} has the end-of-sequence id {max(stops)}, but the embedding has only {vocab} rows", "correct eos_token_id"
        )
    count = 1 + max(number for number in ids.values() if number != image)
    system = read_system_prompt(directory, notes)
    return TextAssets(tokenizer, sorted(stops), count, image, system, source, notes)


def read_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint, from `tokenizer.json`, or from `vocab.json` and `merges.txt` if there is none.

    Raises FastVLMError if a file is missing or damaged.
    """
    path = directory / "tokenizer.json"
    if path.is_file():
        refuse_lfs_pointer(path)
        try:
            tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises plain Exception
            if not isinstance(read_json(path).get("model"), dict):
                raise FastVLMError(f"{path} is damaged ({error})", "copy or download it again") from None
            raise FastVLMError(
                f"{path} cannot be read by tokenizers {tokenizers.__version__}, so a newer version has probably written it ({error})",
                "run: pip install --upgrade tokenizers",
            ) from None
        return tokenizer
    missing = [name for name in ("vocab.json", "merges.txt") if not (directory / name).is_file()]
    if missing:
        raise FastVLMError(
            f"{directory} has no tokenizer: neither tokenizer.json nor {' and '.join(missing)}",
            "copy these files from the model that the checkpoint was trained from",
        )
    return build_tokenizer(directory)


def build_tokenizer(directory: Path) -> Tokenizer:
    """Qwen2's byte-level BPE from `vocab.json`, `merges.txt` and the added tokens of `added_tokens.json` or `tokenizer_config.json`."""
    vocab = read_json(directory / "vocab.json")
    refuse_lfs_pointer(directory / "merges.txt")
    try:
        lines = (directory / "merges.txt").read_text(encoding="utf-8").split("\n")
    except ValueError as error:
        raise FastVLMError(f"{directory / 'merges.txt'} is damaged ({error})", "copy or download it again") from None
    if lines[0].startswith("#version"):
        del lines[0]
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines) if left]
    try:
        tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise FastVLMError(f"vocab.json and merges.txt of {directory} do not fit together ({error})", "download both again") from None
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    for number, token in sorted(_added_tokens(directory).items()):
        tokenizer.add_special_tokens([token]) if token.special else tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != number:
            raise FastVLMError(
                f"the added token {token.content!r} of {directory} should have the id {number}, "
                f"but the vocabulary gives it the id {tokenizer.token_to_id(token.content)}",
                "use the tokenizer files that came with the checkpoint",
            )
    return tokenizer


def _added_tokens(directory: Path) -> dict[int, AddedToken]:
    """Id -> token, with the flags of `tokenizer_config.json`; `added_tokens.json` has only names and ids."""
    found: dict[int, AddedToken] = {}
    try:
        for content, number in read_optional_json(directory / "added_tokens.json").items():
            found[int(number)] = AddedToken(content, special=True, normalized=False)
        decoder: dict[str, Any] = read_optional_json(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}
        for key, token in decoder.items():
            flags = {flag: bool(token.get(flag, False)) for flag in ("special", "lstrip", "rstrip", "single_word", "normalized")}
            found[int(key)] = AddedToken(token["content"], **flags)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FastVLMError(
            f"the added tokens of {directory} are damaged ({error})", "download tokenizer_config.json and added_tokens.json again"
        ) from None
    return found
