"""The page as files: what it may load, and how it is sent. `tests/browser` opens it."""

from __future__ import annotations

import re

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from fastvlm_edge.server import page


@pytest.fixture
def client() -> TestClient:
    return TestClient(Starlette(routes=page.file_routes()))


def test_all_three_files_come_with_a_policy_that_allows_nothing_inline_and_nobody_else(client: TestClient) -> None:
    for path, (name, media_type) in page.FILES.items():
        answer = client.get(path)
        assert answer.status_code == 200 and answer.content == (page.FOLDER / name).read_bytes()
        assert answer.headers["content-type"] == f"{media_type}; charset=utf-8"
        policy = answer.headers["content-security-policy"]
        assert "unsafe" not in policy and "*" not in policy and "http" not in policy and "default-src 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["permissions-policy"].startswith("camera=(self)")


def test_a_file_is_sent_again_only_after_it_has_changed(client: TestClient) -> None:
    first = client.get("/page.js")
    again = client.get("/page.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"") and again.headers["etag"] == first.headers["etag"]
    assert client.get("/page.js", headers={"If-None-Match": '"another"'}).status_code == 200
    assert client.head("/").status_code == 200 and client.post("/").status_code == 405


def test_the_files_name_no_other_host_and_hold_no_inline_code() -> None:
    for name, _ in page.FILES.values():
        text = (page.FOLDER / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.|@import|\burl\(|innerHTML|eval\(", text), name
    html = (page.FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)


def test_every_field_of_the_page_has_a_label() -> None:
    html = (page.FOLDER / "index.html").read_text(encoding="utf-8")
    ids = set(re.findall(r'\sid="([^"]+)"', html))
    for field in re.findall(r"<(?:input|select|textarea)\s[^>]*>", html):
        name = re.search(r'id="([^"]+)"', field)
        assert name is not None
        labelled = f'for="{name.group(1)}"' in html or re.search(rf"<label[^>]*><input {re.escape(name.group())}", html)
        assert labelled or 'type="file"' in field, field  # that one is hidden; a button opens it
    used = set(re.findall(r'\$\("([^"]+)"\)', (page.FOLDER / "page.js").read_text(encoding="utf-8")))
    assert used <= ids
