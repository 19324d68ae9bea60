"""POST /tokenize and /detokenize, in the shapes of llama-server and of vLLM, and GET /props, which says what runs."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.cascade import sizes_to_try
from fastvlm_edge.generation.chat_file import conversation_ids, text_of
from fastvlm_edge.generation.images import model_digest
from fastvlm_edge.generation.vlm import FastVLM
from fastvlm_edge.inputs.prompt import ChatTemplate
from fastvlm_edge.model_dir.manifest import visual_tokens
from fastvlm_edge.server.api import NEUTRAL as NEUTRAL_IN_CHATS
from fastvlm_edge.server.api import Given, Message, Taken, read
from fastvlm_edge.server.conversation import Question, least_rows, read_messages
from fastvlm_edge.server.errors import RequestError, refused
from fastvlm_edge.server.settings import Settings
from fastvlm_edge.server.state import ServerState
from fastvlm_edge.version import __version__

MOST_CHARACTERS = 1 << 20
"""Of a text to tokenize. It is far more than any context holds, and bounds time and memory."""
MOST_TOKENS = 1 << 17
"""To detokenize."""


_TEMPLATE = ("add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs")
NEUTRAL = {name: NEUTRAL_IN_CHATS[name] for name in _TEMPLATE}
"""Fields of `POST /tokenize` that are refused, unless they have a value that changes nothing."""


class TokenizeRequest(Taken):
    """The body of `POST /tokenize`: one of `content`, `prompt` and `messages`."""

    content: str | None = None
    """A text, as llama-server takes it."""
    prompt: str | None = None
    """A text, as vLLM takes it."""
    messages: list[Message] | None = None
    """A conversation as for `/v1/chat/completions`. Its pictures are counted, but not opened; of a cascade, at the first size."""
    model: str | None = None
    parse_special: bool | None = None
    """Read special tokens in a text as tokens; the default is what the server does with prompts."""
    with_pieces: bool | None = None
    """Each of `tokens` is an object with `id` and `piece`."""
    return_token_strs: bool | None = None
    """The text of each token, in `token_strs`."""
    # Without effect: the tokenizer adds none.
    add_special: bool | None = None
    add_special_tokens: bool | None = None


class TokenPiece(Given):
    """A token with its text, or with its bytes if they are not text."""

    id: int
    piece: str | list[int]


class TokenizeAnswer(Given):
    """The answer of `POST /tokenize`."""

    tokens: list[int | TokenPiece]
    count: int
    max_model_len: int
    """Tokens of a conversation, pictures and reply included."""
    token_strs: list[str] | UnsetType = UNSET


class DetokenizeRequest(Taken):
    """The body of `POST /detokenize`."""

    tokens: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=MOST_TOKENS)]
    model: str | None = None


class DetokenizeAnswer(Given):
    """The answer of `POST /detokenize`: the text, under llama-server's name and under vLLM's."""

    content: str
    prompt: str


class Backend(Given):
    """What runs the model."""

    name: str
    """`ort`, `ort-cuda` or `tensorrt`."""
    description: str


class Engines(Given):
    """The TensorRT engines that run, as their record (`build.json`) has them."""

    target: str
    library: str
    """`tensorrt` or `tensorrt_rtx`."""
    version: str
    compute_capabilities: list[list[int]]
    device: str
    """The GPU on which they were built; empty without one."""
    board: str
    """Its Jetson, if it is one."""
    verified: bool
    """Whether they ran on a GPU and agreed with their reference."""
    parity: dict[str, Any]
    """The figures of that comparison."""


class Modalities(Given):
    """What a question may have beside text."""

    vision: bool = True
    audio: bool = False


class Cascade(Given):
    """How `auto` answers: at the first size, and at the next one while the answer is not confident enough."""

    sizes: list[int]
    threshold: float
    """The least probability with which an answer stands."""
    confidence: str
    """Whose: the geometric `mean` of its tokens, or that of the `least` likely one."""


class Props(Given):
    """The answer of `GET /props`."""

    model: str
    precision: str
    backend: Backend
    engines: Engines | None
    """null if the backend runs none."""
    total_slots: int
    """Replies that are generated at a time."""
    context: int
    """Tokens of a conversation, pictures and reply included."""
    image_size: int
    """Pixels per side of a picture as the model sees it, for requests that do not say `detail`; of a cascade, the first size."""
    image_sizes: list[int]
    """All sizes of the model."""
    geometry: str
    """`pad` or `crop`."""
    visual_tokens: int
    """Of a picture of `image_size`."""
    cascade: Cascade | None
    """What decides without `detail`; null if it was never fitted, or the server was started with one size."""
    modalities: Modalities
    version: str
    system_fingerprint: str
    model_sha256: str
    """Of all files together."""
    files: dict[str, str]
    """sha256 of each file of the model."""


def tokenize(asked: TokenizeRequest, vlm: FastVLM, settings: Settings) -> TokenizeAnswer:
    """The ids of a text or of a conversation. Raises RequestError if not exactly one is given, or a conversation is not valid."""
    given = [name for name in ("content", "prompt", "messages") if getattr(asked, name) is not None]
    if len(given) != 1:
        raise RequestError(400, f"give one of content, prompt and messages, not {len(given)} of them", param=given[1] if given else None)
    text = (asked.content or "") + (asked.prompt or "")
    if len(text) > MOST_CHARACTERS:
        raise RequestError(400, f"the text has {len(text)} characters; at most {MOST_CHARACTERS} are tokenized", param=given[0])
    special = settings.special_tokens if asked.parse_special is None else asked.parse_special
    try:
        if asked.messages is not None:
            ids = _conversation(asked.messages, vlm, settings)
        else:
            ids = vlm.tokenizer.encode(text, special_tokens=special)
    except FastVLMError as error:
        raise refused(error, given[0]) from None
    vocab = vlm.manifest.decoder.vocab
    data = [b"" if token_id >= vocab else vlm.tokenizer.token_bytes(token_id) for token_id in ids]
    found: list[int | TokenPiece] = [*ids]
    if asked.with_pieces:
        found = [TokenPiece(id=token_id, piece=_piece(piece)) for token_id, piece in zip(ids, data, strict=True)]
    return TokenizeAnswer(
        tokens=found,
        count=len(ids),
        max_model_len=vlm.manifest.decoder.context,
        token_strs=[piece.decode("utf-8", "replace") for piece in data] if asked.return_token_strs else UNSET,
    )


def detokenize(asked: DetokenizeRequest, vlm: FastVLM) -> DetokenizeAnswer:
    """The text of ids, special tokens as they are written. Raises RequestError for an id without a token."""
    count = vlm.manifest.text.token_count
    for index, token_id in enumerate(asked.tokens):
        if token_id >= count:
            raise RequestError(400, f"tokens[{index}]: {token_id} is not a text token; there are {count}", param=f"tokens[{index}]")
    text = text_of(asked.tokens, vlm.tokenizer, special_tokens=True)
    return DetokenizeAnswer(content=text, prompt=text)


def props(state: ServerState) -> Props:
    """What runs."""
    vlm = state.vlm.vlm
    manifest, record = vlm.manifest, vlm.backend.engines
    cascade = manifest.cascade if state.settings.image_size == "auto" else None
    size = sizes_to_try(state.settings.image_size, manifest)[0]
    return Props(
        model=state.model_name,
        precision=manifest.precision,
        backend=Backend(name=vlm.backend.name, description=vlm.backend.description),
        engines=None if record is None else Engines(**{name: getattr(record, name) for name in Engines.__struct_fields__}),
        total_slots=state.settings.slots,
        context=manifest.decoder.context,
        image_size=size,
        image_sizes=manifest.vision.sizes,
        geometry=vlm.geometry,
        visual_tokens=visual_tokens(size),
        cascade=None if cascade is None else Cascade(**{name: getattr(cascade, name) for name in Cascade.__struct_fields__}),
        modalities=Modalities(),
        version=__version__,
        system_fingerprint=state.fingerprint,
        model_sha256=model_digest(manifest).hex(),
        files={name: file.sha256 for name, file in sorted(manifest.files.items())},
    )


def routes(state: ServerState) -> list[Route]:
    """POST /tokenize, POST /detokenize and GET /props."""
    vlm = state.vlm.vlm

    async def on_tokenize(request: Request) -> Response:
        asked = await read(request, TokenizeRequest, NEUTRAL)
        state.check_model(asked.model)
        return _json(await asyncio.to_thread(tokenize, asked, vlm, state.settings))

    async def on_detokenize(request: Request) -> Response:
        asked = await read(request, DetokenizeRequest, {})
        state.check_model(asked.model)
        return _json(await asyncio.to_thread(detokenize, asked, vlm))

    async def on_props(request: Request) -> Response:
        return _json(props(state))

    return [
        Route("/tokenize", on_tokenize, methods=["POST"]),
        Route("/detokenize", on_detokenize, methods=["POST"]),
        Route("/props", on_props, methods=["GET"]),
    ]


def _conversation(messages: list[Message], vlm: FastVLM, settings: Settings) -> list[int]:
    """The ids of a conversation up to where the reply begins, as `/v1/chat/completions` gives them to the model."""
    said = read_messages(messages, settings, vlm.manifest)
    template, special = ChatTemplate(vlm.tokenizer, vlm.manifest), settings.special_tokens

    def rows(question: Question) -> list[int]:
        return least_rows(question, vlm.manifest)

    turns = [
        (question.prompt, rows(question), special, vlm.tokenizer.encode(reply, special_tokens=special)) for question, reply in said.history
    ]
    ids = conversation_ids(template, template.opening(said.system), turns)
    if turns:
        ids += template.closing()
    first_row = sum(sum(earlier) for _, earlier, _, _ in turns)
    return [*ids, *template.turn(said.question.prompt, rows(said.question), first_row=first_row, special_tokens=special)]


def _piece(data: bytes) -> str | list[int]:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return list(data)


def _json(answer: Given) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
