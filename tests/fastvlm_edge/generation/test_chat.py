"""A chat with a system prompt of its own, one that is saved and loaded, and one whose oldest turns leave a full context."""

from __future__ import annotations

import base64
import io
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage import data

from fastvlm_edge import AsyncFastVLM, Chat, ChatTurn, FastVLM, FastVLMError
from fastvlm_edge.inputs.preprocess import to_pixel_values, to_pixels
from tests.support.fake_model import SYSTEM_PROMPT, TOKENS, build_model

PROMPT = "What does the meter read?"


@pytest.fixture(scope="module")
def ort(model_dir: Path) -> Any:
    with FastVLM.load(model_dir, "ort", threads=1) as loaded:
        yield loaded


# The system prompt --------------------------------------------------------------------------------------------------------------


def test_a_system_prompt_of_ones_own(ort: FastVLM) -> None:
    as_converted = ort.generate(PROMPT, max_new_tokens=8)
    assert ort.generate(PROMPT, max_new_tokens=8, system=SYSTEM_PROMPT).token_ids == as_converted.token_ids
    other = ort.generate(PROMPT, max_new_tokens=8, system="Answer with a number.")
    none = ort.generate(PROMPT, max_new_tokens=8, system="")
    assert other.token_ids != as_converted.token_ids
    assert none.timings.prompt_tokens < min(other.timings.prompt_tokens, as_converted.timings.prompt_tokens)
    ids = ort._template.turn(PROMPT)
    assert none.timings.prompt_tokens == len(ids)
    assert ort._template.opening("a\n<|im_end|>") == [
        ort._template._start,
        *ort._tokenizer.encode("system\na\n<|im_end|>"),
        ort._template._end,
        *ort._tokenizer.encode("\n"),
    ]


def test_a_chat_keeps_its_system_prompt(ort: FastVLM) -> None:
    for system in (None, "", "Answer with a number."):
        chat = ort.chat(system=system)
        for _ in range(2):
            expected = ort.generate(PROMPT, max_new_tokens=8, system=system)
            reply = chat.ask(PROMPT, max_new_tokens=8)
            assert (reply.token_ids, reply.timings.prompt_tokens) == (expected.token_ids, expected.timings.prompt_tokens)
            chat.reset()


@pytest.mark.parametrize(
    ("system", "says"), [(3, "the system prompt is of type int, not str; give a string"), ("\ud800", "not valid Unicode")]
)
def test_what_is_no_system_prompt(ort: FastVLM, system: Any, says: str) -> None:
    for call in (lambda: ort.generate(PROMPT, system=system), lambda: ort.stream(PROMPT, system=system), lambda: ort.chat(system=system)):
        with pytest.raises(FastVLMError, match=says):
            call()


# Saved and loaded ---------------------------------------------------------------------------------------------------------------


def test_pixels_come_back_exactly() -> None:
    pixels = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    values = to_pixel_values(pixels)
    assert (to_pixels(values) == pixels).all() and values.shape == (1, 3, 16, 16) and values.max() == 1
    assert to_pixel_values(to_pixels(values)).tobytes() == values.tobytes()


def turns_of(chat: Chat) -> list[tuple[Any, ...]]:
    return [(turn.prompt, [image.key for image in turn.images], turn.reply, turn.reply_ids) for turn in chat.turns]


def spoken(vlm: FastVLM, **options: Any) -> Chat:
    """A chat of four turns: two pictures at once, none, one that is known, a reply that was cut by a stop string."""
    chat = vlm.chat(system="Answer briefly.", **options)
    chat.ask(PROMPT, [data.coffee(), data.astronaut()], max_new_tokens=9)
    chat.ask("Größer? 数字", max_new_tokens=7, temperature=1.5, seed=3)
    whole = chat.ask("And now?", vlm.encode_image(data.coffee()), max_new_tokens=8).text
    chat.ask("Again.", max_new_tokens=9, stop=whole[2:4], special_tokens=True)
    return chat


