"""The messages of a request as a conversation: system prompt, earlier turns, and the question with its pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fastvlm_edge.generation.cascade import ImageSize, sizes_to_try
from fastvlm_edge.model_dir.manifest import Manifest, visual_tokens
from fastvlm_edge.server.api import Detail, DeveloperMessage, Message, SystemMessage, TextPart, UserMessage, VideoPart
from fastvlm_edge.server.errors import RequestError
from fastvlm_edge.server.pictures import Picture
from fastvlm_edge.server.settings import FRAMES, Settings

_LONGEST_TOKEN = 128
"""Characters per token that no text comes near. More than so many for each position are refused before they are tokenized."""


@dataclass(frozen=True)
class Question:
    """What a user said: a text, and the pictures before it."""

    prompt: str
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """A question, and what was said before."""

    question: Question
    history: tuple[tuple[Question, str], ...] = ()
    """Earlier questions and the replies to them."""
    system: str | None = None
    """None is that of the model."""

    @property
    def characters(self) -> int:
        """Length of all texts."""
        asked = sum(len(question.prompt) + len(reply) for question, reply in self.history)
        return asked + len(self.question.prompt) + len(self.system or "")


def read_messages(messages: Sequence[Message], settings: Settings, manifest: Manifest, frames: int | None = None) -> Conversation:
    """The conversation of a request. `frames` is how many pictures stand for a clip, at most; None is FRAMES, or as many as are allowed.

    Raises RequestError for an order of messages that no conversation with the model has.
    """
    frames = min(FRAMES, settings.max_images) if frames is None else frames
    system: list[str] = []
    history: list[tuple[Question, str]] = []
    asked: list[Question] = []
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        if isinstance(message, SystemMessage | DeveloperMessage):
            if history or asked:
                raise RequestError(400, "system messages stand before all others", param=place)
            system.append(_text(message.content))
        elif isinstance(message, UserMessage):
            asked.append(_question(message, place, frames, {**_sizes(manifest), None: settings.image_size, "auto": settings.image_size}))
        elif not asked:
            raise RequestError(400, "an assistant message follows a user message", param=place)
        else:
            history.append((_joined(asked), _text(message.content)))
            asked = []
    if not asked:
        raise RequestError(400, "the last message is not one of the user; a reply cannot be begun for the model", param="messages")
    conversation = Conversation(_joined(asked), tuple(history), _lines(system) if system else None)
    check(conversation, settings, manifest)
    return conversation


def check(conversation: Conversation, settings: Settings, manifest: Manifest) -> None:
    """Raise RequestError for more pictures than are allowed, and for more text than fits in any case."""
    questions = [conversation.question, *(question for question, _ in conversation.history)]
    rows = [tokens for question in questions for tokens in least_rows(question, manifest)]
    pictures, most = len(rows), max(rows, default=0)
    if pictures > settings.max_images:
        message = f"the conversation has {pictures} pictures, and at most {settings.max_images} are allowed{_fewer_frames(questions)}"
        raise RequestError(400, message, param="messages", code="too_many_images")
    characters, context = conversation.characters, manifest.decoder.context
    if sum(rows) >= context:
        message = f"{pictures} pictures take {sum(rows)} tokens; the context of {context} has room for {(context - 1) // most}"
        message += _fewer_frames(questions)
        if (low := manifest.vision.at(manifest.vision.sizes[0]).tokens) < most:
            message += f"; a picture of detail low takes {low} of them"
        raise RequestError(400, message, param="messages", code="context_length_exceeded")
    if characters > _LONGEST_TOKEN * context:
        message = f"the conversation has {characters} characters, which do not fit into the context of {context} tokens"
        raise RequestError(400, message, param="messages", code="context_length_exceeded")


def least_rows(question: Question, manifest: Manifest) -> list[int]:
    """Visual tokens of each picture that the model may see of a question: of a cascade, at the first size."""
    return [visual_tokens(sizes_to_try(picture.image_size, manifest)[0]) for picture in question.pictures for _ in range(picture.most)]


def _sizes(manifest: Manifest) -> dict[Detail | None, ImageSize]:
    """What the values of `detail` stand for."""
    sizes = manifest.vision.sizes
    return {"low": sizes[0], "high": sizes[-1], "original": sizes[-1]}


def _fewer_frames(questions: Sequence[Question]) -> str:
    """What to do, if there is a clip."""
    clips = [picture.frames for question in questions for picture in question.pictures if picture.frames]
    return f"; each clip is {clips[0]} of them, which media_io_kwargs.video.num_frames changes" if clips else ""


def _question(message: UserMessage, place: str, frames: int, sizes: Mapping[Detail | None, ImageSize]) -> Question:
    if isinstance(message.content, str):
        return Question(message.content)
    texts, pictures = [], []
    for index, part in enumerate(message.content):
        if isinstance(part, TextPart):
            texts.append(part.text)
        elif isinstance(part, VideoPart):
            size = sizes[part.video_url.detail]
            pictures.append(Picture(part.video_url.url, f"{place}.content[{index}].video_url.url", size, frames))
        else:
            pictures.append(Picture(part.image_url.url, f"{place}.content[{index}].image_url.url", sizes[part.image_url.detail]))
    return Question(_lines(texts), tuple(pictures))


def _joined(questions: Sequence[Question]) -> Question:
    pictures = tuple(picture for question in questions for picture in question.pictures)
    return Question(_lines(question.prompt for question in questions), pictures)


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else _lines(part.text for part in content)


def _lines(texts: Iterable[str]) -> str:
    return "\n".join(text for text in texts if text)
