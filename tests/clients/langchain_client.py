"""LangChain's ChatOpenAI with a server: `python langchain_client.py BASE PICTURE QUESTION` prints the replies, by ways to ask, as JSON."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from pathlib import Path
from typing import Annotated, Any

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field


class Meter(BaseModel):
    """What a meter shows."""

    reading: Annotated[int, Field(ge=0, le=99)]


def main(base: str, picture: Path, question: str) -> None:
    model = ChatOpenAI(base_url=base, api_key="none", model="fastvlm-demo", max_retries=0)
    data = base64.b64encode(picture.read_bytes()).decode()
    text = {"type": "text", "text": question}
    asked = HumanMessage([text, {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}])
    first = model.invoke([asked])
    replies = {
        "text": model.invoke(question).content,
        "picture": first.content,
        "own_format": model.invoke([HumanMessage([text, {"type": "image", "base64": data, "mime_type": "image/jpeg"}])]).content,
        "stream": [chunk.content for chunk in model.stream([asked])],
        "usage": first.usage_metadata,
        "structured": model.with_structured_output(Meter, method="json_schema").invoke([asked]).model_dump(),
        "turns": model.invoke([SystemMessage("Answer briefly."), asked, first, HumanMessage("Count the objects.")]).content,
        **asyncio.run(concurrently(model, asked)),
        "responses": ChatOpenAI(base_url=base, api_key="none", model="fastvlm-demo", use_responses_api=True).invoke([asked]).text,
    }
    print(json.dumps(replies))


async def concurrently(model: Any, asked: Any) -> dict[str, Any]:
    structured = model.with_structured_output(Meter, method="json_schema")
    return {
        "async": (await model.ainvoke([asked])).content,
        "async_stream": [chunk.content async for chunk in model.astream([asked])],
        "async_structured": (await structured.ainvoke([asked])).model_dump(),
        "batch": [reply.content for reply in await model.abatch([[asked]] * 6)],
    }


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
