"""Types of POST /v1/responses: the request, the answer and the events of a stream. They validate what comes in, and describe it.

As in `api.py`, a field that is not here is refused. Where a comment says so, a field has no effect.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta, field

from fastvlm_edge.generation.sampling import MAX_LOGPROBS
from fastvlm_edge.server.api import Detail, Given, JsonObjectFormat, Taken, TextFormat

# The request --------------------------------------------------------------------------------------------------------------------


class InputText(Taken, tag_field="type", tag="input_text"):
    """Text of a user or of the system."""

    text: str


class InputImage(Taken, tag_field="type", tag="input_image"):
    """A picture of a user."""

    image_url: str
    """`data:image/jpeg;base64,...`; https: and file: only where the server allows them."""
    detail: Detail | None = None
    file_id: None = None
    """There are no stored files."""


class EarlierText(Taken, tag_field="type", tag="output_text"):
    """Text of an earlier reply, as it came."""

    text: str
    annotations: list[Any] | None = None
    """Has no effect."""
    logprobs: list[Any] | None = None
    """Has no effect."""


Content: TypeAlias = InputText | InputImage | EarlierText


class InputMessage(Taken):
    """A message. Those of earlier replies may be sent as they came."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Content]
    type: Literal["message"] = "message"
    # Without effect on the reply.
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class JsonSchemaTextFormat(Taken, tag_field="type", tag="json_schema"):
    """JSON that is valid for a schema. It is always followed strictly."""

    schema: dict[str, Any]
    name: str | None = None
    """Has no effect."""
    description: str | None = None
    """Has no effect: say in the question what is wanted."""
    strict: bool | None = None
    """Has no effect."""


class TextOptions(Taken):
    """What the reply must look like."""

    format: TextFormat | JsonObjectFormat | JsonSchemaTextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseStreamOptions(Taken):
    """What a stream has beside the text."""

    include_obfuscation: bool | None = None
    """Has no effect: there is none."""


LOGPROBS = "message.output_text.logprobs"


class ResponsesRequest(Taken):
    """The body of `POST /v1/responses`. The whole conversation is in `input`, because nothing is stored."""

    input: str | Annotated[list[InputMessage], Meta(min_length=1)]
    """A question, or system messages, then questions and replies by turns; the last one is a question."""
    model: str | None = None
    instructions: str | None = None
    """The system prompt, before those in `input`."""
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    """0, the default, always takes the most likely token."""
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    include: list[str] | None = None
    """`message.output_text.logprobs` adds log probabilities. Others have no effect: there is nothing to add."""
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    """Needs `message.output_text.logprobs` in `include`."""
    text: TextOptions | None = None
    # Without effect on the reply.
    store: bool | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None


_STORED = "nothing is stored; send the whole conversation as input"
_NO_TOOLS = "tools are not supported; ask for JSON with text.format instead"
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "previous_response_id": ((), _STORED),
    "conversation": ((), _STORED),
    "prompt": ((), "there are no stored prompts; give instructions and input"),
    "background": ((False,), "nothing is stored; use stream"),
    "tools": (([],), _NO_TOOLS),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "reasoning": (({}, {"effort": None}, {"effort": "none"}, {"effort": None, "summary": None}), "the model does not reason"),
    "truncation": (("disabled",), "a conversation that does not fit is an error; leave out its oldest turns"),
}
"""Fields that are refused, unless they have a value that changes nothing -> those values, and why."""

# The answer ---------------------------------------------------------------------------------------------------------------------


class TopLogprob(Given):
    """One of the most likely tokens at a place."""

    token: str
    logprob: float
    bytes: list[int]


class OutputLogprob(Given):
    """A token of the reply, and the natural logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class OutputText(Given, tag_field="type", tag="output_text"):
    """The text of a reply."""

    text: str
    annotations: list[Any] = field(default_factory=list)
    logprobs: list[OutputLogprob] = field(default_factory=list)


class InputTokensDetails(Given):
    """Of the tokens before the reply."""

    cached_tokens: int


class OutputTokensDetails(Given):
    """Of the tokens of the reply."""

    reasoning_tokens: int = 0


class ResponseUsage(Given):
    """Tokens of a request."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class OutputMessage(Given, kw_only=True):
    """The reply."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class ResponseError(Given):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(Given):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens", "content_filter"]


class Reasoning(Given):
    """There is none."""

    effort: None = None
    summary: None = None


class ResponseObject(Given, kw_only=True):
    """The answer of POST /v1/responses."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: bool = False
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    model: str
    output: list[OutputMessage] = field(default_factory=list)
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    reasoning: Reasoning = field(default_factory=Reasoning)
    service_tier: None = None
    store: bool = False
    temperature: float
    text: dict[str, Any]
    """`format`, as in the request."""
    tool_choice: Literal["none"] = "none"
    tools: list[Any] = field(default_factory=list)
    top_logprobs: int = 0
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)


# The events of a stream ---------------------------------------------------------------------------------------------------------


class _Event(Given, tag_field="type"):
    sequence_number: int


class _OfResponse(_Event, kw_only=True):
    response: ResponseObject


class _OfItem(_Event, kw_only=True):
    output_index: int
    item: OutputMessage


class _OfText(_Event, kw_only=True):
    item_id: str
    output_index: int
    content_index: int


class Created(_OfResponse, kw_only=True, tag="response.created"):
    """The first event."""


class InProgress(_OfResponse, kw_only=True, tag="response.in_progress"):
    """The request is being worked on."""


class OutputItemAdded(_OfItem, kw_only=True, tag="response.output_item.added"):
    """The message of the reply begins."""


class ContentPartAdded(_OfText, kw_only=True, tag="response.content_part.added"):
    """The text of the message begins."""

    part: OutputText


class OutputTextDelta(_OfText, kw_only=True, tag="response.output_text.delta"):
    """The next piece of the text."""

    delta: str
    logprobs: list[OutputLogprob] = field(default_factory=list)


class OutputTextDone(_OfText, kw_only=True, tag="response.output_text.done"):
    """The whole text."""

    text: str
    logprobs: list[OutputLogprob] = field(default_factory=list)


class ContentPartDone(_OfText, kw_only=True, tag="response.content_part.done"):
    """The text of the message is complete."""

    part: OutputText


class OutputItemDone(_OfItem, kw_only=True, tag="response.output_item.done"):
    """The message of the reply is complete."""


class Completed(_OfResponse, kw_only=True, tag="response.completed"):
    """The last event of a reply that ended by itself."""


class Incomplete(_OfResponse, kw_only=True, tag="response.incomplete"):
    """The last event of a reply that was cut off."""


class Failed(_OfResponse, kw_only=True, tag="response.failed"):
    """The last event of a request that failed after its first event."""


Event: TypeAlias = (
    Created
    | InProgress
    | OutputItemAdded
    | ContentPartAdded
    | OutputTextDelta
    | OutputTextDone
    | ContentPartDone
    | OutputItemDone
    | Completed
    | Incomplete
    | Failed
)
