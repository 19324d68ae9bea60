"""An RTSP server with a ball that moves: `/usr/bin/python3 rtsp_server.py PORT` prints the port (0 takes a free one) and serves /ball.

It needs gst-rtsp-server and its bindings for the system's Python, so it imports nothing of this project. Sound comes first, as it may.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

BALL = (
    "( audiotestsrc is-live=true ! audioconvert ! alawenc ! rtppcmapay name=pay0 pt=8 "
    "videotestsrc is-live=true pattern=ball ! video/x-raw,width=320,height=240,framerate=15/1 ! videoconvert ! video/x-raw,format=I420 ! "
    "x264enc tune=zerolatency speed-preset=ultrafast key-int-max=15 ! rtph264pay name=pay1 pt=96 config-interval=1 )"
)


def main() -> None:
    """Serve until the process is ended."""
    gi: Any = import_module("gi")
    for name in ("Gst", "GstRtspServer"):
        gi.require_version(name, "1.0")
    gst, glib, rtsp = (import_module(f"gi.repository.{name}") for name in ("Gst", "GLib", "GstRtspServer"))
    gst.init(None)
    server = rtsp.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(sys.argv[1])
    factory = rtsp.RTSPMediaFactory()
    factory.set_launch(BALL)
    factory.set_shared(True)
    server.get_mount_points().add_factory("/ball", factory)
    server.attach(None)
    print(server.get_bound_port(), flush=True)
    glib.MainLoop().run()


if __name__ == "__main__":
    main()
