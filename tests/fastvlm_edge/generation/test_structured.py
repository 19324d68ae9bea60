"""Replies that are held to a format: they match it, and are those of a model whose whole row is masked at every step. Log probabilities."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm_edge import EncodedImage, FastVLM, FastVLMError, Reply, SamplingParams, TokenLogProb
from fastvlm_edge.backends.protocol import LOGIT_POSITIONS, Backend
from fastvlm_edge.errors import PackageError
from fastvlm_edge.generation.answer_format import answer_format
from fastvlm_edge.generation.grammar import GrammarState, compile_grammar
from fastvlm_edge.generation.sampling import MAX_TOP_K, Sampler
from fastvlm_edge.generation.vlm import load_parts
from tests.support.fake_model import build_model

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

DEMO = Path(__file__).resolve().parents[3] / "fastvlm_edge" / "demo"
PROMPT = "What does the meter read?"
LONG = {
    "type": "object",
    "properties": {"reading of the meter": {"type": "string", "pattern": "^[0-9]{3}$"}, "unit of the reading": {"const": "kWh"}},
    "required": ["reading of the meter", "unit of the reading"],
    "additionalProperties": False,
}
WORDS = ["yes", "no", "the meter is broken", "the meter is hidden", "Zähler", "déjà vu", "<|im_end|>", "\U0001f600", 'say "x"', "a", "ab"]
PIECES = ["[0-9]{1,4}", "(yes|no)", "déjà", " kWh", "[A-Z]?", "x{1,3}", r"\.", "(?i:abc)", "[^\\n]{0,5}", "The meter reads "]


def random_schema(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema whose answers are bounded."""
    kind = chance.choice(["integer", "boolean", "enum", "string", "array", "object"][: 4 if depth == 2 else 6])
    if kind == "integer":
        return {"type": "integer", "minimum": chance.randint(-50, 5), "maximum": chance.randint(6, 5000)}
    if kind == "enum":
        return {"enum": chance.sample([*WORDS, 1, 2.5, None, True], chance.randint(1, 4))}
    if kind == "string":
        return {"type": "string", "maxLength": chance.randint(1, 8)}
    if kind == "array":
        return {"type": "array", "items": random_schema(chance, depth + 1), "minItems": chance.randint(0, 1), "maxItems": 2}
    if kind == "object":
        properties = {name: random_schema(chance, depth + 1) for name in chance.sample(WORDS, chance.randint(1, 3))}
        required = chance.sample([*properties], chance.randint(0, len(properties)))
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": kind}


def random_format(chance: random.Random) -> dict[str, Any]:
    kind = chance.choice(["json_schema", "json_schema", "choices", "regex"])
    if kind == "json_schema":
        return {kind: random_schema(chance)}
    if kind == "choices":
        return {kind: chance.sample(WORDS, chance.randint(1, 5))}
    return {kind: "".join(chance.choices(PIECES, k=chance.randint(1, 4)))}


def matches(wanted: dict[str, Any], text: str) -> bool:
    """Whether a reply has its format."""
    ((kind, value),) = wanted.items()
    if kind == "json_schema":
        jsonschema.Draft202012Validator(value).validate(json.loads(text))
        return True
    return text in value if kind == "choices" else re.fullmatch(value, text) is not None


class Masked:
    """Recomputes a reply one id a step, with the mask of its grammar over the whole row."""

    def __init__(self, directory: Path) -> None:
        self.manifest, self._tokenizer, self._backend = load_parts(directory, "ort", threads=1)

    def check(self, ids: list[int], reply: Reply, wanted: dict[str, Any], **sampling: Any) -> None:
        """Raise AssertionError unless every id of the reply is that of the masked row, and its end too."""
        answer = answer_format(**wanted)
        assert answer is not None
        state = compile_grammar(self._tokenizer, self.manifest, answer).begin()
        sampler = Sampler(SamplingParams(**sampling), self.manifest.text.token_count, ids)
        self._backend.reset()
        step = list(ids)
        for token_id in [*reply.token_ids, None]:
            if state.ended:
                break
            logits = self._backend.step(step, want_logits=True).logits
            assert logits is not None
            allowed = state.allowed()
            row = np.where(allowed, logits[0][: len(allowed)], -np.inf)
            order = np.argsort(-row, kind="stable")[:MAX_TOP_K]
            chosen = sampler.next(row[order], order, row)
            if token_id is None:
                assert chosen in self.manifest.text.stop_ids
                return
            assert chosen == token_id
            state.accept(token_id)
            step = [token_id]
        assert token_id is None, "the reply goes on after the end of its grammar"