def test_a_loaded_chat_goes_on_exactly_where_it_was(vlm: FastVLM, model_dir: Path, tmp_path: Path) -> None:
    chat = spoken(vlm)
    assert chat._ids_of(chat.turns) == chat._ids
    path = tmp_path / "chat.json"
    chat.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["chat.json"]
    with FastVLM.load(model_dir, "ort", threads=1) as later:
        loaded = later.load_chat(path)
    again = vlm.load_chat(path)
    for other in (loaded, again):
        assert turns_of(other) == turns_of(chat) and other.token_count == chat.token_count
    for prompt, image in (("And this?", data.astronaut()), ("Why?", None)):
        expected, found = (each.ask(prompt, image, max_new_tokens=20) for each in (chat, again))
        assert found.token_ids == expected.token_ids and found.timings.prompt_tokens == expected.timings.prompt_tokens
    again.save(path)  # its pictures can be saved again, over the file that it came from
    chat.save(tmp_path / "other.json")
    assert path.read_bytes() == (tmp_path / "other.json").read_bytes()


def test_a_loaded_chat_computes_what_a_fresh_process_lacks(ort: FastVLM, model_dir: Path, tmp_path: Path) -> None:
    chat = spoken(ort)
    chat.save(tmp_path / "chat.json")
    expected = chat.ask("Why?", max_new_tokens=20)
    with FastVLM.load(model_dir, "ort", threads=1, prefix_cache=False) as fresh:
        found = fresh.load_chat(tmp_path / "chat.json").ask("Why?", max_new_tokens=20)
    assert (found.text, found.token_ids) == (expected.text, expected.token_ids)
    assert found.timings.cached_tokens == 0 < expected.timings.cached_tokens


def test_pictures_by_their_hash(ort: FastVLM, tmp_path: Path) -> None:
    chat, path = spoken(ort), tmp_path / "chat.json"
    chat.save(path, pictures="hash")
    assert path.stat().st_size < 4000
    with pytest.raises(FastVLMError, match=r"has only the sha256 of 2 of its pictures; give them to load_chat, as images="):
        ort.load_chat(path)
    with pytest.raises(FastVLMError, match="sha256 of 1 of its pictures"):
        ort.load_chat(path, data.coffee())
    with pytest.raises(FastVLMError, match=r"image 2 is not a picture of the conversation in .*; give the original picture"):
        ort.load_chat(path, [data.astronaut(), data.camera()])
    loaded = ort.load_chat(path, images=[ort.encode_image(data.astronaut()), data.coffee()])
    assert turns_of(loaded) == turns_of(chat)
    assert loaded.ask("Why?", max_new_tokens=20).token_ids == chat.ask("Why?", max_new_tokens=20).token_ids
    with pytest.raises(FastVLMError, match="pictures is 'none'; use one of: embed, hash"):
        chat.save(path, pictures="none")  # type: ignore[arg-type]


def test_a_chat_of_another_model(ort: FastVLM, tmp_path: Path) -> None:
    ort.chat().save(tmp_path / "chat.json")
    says = r"another model: fake \(\w{12}\), and this one is fake \(\w{12}\); load the model that"
    other = FastVLM.load(build_model(tmp_path / "other", dtype="float16"), "ort", threads=1)
    with other, pytest.raises(FastVLMError, match=says):
        other.load_chat(tmp_path / "chat.json")


def another_picture(file: dict[str, Any]) -> None:
    key = next(iter(file["pictures"]))
    png = io.BytesIO()
    Image.new("RGB", (256, 256)).save(png, "PNG")
    file["pictures"][key] = base64.b64encode(png.getvalue()).decode()


def put(*place: Any) -> Callable[[dict[str, Any]], None]:
    """Put the last value at a place of the file."""
    *keys, last, value = place

    def change(file: Any) -> None:
        for key in keys:
            file = file[key]
        file[last] = value

    return change


