"""Generation through the cache gives what recomputing everything gives, however it is chunked, interrupted, branched or continued."""

from __future__ import annotations

import ctypes
import dataclasses
import inspect
import math
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image
from skimage import data
from tokenizers import Tokenizer

import fastvlm_edge
from fastvlm_edge import Chat, FastVLM, FastVLMError, ReplyStream, SamplingParams
from fastvlm_edge.backends.dtypes import from_float32, storage, to_float32
from fastvlm_edge.backends.protocol import LOGIT_POSITIONS
from fastvlm_edge.backends.select import select
from fastvlm_edge.generation.answer_format import answer_format
from fastvlm_edge.inputs.preprocess import preprocess
from fastvlm_edge.inputs.prompt import ChatTemplate
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.manifest import MANIFEST_NAME, FileRecord, read_manifest, sha256
from tests.support.fake_model import HEAD_DIM, HIDDEN, IMAGE_SIZE, KV_HEADS, LAYERS, TOKEN_COUNT, TOKENS, VOCAB, build_model

PROMPT = "What does the meter read?"
LONG_PROMPT = "Describe the picture. " * 40


class Reference:
    """The same graphs without a cache: every step runs the whole conversation again."""

    def __init__(self, directory: Path) -> None:
        self.manifest = read_manifest(directory)
        self.tokenizer = TextTokenizer(directory / "tokenizer.json")
        self.template = ChatTemplate(self.tokenizer, self.manifest)
        self.vision = ort.InferenceSession(directory / "vision.onnx")
        self.decoder = ort.InferenceSession(directory / "decoder.onnx")

    def _value(self, array: Any) -> Any:
        bits = from_float32(np.float32(array), self.manifest.decoder.dtype)
        if bits.dtype == np.uint16:
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16)
        return ort.OrtValue.ortvalue_from_numpy(bits)

    def ids(self, prompt: str, pictures: int = 1) -> list[int]:
        return self.template.opening() + self.template.turn(prompt, [TOKENS] * pictures)

    def features(self, *images: Any) -> Any:
        if not images:
            return np.zeros((1, HIDDEN), np.float32)
        return np.concatenate([self._encode(preprocess(image, IMAGE_SIZE, "pad")) for image in images])

    def _encode(self, pixels: Any) -> Any:
        found = self._value(np.zeros((1, TOKENS, HIDDEN)))
        binding = self.vision.io_binding()
        binding.bind_cpu_input("pixel_values", pixels)
        binding.bind_ortvalue_output("image_features", found)
        self.vision.run_with_iobinding(binding)
        dtype = self.manifest.decoder.dtype
        nbytes = TOKENS * HIDDEN * np.dtype(storage(dtype)).itemsize
        bits = np.ctypeslib.as_array(ctypes.cast(found.data_ptr(), ctypes.POINTER(ctypes.c_uint8)), (nbytes,))
        return to_float32(bits.view(storage(dtype)), dtype).reshape(TOKENS, HIDDEN).copy()

    def logits(self, ids: Sequence[int], features: Any) -> Any:
        zeros = self._value(np.zeros((1, KV_HEADS, 1, HEAD_DIM)))
        feeds = {f"past_key_values.{n}.{part}": zeros for n in range(LAYERS) for part in ("key", "value")}
        feeds["image_features"] = self._value(features)
        int64 = {"input_ids": [list(ids)], "position_ids": [list(range(len(ids)))], "logit_positions": [[len(ids) - 1]]}
        feeds |= {name: ort.OrtValue.ortvalue_from_numpy(np.array(value, np.int64)) for name, value in int64.items()}
        return self.decoder.run_with_ort_values(["logits"], feeds)[0].numpy()[0, 0]

    def greedy(self, ids: Sequence[int], features: Any, steps: int, choose: Callable[[Any, list[int]], Any] | None = None) -> list[int]:
        ids, start = list(ids), len(ids)
        for _ in range(steps):
            row = self.logits(ids, features)[:TOKEN_COUNT]
            token_id = int((choose(row, ids) if choose else row).argmax())
            if token_id in self.manifest.text.stop_ids:
                break
            ids.append(token_id)
        return ids[start:]


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Reference:
    return Reference(model_dir)


def with_stop_ids(vlm: FastVLM, *stop_ids: int) -> FastVLM:
    text = dataclasses.replace(vlm.manifest.text, stop_ids=list(stop_ids))
    return FastVLM(dataclasses.replace(vlm.manifest, text=text), vlm._tokenizer, vlm._engine)


@pytest.mark.parametrize("prompt", [PROMPT, LONG_PROMPT])
def test_generation_equals_recomputing_everything(vlm: FastVLM, reference: Reference, prompt: str) -> None:
    ids = reference.ids(prompt)
    expected = reference.greedy(ids, reference.features(data.astronaut()), 60)
    reply = vlm.generate(prompt, data.astronaut(), max_new_tokens=60)
    assert reply.token_ids == expected and len(expected) == 60
    timings = reply.timings
    assert reply.stop_reason == "length" and timings.prompt_tokens == timings.cached_tokens + timings.prefilled_tokens == len(ids)


