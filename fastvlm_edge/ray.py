"""Batches on a Ray cluster: `Describe`, an actor class, also for Ray Data; and `Workers`, which gives rows to actors that may die.

The driver reads the rows and writes the results, as `batch` does without Ray. Paths or encoded pictures travel, never pixels: an actor
opens and decodes the pictures itself, while it answers others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from fastvlm_edge.batch.answering import RowAnswerer
from fastvlm_edge.batch.job import Job, cascade_of
from fastvlm_edge.batch.rows import Row
from fastvlm_edge.errors import FastVLMError, one_line
from fastvlm_edge.evaluation.data import ArchivedPicture
from fastvlm_edge.extras import package_errors
from fastvlm_edge.generation.images import model_digest
from fastvlm_edge.generation.vlm import SLOTS, FastVLM
from fastvlm_edge.model_dir.manifest import read_manifest
from fastvlm_edge.version import __version__

ROWS = 16
"""Rows of one call. An actor that dies loses the work on those of its calls, but no row."""
BYTES = 16 << 20
"""Encoded pictures of one call; a call with more has one row."""
CALLS = 2
"""Calls that an actor has at a time: the second one begins when the first no longer fills all slots."""
DEATHS = 3
"""A row that was with so many actors when they died becomes an error."""
FAILURES = 5
"""An actor that dies so often without finishing a call in between is not started again. More than DEATHS, so that a row is not its end."""
SECONDS = 5.0
"""To wait for the port of a cluster."""
PATIENCE = 30.0
"""Seconds without any actor after which the user is told what is missing."""


class Describe:
    """Answers rows with the model directory of its node. An actor class for `ray.remote` and for `Dataset.map_batches` of Ray Data."""

    def __init__(self, model: str, job: Job, **options: Any) -> None:
        """`model` is a path on the node of the actor, and `options` are others of `FastVLM.load`.

        Raises FastVLMError, which names the node, if it cannot be loaded or is not the model of `job`.
        """
        try:
            manifest = read_manifest(Path(model))
            found = model_digest(manifest).hex()
            if found != job.model_sha256:
                what = f"{model} is another model than that of the job: its sha256 is {found[:12]}..., not {job.model_sha256[:12]}..."
                raise FastVLMError(what, "copy the model directory of the driver to this node")
            if job.image_size == "auto" and job.cascade != cascade_of(manifest):
                what = f"{model} has another cascade than that of the job, {job.cascade}"
                raise FastVLMError(what, "copy fastvlm.json of the driver to this node")
            red, green, blue = job.background
            background = (red, green, blue)
            self._vlm = FastVLM.load(
                model, image_size=job.image_size, geometry=job.geometry, background=background, tune_process=True, **options
            )
        except FastVLMError as error:
            raise FastVLMError(f"on {socket.gethostname()}: {error.what}", error.mend) from None
        self._job = job

    @property
    def backend(self) -> str:
        """What runs the model, as text for users."""
        return self._vlm.backend.description

    def answer(self, rows: Iterable[Row]) -> list[dict[str, Any]]:
        """The results of rows, in any order, as of `RowAnswerer.answer`.

        Two threads should call it at a time: the rows of one call are opened while those of the other are answered.
        """
        return list(RowAnswerer(self._vlm, self._job, ahead=0).answer(rows))

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
        """Answer a batch of Ray Data, whose columns are `image` and perhaps `prompt` and others.

        An image is a path, encoded bytes, or {bytes, path} as in Hugging Face's datasets. The result has all columns but `image`, and
        `text`, `stop_reason`, `confidence`, `image_size` and `error`, each of them None where it does not apply. No row raises an error.
        """
        count = len(batch["image"])
        prompts = batch.get("prompt", [None] * count)
        rows = [_row(str(index), batch["image"][index], prompts[index] or self._job.prompt) for index in range(count)]
        answers: list[dict[str, Any]] = [{}] * count
        for found in RowAnswerer(self._vlm, self._job).answer(rows):
            answers[int(found["id"])] = found
        errors = [answer.get("error") for answer in answers]
        confidences = [answer.get("confidence") for answer in answers]
        return {
            **{name: column for name, column in batch.items() if name != "image"},
            "text": [answer.get("text") for answer in answers],
            "stop_reason": [answer.get("stop_reason") for answer in answers],
            "confidence": [each and each["mean"] for each in confidences],
            "image_size": [answer.get("image_size") for answer in answers],
            "error": [each and f"{each['kind']}: {each['message']}" for each in errors],
        }


def _row(id: str, image: Any, prompt: Any) -> Row:
    """A row of Ray Data."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    prompt = None if prompt is None else str(prompt)
    if isinstance(image, bytes) and image:
        return Row(id, image, prompt, None if prompt else "no prompt")
    if isinstance(image, (str, Path)) and str(image):
        return Row(id, Path(image), prompt, None if prompt else "no prompt")
    return Row(id, None, prompt, f"its image is of type {type(image).__name__}, not a path or bytes" if image else "no picture")