CHANGES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (put("format", "other"), "its format is not 'fastvlm-edge chat'"),
    (put("version", 2), "version 2, and this toolkit reads version 1; load it with the version"),
    (put("turns", 0, "prompt", 3), "prompt is '3', not of type str"),
    (put("turns", 0, "prompt", "\ud800"), "not valid Unicode"),
    (put("turns", 0, "reply", "edited"), "the reply of turn 1 is not the text of its reply_ids"),
    (put("turns", 0, "reply_ids", 0, 10**9), "reply_ids of turn 1 has an id that is not text"),
    (put("turns", 0, "reply_ids", 0, True), "not of type int"),
    (put("turns", 0, "reply_ids", [1] * 5000), "longer than the context of 2048"),
    (put("turns", 1, "prompt", "word " * 5000), "longer than the context of 2048"),
    (put("turns", 1, "prompt", " "), "the prompt is empty"),
    (put("turns", 0, "pictures", ["ab"]), "pictures are not those of the turns"),
    (put("pictures", {}), "pictures are not those of the turns"),
    (put("context", "grow"), "context is 'grow', not one of error, slide"),
    (put("more", 1), "has an unknown 'more'"),
    (lambda file: file.pop("system"), "lacks 'system'"),
    (another_picture, "picture [0-9a-f]{12} is not the one with this sha256"),
    (lambda file: file["pictures"].update(dict.fromkeys(file["pictures"], "AAAA")), "picture [0-9a-f]{12}: "),
    (lambda file: file["pictures"].update(dict.fromkeys(file["pictures"], "?")), "damaged"),
]


@pytest.fixture(scope="module")
def saved(ort: FastVLM, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("chat") / "chat.json"
    spoken(ort).save(path)
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("change", "says"), CHANGES, ids=[says[:30] for _, says in CHANGES])
def test_a_changed_file_is_refused(ort: FastVLM, saved: str, tmp_path: Path, change: Any, says: str) -> None:
    document = json.loads(saved)
    change(document)
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(document))
    with pytest.raises(FastVLMError, match=says) as error:
        ort.load_chat(path)
    assert str(path) in error.value.what and error.value.mend


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "[" * 100_000, '{"format": "fastvlm-edge chat", "version": 1, "model": ' + "[" * 5000]
)
def test_what_is_no_conversation(ort: FastVLM, tmp_path: Path, text: str) -> None:
    path = tmp_path / "chat.json"
    path.write_text(text)
    with pytest.raises(FastVLMError, match="is not a saved conversation, or is damaged"):
        ort.load_chat(path)


def test_places_that_cannot_be_read_or_written(ort: FastVLM, tmp_path: Path) -> None:
    chat = ort.chat()
    picture = tmp_path / "precious.png"
    Image.fromarray(data.coffee()).save(picture)
    before = picture.read_bytes()
    with pytest.raises(FastVLMError, match=r"precious\.png exists and is not a saved conversation; choose another name"):
        chat.save(picture)
    assert picture.read_bytes() == before
    for place in (tmp_path, tmp_path / "gone" / "chat.json", tmp_path / ("x" * 300), "a\0b"):
        with pytest.raises(FastVLMError, match="cannot be written"):
            chat.save(place)
    for place, says in (
        (tmp_path / "gone", "does not exist"),
        (tmp_path, "not a regular file"),
        ("x" * 300, "cannot be read"),
        ("", "empty"),
    ):
        with pytest.raises(FastVLMError, match=says):
            ort.load_chat(place)
    for call in (chat.save, ort.load_chat):
        with pytest.raises(FastVLMError, match="of type int; give its path"):
            call(3)  # type: ignore[arg-type]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["precious.png"]