def test_the_long_prompt_crosses_a_cache_bucket(reference: Reference) -> None:
    assert len(reference.ids(LONG_PROMPT)) < 256 < len(reference.ids(LONG_PROMPT)) + 60


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_types_of_cache_and_features(tmp_path: Path, dtype: str) -> None:
    directory = build_model(tmp_path / "model", dtype=dtype)
    reference = Reference(directory)
    features = reference.features(data.coffee())
    expected = reference.greedy(reference.ids(LONG_PROMPT), features, 60)
    with FastVLM.load(directory, threads=1) as vlm:
        assert vlm.generate(LONG_PROMPT, data.coffee(), max_new_tokens=60).token_ids == expected
        assert np.array_equal(vlm.encode_image(data.coffee()).numpy(), features)


def test_text_alone_and_several_pictures(vlm: FastVLM, reference: Reference) -> None:
    expected = reference.greedy(reference.ids(PROMPT, 0), reference.features(), 20)
    assert vlm.generate(PROMPT, max_new_tokens=20).token_ids == expected
    pictures = [data.astronaut(), data.coffee(), data.chelsea()]
    expected = reference.greedy(reference.ids(PROMPT, 3), reference.features(*pictures), 20)
    assert vlm.generate(PROMPT, pictures, max_new_tokens=20).token_ids == expected
    assert vlm.generate(PROMPT, pictures[::-1], max_new_tokens=20).token_ids != expected


@pytest.mark.parametrize("chunk", [1, 7, 64, 511, 512])
def test_chunked_prefill_equals_one_shot(model_dir: Path, vlm: FastVLM, chunk: int) -> None:
    chunked = FastVLM(vlm.manifest, vlm._tokenizer, vlm._engine, prefill_chunk=chunk)
    expected = vlm.generate(LONG_PROMPT, data.coffee(), max_new_tokens=24)
    assert chunked.generate(LONG_PROMPT, data.coffee(), max_new_tokens=24).token_ids == expected.token_ids


def questions_in_between(vlm: FastVLM) -> None:
    vlm.generate("Something else entirely.", data.astronaut(), max_new_tokens=3)


def another_chat(vlm: FastVLM) -> None:
    vlm.chat().ask(PROMPT, data.coffee(), max_new_tokens=3)


def scoring(vlm: FastVLM) -> None:
    """The same ids as the chat holds, but another image; and ids that branch off."""
    image = vlm.encode_image(data.astronaut())
    template = ChatTemplate(vlm._tokenizer, vlm.manifest)
    ids = [*template.opening(), *template.turn(PROMPT, [TOKENS])]
    assert sum(map(len, vlm.logits(ids, [image], start=len(ids) - 20))) == 20
    assert sum(map(len, vlm.logits([*ids[:30], *ids[:9]], [image]))) == 39


