"""Programs of others in an environment of their own, and the server with the demo model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser.conftest import demo_question as demo_question
from tests.browser.conftest import served as served
from tests.browser.conftest import start_server as start_server

CLIENTS = Path(__file__).resolve().parents[2] / "build" / "clients" / "bin"


@pytest.fixture(scope="session")
def clients() -> Path:
    """Directory of the clients' programs."""
    if not (CLIENTS / "live-vlm-webui").exists():
        pytest.skip("the clients are not installed; make test-clients installs them")
    return CLIENTS
