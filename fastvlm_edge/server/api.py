"""Requests and answers of the OpenAI API as types. They validate what comes in, and describe it in `/openapi.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol, TypeAlias, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.requests import ClientDisconnect, Request

from fastvlm_edge.generation.sampling import LEAST_PENALTY, MAX_LOGPROBS, MAX_STOP_CHARACTERS, MAX_TOP_K, MOST_PENALTY
from fastvlm_edge.server.errors import ClientGone, RequestError

T = TypeVar("T")

MAX_STOPS = 4
"""Stop strings of a request, as in the OpenAI API."""
MOST_VALUES = 1 << 18
"""Commas and opening brackets in a body, which bound its JSON values: each of them may take 2 bytes there, and 80 in memory."""


class Taken(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An object in a request. A field that is null counts as absent."""


class Given(msgspec.Struct, kw_only=True):
    """An object in an answer."""


# Messages -----------------------------------------------------------------------------------------------------------------------


class TextPart(Taken, tag_field="type", tag="text"):
    """A text in a message."""

    text: str


_DETAIL = (
    "The size at which the model sees it: `low` is its smallest, `high` and `original` are its largest. `auto`, the default, is what the "
    "server was started with: a small size first and a larger one if the answer is not sure, where that was fitted, else the default size."
)
Detail: TypeAlias = Annotated[Literal["auto", "low", "high", "original"], Meta(description=_DETAIL)]


class ImageUrl(Taken):
    """Where a picture is."""

    url: str
    """`data:image/jpeg;base64,...`; https: and file: only where the server allows them."""
    detail: Detail | None = None


class ImagePart(Taken, tag_field="type", tag="image_url"):
    """A picture in a message. The model sees the pictures of a message before its text, in their order."""

    image_url: ImageUrl


class VideoUrl(Taken):
    """Where a clip is."""

    url: str
    """As of a picture."""
    detail: Detail | None = None
    """Of all its frames."""


class VideoPart(Taken, tag_field="type", tag="video_url"):
    """A clip in a message: frames spread over it, as pictures in their order."""

    video_url: VideoUrl


class SystemMessage(Taken, tag_field="role", tag="system"):
    """The system prompt. Without one, the model gets that of its manifest; an empty one is none."""

    content: str | list[TextPart]


class DeveloperMessage(Taken, tag_field="role", tag="developer"):
    """The same as a system message."""

    content: str | list[TextPart]


class UserMessage(Taken, tag_field="role", tag="user"):
    """A question. Several in a row are one, joined by a line break."""

    content: str | list[TextPart | ImagePart | VideoPart]


class AssistantMessage(Taken, tag_field="role", tag="assistant"):
    """The reply to the question before it."""

    content: str | list[TextPart]


Message: TypeAlias = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage

# What the reply must look like --------------------------------------------------------------------------------------------------


class TextFormat(Taken, tag_field="type", tag="text"):
    """Any text."""


class JsonObjectFormat(Taken, tag_field="type", tag="json_object"):
    """Any JSON object."""


class JsonSchema(Taken):
    """A JSON schema. It is always followed strictly."""

    schema: dict[str, Any]
    name: str | None = None
    """Has no effect."""
    description: str | None = None
    """Has no effect: say in the question what is wanted."""
    strict: bool | None = None
    """Has no effect."""


class JsonSchemaFormat(Taken, tag_field="type", tag="json_schema"):
    """JSON that is valid for a schema."""

    json_schema: JsonSchema


class StructuredOutputs(Taken):
    """One of these, as vLLM takes them."""

    json: dict[str, Any] | str | None = None
    """A JSON schema, also as JSON text."""
    json_object: bool | None = None
    """Any JSON object, if it is true."""
    regex: str | None = None
    """In the syntax of Rust's regex."""
    choice: list[str] | None = None
    grammar: str | None = None
    """In llguidance's Lark syntax."""


# The request --------------------------------------------------------------------------------------------------------------------


class StreamOptions(Taken):
    """What a stream has beside the text."""

    include_usage: bool | None = None
    """One more chunk at the end, with `usage`."""
    include_obfuscation: bool | None = None
    """Has no effect: there is none."""


class VideoOptions(Taken):
    """How clips are read."""

    num_frames: Annotated[int, Meta(ge=1)]
    """Frames of each clip, at most as many as pictures are allowed."""


class MediaOptions(Taken):
    """How pictures and clips are read, as in vLLM."""

    video: VideoOptions | None = None


