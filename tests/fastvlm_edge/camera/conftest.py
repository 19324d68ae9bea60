"""GStreamer and an RTSP server for the tests with the marker `camera`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.support import rtsp_server
from tests.support.system_gi import SYSTEM_PYTHON, folder_with_gi, lacks


@pytest.fixture(scope="session")
def system_gi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The system's `gi` can be imported in this process; a folder for PYTHONPATH of others."""
    folder = folder_with_gi(tmp_path_factory.mktemp("gi") / "path")
    if (why := lacks(sys.executable, "Gst", "GstApp", path=folder)) is not None:
        pytest.skip(why)
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))


@contextmanager
def _serve(port: int = 0) -> Iterator[int]:
    with subprocess.Popen([SYSTEM_PYTHON, rtsp_server.__file__, str(port)], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield int(server.stdout.readline())
        finally:
            server.kill()


@pytest.fixture(scope="session")
def rtsp() -> Callable[..., AbstractContextManager[int]]:
    """`with rtsp() as port`: rtsp://127.0.0.1:PORT/ball shows a ball that moves, at 15 frames/s."""
    if (why := lacks(SYSTEM_PYTHON, "Gst", "GstRtspServer")) is not None:
        pytest.skip(why)
    return _serve
