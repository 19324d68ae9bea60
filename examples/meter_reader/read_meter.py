"""Ask a running server for the number that a meter shows. It needs only Python, so it runs on any machine that reaches the server.

    python examples/meter_reader/read_meter.py http://localhost:8000 photo.jpg

The answer is held to digits. If the server asks for a key, set FASTVLM_EDGE_API_KEY.
"""

import base64
import json
import mimetypes
import os
import sys
import urllib.request


def read_meter(server: str, path: str, digits: str = r"[0-9]{1,8}") -> int:
    """The number on a picture of a meter. `digits` is a regular expression, for example [0-9]{5} for five digits."""
    kind = mimetypes.guess_type(path)[0] or "image/jpeg"
    with open(path, "rb") as file:
        picture = base64.b64encode(file.read()).decode()
    question = [
        {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{picture}"}},
        {"type": "text", "text": "What number is shown?"},
    ]
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 16, "structured_outputs": {"regex": digits}}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("FASTVLM_EDGE_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{server.rstrip('/')}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return int(json.load(answer)["choices"][0]["message"]["content"])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: read_meter.py SERVER PICTURE")
    try:
        print(read_meter(sys.argv[1], sys.argv[2]))
    except OSError as error:  # the file, the network, or a status such as 401
        sys.exit(f"error: {error}")