Stop: TypeAlias = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class ChatRequest(Taken):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    """System messages, then questions and replies by turns; the last one is a question."""
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    """The same as `max_completion_tokens`."""
    temperature: Annotated[float, Meta(ge=0)] | None = None
    """0, the default, always takes the most likely token."""
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=MAX_TOP_K)] | None = None
    """Sample from the k most likely tokens; -1 and 0 mean as many as there are candidates, which is 64."""
    repetition_penalty: Annotated[float, Meta(ge=LEAST_PENALTY, le=MOST_PENALTY)] | None = None
    """Values above 1 make tokens less likely that are in the conversation already."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    """Choice i of several uses seed + i."""
    stop: Stop | Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None = None
    n: Annotated[int, Meta(ge=1)] | None = None
    """Number of replies, at most the slots of the server."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    """Needs `logprobs`."""
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    media_io_kwargs: MediaOptions | None = None
    # Without effect on the reply.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prediction: Any = None
    parallel_tool_calls: bool | None = None
    request_id: str | None = None


NO_TOOLS = "tools are not supported; ask for JSON with response_format instead"
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), NO_TOOLS),
    "tool_choice": (("none", "auto"), NO_TOOLS),
    "functions": (([],), NO_TOOLS),
    "function_call": (("none", "auto"), NO_TOOLS),
    "audio": ((), "audio is not supported"),
    "modalities": ((["text"],), "replies are text only"),
    "presence_penalty": ((0,), "only repetition_penalty is supported"),
    "frequency_penalty": ((0,), "only repetition_penalty is supported"),
    "length_penalty": ((1,), "there is no beam search"),
    "use_beam_search": ((False,), "there is no beam search"),
    "best_of": ((1,), "only n is supported"),
    "min_p": ((0,), "only top_k and top_p are supported"),
    "min_tokens": ((0,), "a shortest reply is not supported"),
    "ignore_eos": ((False,), "the model decides where a reply ends"),
    "logit_bias": (({},), "biases are not supported; give choices with structured_outputs"),
    "stop_token_ids": (([],), "only stop strings are supported"),
    "chat_template": ((), "the model's own conversation format is used"),
    "chat_template_kwargs": (({},), "the model's own conversation format is used"),
    "add_generation_prompt": ((True,), "the model's own conversation format is used"),
    "continue_final_message": ((False,), "the last message is a question"),
    "echo": ((False,), "the prompt is not repeated"),
    "reasoning_effort": (("none",), "the model does not reason"),
    "verbosity": (("medium",), "say in the question how long the reply should be"),
    "web_search_options": ((), "there is no web search"),
    "guided_json": ((), "give structured_outputs, with json"),
    "guided_regex": ((), "give structured_outputs, with regex"),
    "guided_choice": ((), "give structured_outputs, with choice"),
    "guided_grammar": ((), "give structured_outputs, with grammar"),
}
"""Fields that are refused, unless they have a value that changes nothing -> those values, and why."""
_EMPTY = ("tool_calls", "annotations")
"""Fields of a message that may be an empty list, as in replies that a client sends back."""


def decode(body: bytes, kind: type[T], neutral: Mapping[str, tuple[tuple[Any, ...], str]] = NEUTRAL) -> T:
    """A request from its JSON. Raises RequestError that names what is wrong: nothing that would change the reply is ignored."""
    if sum(map(body.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise RequestError(413, f"the body has more than {MOST_VALUES:,} commas and brackets", code="request_too_large")
    try:
        document = msgspec.json.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON ({error})", code="invalid_json") from None
    if not isinstance(document, dict):
        raise RequestError(400, "the body is not a JSON object", code="invalid_json")
    document = _without_null(document)
    for name in [name for name in document if name in neutral]:
        values, why = neutral[name]
        if document.pop(name) not in values:
            raise RequestError(400, f"{name} is not supported: {why}", param=name, code="unsupported_parameter")
    messages = document.get("messages")
    if isinstance(messages, list):
        document["messages"] = [_without_null(message, _EMPTY) if isinstance(message, dict) else message for message in messages]
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except RecursionError:
        raise RequestError(400, "the body is nested too deeply", code="invalid_json") from None


async def read(request: Request, kind: type[T], neutral: Mapping[str, tuple[tuple[Any, ...], str]] = NEUTRAL) -> T:
    """The body of a request. A web page of another origin cannot send this content type without being allowed to.

    Raises RequestError, or ClientGone if the body does not end.
    """
    sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if sent != "application/json":
        raise RequestError(415, f"the content type is {sent or 'not given'}; send JSON with content-type: application/json")
    try:
        body = await request.body()
    except ClientDisconnect:
        raise ClientGone from None
    return decode(body, kind, neutral)


class _Streamed(Protocol):
    """The fields that `check_combinations` reads."""

    stream: bool | None
    temperature: float | None

    @property
    def stream_options(self) -> object: ...


def check_combinations(asked: _Streamed, **sampled: bool) -> None:
    """Raise RequestError for options that would be ignored. `sampled` says which options of sampling a request has."""
    if asked.stream_options is not None and not asked.stream:
        raise RequestError(400, "stream_options needs stream to be true", param="stream_options")
    for name, given in sampled.items():
        if given and asked.temperature is None:
            message = f"{name} without temperature: the most likely token is always taken; give temperature, such as 0.7"
            raise RequestError(400, message, param=name)


def _without_null(values: dict[str, Any], empty: tuple[str, ...] = ()) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None and not (name in empty and value == [])}


def _invalid(message: str) -> RequestError:
    """What msgspec says, such as "Expected `int`, got `str` - at `$.seed`", with the field as `param`."""
    what, _, place = message.partition(" - at ")
    param = place.strip("`").removeprefix("$").removeprefix(".")
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", what, re.DOTALL)
    missing = re.fullmatch(r"Object missing required field `(.*)`", what, re.DOTALL)
    if unknown or missing:
        name = (unknown or missing).group(1)  # type: ignore[union-attr]
        param = f"{param}.{name}" if param else name
        what = "it is not a field of the API" if unknown else "it is missing"
    code = "unsupported_parameter" if unknown else "invalid_value"
    return RequestError(400, f"{param or 'the body'}: {what}"[:500], param=param or None, code=code)


# The answer ---------------------------------------------------------------------------------------------------------------------


class PromptTokensDetails(Given):
    """What of the prompt was known already."""

    cached_tokens: int


class Usage(Given):
    """Tokens of a request. Those of pictures are prompt tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Timings(Given):
    """Where the time went. The names up to `predicted_per_second` are llama-server's."""

    cache_n: int
    """Tokens of the prompt that were known already."""
    prompt_n: int
    """Tokens of the prompt that were computed."""
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    """Tokens of the reply."""
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float
    preprocess_ms: float
    """Reading, decoding and resizing the pictures."""
    vision_ms: float
    """Running the vision encoder; 0 for pictures that were sent before."""
    queue_ms: float
    """Waiting for a place."""
    image_size: int | None
    """Pixels per side of the last picture as the model saw it; null without a picture."""
    tried_sizes: list[int]
    """The sizes of the cascade at which the question was asked, in order. The answer is that at the last one; empty without a cascade."""


