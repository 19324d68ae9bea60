"""`optimum-cli export fastvlm`: the command `fastvlm-edge convert` under the name that users of optimum look for.

optimum imports every file in this namespace package (PEP 420: no `__init__.py` here or above) at each start, so nothing of ours is imported
before the command is asked for.
"""

from __future__ import annotations

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

_NAME = "fastvlm"


class FastVLMExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum has no types
    """Options and errors as in `fastvlm-edge convert`, but for OUTPUT, which is an argument as in other exports of optimum."""

    COMMAND = CommandInfo(name=_NAME, help="Convert a FastVLM checkpoint to ONNX for fastvlm-edge.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Add the arguments. optimum calls this for all commands at each start, so they are only added for this one."""
        if _NAME not in sys.argv:
            return
        from fastvlm_edge.commands.arguments import given_path
        from fastvlm_edge.commands.convert import OUTPUT_HELP, add_checkpoint, add_options

        add_checkpoint(parser)
        parser.add_argument("output", metavar="OUTPUT", type=given_path, help=OUTPUT_HELP)
        add_options(parser)

    def run(self) -> None:
        """Convert, and end the process with the exit status of `fastvlm-edge convert`."""
        from fastvlm_edge.cli import guarded
        from fastvlm_edge.commands.convert import convert_as_asked

        sys.exit(guarded(lambda: convert_as_asked(self.args)))


REGISTER_COMMANDS = [(FastVLMExportCommand, ExportCommand)]
