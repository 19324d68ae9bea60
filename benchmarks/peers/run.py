"""FastVLM-0.5B beside its peers on one CPU, in one run: the same random weights, the same positions, the same threads.

    python -m benchmarks.peers.run [--only NAME,NAME] [--rounds 5] [--threads 2] [--out FILE] [--fresh]

256 visual and 34 text tokens at 1024 px, greedy, 65 tokens; a peer without an encoder gets 290 positions of text, a peer without an LLM the
picture alone. Every peer has an environment of its own in build/peers, made at the first call. Contenders take turns: each is a new process
once a round, so that noise hits all of them alike. A peer that fails is recorded with the reason, the others go on. A run that was cut off
goes on where it stopped: finished rounds are kept in the work folder until all are done.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.peers.protocol import FIELDS, ROOT, Peer
from benchmarks.peers.workload import prepare
from fastvlm_edge.bench.record import Samples, write_json
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
"""Name of a peer -> its module in this folder."""
RESULT = ROOT / "benchmarks" / "results" / "peers.json"
TIMEOUT = 3600.0


@dataclass(frozen=True)
class Contender:
    """A variant of a peer."""

    name: str
    """`llama.cpp:q4_0`"""
    peer: Peer
    module: str
    variant: str


class PeerFailed(Exception):
    """What a peer's process said last."""


def contenders(only: list[str] | None) -> list[Contender]:
    """All, or those that `only` names in full or by peer."""
    found = []
    for name, module in SCRIPTS.items():
        peer = peer_of(module)
        found += [Contender(f"{name}:{variant}", peer, module, variant) for variant in peer.variants]
    names = [each.name for each in found]
    for wanted in only or ():
        if wanted not in names and wanted not in SCRIPTS:
            raise SystemExit(f"peers: --only names {wanted}, which is none of {', '.join([*SCRIPTS, *names])}")
    return [each for each in found if only is None or each.name in only or each.name.partition(":")[0] in only]


def peer_of(module: str) -> Peer:
    """What a module of this folder says about itself."""
    peer: Peer = import_module(f"benchmarks.peers.{module}").PEER
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


