"""`fastvlm-edge serve`: the runtime behind the OpenAI API. Only here starlette, uvicorn, msgspec and prometheus_client are imported."""
