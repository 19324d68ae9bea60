"""FastVLM-0.5B beside its peers in one run, on a CPU or on one GPU: the same random weights, the same positions, the same threads.

    python -m benchmarks.peers.run [--only NAME,NAME] [--rounds 7] [--threads 2] [--out FILE] [--fresh]
    python -m benchmarks.peers.run --device gpu [--only NAME,NAME] [--limit SECONDS] [--prepare]

256 visual and 34 text tokens at 1024 px, greedy, 65 tokens. A peer without an encoder gets 290 positions of text, a peer without an LLM
only the picture. Contenders take turns, each in a new process every round. A peer that fails is recorded with the reason, and the others
go on. A run that was cut off continues with the same command: finished rounds are kept in the work directory until all are done.

On a CPU every peer has an environment of its own in build/peers, made at the first call. On a GPU all run in this environment, because
PyTorch and TensorRT have to fit the driver. There, the demo's answers are first compared with those of the CPU, and decoding is timed
behind 1,900 positions as well. Not yet run on hardware.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import venv
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.common.rounds import TIMEOUT, Contender, Failed, call, figures, take_turns
from benchmarks.peers.gpu import floor_of
from benchmarks.peers.protocol import DEVICES, FIELDS, ROOT, Peer, Samples
from benchmarks.peers.workload import PRECISIONS, prepare
from fastvlm_edge.bench.record import write_json
from fastvlm_edge.machine.state import read_state
from fastvlm_edge.progress import stderr_progress

SCRIPTS = {
    "fastvlm-edge": "ours",
    "transformers": "transformers_fastvlm",
    "optimum-onnx": "optimum_llm",
    "onnxruntime-genai": "genai_llm",
    "llama.cpp": "llamacpp",
    "openvino": "openvino_vision",
}
"""Name of a peer -> its module in runtimes/."""
RESULTS = ROOT / "benchmarks" / "results"


def contenders(only: Sequence[str] | None = None, device: str = "cpu") -> list[Contender]:
    """All contenders on a device, or those that `only` names in full or by peer. Exits if it names another one."""
    found = []
    for name, module in SCRIPTS.items():
        found += [contender(f"{name}:{variant}", module, variant) for variant in peer_of(module).variants_on(device)]
    names = [each.name for each in found]
    for wanted in only or ():
        if wanted not in names and wanted not in SCRIPTS:
            raise SystemExit(f"peers: --only names {wanted}, which is none of {', '.join([*SCRIPTS, *names])}")
    return [each for each in found if only is None or each.name in only or each.name.partition(":")[0] in only]


def contender(name: str, module: str, variant: str) -> Contender:
    """A variant of the peer in a module of runtimes/."""
    return Contender(name, peer_of(module), module, variant)


def peer_of(module: str) -> Peer:
    """The PEER of a module in runtimes/."""
    peer: Peer = import_module(f"benchmarks.peers.runtimes.{module}").PEER
    return peer


def environment(folder: Path, peer: Peer) -> str:
    """The interpreter of a peer's environment, made at the first call and again when its packages change."""
    if not peer.packages:
        return sys.executable
    python, ready = folder / "bin" / "python", folder / ".ready"
    wanted = "\n".join([*peer.packages, *peer.bare])
    if not ready.is_file() or ready.read_text(encoding="utf-8") != wanted:
        print(f"installing {', '.join([*peer.packages, *peer.bare])}", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
        call([*pip, *peer.packages])
        if peer.bare:
            call([*pip, "--no-deps", *peer.bare])
        ready.write_text(wanted, encoding="utf-8")
    return str(python)


class TimeUp(Exception):
    """The seconds of `--limit` are over."""


class Run:
    """One run: the contenders, the rounds so far, and the file in which they are kept."""

    def __init__(self, options: argparse.Namespace, chosen: Sequence[Contender]) -> None:
        """Take up a run that was cut off, unless its settings were different or `options.fresh` asks for a new one.

        `options` are those of `parser()`. Without `options.envs`, all peers run in this environment.
        """
        self.options, self.chosen = options, list(chosen)
        self.deadline = time.monotonic() + options.limit if options.limit else float("inf")
        stem = options.out.stem if options.out else options.device
        self._state_path: Path = options.work / f"{stem}-run.json"
        settings = {"device": options.device, "size": options.size, "threads": options.threads, "runs": options.runs}
        empty: dict[str, Any] = {"rounds": {}, "errors": {}, "versions": {}, "checks": {}, "before": read_state()}
        self.state: dict[str, Any] = {"settings": settings, **empty}
        if self._state_path.is_file() and not options.fresh:
            earlier = json.loads(self._state_path.read_text(encoding="utf-8"))
            if earlier["settings"] == settings:
                self.state = earlier
                print(f"continuing {self._state_path}; --fresh starts anew", file=sys.stderr)

    def run(self) -> int:
        """Prepare everything, then measure the rounds. 0 if all of it was done and nothing failed."""
        options, complete = self.options, True
        self.state["errors"] = {}  # what failed is tried again
        try:
            if options.device == "gpu":
                self._look_at_the_gpu()
        except Failed as error:
            print(f"peers: {error}", file=sys.stderr)
            return 1
        try:
            prepare(options.work, options.size, stderr_progress(), self._precisions())
            if options.device == "cpu" and "limits" not in self.state:
                self.state["limits"] = machine.limits(options.threads)
            pythons = self._prepare_contenders()
            if options.prepare:
                return 1 if self.state["errors"] else 0
            names = [each.name for each in self.chosen if each.name not in self.state["errors"]]
            of = {each.name: each for each in self.chosen}

            def measure(name: str) -> Samples:
                found = json.loads(self._call(pythons[name], of[name], "--measure").splitlines()[-1])
                self.state["versions"][name] = found["versions"]
                samples: Samples = found["samples"]
                return samples

            take_turns(names, options.rounds, measure, found=self.state["rounds"], keep=self._keep, failed=self._failed)
        except TimeUp:
            complete = False
            print(f"peers: {options.limit:.0f} s are over; the same command continues from here", file=sys.stderr)
        self._keep()
        if all(len(self.state["rounds"].get(each.name, ())) >= options.rounds for each in self.chosen):
            self._state_path.unlink()  # the next run is a new one
        print_table(self.document())
        return 0 if complete and not self.state["errors"] else 1

    def document(self) -> dict[str, Any]:
        """The record."""
        options, settings = self.options, self.state["settings"]
        workload = json.loads((options.work / "workload.json").read_text(encoding="utf-8"))
        document: dict[str, Any] = {
            "what": f"FastVLM-{settings['size']}, random weights, {workload['image_size']} px: {workload['visual_tokens']} visual and "
            f"{len(workload['ids']) - workload['visual_tokens']} text tokens, greedy, {workload['new_tokens']} tokens",
            "machine": machine.describe(),
            "limits": self.state.get("limits"),
            "state": {"before": self.state["before"], "after": read_state()},
            **settings,
            "rounds": options.rounds,
            "results": self._kept_results(),
        }
        if options.device == "gpu":
            document |= {"gpu": self.state["gpu"], "floor": self._floor(len(workload["ids"]))}
            document["machine"]["versions"] |= self.state["gpu_versions"]
        for each in self.chosen:
            part = "llm" if each.variant.endswith("-llm") else each.peer.what
            record: dict[str, Any] = {"part": part, **figures(self.state["rounds"].get(each.name, []))}
            record["versions"] = self.state["versions"].get(each.name)
            for key, found in (("parity", "checks"), ("error", "errors")):
                if each.name in self.state[found]:
                    record[key] = self.state[found][each.name]
            document["results"][each.name] = record
        return document

    def _look_at_the_gpu(self) -> None:
        """Which GPU, and its limits. Raises Failed with the reason if there is none."""
        found = json.loads(call([sys.executable, "-m", "benchmarks.peers.gpu"]).splitlines()[-1])
        if self.options.out is None:
            name = re.sub(r"[^a-z0-9]+", "-", found["device"]["name"].lower()).strip("-")
            self.options.out = RESULTS / f"gpu-{name}.json"
        if self.state.get("gpu", found["device"]) != found["device"]:
            self.state |= {"rounds": {}, "versions": {}, "checks": {}}  # of another GPU or driver
        self.state |= {"gpu": found["device"], "gpu_versions": found["versions"], "limits": found["limits"]}

    def _precisions(self) -> tuple[str, ...]:
        """The precisions to convert to: on a GPU, those that the chosen contenders need."""
        if self.options.device == "cpu":
            return PRECISIONS
        ours = [each.variant.rpartition("-")[2] for each in self.chosen if each.module == "ours"]
        return tuple(dict.fromkeys(ours)) or ("fp16",)

    def _prepare_contenders(self) -> dict[str, str]:
        """Environments, prepared files and checks; the interpreter of every contender that did not fail."""
        pythons: dict[str, str] = {}
        for each in self.chosen:
            try:
                own = self.options.envs is not None
                pythons[each.name] = environment(self.options.envs / each.environment, peer_of(each.environment)) if own else sys.executable
                if each.peer.prepare is not None:
                    print(f"preparing {each.name}", file=sys.stderr, flush=True)
                    self._call(pythons[each.name], each, "--prepare")
                if self.options.device == "gpu" and each.peer.check is not None and each.name not in self.state["checks"]:
                    print(f"checking {each.name}", file=sys.stderr, flush=True)
                    self.state["checks"][each.name] = json.loads(self._call(pythons[each.name], each, "--check").splitlines()[-1])
                    self._keep()
            except (Failed, OSError, ValueError, IndexError) as error:
                self._failed(each.name, error)
        return pythons

    def _call(self, python: str, each: Contender, what: str) -> str:
        """Run a process of a contender. Raises Failed, or TimeUp once the limit is reached."""
        left = self.deadline - time.monotonic()
        if left < 1:
            raise TimeUp
        options = self.options
        try:
            command = each.command(python, options.work, options.threads, options.runs, options.device, what)
            return call(command, seconds=min(TIMEOUT, left))
        except Failed:
            if time.monotonic() >= self.deadline:
                raise TimeUp from None
            raise

    def _floor(self, prompt: int) -> dict[str, Any]:
        from fastvlm_edge.model_dir.manifest import read_manifest
        from fastvlm_edge.planning.workload import shape_of

        precisions = self._precisions()
        manifest = read_manifest(self.options.work / precisions[0])
        return floor_of(shape_of(manifest), manifest.vision.image_size, prompt, precisions, self.state["limits"])

    def _kept_results(self) -> dict[str, Any]:
        """On a GPU, with `--only`: the other contenders' results in an earlier record of the same GPU and driver."""
        out: Path = self.options.out
        if self.options.device == "cpu" or not self.options.only or not out.is_file():
            return {}
        earlier = json.loads(out.read_text(encoding="utf-8"))
        return dict(earlier["results"]) if earlier.get("gpu") == self.state["gpu"] else {}

    def _keep(self) -> None:
        write_json(self._state_path, self.state)
        if self.options.out is not None:
            write_json(self.options.out, self.document())

    def _failed(self, name: str, error: Exception) -> None:
        self.state["errors"][name] = " ".join(str(error).split()) or type(error).__name__
        print(f"{name}: {self.state['errors'][name]}", file=sys.stderr, flush=True)
        self._keep()


def print_table(document: dict[str, Any]) -> None:
    """Print the medians."""
    fields = [field for field in FIELDS if any(field in record for record in document["results"].values())]
    titles = [field.replace("decode_tokens_per_second", "tokens/s").removesuffix("_ms").replace("_mib", " MiB") for field in fields]
    print(f"{'':28}" + "".join(f"{title.replace('_', ' '):>17}" for title in titles))
    for name, record in document["results"].items():
        cells = "".join(f"{record[field]['median']:17.1f}" if field in record else f"{'-':>17}" for field in fields)
        parity = record.get("parity")
        same = f"  {parity['equal']} of {parity['asked']} answers as on the CPU" if parity else ""
        print(f"{name:28}{cells}{same}" + (f"  {record['error']}" if "error" in record else ""))


def parser(name: str, about: str | None, out: Path | None) -> argparse.ArgumentParser:
    """The options that every comparison has; `out` is where its record goes by default."""
    made = argparse.ArgumentParser(prog=f"python -m {name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=7, help="processes of each contender; default %(default)s")
    made.add_argument("--runs", type=int, default=3, help="timed runs per process after a warm-up; default %(default)s")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--size", default="0.5b", choices=("tiny", "0.5b", "1.5b"), help="tiny is a smoke test")
    made.add_argument(
        "--work", type=Path, help="where checkpoint and models are kept; default build/bench, for other sizes build/bench-SIZE"
    )
    made.add_argument("--envs", type=Path, default=ROOT / "build" / "peers", help="where the environments are kept")
    made.add_argument("--out", type=Path, default=out)
    made.add_argument("--fresh", action="store_true", help="forget the rounds of a run that was cut off")
    made.set_defaults(device="cpu", only=None, limit=None, prepare=False)
    return made


def settle(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in the work directory, make it, and let nothing be downloaded from now on."""
    if options.work is None:
        name = "bench" if options.device == "cpu" else "bench-gpu"
        options.work = ROOT / "build" / (name if options.size == "0.5b" else f"{name}-{options.size}")
    options.work.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    return options


def main() -> int:
    """Run the comparison."""
    made = parser("benchmarks.peers.run", __doc__, None)
    made.add_argument("--device", choices=DEVICES, default="cpu")
    made.add_argument("--only", help="peers or contenders, such as llama.cpp,fastvlm-edge:int4; default all")
    made.add_argument("--limit", type=float, help="stop after this many seconds; the same command then continues")
    made.add_argument("--prepare", action="store_true", help="only convert, build and check, so that a later run only has to measure")
    options = made.parse_args()
    if options.device == "gpu":
        options.envs = None
    elif options.out is None:
        options.out = RESULTS / "peers.json"
    chosen = contenders(options.only.split(",") if options.only else None, options.device)
    try:
        return Run(settle(options), chosen).run()
    except KeyboardInterrupt:
        print("peers: stopped; the same command continues from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