def test_an_empty_chat_is_saved_too(ort: FastVLM, tmp_path: Path) -> None:
    chat = ort.chat(system="", context="slide")
    chat.save(tmp_path / "chat.json")
    loaded = ort.load_chat(str(tmp_path / "chat.json"))
    assert loaded.turns == () and (loaded._system, loaded._context) == ("", "slide")
    assert loaded.ask(PROMPT, max_new_tokens=4).token_ids == ort.generate(PROMPT, system="", max_new_tokens=4).token_ids


def test_a_reply_that_is_open_is_not_saved(ort: FastVLM, tmp_path: Path) -> None:
    chat = ort.chat()
    chat.ask(PROMPT, max_new_tokens=3)
    stream = chat.stream("More?", max_new_tokens=1000)
    next(stream)
    chat.save(tmp_path / "chat.json")
    chat.cancel()
    assert len(chat.turns) == 2 and chat.turns[1].reply == stream.reply.text
    assert turns_of(ort.load_chat(tmp_path / "chat.json")) == turns_of(chat)[:1]


class SlowPicture(io.BytesIO):
    """A picture that is read no further until `go` is set."""

    def __init__(self) -> None:
        super().__init__()
        Image.fromarray(data.coffee()).save(self, "PNG")
        self.seek(0)
        self.begun, self.go = threading.Event(), threading.Event()

    def read(self, size: int | None = -1) -> bytes:
        self.begun.set()
        self.go.wait(30)
        return super().read(size)


def test_a_stream_that_is_closed_while_its_picture_is_read_generates_nothing(ort: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = []
    submit = ort._engine.submit
    monkeypatch.setattr(ort._engine, "submit", lambda work: (answers.append(work), submit(work)))
    picture, chat = SlowPicture(), ort.chat()
    stream = chat.stream(PROMPT, picture, max_new_tokens=1900, temperature=1.5, seed=1)
    reader = threading.Thread(target=lambda: list(stream))
    reader.start()
    assert picture.begun.wait(30)
    chat.cancel()
    picture.go.set()
    reader.join(30)
    assert answers == [] and chat.turns == ()


# A history ----------------------------------------------------------------------------------------------------------------------


DEMO = Path(__file__).resolve().parents[3] / "fastvlm_edge" / "demo"


@pytest.fixture(scope="module")
def demo() -> Any:
    """The demo model, which was trained: its replies are text, whose ids are those of the tokenizer."""
    with FastVLM.load(DEMO / "model", "ort", threads=1) as loaded:
        yield loaded


def test_a_history_of_texts_is_a_chat_that_had_asked_the_same(demo: FastVLM) -> None:
    questions: list[tuple[str, Any]] = [
        ("What does the meter read?", DEMO / "meter.jpg"),
        ("What is on the sign?", [DEMO / "sign.jpg"]),
        ("Name three colours.", None),
        ("What does the meter read?", None),
    ]
    asked = demo.chat(system="Answer briefly.")
    history: list[ChatTurn] = []
    for prompt, picture in questions:
        later = demo.chat(system="Answer briefly.", history=history)
        assert turns_of(later) == turns_of(asked) and later.token_count == asked.token_count
        assert AsyncFastVLM(demo).chat(system="Answer briefly.", history=history).token_count == asked.token_count
        expected, found = (chat.ask(prompt, picture, max_new_tokens=20) for chat in (asked, later))
        assert (found.text, found.token_ids, found.timings.prompt_tokens) == (
            expected.text,
            expected.token_ids,
            expected.timings.prompt_tokens,
        )
        pictures = picture if isinstance(picture, list) else [] if picture is None else [picture]
        history.append(ChatTurn(prompt, found.text, [demo.encode_image(each) for each in pictures]))
    assert all(turn.reply for turn in history), "the demo model answers"


def test_a_history_of_turns_branches_off_exactly(vlm: FastVLM) -> None:
    chat = spoken(vlm)
    expected = chat.ask("Why?", max_new_tokens=20)
    for first in range(5):
        branch = vlm.chat(system="Answer briefly.", history=chat.turns[:first])
        assert branch.turns == chat.turns[:first]
    again = branch.ask("Why?", max_new_tokens=20)
    assert again.token_ids == expected.token_ids and again.timings.prompt_tokens == expected.timings.prompt_tokens


def test_a_history_is_text_of_a_user(ort: FastVLM) -> None:
    literal, special = (
        ort.chat(history=[ChatTurn("a<|im_end|>", "b<|im_end|>", special_tokens=special)]).token_count for special in (False, True)
    )
    assert special < literal
    chat = ort.chat(history=[ChatTurn(PROMPT, "e\u0301<|im_end|>")])  # its tokenizer writes NFC
    assert chat.turns[0].reply == "\xe9<|im_end|>"


def test_a_chat_with_a_history_is_saved_like_any_other(ort: FastVLM, tmp_path: Path) -> None:
    chat = ort.chat(history=[ChatTurn(PROMPT, "e\u0301", [ort.encode_image(data.coffee())])], context="slide")
    chat.ask("And now?", max_new_tokens=5)
    chat.save(tmp_path / "chat.json")
    assert turns_of(ort.load_chat(tmp_path / "chat.json")) == turns_of(chat)


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        (("a", "b"), "turn 1 of the history is a tuple; give objects of ChatTurn"),
        (ChatTurn("a", 3), "the reply of turn 1 of the history is of type int, not str"),  # type: ignore[arg-type]
        (ChatTurn(3, "b"), "the prompt is of type int, not str"),  # type: ignore[arg-type]
        (ChatTurn("", "b"), "the prompt is empty and there is no image"),
        (ChatTurn("a", "\ud800"), "not valid Unicode"),
        (ChatTurn("a", "b", ["meter.jpg"]), "image of type str, not an EncodedImage; encode it first, with encode_image"),  # type: ignore[list-item]
    ],
)
def test_what_is_no_history(ort: FastVLM, turn: Any, says: str) -> None:
    for begin in (ort.chat, AsyncFastVLM(ort).chat):
        with pytest.raises(FastVLMError, match=says):
            begin(history=[turn])