class _Actor:
    """`Describe`, loaded in a call: the driver gets the error of that call itself, but only a text of one in a constructor."""

    def load(self, version: str, model: str, job: Job, options: dict[str, Any]) -> tuple[str, str]:
        """Load the model. Returns the name of the node and what runs the model."""
        if version != __version__:
            what = f"{socket.gethostname()} has fastvlm-edge {__version__}, and the driver has {version}"
            raise FastVLMError(what, "install the same version on all nodes")
        self._describe = Describe(model, job, **options)
        return socket.gethostname(), self._describe.backend

    def answer(self, rows: list[Row]) -> list[dict[str, Any]]:
        """See `Describe.answer`."""
        return self._describe.answer(rows)


@dataclass(frozen=True)
class Share:
    """The part of the cluster that each actor takes."""

    cpus: float
    gpus: float
    actors: int


def share_of(nodes: Iterable[Mapping[str, float]], *, actors: int | None, gpus: float | None, threads: int | None) -> Share:
    """How the cluster is divided. `nodes` are the resources of each node, as Ray names them (`CPU`, `GPU`).

    An actor takes `gpus`, by default one where the cluster has any, and one CPU. Without GPUs it takes as many CPUs as it has `threads`, by
    default those of the smallest node. By default there are as many actors as fit.
    """
    sizes = [(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes]
    if gpus is None:
        gpus = 1.0 if any(size[1] for size in sizes) else 0.0
    cpus = 1.0 if gpus else threads or min((size[0] for size in sizes if size[0]), default=1.0)
    if actors is None:
        fitting = [min(have // need for have, need in zip(size, (cpus, gpus), strict=True) if need) for size in sizes]
        actors = max(1, int(sum(fitting)))
    return Share(cpus, gpus, actors)


@dataclass
class _Worker:
    """An actor, and what it has to do."""

    actor: Any
    loading: Any
    """The call of `load`, until it has returned."""
    failures: int = 0
    """How often it died since it last finished a call; it was started again each time."""
    node: str = "a node"
    calls: dict[Any, list[Row]] = field(default_factory=dict)


class Workers:
    """Answers rows with actors of a Ray cluster, and offers the same `answer` as `RowAnswerer`. A context manager."""

    def __init__(
        self,
        model: Path,
        job: Job,
        *,
        address: str | None = None,
        actors: int | None = None,
        gpus: float | None = None,
        upload: bool = False,
        tell: Callable[[str], None] = lambda line: None,
        threads: int | None = None,
        slots: int = SLOTS,
        **options: Any,
    ) -> None:
        """Connect to the cluster.

        `address` is one of `ray.init`; None is that of RAY_ADDRESS, or of a cluster on this machine, or a new one of this machine alone.
        `actors`, `gpus` and `threads` are as for `share_of`. With `upload` the driver reads the files of the pictures and sends them;
        otherwise their paths are those of every node, like that of the model. `tell` gets lines for the user. The `options` are
        others of `FastVLM.load`. Raises FastVLMError if there is no cluster.
        """
        with package_errors("--engine ray needs"):
            import ray
        self._ray = ray
        self._own = not ray.is_initialized()
        if self._own:
            _connect(ray, address)
        self._tell = tell
        self._upload = upload
        self._rows = max(ROWS, 4 * slots)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._share = share = share_of(nodes, actors=actors, gpus=gpus, threads=threads)
        threads = threads or (None if share.gpus else max(1, int(share.cpus)))
        self._load = (__version__, os.path.abspath(model), job, {"threads": threads, "slots": slots, **options})
        self._class = ray.remote(
            num_cpus=share.cpus, num_gpus=share.gpus, max_concurrency=CALLS, max_restarts=0, scheduling_strategy="SPREAD"
        )(_Actor)
        self._workers: list[_Worker] = []

    @property
    def description(self) -> str:
        """How many actors there are to be, as text for users."""
        share, slots = self._share, self._load[3]["slots"]
        return f"up to {share.actors} workers with {share.cpus:g} CPU and {share.gpus:g} GPU each, {slots} at a time in each"

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the actors, and leave the cluster if it was joined here."""
        for worker in self._workers:
            self._kill(worker)
        self._workers.clear()
        if self._own:
            self._ray.shutdown()

    def answer(self, rows: Iterable[Row]) -> Generator[dict[str, Any]]:
        """The result of each row, as soon as it is known, as of `RowAnswerer.answer`.

        Rows that were with an actor that died are given to others. A row with `DEATHS` dead actors becomes an error of the kind `worker`.
        Raises FastVLMError if a model cannot be loaded, or if no actor is left.
        """
        calls = _calls(rows, self._rows, upload=self._upload)
        suspects: deque[Row] = deque()
        deaths: Counter[str] = Counter()
        self._workers += [self._start() for _ in range(self._share.actors)]
        began, told = time.monotonic(), False
        while self._give(calls, suspects):
            waiting = [ref for worker in self._workers for ref in (worker.loading, *worker.calls) if ref is not None]
            finished, _ = self._ray.wait(waiting, timeout=PATIENCE)
            if not (finished or told) and time.monotonic() - began > PATIENCE:
                self._tell_what_is_missing()
                told = True
            for ref in finished:
                worker = next((worker for worker in self._workers if ref is worker.loading or ref in worker.calls), None)
                if worker is None:
                    continue  # of an actor that has just died
                try:
                    value = self._ray.get(ref)
                except self._ray.exceptions.RayError as error:
                    for row in self._lost(worker, error):
                        deaths[row.id] += 1
                        if deaths[row.id] < DEATHS:
                            suspects.append(row)
                        else:
                            message = f"{DEATHS} processes died while they answered this row"
                            yield {"id": row.id, "error": {"kind": "worker", "message": message}}
                    continue
                if ref is worker.loading:
                    worker.loading, told = None, True
                    worker.node, backend = value
                    self._tell(f"a worker on {worker.node}: {backend}")
                else:
                    del worker.calls[ref]
                    worker.failures = 0
                    yield from value

    def _give(self, calls: Iterator[list[Row]], suspects: deque[Row]) -> bool:
        """Give work to every actor that has room for it. False if nothing is left to wait for.

        A row that was with a dead actor comes last, and is alone with its next one: if that dies too, it was this row.
        """
        for depth in range(CALLS):
            for worker in self._workers:
                if worker.loading is None and len(worker.calls) <= depth:
                    rows = next(calls, None)
                    if rows is None and suspects and not worker.calls:
                        rows = [suspects.popleft()]
                    if rows is not None:
                        worker.calls[worker.actor.answer.remote(rows)] = rows
        idle = any(worker.loading is None and not worker.calls for worker in self._workers)
        return not idle or any(worker.calls for worker in self._workers)

    def _start(self, failures: int = 0) -> _Worker:
        actor = self._class.remote()
        return _Worker(actor, actor.load.remote(*self._load), failures)

    def _lost(self, worker: _Worker, error: Exception) -> list[Row]:
        """Replace an actor that died or whose model failed. Returns the rows that it had. Raises FastVLMError if it cannot be replaced."""
        cause = getattr(error, "cause", None)  # of RayTaskError: what the call raised
        if isinstance(error, self._ray.exceptions.RayTaskError) and (worker.loading is not None or not isinstance(cause, FastVLMError)):
            raise cause if isinstance(cause, FastVLMError) else error
        self._kill(worker)
        at = self._workers.index(worker)
        why = str(cause) if isinstance(cause, FastVLMError) else type(error).__name__
        if worker.failures + 1 < FAILURES:
            self._tell(f"a worker on {worker.node} was lost ({why}); its rows are answered again")
            self._workers[at] = self._start(worker.failures + 1)
        elif len(self._workers) > 1:
            self._tell(f"a worker on {worker.node} was lost {FAILURES} times in a row ({why}) and is given up")
            del self._workers[at]
        else:
            what = f"the last worker, on {worker.node}, was lost {FAILURES} times in a row ({why})"
            raise FastVLMError(what, "look into the logs of Ray on that node, and run the same command again")
        return [row for rows in worker.calls.values() for row in rows]

    def _kill(self, worker: _Worker) -> None:
        with contextlib.suppress(Exception):  # it is dead, or the cluster is gone
            self._ray.kill(worker.actor, no_restart=True)

    def _tell_what_is_missing(self) -> None:
        have = {name: amount for name, amount in self._ray.available_resources().items() if name in ("CPU", "GPU")}
        needs = f"{self._share.cpus:g} CPU and {self._share.gpus:g} GPU on one node"
        free = ", ".join(f"{amount:g} {name}" for name, amount in sorted(have.items())) or "nothing"
        self._tell(f"no worker has started: each needs {needs}, and the cluster has {free} free; waiting")


def _calls(rows: Iterable[Row], most: int, *, upload: bool) -> Iterator[list[Row]]:
    """The rows of each call: at most `most`, and at most BYTES of pictures if they are more than one."""
    call, size = list[Row](), 0
    for row in rows:
        row = _with_picture(row) if upload else _with_whole_path(row)
        length = len(row.image) if isinstance(row.image, bytes) else 0
        if call and (len(call) == most or size + length > BYTES):
            yield call
            call, size = [], 0
        call.append(row)
        size += length
    if call:
        yield call


def _with_whole_path(row: Row) -> Row:
    """The row for an actor, which runs in another directory."""
    return replace(row, image=row.image.absolute()) if isinstance(row.image, Path) else row


def _with_picture(row: Row) -> Row:
    """The row with its picture, still encoded. A picture that cannot be read stays as it is, so that the actor makes the error of it."""
    row = _with_whole_path(row)
    try:
        if isinstance(row.image, ArchivedPicture):
            data = row.image.load()
            return replace(row, image=data) if isinstance(data, bytes) else row
        if isinstance(row.image, Path) and row.image.is_file():
            return replace(row, image=row.image.read_bytes())
    except OSError:
        pass
    return row


def _connect(ray: Any, address: str | None) -> None:
    """Join or start a cluster. Raises FastVLMError if there is none at `address`."""
    if address is not None and address.startswith("ray://"):
        what = f"{address} is an address of Ray Client, which cannot be used"
        raise FastVLMError(what, "run the command on a machine of the cluster, or with: ray job submit")
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), SECONDS).close()  # Ray would try for minutes
        except (OSError, OverflowError) as error:
            raise _no_cluster(address, error) from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here sends nothing
    ours = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, TimeoutError, ray.exceptions.RayError) as error:  # the last: without the token of the cluster
        raise _no_cluster(address, error) from None
    finally:
        with contextlib.suppress(ValueError):  # only the main thread has handlers
            signal.signal(signal.SIGTERM, ours)  # Ray replaces it


def _no_cluster(address: str | None, error: Exception) -> FastVLMError:
    what = f"no Ray cluster could be joined at {address or 'this machine'} ({one_line(error)})"
    token = "if it runs, this machine needs its token and RAY_AUTH_MODE=token"
    return FastVLMError(what, f"start one with: ray start --head; {token}; or leave --address out to use this machine alone")