class TokenAlternative(Given):
    """A token and the natural logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TokenAlternative):
    """A token of the reply, and the most likely ones at its place."""

    top_logprobs: list[TokenAlternative]


class Logprobs(Given):
    """Those of the tokens of a reply, or of a part of it."""

    content: list[TokenLogprob]
    refusal: None = None


FinishReason: TypeAlias = Literal["stop", "length"]


class ReplyMessage(Given):
    """The reply."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class Choice(Given):
    """One reply, and why it ended: the model or a stop string ended it, or the most tokens or the context did."""

    index: int
    message: ReplyMessage
    logprobs: Logprobs | None
    finish_reason: FinishReason


class ChatCompletion(Given):
    """The answer to a request without `stream`."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage
    timings: Timings
    object: Literal["chat.completion"] = "chat.completion"


class Delta(Given, omit_defaults=True):
    """A part of a reply."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Given):
    """A part of one reply."""

    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(Given):
    """The data of one event of a stream. The last one has `timings`, and `usage` and no choice if usage was asked for."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    timings: Timings | UnsetType = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class Architecture(Given):
    """What goes into a model and what comes out."""

    input_modalities: list[str]
    output_modalities: list[str]


class Model(Given):
    """A model that is served."""

    id: str
    created: int
    max_model_len: int
    """Tokens of a conversation, pictures and reply included."""
    architecture: Architecture
    owned_by: str = "fastvlm-edge"
    object: Literal["model"] = "model"


class Models(Given):
    """The answer of `GET /v1/models`."""

    data: list[Model]
    object: Literal["list"] = "list"


class Health(Given):
    """The answer of `GET /health` when the model is ready."""

    status: Literal["ok"] = "ok"