def an_interrupted_question(vlm: FastVLM) -> None:
    with pytest.MonkeyPatch.context() as patch:
        step = vlm._engine.backend.step

        def interrupted(*arguments: Any, **options: Any) -> Any:
            step(*arguments, **options)
            raise KeyboardInterrupt

        patch.setattr(vlm._engine.backend, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            vlm.generate(LONG_PROMPT, data.coffee(), max_new_tokens=3)


@pytest.mark.parametrize(
    "between",
    [questions_in_between, another_chat, scoring, an_interrupted_question],
)
def test_nothing_between_two_turns_of_a_chat_changes_its_answers(vlm: FastVLM, between: Callable[[FastVLM], None]) -> None:
    def talk(between: Callable[[FastVLM], None] | None) -> list[list[int]]:
        chat, replies = vlm.chat(), []
        for prompt, image in ((PROMPT, data.coffee()), ("And the second digit?", None), ("Why?", data.chelsea()), ("Sure?", None)):
            replies.append(chat.ask(prompt, image, max_new_tokens=10).token_ids)
            if between is not None:
                between(vlm)
        return replies

    assert talk(between) == talk(None)


def test_the_backend_of_a_model_can_be_named_but_not_used(vlm: FastVLM) -> None:
    assert vlm.backend.name in ("ort", "ort-cuda", "tensorrt") and vlm.backend.description
    assert not any(hasattr(vlm.backend, method) for method in ("step", "truncate", "reset", "encode", "close"))


def test_logits_score_a_text(vlm: FastVLM, reference: Reference) -> None:
    """In blocks, from any start, with and without what the cache holds, and while the model is used for something else."""
    ids = [*reference.ids(PROMPT), *vlm._tokenizer.encode("It reads 042, or something like it; one cannot be sure.")]
    image = vlm.encode_image(data.coffee())
    features = reference.features(data.coffee())
    expected = np.stack([reference.logits(ids[: end + 1], features)[:TOKEN_COUNT] for end in range(len(ids))])
    assert len(ids) > 3 * LOGIT_POSITIONS
    for start in (0, 5, len(ids) - 1):
        blocks = []
        for block in vlm.logits(ids, [image], start=start):
            assert block.dtype == np.float32 and len(block) <= LOGIT_POSITIONS
            blocks.append(block)
            questions_in_between(vlm)
        np.testing.assert_allclose(np.concatenate(blocks), expected[start:], atol=1e-3)
    two = zip(vlm.logits(ids, [image]), vlm.logits(ids, [image]), strict=True)
    for first, second in two:
        assert np.array_equal(first, second)


def test_log_probabilities_are_those_of_the_whole_row(vlm: FastVLM, reference: Reference) -> None:
    """Padding rows count too. The context may be full before the last id."""
    ids = [*reference.ids(PROMPT), *vlm._tokenizer.encode("It reads 042, or something like it; one cannot be sure.")]
    image = vlm.encode_image(data.coffee())
    features = reference.features(data.coffee())
    rows = np.stack([reference.logits(ids[: end + 1], features) for end in range(len(ids) - 1)]).astype(np.float64)
    for start in (len(ids) - 30, len(ids) - 2):
        found = vlm.log_probabilities(ids, [image], start=start)
        for at, end in enumerate(range(start, len(ids) - 1)):
            shares = np.exp(rows[end] - rows[end].max())
            assert found[at] == pytest.approx(math.log(shares[ids[end + 1]] / shares.sum()), abs=1e-3)
    with pytest.raises(FastVLMError, match="is not a text token"):
        vlm.log_probabilities([*ids, vlm.manifest.decoder.vocab], [image], start=len(ids) - 2)


@pytest.mark.parametrize(
    ("ids", "start", "says"),
    [
        ([], 0, "start is 0, and 0 ids were given: there is no id after start to score; give at least two ids"),
        ([1], 0, "start is 0, and 1 ids were given"),
        ([1, 2, 3], 2, "start is 2, and 3 ids were given"),
        ([1, 2, 3], -1, "start is -1, and 3 ids were given"),
    ],
)
def test_log_probabilities_need_an_id_after_start(vlm: FastVLM, ids: list[int], start: int, says: str) -> None:
    with pytest.raises(FastVLMError, match=says):
        vlm.log_probabilities(ids, start=start)


def test_logits_continue_what_is_in_the_cache(vlm: FastVLM, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    image, ids = vlm.encode_image(data.coffee()), reference.ids(PROMPT)
    vlm.generate(PROMPT, image, max_new_tokens=4)
    steps: list[int] = []
    step = vlm._engine.backend.step
    monkeypatch.setattr(
        vlm._engine.backend, "step", lambda given, *rest, **options: steps.append(len(given)) or step(given, *rest, **options)
    )
    list(vlm.logits([*ids, *range(20)], [image], start=len(ids) - 1))
    assert steps == [16, 5]
    steps.clear()
    list(vlm.logits([*ids, *range(20)], [vlm.encode_image(data.coffee().copy())], start=len(ids) - 1))
    assert steps == [16, 5], "the same picture is known by its content"
    steps.clear()
    list(vlm.logits([*ids, *range(20)], [vlm.encode_image(data.rocket())], start=len(ids) - 1))
    assert len(steps) == 3 and steps[1:] == [16, 5] and steps[0] >= TOKENS


@pytest.mark.parametrize(
    ("ids", "start", "says"),
    [
        ([1, -1], 0, "the id -1 is out of range"),
        ([1, VOCAB], 0, f"the id {VOCAB} is out of range: there are {VOCAB} text and visual tokens"),
        ([1, 2], 2, "start is 2, outside the 2 ids"),
        ([], 0, "start is 0, outside the 0 ids"),
    ],
)
def test_ids_that_cannot_be_scored(vlm: FastVLM, ids: list[int], start: int, says: str) -> None:
    with pytest.raises(FastVLMError, match=says):
        vlm.logits(ids, start=start)


def test_logits_of_any_positions_and_rollback(vlm: FastVLM, reference: Reference) -> None:
    backend = vlm._engine.backend
    ids = reference.ids(PROMPT, 0)
    backend.reset()
    backend.step(ids[:5])
    output = backend.step(ids[5:15], logit_positions=[0, 4, 9], want_logits=True)
    assert output.logits is not None
    for row, position in enumerate((5, 9, 14)):
        np.testing.assert_allclose(output.logits[row], reference.logits(ids[: position + 1], reference.features()), atol=1e-4)
        assert np.array_equal(np.sort(output.logits[row])[::-1][:64], output.top_values[row])
        assert np.array_equal(output.logits[row][output.top_ids[row]], output.top_values[row])
    backend.truncate(9)
    assert backend.lengths[0] == 9
    output = backend.step([77], want_logits=True)
    assert output.logits is not None
    np.testing.assert_allclose(output.logits[0], reference.logits([*ids[:9], 77], reference.features()), atol=1e-4)
    backend.reset()
    vlm._engine._slots.recover()


def test_decoding_binds_anew_only_where_the_cache_grows(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    if vlm._engine.backend.name != "ort":
        pytest.skip("tests/fastvlm_edge/backends/test_tensorrt_backend.py looks at its graphs")
    made: list[tuple[Any, ...]] = []
    decoder = vlm._engine.backend._decoder  # type: ignore[attr-defined]
    decoder._calls.clear()
    monkeypatch.setattr(vlm, "_speculate", False)
    bind = decoder._bind
    vlm._engine.backend.reset()
    vlm._engine._slots.recover()
    vlm._engine._slots.clear()
    monkeypatch.setattr(decoder, "_bind", lambda *key, **options: made.append(key) or bind(*key, **options))
    vlm.generate(PROMPT, data.coffee(), max_new_tokens=150)
    assert made == [(0, 1, 46, 1, False), (0, 1, 1, 1, False), (0, 1, 1, 1, False)]  # 46 + 150 positions cross one border, at 128


def test_a_context_that_fills_up(tmp_path: Path) -> None:
    directory = build_model(tmp_path / "model", context=100)
    with FastVLM.load(directory, threads=1) as vlm:
        reply = vlm.generate(PROMPT, data.coffee(), max_new_tokens=1000)
        assert reply.stop_reason == "context" and reply.timings.prompt_tokens + len(reply.token_ids) == 100
        says = r"has \d+ tokens \(16 of them visual\), .* no room .* context of 100; shorten the prompt, .* larger --context"
        with pytest.raises(FastVLMError, match=says):
            vlm.generate(LONG_PROMPT, data.coffee())
        with pytest.raises(FastVLMError, match=r"96 of them visual.*; use fewer images"):
            vlm.generate(PROMPT, [data.coffee()] * 6)
        chat = vlm.chat()
        chat.ask(PROMPT, data.coffee(), max_new_tokens=1000)
        assert chat.token_count == 100
        with pytest.raises(FastVLMError, match="start a new conversation"):
            chat.ask("And now?")
        with pytest.raises(FastVLMError, match="101 positions do not fit into the context of 100"):
            vlm._engine.backend.step([1] * (101 - vlm._engine.backend.lengths[0]))


def test_an_end_id_ends_the_reply_and_is_not_part_of_it(vlm: FastVLM) -> None:
    whole = vlm.generate(PROMPT, data.coffee(), max_new_tokens=20)
    end = whole.token_ids[10]
    first = whole.token_ids.index(end)
    reply = with_stop_ids(vlm, end).generate(PROMPT, data.coffee(), max_new_tokens=20)
    assert reply.stop_reason == "stop" and reply.stop_string is None and reply.token_ids == whole.token_ids[:first]
    at_once = with_stop_ids(vlm, whole.token_ids[0]).generate(PROMPT, data.coffee())
    assert (at_once.text, at_once.token_ids, at_once.stop_reason) == ("", [], "stop")
    assert at_once.timings.decode_tokens_per_second == 0 and at_once.timings.ttft_ms > 0


def test_special_tokens_of_a_reply_are_shown_if_asked_for(vlm: FastVLM, model_dir: Path) -> None:
    whole = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    special = {token_id for token_id, token in whole.get_added_tokens_decoder().items() if token.special}
    seen = set()
    for seed in range(20):
        options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 5.0, "seed": seed}
        stream = vlm.stream(PROMPT, special_tokens=True, **options)
        text = "".join(stream)
        ids = stream.reply.token_ids
        assert text == stream.reply.text == whole.decode(ids, skip_special_tokens=False)
        hidden = vlm.generate(PROMPT, **options)
        assert (hidden.token_ids, hidden.text) == (ids, whole.decode(ids, skip_special_tokens=True))
        assert not set(ids) & set(vlm.manifest.text.stop_ids), "the token that ends a reply is not part of it"
        seen |= special & set(ids)
    assert seen, "no reply had a special token"


def test_special_tokens_of_a_prompt_are_read_if_asked_for(vlm: FastVLM) -> None:
    prompt = f"{PROMPT}<|endoftext|>"
    one, several = (vlm.generate(prompt, special_tokens=each, max_new_tokens=1).timings.prompt_tokens for each in (True, False))
    plain = vlm.generate(PROMPT, max_new_tokens=1).timings.prompt_tokens
    assert one == plain + 1 < several
    chat = vlm.chat()
    assert chat.ask(prompt, special_tokens=True, max_new_tokens=1).timings.prompt_tokens == one
    with pytest.raises(FastVLMError, match="special_tokens is 'yes'; give True or False"):
        vlm.generate(PROMPT, special_tokens="yes")  # type: ignore[arg-type]


def test_a_stop_string_over_token_borders(vlm: FastVLM) -> None:
    whole = vlm.generate(PROMPT, data.coffee(), max_new_tokens=40)
    for start in range(5, 40, 5):
        stop = whole.text[start : start + 4]
        stream = vlm.stream(PROMPT, data.coffee(), max_new_tokens=40, stop=["never there", stop])
        pieces = list(stream)
        assert "".join(pieces) == stream.reply.text == whole.text[: whole.text.index(stop)]
        assert stream.reply.stop_reason == "stop" and stream.reply.stop_string == stop
        assert stream.reply.token_ids == whole.token_ids[: len(stream.reply.token_ids)]
    held_to_the_end = vlm.generate(PROMPT, data.coffee(), max_new_tokens=40, stop=whole.text[-2:] + "x")
    assert held_to_the_end.text == whole.text and held_to_the_end.stop_reason == "length"


def test_the_stream_is_the_reply_in_pieces(vlm: FastVLM) -> None:
    reply = vlm.generate(PROMPT, data.coffee(), max_new_tokens=80)
    stream = vlm.stream(PROMPT, data.coffee(), max_new_tokens=80)
    with pytest.raises(FastVLMError, match="reply is not finished"):
        _ = stream.reply
    pieces = list(stream)
    assert len(pieces) > 20 and all(pieces)
    assert "".join(pieces) == reply.text == stream.reply.text
    assert stream.reply.token_ids == reply.token_ids


def test_sampling_repeats_with_a_seed(vlm: FastVLM) -> None:
    def texts(seed: int) -> list[int]:
        return vlm.generate(PROMPT, temperature=0.9, top_k=20, top_p=0.9, seed=seed, max_new_tokens=30).token_ids

    assert texts(1) == texts(1) != texts(2)
    assert (
        vlm.generate(PROMPT, temperature=5.0, top_k=1, seed=4, max_new_tokens=9).token_ids
        == vlm.generate(PROMPT, max_new_tokens=9).token_ids
    )


def test_repetition_penalty_looks_at_the_whole_vocabulary(vlm: FastVLM, reference: Reference) -> None:
    def punish(row: Any, ids: list[int]) -> Any:
        row = row.copy()
        for token_id in {i for i in ids if i < TOKEN_COUNT}:
            row[token_id] = row[token_id] / 8 if row[token_id] > 0 else row[token_id] * 8
        return row

    expected = reference.greedy(reference.ids(LONG_PROMPT), reference.features(data.coffee()), 40, punish)
    reply = vlm.generate(LONG_PROMPT, data.coffee(), max_new_tokens=40, repetition_penalty=8.0)
    assert reply.token_ids == expected


def test_an_encoded_image_is_not_encoded_again(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = vlm.generate(PROMPT, [data.coffee(), data.astronaut()], max_new_tokens=20)
    encoded = vlm.encode_image(data.coffee())
    assert encoded.numpy().shape == (TOKENS, HIDDEN) and encoded.numpy().dtype == np.float32
    reply = vlm.generate(PROMPT, [encoded, data.astronaut()], max_new_tokens=20)
    assert reply.token_ids == expected.token_ids
    monkeypatch.setattr(vlm._engine.backend, "encode", None)
    alone = vlm.generate(PROMPT, encoded, max_new_tokens=5)
    assert alone.timings.vision_ms == alone.timings.preprocess_ms == 0


def test_an_encoded_image_is_recalled_by_its_key(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = np.random.default_rng(21).integers(0, 255, (90, 70, 3), np.uint8)
    encoded = vlm.encode_image(picture)
    assert encoded.vision_ms > 0 and encoded.preprocess_ms > 0
    expected = vlm.generate(PROMPT, encoded, max_new_tokens=10)
    before = vlm.counters()
    monkeypatch.setattr(vlm._engine.backend, "encode", None)
    recalled = vlm.recall_image(encoded.key)
    assert recalled is not None and recalled.pixels is None and recalled.vision_ms == recalled.preprocess_ms == 0
    assert vlm.counters().cached_images == before.cached_images + 1 and vlm.counters().images == before.images + 1
    assert vlm.generate(PROMPT, recalled, max_new_tokens=10).token_ids == expected.token_ids
    assert vlm.recall_image(bytes(32)) is None and vlm.counters().images == before.images + 1


def test_geometry_can_be_overridden(model_dir: Path, vlm: FastVLM) -> None:
    cropped = FastVLM(vlm.manifest, vlm._tokenizer, vlm._engine, geometry="crop")
    expected = vlm._engine.backend.encode(preprocess(data.coffee(), IMAGE_SIZE, "crop")).numpy()
    assert np.array_equal(cropped.encode_image(data.coffee()).numpy(), expected)
    assert not np.array_equal(vlm.encode_image(data.coffee()).numpy(), expected)


def test_chat_equals_asking_everything_at_once_and_computes_only_what_is_new(vlm: FastVLM, reference: Reference) -> None:
    template, ids = reference.template, reference.ids(PROMPT)
    chat = vlm.chat()
    first = second = chat.ask(PROMPT, data.coffee(), max_new_tokens=12)
    for between in (False, True):
        if between:
            vlm.generate("Something else entirely.", data.astronaut(), max_new_tokens=3)
        ids = [*ids, *second.token_ids, *template.closing()]
        ids += template.turn("And the second digit?", [TOKENS] * between, first_row=TOKENS)
        pictures = [data.coffee(), data.astronaut()][: 1 + between]
        second = chat.ask("And the second digit?", data.astronaut() if between else None, max_new_tokens=12)
        assert second.token_ids == reference.greedy(ids, reference.features(*pictures), 12)
        assert second.timings.prompt_tokens == len(ids)
        assert (second.timings.prefilled_tokens < 40) != between
    chat.reset()
    assert chat.ask(PROMPT, data.coffee(), max_new_tokens=12).token_ids == first.token_ids


def test_two_chats_that_differ_only_in_the_picture_share_no_picture(vlm: FastVLM) -> None:
    alone = vlm.generate(PROMPT, data.astronaut(), max_new_tokens=10).token_ids
    vlm.chat().ask(PROMPT, data.coffee(), max_new_tokens=10)
    reply = vlm.chat().ask(PROMPT, data.astronaut(), max_new_tokens=10)
    assert reply.token_ids == alone
    assert 0 < reply.timings.prefilled_tokens < reply.timings.prompt_tokens  # the system prompt was there


def test_a_failed_turn_leaves_the_chat_as_it_was(vlm: FastVLM) -> None:
    chat = vlm.chat()
    chat.ask(PROMPT, max_new_tokens=5)
    before = chat.token_count
    with pytest.raises(FastVLMError, match="does not exist"):
        chat.ask("And this?", "gone.png")
    assert chat.token_count == before


def test_a_stream_closed_early_leaves_what_it_said(vlm: FastVLM) -> None:
    whole = vlm.generate(PROMPT, data.coffee(), max_new_tokens=40)
    chat = vlm.chat()
    stream = chat.stream(PROMPT, data.coffee(), max_new_tokens=40)
    shown = [next(stream) for _ in range(5)]
    stream.close()
    assert stream.reply.stop_reason == "cancelled" and "".join(shown) == stream.reply.text
    assert whole.token_ids[: len(stream.reply.token_ids)] == stream.reply.token_ids
    assert chat.token_count == stream.reply.timings.prompt_tokens + len(stream.reply.token_ids)
    assert chat.ask("Go on.", max_new_tokens=5).token_ids


def test_a_stream_closed_before_its_first_piece_has_no_reply(vlm: FastVLM) -> None:
    stream = vlm.stream(PROMPT)
    stream.close()
    with pytest.raises(FastVLMError, match="closed before its first piece"):
        _ = stream.reply


@pytest.mark.parametrize("at", [1, 2, 5])
def test_an_interrupt_leaves_the_model_usable(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    expected = vlm.generate(LONG_PROMPT, data.coffee(), max_new_tokens=20).token_ids
    calls = 0
    backend = vlm._engine.backend

    def interrupted(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            output = call(*arguments, **options)
            if calls >= at:
                raise KeyboardInterrupt
            return output

        return run

    chat = vlm.chat()
    monkeypatch.setattr(backend, "decode", interrupted(backend.decode))
    monkeypatch.setattr(backend, "step", interrupted(backend.step))
    with pytest.raises(KeyboardInterrupt):
        chat.ask(LONG_PROMPT, data.coffee(), max_new_tokens=20)
    monkeypatch.undo()
    assert vlm.generate(LONG_PROMPT, data.coffee(), max_new_tokens=20).token_ids == expected
    chat.reset()
    assert chat.ask(LONG_PROMPT, data.coffee(), max_new_tokens=20).token_ids == expected


def test_threads_wait_for_each_other(vlm: FastVLM) -> None:
    pictures = [data.coffee(), data.astronaut(), data.chelsea(), None]
    expected = [vlm.generate(PROMPT, picture, max_new_tokens=30).token_ids for picture in pictures]
    got: dict[int, list[int]] = {}

    def work(index: int) -> None:
        for _ in range(5):
            got[index] = vlm.generate(PROMPT, pictures[index], max_new_tokens=30).token_ids

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[index] for index in range(4)] == expected


def test_closing(model_dir: Path) -> None:
    with FastVLM.load(model_dir, threads=1) as vlm:
        stream = vlm.stream(PROMPT, data.coffee(), max_new_tokens=1900)  # more than it generates before it is closed
        next(stream)
    vlm.close()
    with pytest.raises(FastVLMError, match=r"cut short|was closed"):
        list(stream)
    for use in (lambda: vlm.generate(PROMPT), lambda: vlm.encode_image(data.coffee()), lambda: vlm.chat().ask(PROMPT)):
        with pytest.raises(FastVLMError, match="was closed; load it again"):
            use()


def copy_of(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "copy"))


def edit(directory: Path, **changes: Any) -> None:
    """Change the manifest: `decoder__layers=4` and the like."""
    manifest = read_manifest(directory)
    for key, value in changes.items():
        part, name = key.split("__")
        manifest = dataclasses.replace(manifest, **{part: dataclasses.replace(getattr(manifest, part), **{name: value})})
    manifest.write(directory)


def test_directories_that_cannot_be_loaded(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FastVLMError, match=r"is not a model directory.*fastvlm-edge convert"):
        FastVLM.load(tmp_path)
    with pytest.raises(FastVLMError, match="unknown geometry 'stretch'"):  # told before anything is read
        FastVLM.load(tmp_path, geometry="stretch")
    with pytest.raises(FastVLMError, match="prefill_chunk is 0"):
        FastVLM.load(tmp_path, prefill_chunk=0)
    directory = copy_of(model_dir, tmp_path)
    (directory / "decoder.onnx").rename(tmp_path / "decoder.onnx")
    with pytest.raises(FastVLMError, match=r"decoder\.onnx is missing"):
        FastVLM.load(directory)
    damaged = bytearray((tmp_path / "decoder.onnx").read_bytes())
    (directory / "decoder.onnx").write_bytes(damaged[:-10])
    with pytest.raises(FastVLMError, match=r"decoder\.onnx has \d+ bytes, but the manifest says"):
        FastVLM.load(directory)
    damaged[100] ^= 255
    (directory / "decoder.onnx").write_bytes(damaged)
    with pytest.raises(FastVLMError, match="sha256 differs"):
        FastVLM.load(directory)
    (directory / "decoder.onnx").write_bytes(bytes(len(damaged)))
    manifest = read_manifest(directory)
    files = {**manifest.files, "decoder.onnx": FileRecord(sha256(directory / "decoder.onnx"), len(damaged))}
    dataclasses.replace(manifest, files=files).write(directory)
    with pytest.raises(FastVLMError, match=r"decoder\.onnx could not be loaded: .*; copy the model directory again") as caught:
        FastVLM.load(directory)
    assert "\n" not in str(caught.value)
    (directory / MANIFEST_NAME).write_text("{")
    with pytest.raises(FastVLMError, match="is damaged"):
        FastVLM.load(directory)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"decoder__layers": 4}, r"tensor past_key_values\.3\.key is missing, expected float32"),
        ({"decoder__layers": 2}, r"tensor past_key_values\.2\.key is float32, expected no such tensor"),
        ({"decoder__dtype": "float16"}, "tensor image_features is float32, expected float16"),
    ],
)
def test_graphs_that_do_not_belong_to_the_manifest(model_dir: Path, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    directory = copy_of(model_dir, tmp_path)
    edit(directory, **change)
    with pytest.raises(FastVLMError, match=says):
        FastVLM.load(directory)


def test_a_graph_that_fails_while_it_runs(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = copy_of(model_dir, tmp_path)
    monkeypatch.setattr("fastvlm_edge.backends.ort.check_shapes", lambda *_: None)
    edit(directory, decoder__head_dim=5)
    with FastVLM.load(directory) as vlm, pytest.raises(FastVLMError, match=r"onnxruntime failed in the decoder graph: .*convert") as caught:
        vlm.generate(PROMPT)
    assert "\n" not in str(caught.value)


def test_backends_and_options_that_are_refused(model_dir: Path, vlm: FastVLM) -> None:
    manifest = read_manifest(model_dir)
    with pytest.raises(FastVLMError, match="backend 'gpu' is unknown; use one of: auto, ort"):
        select("gpu", model_dir, manifest)
    with pytest.raises(FastVLMError, match="has no engines; run: fastvlm-edge build"):
        select("tensorrt", model_dir, manifest)
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        with pytest.raises(FastVLMError, match="no CUDA support"):
            select("ort-cuda", model_dir, manifest)
    with pytest.raises(FastVLMError, match="threads is 0"):
        FastVLM.load(model_dir, threads=0)
    with pytest.raises(FastVLMError, match="unknown geometry 'stretch'"):
        FastVLM.load(model_dir, geometry="stretch")
    with pytest.raises(FastVLMError, match="prefill_chunk is 0"):
        FastVLM.load(model_dir, prefill_chunk=0)
    with pytest.raises(FastVLMError, match=r"shape \[1, 3, 8, 8\], but this model takes \[1, 3, S, S\] with S = 256"):
        vlm._engine.backend.encode(np.zeros((1, 3, 8, 8), np.float32))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"path": None}, "the model directory is of type NoneType; give its path"),
        ({"path": 7}, "the model directory is of type int"),
        ({"path": b"model"}, "the model directory is of type bytes"),
        ({"backend": None}, "backend None is unknown"),
        ({"backend": 1}, "backend 1 is unknown"),
        ({"threads": "2"}, "threads is '2'; give an integer of at least 1"),
        ({"threads": 1.5}, "threads is 1.5"),
        ({"threads": True}, "threads is True"),
        ({"geometry": 1}, "unknown geometry 1"),
        ({"prefill_chunk": "64"}, "prefill_chunk is '64'"),
        ({"prefill_chunk": None}, "prefill_chunk is None"),
        ({"prefill_chunk": 2.0}, "prefill_chunk is 2.0"),
    ],
)
def test_options_of_a_wrong_type_are_named(model_dir: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(FastVLMError, match=says):
        FastVLM.load(**{"path": model_dir, **options})


def test_what_cannot_be_scored_is_named(vlm: FastVLM) -> None:
    with pytest.raises(FastVLMError, match="images holds a Posix"):
        vlm.logits([1, 2], [Path("a.jpg")])  # type: ignore[list-item]
    with pytest.raises(FastVLMError, match="input_ids holds '1'"):
        vlm.logits(["1", 2])  # type: ignore[list-item]
    with pytest.raises(FastVLMError, match="start is None"):
        vlm.logits([1, 2], start=None)  # type: ignore[arg-type]
    with pytest.raises(FastVLMError, match="input_ids holds '1'"):
        vlm.log_probabilities(["1", 2])  # type: ignore[list-item]
    assert np.isfinite(vlm.log_probabilities(np.array([1, 2, 3]))).all()  # type: ignore[arg-type]


def test_no_stop_string(vlm: FastVLM) -> None:
    expected = vlm.generate(PROMPT, max_new_tokens=5)
    stops: tuple[Sequence[str] | None, ...] = (None, (), [])
    for stop in stops:
        assert vlm.generate(PROMPT, max_new_tokens=5, stop=stop).token_ids == expected.token_ids


@pytest.mark.parametrize("call", [FastVLM.generate, FastVLM.stream, Chat.ask, Chat.stream])
def test_the_options_of_sampling_are_keywords(call: Callable[..., Any]) -> None:
    parameters = inspect.signature(call).parameters
    fields = {field.name: field.default for field in dataclasses.fields(SamplingParams) if field.name != "format"}
    found = {name: each.default for name, each in parameters.items() if each.kind is inspect.Parameter.KEYWORD_ONLY}
    for name in {"system", "image_size"} & set(found):  # they are not about sampling
        del found[name]
    formats = inspect.signature(answer_format).parameters
    assert found == {**fields, "stop": None, **{name: each.default for name, each in formats.items()}}


def test_every_option_of_sampling_reaches_the_sampler(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SamplingParams] = []
    original = FastVLM._ask

    def ask(self: FastVLM, history: Any, earlier: Any, prompt: Any, image: Any, params: SamplingParams, **options: Any) -> ReplyStream:
        seen.append(params)
        return original(self, history, earlier, prompt, image, params, **options)

    monkeypatch.setattr(FastVLM, "_ask", ask)
    options: dict[str, Any] = {"max_new_tokens": 3, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "seed": 1, "repetition_penalty": 1.1}
    options |= {"logprobs": 2, "special_tokens": True}
    for call in (vlm.generate, vlm.stream, vlm.chat().ask, vlm.chat().stream):
        call(PROMPT, None, stop="zzz", **options)
        call(PROMPT, None, stop="zzz", regex="[0-9]", **options)
    plain, digit = (SamplingParams(**options, stop=("zzz",), format=answer_format(regex=regex)) for regex in (None, "[0-9]"))
    assert seen == 4 * [plain, digit]


def test_objects_describe_themselves(model_dir: Path) -> None:
    with FastVLM.load(model_dir, "ort", threads=1) as vlm:
        chat, stream = vlm.chat(), vlm.stream(PROMPT, max_new_tokens=2)
        assert repr(vlm) == "<FastVLM fake, fp32, ort>"
        assert repr(vlm.encode_image(data.coffee())) == "<EncodedImage of 256 px, 16 visual tokens>"
        assert repr(stream) == "<ReplyStream, not finished>"
        for _ in stream:
            pass
        assert repr(stream) == "<ReplyStream, finished>"
        chat.ask(PROMPT, max_new_tokens=2)
        assert repr(chat) == f"<Chat of {chat.token_count} positions with fake>"
    assert repr(vlm) == "<FastVLM fake, fp32, closed>"


def test_the_names_of_the_package_are_completed() -> None:
    assert set(fastvlm_edge.__all__) <= set(dir(fastvlm_edge))


def test_features_of_another_model_are_refused(vlm: FastVLM, tmp_path: Path) -> None:
    with FastVLM.load(build_model(tmp_path / "half", dtype="float16"), threads=1) as other:
        encoded = other.encode_image(data.coffee())
    with pytest.raises(FastVLMError, match="another model or backend"):
        vlm.generate(PROMPT, encoded)
    assert vlm.generate(PROMPT, data.coffee(), max_new_tokens=3).token_ids


def test_the_background_of_transparent_pictures(model_dir: Path) -> None:
    for background in ("white", "#204060"):
        with FastVLM.load(model_dir, threads=1, background=background) as vlm:
            drawn = vlm.encode_image(Image.new("RGB", (64, 48), background)).numpy()
            assert np.array_equal(vlm.encode_image(Image.new("RGBA", (64, 48), (0, 0, 0, 0))).numpy(), drawn)
    with pytest.raises(FastVLMError, match="the background 'see-through' is not a colour"):
        FastVLM.load("nowhere", background="see-through")