def call(command: list[str]) -> str:
    """Run in the repository's root; what it prints. Raises PeerFailed with its last line where it fails."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, errors = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise PeerFailed(f"not done after {TIMEOUT:.0f} s") from None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode:
        lines = errors.strip().splitlines() or [f"exit status {process.returncode}"]
        killed = f"ended by signal {-process.returncode}: " if process.returncode < 0 else ""
        raise PeerFailed((killed + lines[-1]).replace(str(ROOT), ".")[:400])
    return out


class Run:
    """The rounds so far and where they are kept."""

    def __init__(self, options: argparse.Namespace) -> None:
        """A run that was cut off is taken up, unless it was of other settings or `--fresh` asks for a new one."""
        self.options = options
        self.chosen = contenders(options.only.split(",") if options.only else None)
        self._state_path: Path = options.work / "peers-run.json"
        settings = {"size": options.size, "threads": options.threads, "runs": options.runs}
        self.state: dict[str, Any] = {"settings": settings, "rounds": {}, "errors": {}, "versions": {}, "before": read_state()}
        if self._state_path.is_file() and not options.fresh:
            earlier = json.loads(self._state_path.read_text(encoding="utf-8"))
            if earlier["settings"] == settings:
                self.state = earlier
                print(f"going on with {self._state_path}; --fresh begins anew", file=sys.stderr)

    def run(self) -> int:
        """Prepare all, then the rounds. 0 where nothing failed."""
        self.state["errors"] = {}  # what failed is tried again
        prepare(self.options.work, self.options.size, stderr_progress())
        if "limits" not in self.state:
            self.state["limits"] = machine.limits(self.options.threads)
        pythons: dict[str, str] = {}
        for each in self.chosen:
            try:
                pythons[each.name] = environment(self.options.envs / each.module, each.peer)
                if each.peer.prepare is not None:
                    print(f"preparing {each.name}", file=sys.stderr, flush=True)
                    call(self._command(pythons[each.name], each, "--prepare"))
            except (PeerFailed, OSError) as error:
                self._failed(each, error)
        for number in range(self.options.rounds):
            for each in self.chosen:
                done = self.state["rounds"].setdefault(each.name, [])
                if len(done) > number or each.name in self.state["errors"]:
                    continue
                print(f"round {number + 1}: {each.name}", file=sys.stderr, flush=True)
                try:
                    found = json.loads(call(self._command(pythons[each.name], each, "--measure")).splitlines()[-1])
                except (PeerFailed, OSError, ValueError, IndexError) as error:
                    self._failed(each, error)
                    continue
                done.append(found["samples"])
                self.state["versions"][each.name] = found["versions"]
                self._keep()
        self._keep()
        if all(len(self.state["rounds"].get(each.name, ())) >= self.options.rounds for each in self.chosen):
            self._state_path.unlink()  # the next run is a new one
        print_table(self.document())
        return 1 if self.state["errors"] else 0

    def document(self) -> dict[str, Any]:
        """The record."""
        settings = self.state["settings"]
        workload = json.loads((self.options.work / "workload.json").read_text(encoding="utf-8"))
        results = {}
        for each in self.chosen:
            rounds = self.state["rounds"].get(each.name, [])
            record = {"part": "llm" if each.variant.endswith("-llm") else each.peer.what, **figures(rounds)}
            record["versions"] = self.state["versions"].get(each.name)
            if each.name in self.state["errors"]:
                record["error"] = self.state["errors"][each.name]
            results[each.name] = record
        return {
            "what": f"FastVLM-{settings['size']}, random weights, {workload['image_size']} px: {workload['visual_tokens']} visual and "
            f"{len(workload['ids']) - workload['visual_tokens']} text tokens, greedy, {workload['new_tokens']} tokens",
            "machine": machine.describe(),
            "limits": self.state["limits"],
            "state": {"before": self.state["before"], "after": read_state()},
            **settings,
            "rounds": self.options.rounds,
            "results": results,
        }

    def _keep(self) -> None:
        write_json(self._state_path, self.state)
        write_json(self.options.out, self.document())

    def _failed(self, each: Contender, error: Exception) -> None:
        self.state["errors"][each.name] = " ".join(str(error).split()) or type(error).__name__
        print(f"{each.name}: {self.state['errors'][each.name]}", file=sys.stderr, flush=True)
        self._keep()

    def _command(self, python: str, each: Contender, what: str) -> list[str]:
        options = self.options
        arguments = ["--work", str(options.work.resolve()), "--threads", str(options.threads), "--runs", str(options.runs)]
        return [python, "-m", f"benchmarks.peers.{each.module}", *arguments, what, each.variant]


def figures(rounds: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Median, least, most and samples by round of every field."""
    samples = Samples()
    for found in rounds:
        samples.begin_process()
        for name in FIELDS:
            for value in found.get(name, ()):
                samples.add(name, value)
    return {name: samples.summary(name) for name in FIELDS if name in samples.figures}


def print_table(document: dict[str, Any]) -> None:
    """The medians, for people."""
    print(f"{'':28}" + "".join(f"{field.removesuffix('_ms').replace('decode_tokens_per_second', 'tokens/s'):>17}" for field in FIELDS))
    for name, record in document["results"].items():
        cells = "".join(f"{record[field]['median']:17.1f}" if field in record else f"{'-':>17}" for field in FIELDS)
        print(f"{name:28}{cells}" + (f"  {record['error']}" if "error" in record else ""))


def main() -> int:
    """Run the driver."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="peers or contenders, such as llama.cpp,fastvlm-edge:int4; default all")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each contender; default %(default)s")
    parser.add_argument("--runs", type=int, default=3, help="timed runs a process after a warm-up; default %(default)s")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", default="0.5b", choices=("tiny", "0.5b", "1.5b"))
    parser.add_argument("--work", type=Path, help="default build/bench, for other sizes build/bench-SIZE")
    parser.add_argument("--envs", type=Path, default=ROOT / "build" / "peers", help="where the environments are kept")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--fresh", action="store_true", help="forget the rounds of a run that was cut off")
    options = parser.parse_args()
    if options.work is None:
        options.work = ROOT / "build" / ("bench" if options.size == "0.5b" else f"bench-{options.size}")
    options.work.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here is to be downloaded while it is measured
    run = Run(options)
    try:
        return run.run()
    except KeyboardInterrupt:
        print("peers: stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
