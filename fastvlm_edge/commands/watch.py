"""`fastvlm-edge watch`: ask the same question about the newest frame again and again; one line of JSON per answer goes to stdout."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from typing import Any

from fastvlm_edge.camera.change import THRESHOLD, distance, small_grey
from fastvlm_edge.camera.frame import Frame, Reader
from fastvlm_edge.camera.newest import EveryFrame, Frames, NewestFrame
from fastvlm_edge.camera.sources import READERS, Source, chosen_reader, open_source, parse_source
from fastvlm_edge.camera.webhook import Webhook
from fastvlm_edge.commands.arguments import at_least_zero, given, positive
from fastvlm_edge.commands.run import MODEL_HELP, add_loading_options, add_reply_options, check_reply, load, sampling_options
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.reply import Reply
from fastvlm_edge.generation.vlm import FastVLM
from fastvlm_edge.inputs.rgb import to_colour
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.manifest import Manifest
from fastvlm_edge.progress import SilentProgress, stderr_progress


def main(arguments: Sequence[str]) -> int:
    """Watch until the source ends, `--max-frames` answers are given, or a signal comes. 1 if something could not be read."""
    options = parser().parse_args(arguments)
    sampling = sampling_options(options)
    to_colour(options.background)
    source = parse_source(options.source)
    if options.no_realtime and source.live:
        raise FastVLMError(f"--no-realtime with {source}, which does not wait", "leave it out")
    note = _silent if options.quiet else _note
    opened = partial(open_source, source, options.reader, realtime=not options.no_realtime)
    waiting = [opened()]  # loading a model may take minutes
    if source.kind != "folder":  # which is watched from now on; a camera would fill up
        waiting.pop().close()

    def read_again() -> Reader:
        return waiting.pop() if waiting else opened()

    webhook = None if options.webhook is None else Webhook(options.webhook, note)

    def check(manifest: Manifest, tokenizer: TextTokenizer) -> None:
        check_reply(manifest, tokenizer, options, sampling, images=1)

    with load(options, SilentProgress() if options.quiet else stderr_progress(), check) as vlm:
        frames: Frames
        if options.no_realtime:
            frames = EveryFrame(read_again, note, every=options.every, again=source.kind != "file")
        else:
            frames = NewestFrame(read_again, note, every=options.every, again=source.kind != "file")
        watch = Watch(vlm, frames, options, sampling, webhook, note)
        note(f"watching {source}{_how(source, options.reader)}; Ctrl-C ends")
        try:
            watch.run()
        except KeyboardInterrupt:
            watch.end()
            raise
        watch.end()
    return int(watch.failed)


class Watch:
    """The loop: a frame, a question, a line."""

    def __init__(
        self,
        vlm: FastVLM,
        frames: Frames,
        options: argparse.Namespace,
        sampling: dict[str, Any],
        webhook: Webhook | None,
        note: Callable[[str], None],
    ) -> None:
        self._vlm, self._frames, self._options, self._sampling = vlm, frames, options, sampling
        self._webhook, self._note = webhook, note
        self._began = time.monotonic()
        self._answers = self._skipped = self._unreadable = 0
        self._printed: str | None = None
        """The text of the last line."""

    @property
    def failed(self) -> bool:
        """Whether a picture could not be read, or a video file broke off."""
        return self._unreadable > 0 or self._frames.broke

    def run(self) -> None:
        """Until the source ends or enough was answered."""
        seen = None
        with self._frames as frames:
            while self._options.max_frames is None or self._answers < self._options.max_frames:
                frame = frames.take()
                if frame is None:
                    break
                try:
                    picture = frame.picture()
                except FastVLMError as error:  # a file that is no picture, or was removed
                    self._unreadable += 1
                    self._note(error.what)
                    continue
                if self._options.threshold:
                    small = small_grey(picture)
                    if seen is not None and distance(small, seen) < self._options.threshold:
                        self._skipped += 1
                        continue
                    seen = small
                reply = self._vlm.generate(self._options.prompt, picture, system=self._options.system, **self._sampling)
                self._answers += 1
                self._tell(frame, reply)

    def _tell(self, frame: Frame, reply: Reply) -> None:
        if self._options.on_change and reply.text == self._printed:
            return
        self._printed = reply.text
        line = json.dumps(
            {
                "time": _clock(time.time()),
                "frame_time": _clock(frame.time),
                "position": None if frame.position is None else round(frame.position, 3),
                "file": frame.file,
                "text": reply.text,
                "stop_reason": reply.stop_reason,
                "image_size": reply.image_size,
                "tried_sizes": reply.tried_sizes,
                "confidence": None if reply.confidence is None else dataclasses.asdict(reply.confidence),
                "latency_ms": round((time.monotonic() - frame.arrived) * 1e3, 1),
                "dropped": self._frames.dropped,
                "skipped": self._skipped,
            },
            ensure_ascii=False,
        )
        print(line, flush=True)
        if self._webhook is not None:
            self._webhook.post(line)

    def end(self) -> None:
        """Post what waits, and say what was done."""
        parts = [
            f"{self._answers} answer{'s' * (self._answers != 1)} in {time.monotonic() - self._began:.0f} s",
            f"{self._frames.dropped} frames dropped",
            f"{self._skipped} skipped because nothing changed",
        ]
        if self._unreadable:
            parts.append(f"{self._unreadable} not readable")
        if self._webhook is not None:
            self._webhook.close()
            parts.append(f"webhook: {self._webhook.posted} posted, {self._webhook.failed} failed")
        self._note("; ".join(parts))


def _how(source: Source, reader: str) -> str:
    if source.kind == "folder":
        return " for new pictures"
    return " with " + {"gstreamer": "GStreamer", "pyav": "PyAV"}[chosen_reader(source, reader)]


def _clock(seconds: float) -> str:
    """A time since 1970 as ISO 8601, in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _note(text: str) -> None:
    print(f"[{text}]", file=sys.stderr, flush=True)