@pytest.fixture(scope="module", params=["tiny", "demo"])
def directory(request: pytest.FixtureRequest, model_dir: Path) -> Path:
    return model_dir if request.param == "tiny" else DEMO / "model"


@pytest.fixture(scope="module")
def masked(directory: Path) -> Masked:
    return Masked(directory)


@pytest.fixture
def engine(directory: Path) -> Iterator[FastVLM]:
    with FastVLM.load(directory, "ort", threads=1, slots=4) as loaded:
        yield loaded


@pytest.fixture
def tiny(model_dir: Path) -> Iterator[FastVLM]:
    with FastVLM.load(model_dir, "ort", threads=1, slots=4) as loaded:
        yield loaded


def prompt_ids(vlm: FastVLM, prompt: str, *images: EncodedImage) -> list[int]:
    return [*vlm._template.opening(), *vlm._template.turn(prompt, [image.rows for image in images])]


def steps_of(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of ids of each call of the backend from here on."""
    found: list[int] = []
    backend: Backend = vlm._engine.backend
    step, decode = backend.step, backend.decode
    monkeypatch.setattr(backend, "step", lambda ids, *images, **options: found.append(len(ids)) or step(ids, *images, **options))
    monkeypatch.setattr(backend, "decode", lambda ids, **options: found.append(len(ids)) or decode(ids, **options))
    return found


# Every answer has its format, and is that of the masked row --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_greedy_replies_are_those_of_the_masked_row_alone_and_together(engine: FastVLM, masked: Masked, seed: int) -> None:
    chance = random.Random(seed)
    jobs = [(f"{PROMPT} {number}", random_format(chance)) for number in range(12)]

    def ask(job: tuple[str, dict[str, Any]]) -> Reply:
        return engine.generate(job[0], max_new_tokens=300, **job[1])

    alone = [ask(job) for job in jobs]
    with ThreadPoolExecutor(6) as pool:
        plain = pool.submit(engine.generate, "Name three colours.", max_new_tokens=200)
        together = list(pool.map(ask, jobs))
    for job, one, other in zip(jobs, alone, together, strict=True):
        for reply in (one, other):
            assert reply.stop_reason == "stop"
            assert matches(job[1], reply.text), (job, reply.text)
            masked.check(prompt_ids(engine, job[0]), reply, job[1])
    assert plain.result().token_ids == engine.generate("Name three colours.", max_new_tokens=200).token_ids


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0, "seed": 3},
        {"temperature": 2.0, "top_k": 3, "seed": 4},
        {"temperature": 1.5, "top_p": 0.7, "seed": 5},
        {"repetition_penalty": 1.7},
        {"temperature": 1.2, "repetition_penalty": 1.3, "seed": 6},
    ],
    ids=str,
)
def test_sampled_replies_are_those_of_the_masked_row_alone_and_together(tiny: FastVLM, model_dir: Path, sampling: dict[str, Any]) -> None:
    chance, masked = random.Random(7), Masked(model_dir)
    jobs = [(f"{PROMPT} {number}", random_format(chance)) for number in range(12)]

    def ask(job: tuple[str, dict[str, Any]]) -> Reply:
        return tiny.generate(job[0], max_new_tokens=300, **job[1], **sampling)

    alone = [ask(job) for job in jobs]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(ask, jobs))
    assert [reply.token_ids for reply in together] == [reply.token_ids for reply in alone]
    for job, reply in zip(jobs, alone, strict=True):
        assert reply.stop_reason == "stop" and matches(job[1], reply.text)
        masked.check(prompt_ids(tiny, job[0]), reply, job[1], **sampling)


def test_every_backend_and_every_way_to_ask_holds_the_format(vlm: FastVLM) -> None:
    wrapped = {"type": "json_schema", "json_schema": {"name": "reading", "schema": LONG}}
    chat = vlm.chat()
    texts = [vlm.generate(PROMPT, json_schema=LONG).text, "".join(vlm.stream(PROMPT, response_format=wrapped))]
    texts += [chat.ask(PROMPT, json_schema=LONG).text, "".join(chat.stream(PROMPT, json_schema=LONG))]
    assert texts[0] == texts[1] == texts[2]
    for text in texts:
        jsonschema.validate(json.loads(text), LONG)
    assert chat.ask(PROMPT, choices=["yes", "no"]).text in ("yes", "no")
    assert re.fullmatch("[0-9]{4}", chat.ask(PROMPT, regex="[0-9]{4}").text)
    assert chat.ask(PROMPT, grammar='start: "reads " /[0-9]{2}/').text.startswith("reads ")
    assert isinstance(json.loads(vlm.generate(PROMPT, response_format={"type": "json_object"}, max_new_tokens=2000).text), dict)


def test_a_picture_is_answered_in_a_format() -> None:
    with FastVLM.load(DEMO / "model", "ort", threads=1) as demo:
        colours = ["red", "green", "purple", "blue"]
        assert demo.generate("What colour is the circle?", DEMO / "shapes.jpg", choices=colours).text == "purple"
        assert (
            demo.generate("What does the meter read?", DEMO / "meter.jpg", regex="[0-9]+").text
            == demo.generate("What does the meter read?", DEMO / "meter.jpg").text
        )


# Steps --------------------------------------------------------------------------------------------------------------------------


def test_forced_ids_take_no_step_of_their_own(tiny: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = steps_of(tiny, monkeypatch)
    reply = tiny.generate(PROMPT, json_schema=LONG)
    decoding = steps[1:]
    assert sum(decoding) <= len(reply.token_ids), "no id is appended twice"
    assert len(decoding) < len(reply.token_ids) / 2 and max(decoding) <= LOGIT_POSITIONS
    assert reply.timings.new_tokens == len(reply.token_ids)


def test_the_rows_of_a_step_of_forced_ids_are_not_kept_in_memory(tiny: FastVLM) -> None:
    """16 rows of logits of the real vocabulary are 10 MB, and there are 15 such sizes."""
    tiny.generate(PROMPT, json_schema=LONG)
    backend: Any = tiny._engine.backend
    kept = [(rows, want_logits) for _, _, _, rows, want_logits in backend._decoder._calls]
    assert (1, True) in kept and not [rows for rows, want_logits in kept if want_logits and rows > 1]


def test_a_complete_answer_ends_without_another_step(tiny: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tiny._tokenizer.encode("a")
    steps = steps_of(tiny, monkeypatch)
    reply = tiny.generate(PROMPT, choices=["a"])
    assert (reply.token_ids, reply.stop_reason) == (tokens, "stop")
    assert len(steps) == 1


@pytest.mark.parametrize("most", [1, 2, 7, 20])
def test_a_reply_that_is_cut_off_is_the_beginning_of_the_whole_one(tiny: FastVLM, most: int) -> None:
    whole = tiny.generate(PROMPT, json_schema=LONG)
    cut = tiny.generate(PROMPT, json_schema=LONG, max_new_tokens=most)
    assert (cut.token_ids, cut.stop_reason) == (whole.token_ids[:most], "length")
    exact = tiny.generate(PROMPT, json_schema=LONG, max_new_tokens=len(whole.token_ids))
    assert (exact.token_ids, exact.stop_reason) == (whole.token_ids, "stop")


def test_forced_ids_never_leave_the_context(tmp_path: Path, tiny: FastVLM) -> None:
    whole = tiny.generate(PROMPT, json_schema=LONG)
    positions = len(prompt_ids(tiny, PROMPT))
    for room in (1, 2, 3, 9, len(whole.token_ids) - 1):
        with FastVLM.load(build_model(tmp_path / str(room), context=positions + room), "ort", threads=1) as small:
            reply = small.generate(PROMPT, json_schema=LONG)
            assert (reply.token_ids, reply.stop_reason) == (whole.token_ids[:room], "context")


def test_a_stop_string_among_forced_ids_leaves_a_chat_as_it_was_read(tiny: FastVLM) -> None:
    cut, other = tiny.chat(), tiny.chat()
    reply = cut.ask(PROMPT, json_schema=LONG, stop="the meter")
    assert (reply.text, reply.stop_reason, reply.stop_string) == ('{"reading of ', "stop", "the meter")
    assert other.ask(PROMPT, choices=['{"reading of ']).text == reply.text
    assert cut.ask("Why?", max_new_tokens=30).token_ids == other.ask("Why?", max_new_tokens=30).token_ids


# What is refused ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"json_schema": {"not": {}}}, "not"),
        ({"regex": "(?=a)b"}, "look-ahead"),
        ({"choices": []}, "no choices"),
        ({"grammar": "start: ("}, "grammar"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"regex": "a", "choices": ["a"]}, "one format"),
        ({"logprobs": 21}, "logprobs is 21; give at most 20"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"logprobs": True}, "logprobs is True"),
    ],
)
def test_what_cannot_be_kept_is_refused_at_the_call(tiny: FastVLM, options: dict[str, Any], says: str) -> None:
    calls: tuple[Callable[..., Any], ...] = (tiny.generate, tiny.stream, tiny.chat().ask, tiny.chat().stream)
    for call in calls:
        with pytest.raises(FastVLMError, match=says):
            call(PROMPT, "no-such-picture.jpg", **options)
    assert tiny.counters().requests == 0


def test_a_format_of_another_type_is_refused() -> None:
    with pytest.raises(FastVLMError, match="format is a dict"):
        SamplingParams(format={"type": "json_object"})  # type: ignore[arg-type]


def test_a_format_is_compiled_once(tiny: FastVLM) -> None:
    for _ in range(3):
        tiny.generate(PROMPT, json_schema=LONG, max_new_tokens=1)
    assert (tiny._grammar.cache_info().misses, tiny._grammar.cache_info().hits) == (1, 2)
    for number in range(40):
        tiny.generate(PROMPT, choices=[str(number)], max_new_tokens=1)
    assert tiny._grammar.cache_info().currsize < 40


def test_a_format_can_be_compiled_before_its_first_use(tiny: FastVLM) -> None:
    tiny.prepare_format()
    before = tiny._grammar.cache_info().misses
    tiny.prepare_format(regex="[0-9]{7}")
    tiny.generate(PROMPT, regex="[0-9]{7}", max_new_tokens=1)
    assert tiny._grammar.cache_info().misses == before + 1
    with pytest.raises(FastVLMError, match="the regex cannot be used"):
        tiny.prepare_format(regex="(")


def test_without_llguidance_a_format_is_refused_and_all_else_works(tiny: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(PackageError, match="structured answers need the package llguidance"):
        tiny.generate(PROMPT, choices=["yes"])
    assert tiny.generate(PROMPT, max_new_tokens=2).token_ids


@pytest.mark.parametrize("method", ["allowed", "accept", "forced"])
def test_a_grammar_that_becomes_too_complex_ends_only_its_own_reply(tiny: FastVLM, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    plain = tiny.generate(PROMPT, max_new_tokens=60)

    def fail(*_given: Any) -> Any:
        raise FastVLMError("the format of the answer became too complex")

    def ask_twice() -> None:
        for _ in range(2):  # the second time alone, so that forced ids are asked for
            tiny.generate(PROMPT, json_schema=LONG)

    stream = tiny.stream(PROMPT, max_new_tokens=60)
    text = next(stream)
    monkeypatch.setattr(GrammarState, method, fail)
    with pytest.raises(FastVLMError, match="too complex"):
        ask_twice()
    assert text + "".join(stream) == plain.text
    monkeypatch.undo()
    assert tiny.generate(PROMPT, json_schema=LONG).stop_reason == "stop"


# Log probabilities --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.5, "seed": 1, "top_k": 5},
        {"repetition_penalty": 1.5},
        {"json_schema": LONG},
        {"regex": "[0-9]{9}", "temperature": 2.0, "seed": 2},
    ],
    ids=str,
)
def test_log_probabilities_are_those_of_the_model_itself(vlm: FastVLM, options: dict[str, Any]) -> None:
    image = vlm.encode_image(DEMO / "meter.jpg")
    reply = vlm.generate(PROMPT, image, max_new_tokens=30, logprobs=5, **options)
    ids = [*prompt_ids(vlm, PROMPT, image), *reply.token_ids]
    start = len(ids) - len(reply.token_ids) - 1
    assert reply.logprobs is not None and reply.confidence is not None
    assert [each.token_id for each in reply.logprobs] == reply.token_ids
    expected = vlm.log_probabilities(ids, [image], start=start)
    np.testing.assert_allclose([each.logprob for each in reply.logprobs], expected, atol=2e-3)
    assert reply.confidence.least == pytest.approx(np.exp(min(each.logprob for each in reply.logprobs)))
    rows = np.concatenate(list(vlm.logits(ids[:-1], [image], start=start)))
    for each, row in zip(reply.logprobs, rows, strict=True):
        order = np.argsort(-row, kind="stable")[:5]
        assert [other.token_id for other in each.top] == order.tolist()
        known = row[each.token_id] - each.logprob
        np.testing.assert_allclose([other.logprob for other in each.top], row[order] - known, atol=2e-3)
        assert bytes(each.bytes) == vlm._tokenizer.token_bytes(each.token_id)
    shown = [bytes(each.bytes) for each in reply.logprobs if each.token_id not in vlm._tokenizer.special_ids]
    assert b"".join(shown).decode("utf-8", "replace") == reply.text


def test_log_probabilities_come_with_the_pieces(tiny: FastVLM) -> None:
    stream, pieces = tiny.stream(PROMPT, max_new_tokens=50, logprobs=2), 0
    found: list[TokenLogProb] = []
    assert stream.logprobs_from(0) == []
    for _ in stream:
        found += stream.logprobs_from(len(found))
        pieces += 1
        assert stream.logprobs_from(len(found)) == []
    reply = stream.reply
    assert reply.logprobs is not None and pieces > 5 and len(found) > 20
    assert found == reply.logprobs[: len(found)] and stream.logprobs_from(0) == found
    plain = tiny.stream(PROMPT, max_new_tokens=5)
    next(plain)
    assert plain.logprobs_from(0) == []


def test_log_probabilities_are_given_only_if_asked_for_and_fit_what_was_read(tiny: FastVLM) -> None:
    assert tiny.generate(PROMPT, max_new_tokens=3).logprobs is None
    assert tiny.generate(PROMPT, max_new_tokens=3).to_json()["logprobs"] is None
    bare = tiny.generate(PROMPT, max_new_tokens=3, logprobs=0)
    assert bare.logprobs is not None and [each.top for each in bare.logprobs] == [[], [], []]
    assert json.loads(json.dumps(bare.to_json()))["logprobs"][0]["bytes"] == bare.logprobs[0].bytes
    most = tiny.generate(PROMPT, max_new_tokens=1, logprobs=20).logprobs
    assert most is not None and len(most[0].top) == 20
    stream = tiny.stream(PROMPT, max_new_tokens=50, logprobs=1)
    next(stream)
    stream.close()
    assert stream.reply.logprobs is not None
    assert [each.token_id for each in stream.reply.logprobs] == stream.reply.token_ids
