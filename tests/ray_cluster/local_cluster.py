"""A Ray cluster on this machine: a head without CPUs, and nodes with one CPU each. Runs in the environment of Ray.

    python local_cluster.py COUNT

It answers lines of stdin with lines of JSON on stdout: `add`, `kill NODE`, `workers` (process ids by node). It ends with its stdin.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

MEMORY = 100 << 20
"""Bytes of each node's object store, of which a Ray node needs about 80 MB."""


def workers(node: Any) -> list[int]:
    """Process ids of the actors of a batch on a node."""
    raylet = node.all_processes["raylet"][0].process.pid
    children = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
    return [int(pid) for pid in children if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::_Actor")]


def main() -> None:
    """See above."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": MEMORY})
    nodes: dict[int, Any] = {}

    def say(document: Any) -> None:
        print(json.dumps(document), flush=True)

    def add() -> None:
        nodes[len(nodes)] = cluster.add_node(num_cpus=1, object_store_memory=MEMORY)

    for _ in range(int(sys.argv[1])):
        add()
    say(cluster.address)
    for line in sys.stdin:
        match line.split():
            case ["add"]:
                add()
                say(len(nodes) - 1)
            case ["kill", node]:
                cluster.remove_node(nodes[int(node)], allow_graceful=False)
                nodes[int(node)] = None
                say(None)
            case ["workers"]:
                say({index: workers(node) for index, node in nodes.items() if node is not None})
    cluster.shutdown()


if __name__ == "__main__":
    main()