def _silent(_text: str) -> None:
    pass


def parser() -> argparse.ArgumentParser:
    """The options of `fastvlm-edge watch`."""
    parser = argparse.ArgumentParser(
        prog="fastvlm-edge watch",
        description="Ask a question about the newest frame of a camera, a stream, a video file or a growing folder, again and again. Each "
        "answer is one line of JSON on stdout. Frames that come while the model answers are dropped and counted. (docs/watch.md)",
    )
    parser.add_argument("model", metavar="MODEL", type=given, help=MODEL_HELP)
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=given,
        help="/dev/video0, csi:0 (a Jetson's CSI camera), rtsp://..., a video file, or a directory into which pictures come",
    )
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="the question")
    group = parser.add_argument_group("which frames")
    group.add_argument(
        "--every",
        metavar="SECONDS",
        type=at_least_zero,
        default=0.0,
        help="look at most once in so many seconds (default: as often as it can)",
    )
    group.add_argument("--max-frames", metavar="N", type=positive, help="end after N answers")
    group.add_argument(
        "--threshold",
        metavar="X",
        type=at_least_zero,
        default=THRESHOLD,
        help="skip a frame that differs less from the one asked about last: mean difference in brightness, 0 to 255; 0 asks about every "
        "frame (default: %(default)s)",
    )
    group.add_argument(
        "--no-realtime",
        action="store_true",
        help="video file or directory: take every frame, one after another, instead of the newest one; --every then counts seconds of the "
        "video. Without it, a video file runs at its own frame rate, as a camera would give it",
    )
    group.add_argument("--reader", choices=READERS, default="auto", help="what reads the frames; auto is GStreamer on a Jetson, else PyAV")
    group = parser.add_argument_group("what is told")
    group.add_argument("--on-change", action="store_true", help="leave out an answer that is the same as the one before")
    group.add_argument("--webhook", metavar="URL", help="also post each line to this http or https address")
    group.add_argument("-q", "--quiet", action="store_true", help="print nothing but the lines and errors")
    add_reply_options(parser)
    add_loading_options(parser)
    return parser
