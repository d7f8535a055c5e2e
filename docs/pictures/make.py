"""Make the documentation's pictures from the program itself: python docs/pictures/make.py (needs chromium, and Pillow to make the file small)

`terminal.svg` is what an export and its evaluation print, `report.png` the top of a report of four artifacts.
"""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

HERE = Path(__file__).parent
COLUMNS = 112
COMMANDS = ("elmexport coreml --model tiny --quant int4", "elmexport eval OpenELM-tiny-coreml-int4 --limit 100")
COMPARED = ("int8", "q5_k_m", "q4_k_m", "int4")  # quantizations of GGUF
WINDOW = "1180,860"
FONTS = "Menlo, Consolas, 'DejaVu Sans Mono', monospace"  # what readers have; nothing is fetched


def terminal(folder: Path) -> None:
    """Record what the commands print to a terminal."""
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    for command in COMMANDS:
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        console.print(Text.from_ansi(_printed(command.split()[1:], folder)))
    svg = console.export_svg(title="elmexport", theme=MONOKAI)
    start, end = svg.index("@font-face"), svg.rindex("@font-face")
    end = svg.index("}", end) + 1
    svg = svg[:start] + svg[end:]
    (HERE / "terminal.svg").write_text(svg.replace("Fira Code, monospace", FONTS), encoding="utf-8")


def _printed(arguments: list[str], folder: Path) -> str:
    """Standard output of `elmexport`, which takes it for a terminal."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    program = subprocess.Popen(
        [sys.executable, "-m", "elmexport", *arguments], cwd=folder, env=environment, stdout=theirs, stderr=subprocess.DEVNULL
    )
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        parts.append(part)
    if program.wait():
        raise SystemExit(f"elmexport {' '.join(arguments)} ended with {program.returncode}")
    return b"".join(parts).decode().replace("\r\n", "\n")


def report(folder: Path) -> None:
    """Photograph the top of a report."""
    from PIL import Image

    elmexport = [sys.executable, "-m", "elmexport"]
    for quant in COMPARED:
        subprocess.run([*elmexport, "gguf", "--model", "tiny", "--quant", quant], cwd=folder, check=True)
    names = [f"OpenELM-tiny-gguf-{quant}" for quant in COMPARED]
    subprocess.run([*elmexport, "report", *names, "--limit", "100", "--out", "report.html"], cwd=folder, check=True)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or sys.exit("chromium is not installed")
    flags = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={WINDOW}", "--screenshot=report.png"]
    subprocess.run([chromium, *flags, (folder / "report.html").as_uri()], cwd=folder, check=True)
    with Image.open(folder / "report.png") as picture:
        picture.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(HERE / "report.png", optimize=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        terminal(Path(temporary))
        report(Path(temporary))