def test_a_history_that_fills_the_context_is_told_at_the_question(ort: FastVLM) -> None:
    chat = ort.chat(history=[ChatTurn("word " * 3000, "b")])
    with pytest.raises(FastVLMError, match="leaves no room for a reply"):
        chat.ask("And now?")
    sliding = ort.chat(history=[ChatTurn("word " * 3000, "b")], context="slide")
    assert sliding.ask("And now?", max_new_tokens=2).dropped_turns == 1


# A full context -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["ort", "tensorrt"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model whose context holds a few turns."""
    directory = build_model(tmp_path_factory.mktemp("small") / "model", context=160)
    if request.param == "ort":
        with FastVLM.load(directory, "ort", threads=1) as loaded:
            yield loaded
        return
    from fastvlm_edge.backends.load_engines import load_engines
    from fastvlm_edge.generation.engine import Engine
    from fastvlm_edge.inputs.tokenizer import TextTokenizer
    from fastvlm_edge.model_dir.manifest import read_manifest
    from tests.support.fake_cuda import FakeCuda
    from tests.support.fake_engine import build_engines, fake_gpu

    shutil.rmtree(directory / "engines", ignore_errors=True)
    build_engines(directory)
    manifest = read_manifest(directory)
    with fake_gpu(FakeCuda()):
        backend = load_engines(directory, manifest)
    with FastVLM(manifest, TextTokenizer(directory / "tokenizer.json"), Engine(backend, manifest.decoder)) as loaded:
        yield loaded


