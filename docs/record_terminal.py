"""Records the terminal that README shows: `python -m docs.record_terminal` runs the commands and writes docs/images/terminal.svg.

The commands run in a pseudo-terminal, so that the picture is what a user sees. The picture that they ask about goes to
docs/images/meter.png.
"""

from __future__ import annotations

import os
import pty
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from examples.demo_training.scenes import make_scene

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
SCENE = ("reading", 3)
"""Kind and index of the held-out scene that is asked about; `fastvlm-edge demo` asks about it too."""
COLUMNS = 100
COMMANDS = (
    "fastvlm-edge convert fastvlm-demo -o model",
    'fastvlm-edge run model --image meter.png "{prompt}"',
)


def run(command: str, folder: Path) -> str:
    """What `command` shows on a terminal. Raises CalledProcessError if it fails."""
    scripts = Path(sys.executable).parent  # the script is called by its name, as users do, so that `convert` names it in what to type next
    words = [str(scripts / "fastvlm-edge"), *shlex.split(command)[1:]]
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "TERM": "xterm-256color", "PATH": f"{scripts}:{os.environ['PATH']}"}
    ours, theirs = pty.openpty()
    output = bytearray()
    with subprocess.Popen(words, cwd=folder, env=environment, stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL) as process:
        os.close(theirs)
        while True:
            try:
                block = os.read(ours, 65536)
            except OSError:  # the last process closed it
                break
            if not block:
                break
            output += block
    os.close(ours)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, bytes(output))
    return final_lines(output.decode())


def final_lines(output: str) -> str:
    """What is left on the screen: progress bars write over their own line."""
    lines = [re.sub(r"\x1b\[K", "", line.rstrip("\r").rpartition("\r")[2]).rstrip() for line in output.split("\n")]
    return "\n".join(line for line in lines if line)


def picture(screens: list[tuple[str, str]]) -> str:
    """The commands and their output as an SVG that loads no font from elsewhere."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True, color_system="truecolor", legacy_windows=False)
        for command, output in screens:
            console.print(Text.assemble(("$ ", "bold green"), (command, "bold white")))
            console.print(Text.from_ansi(output))
            console.print()
    svg = console.export_svg(title="fastvlm-edge", theme=MONOKAI, unique_id="terminal")
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    svg = svg.replace("Fira Code", "DejaVu Sans Mono, Menlo, Consolas")
    return re.sub(r"[ \t]+\n", "\n", svg)


def main() -> int:
    """Record both pictures."""
    scene = make_scene("heldout", 0, SCENE[1], kind=SCENE[0])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "fastvlm-demo").symlink_to(ROOT / "examples" / "demo" / "fastvlm-demo")
        scene.image.save(folder / "meter.png")
        commands = [command.format(prompt=scene.questions[0].prompt) for command in COMMANDS]
        screens = [(command, run(command, folder)) for command in commands]
        scene.image.save(IMAGES / "meter.png", optimize=True)
    (IMAGES / "terminal.svg").write_text(picture(screens), encoding="utf-8")
    for command, output in screens:
        print(f"$ {command}\n{output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
