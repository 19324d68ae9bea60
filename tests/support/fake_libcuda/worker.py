"""Runs functions one after the other, each in a process of its own: a fork of this one, which has imported the large packages already."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import sys
import tempfile
import traceback
from typing import Any

PRELOADED = ("pytest", "cuda.bindings.driver", "tests.support.fake_libcuda.books")
LIMIT = 120
"""Seconds that a function may take."""


def run(request: dict[str, Any]) -> None:
    """Call the function and end the process, with status 0 if it returns."""
    code = 1
    faulthandler.enable()
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    os.environ.update(request["environment"])
    try:
        getattr(importlib.import_module(request["module"]), request["name"])(*request["arguments"])
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Read requests, one a line, and answer each with the exit status and the output of its process."""
    for module in PRELOADED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # so that gc.collect() in a function only looks at what that function made
    for line in sys.stdin:
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if child == 0:
                for stream in (1, 2):
                    os.dup2(output.fileno(), stream)
                run(json.loads(line))
            _, status = os.waitpid(child, 0)
            output.seek(0)
            print(json.dumps({"code": os.waitstatus_to_exitcode(status), "output": output.read().decode()}), flush=True)


if __name__ == "__main__":
    main()