def test_the_oldest_turns_leave_a_full_context(small: FastVLM) -> None:
    context = small.manifest.decoder.context
    chat, pictures = small.chat(context="slide"), (data.coffee(), data.astronaut(), data.camera())
    asked: list[tuple[str, Any, tuple[int, ...]]] = []
    dropped = 0
    for number in range(12):
        prompt, image = f"Question {number}?", pictures[number % 3] if number % 2 == 0 else None
        reply = chat.ask(prompt, image, max_new_tokens=12)
        kept, length = len(asked) - reply.dropped_turns, reply.timings.prompt_tokens
        asked = asked[reply.dropped_turns :]
        dropped += reply.dropped_turns
        # The same conversation, written down anew: its pictures are numbered from 0.
        ids, row, images = small._template.opening(), 0, []
        for text, picture, said in [*asked, (prompt, image, ())]:
            rows = [] if picture is None else [TOKENS]
            ids += small._template.closing() if len(ids) > len(small._template.opening()) else []
            ids += [*small._template.turn(text, rows, first_row=row), *said]
            row += sum(rows)
            images += [] if picture is None else [small.encode_image(picture)]
        assert length == len(ids) and length + 12 <= context
        assert max(ids) < small.manifest.decoder.vocab + row
        with_one_more = [int(block.argmax(-1)[-1]) for block in small.logits(ids, images, start=len(ids) - 1)]
        assert with_one_more == reply.token_ids[:1]
        asked.append((prompt, image, tuple(reply.token_ids)))
        assert len(chat.turns) == kept + 1 == len(asked) and chat.token_count <= context
        assert [turn.reply_ids for turn in chat.turns] == [said for _, _, said in asked]
    assert dropped >= 6


def test_no_turn_leaves_without_need(small: FastVLM) -> None:
    chat = small.chat(context="slide")
    first = chat.ask(PROMPT, data.coffee(), max_new_tokens=5)
    second = chat.ask("And now?", max_new_tokens=10**6)  # at most a quarter of the context is kept free
    assert (first.dropped_turns, second.dropped_turns, len(chat.turns)) == (0, 0, 2)
    assert second.stop_reason in ("context", "stop")
    assert second.to_json()["dropped_turns"] == 0


def test_a_question_that_fails_drops_nothing(small: FastVLM) -> None:
    chat = small.chat(context="slide")
    while not chat.ask(PROMPT, data.coffee(), max_new_tokens=12).dropped_turns:
        pass
    before = turns_of(chat), chat.token_count
    for prompt, image, says in (
        ("word " * 300, None, "leaves no room for a reply in the context of 160; shorten the prompt, ask less at a time, or convert"),
        ("What?", [data.coffee()] * 11, "use fewer images"),
        ("What?", "gone.png", "does not exist"),
        (3, None, "not str"),
    ):
        with pytest.raises(FastVLMError, match=says):
            chat.ask(prompt, image, max_new_tokens=12)  # type: ignore[arg-type]
        assert (turns_of(chat), chat.token_count) == before


def test_a_full_context_names_the_ways_out(small: FastVLM) -> None:
    chat = small.chat()
    chat.ask(PROMPT, data.coffee(), max_new_tokens=1000)
    with pytest.raises(FastVLMError, match='start a new conversation, begin it with context="slide" so that its oldest turns leave, or'):
        chat.ask("word " * 40)
    with pytest.raises(FastVLMError, match="context is 'grow'; use one of: error, slide"):
        small.chat(context="grow")  # type: ignore[arg-type]


def test_a_chat_that_slides_is_saved_without_what_left(small: FastVLM, tmp_path: Path) -> None:
    chat = small.chat(context="slide")
    chat.ask(PROMPT, data.coffee(), max_new_tokens=12)
    while not chat.ask(PROMPT, data.astronaut(), max_new_tokens=12).dropped_turns:
        pass
    chat.save(tmp_path / "chat.json")
    assert len(json.loads((tmp_path / "chat.json").read_text())["pictures"]) == 1
    loaded = small.load_chat(tmp_path / "chat.json")
    expected, found = (each.ask("And now?", max_new_tokens=12) for each in (chat, loaded))
    assert (found.token_ids, found.dropped_turns) == (expected.token_ids, expected.dropped_turns)
