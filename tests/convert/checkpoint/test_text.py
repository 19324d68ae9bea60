"""The tokenizer of a checkpoint equals transformers' Qwen2 tokenizer, and the special ids are right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from fastvlm_edge.convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_edge.convert.checkpoint.text import TextAssets, read_text
from fastvlm_edge.errors import FastVLMError
from tests.support.checkpoints import write_checkpoint, write_json

TEXTS = [
    "What does the meter read?",
    "I'll say it's 12,345.67 kWh -- don't you THINK'S so?",
    "  two  spaces,\ttabs\r\nand\n\n\nlines   \n ",
    "caf\u00e9 cafe\u0301 \u2126 \u00e5ngstr\u00f6m na\u00efve",
    "日本語の計器 и русский текст ١٢٣ 👩‍🔧🏭",
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
    "a<|im_end|>b<|endoftext|> <|im_nothing|>",
    "x=[{'a': 1}];//comment\n\tif(x){}",
    "",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("text")
    return {form: write_checkpoint(base / form, tokenizer=form) for form in ("json", "vocab")}


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def read(directory: Path) -> TextAssets:
    return read_text(open_checkpoint(str(directory)))


def refuse(directory: Path, message: str) -> None:
    with pytest.raises(FastVLMError, match=message):
        read(directory)


@pytest.mark.parametrize("form", ["json", "vocab"])
def test_ids_equal_those_of_the_transformers_tokenizer(folders: dict[str, Path], form: str) -> None:
    from transformers import AddedToken, Qwen2Tokenizer

    vocabulary = json.loads((folders["vocab"] / "vocab.json").read_text(encoding="utf-8"))
    merges: Any = [tuple(line.split(" ")) for line in (folders["vocab"] / "merges.txt").read_text(encoding="utf-8").split("\n")[1:] if line]
    reference = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    reference.add_tokens([AddedToken(token, special=True) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    ours = read(folders[form]).tokenizer
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == reference(text, add_special_tokens=False)["input_ids"], text
        assert ours.decode(ids, skip_special_tokens=False) == reference.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def test_both_forms_give_the_same_tokenizer(folders: dict[str, Path]) -> None:
    one, other = read(folders["json"]), read(folders["vocab"])
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    assert all(one.tokenizer.encode(text).ids == other.tokenizer.encode(text).ids for text in TEXTS)
    assert (one.stop_ids, one.token_count, one.image_token_id) == (other.stop_ids, other.token_count, other.image_token_id)


def test_special_ids_of_the_apple_layout(folders: dict[str, Path]) -> None:
    text = read(folders["json"])
    assert (text.stop_ids, text.token_count, text.image_token_id) == ([512, 514], 515, None)
    assert text.system_prompt == "You are a helpful assistant."


def test_the_image_token_of_the_native_layout_is_not_counted(tmp_path: Path) -> None:
    text = read(write_checkpoint(tmp_path / "model", layout="native"))
    assert (text.image_token_id, text.token_count) == (515, 515)
    assert text.tokenizer.token_to_id("<image>") == 515


def test_an_image_token_below_other_tokens_leaves_the_count_alone(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", layout="native")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_tokens(["later"])
    tokenizer.save(str(directory / "tokenizer.json"))
    text = read(directory)
    assert (text.image_token_id, text.token_count) == (515, 517)


def test_extra_stop_ids_come_from_the_configs(tmp_path: Path, folders: dict[str, Path]) -> None:
    directory = copy(folders["json"], tmp_path / "model")
    write_json(directory / "generation_config.json", {"eos_token_id": [3, 514]})
    assert read(directory).stop_ids == [3, 512, 514]
    write_json(directory / "generation_config.json", {"eos_token_id": 640})
    refuse(directory, "end-of-sequence id 640, but the embedding has only 640 rows")


def test_the_file_of_the_checkpoint_is_written_as_it_is(tmp_path: Path, folders: dict[str, Path]) -> None:
    read(folders["json"]).write_tokenizer(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == (folders["json"] / "tokenizer.json").read_bytes()
    text = read(folders["vocab"])
    text.write_tokenizer(tmp_path / "built.json")
    again = Tokenizer.from_file(str(tmp_path / "built.json"))
    assert all(again.encode(line).ids == text.tokenizer.encode(line).ids for line in TEXTS)


def test_truncation_and_padding_are_taken_out(tmp_path: Path, folders: dict[str, Path]) -> None:
    directory = copy(folders["json"], tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(directory / "tokenizer.json"))
    text = read(directory)
    text.write_tokenizer(tmp_path / "tokenizer.json")
    for kept in (text.tokenizer, Tokenizer.from_file(str(tmp_path / "tokenizer.json"))):
        assert kept.encode(TEXTS[0]).ids == read(folders["json"]).tokenizer.encode(TEXTS[0]).ids


def test_a_merge_that_starts_with_a_hash_is_not_a_comment(tmp_path: Path, folders: dict[str, Path]) -> None:
    directory = copy(folders["vocab"], tmp_path / "model")
    vocabulary = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
    victim = next(token for token, number in vocabulary.items() if number == 511)
    vocabulary["##"] = vocabulary.pop(victim)
    merges = (directory / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line for line in merges if line.replace(" ", "") != victim and victim not in line.split(" ")]
    (directory / "merges.txt").write_text("\n".join([*merges[:1], "# #", *merges[1:]]), encoding="utf-8")
    (directory / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    assert read(directory).tokenizer.encode("##").ids == [511]


def test_what_is_wrong_with_a_tokenizer_is_named(tmp_path: Path, folders: dict[str, Path]) -> None:
    directory = copy(folders["json"], tmp_path / "json")
    (directory / "tokenizer.json").write_text("{")
    refuse(directory, r"tokenizer\.json is damaged")
    (directory / "tokenizer.json").unlink()
    refuse(directory, r"no tokenizer: neither tokenizer\.json nor vocab\.json and merges\.txt")
    directory = copy(folders["vocab"], tmp_path / "vocab")
    (directory / "merges.txt").write_text("#version: 0.2\nnot there\n")
    refuse(directory, r"vocab\.json and merges\.txt .* do not fit together")


def test_a_tokenizer_of_a_newer_version_is_not_called_damaged(tmp_path: Path, folders: dict[str, Path]) -> None:
    directory = copy(folders["json"], tmp_path / "model")
    path = directory / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["pre_tokenizer"] = {"type": "SplitOfTomorrow"}
    write_json(path, document)
    refuse(directory, r"tokenizer\.json cannot be read by tokenizers \d.*newer version.*; run: pip install --upgrade tokenizers")
    write_json(path, {"version": "1.0"})
    refuse(directory, r"tokenizer\.json is damaged")


def test_an_image_token_that_the_tokenizer_contradicts_is_said(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", layout="native")
    config = json.loads((directory / "config.json").read_text()) | {"image_token_index": 600}
    write_json(directory / "config.json", config)
    text = read(directory)
    assert text.image_token_id == 600
    assert text.notes == ["config.json gives 600 for the image token, but the tokenizer gives <image> the id 515: used 600"]


def test_the_system_text_of_the_chat_template_is_used(tmp_path: Path, folders: dict[str, Path]) -> None:
    directory = copy(folders["json"], tmp_path / "model")
    (directory / "chat_template.jinja").write_text(
        "<|im_start|>system\nBe brief.<|im_end|>\n{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n\n"
    )
    text = read(directory)
    assert (text.system_prompt, text.notes) == ("Be brief.", ["the chat template has the system text 'Be brief.': used it"])


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"<|endoftext|>": 512, "<|im_start|>": 513}, r"no token <\|im_end\|>"),
        (
            {"<|endoftext|>": 520, "<|im_start|>": 521, "<|im_end|>": 522},
            r"'<\|endoftext\|>' .* should have the id 520, but the vocabulary gives it the id 512",
        ),
        (
            {"<|endoftext|>": 512, "<|im_start|>": 513, "<|im_end|>": 514, **{f"<{n}>": 515 + n for n in range(126)}},
            "'<125>' the id 640, but the embedding has only 640 rows",
        ),
        ({"<|endoftext|>": "x"}, "added tokens of .* are damaged"),
    ],
)
def test_added_tokens_that_do_not_fit(tmp_path: Path, folders: dict[str, Path], added: dict[str, Any], message: str) -> None:
    directory = copy(folders["vocab"], tmp_path / "model")
    (directory / "tokenizer_config.json").unlink()
    write_json(directory / "added_tokens.json", added)
    refuse(directory, message)


def test_a_full_size_vocabulary_has_the_released_ids(tmp_path: Path) -> None:
    from tests.support.checkpoints import write_tokenizer

    write_tokenizer(tmp_path, 151643, native=True, form="json")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
    assert [tokenizer.token_to_id(name) for name in names] == [151643, 151644, 151645, 151646]
    assert tokenizer.get_vocab_size() == 151647
    assert tokenizer.decode([100_000]).strip() == "~186a0"
