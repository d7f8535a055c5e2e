"""The README's commands do what it says: every fenced `bash` block after a line `<!-- install -->` or `<!-- test -->` is
executed, in order, in one folder. Steps that install are left out, because the suite runs against what is installed already.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import elmexport

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^<!-- (?:install|test) -->\s*\n```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
INSTALLS = re.compile(r"(git|cd|source|\.|(\S*/)?pip3?|(\S*/)?python[\d.]* -m (venv|pip)) ")


def commands(markdown: str) -> list[str]:
    """The shell commands of the marked blocks, one for each link of a `&&` chain, paths taken off `elmexport`."""
    found = []
    for block in BLOCK.findall(markdown):
        for line in block.replace("\\\n", " ").splitlines():
            steps = (step.strip() for step in line.split("&&"))
            found += [
                re.sub(r"^\S*/elmexport ", "elmexport ", step)
                for step in steps
                if step and not step.startswith("#") and not INSTALLS.match(step)
            ]
    return found


@pytest.mark.slow
def test_every_marked_command_succeeds(tmp_path: Path) -> None:
    script = tmp_path / "bin" / "elmexport"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m elmexport "$@"\n')
    script.chmod(0o755)
    package = str(Path(elmexport.__file__).parents[1])
    environment = os.environ | {"PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": package}
    work = tmp_path / "work"
    work.mkdir()
    found = commands(README.read_text(encoding="utf-8"))
    assert any(command.startswith("elmexport ") for command in found), "README.md has no marked command of elmexport"
    for command in found:
        done = subprocess.run(["bash", "-c", command], cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\nexit code {done.returncode}\n{done.stdout}\n{done.stderr}"


def test_commands_of_a_document() -> None:
    document = """
<!-- install -->
```bash
python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt . && .venv/bin/elmexport coreml --model tiny && .venv/bin/elmexport models
# a comment
echo "1 2" > ids.txt
elmexport logits OpenELM-tiny-coreml-int4 \\
  --ids-file ids.txt --out logits.npy
```

```bash
elmexport not --marked
```

<!-- test -->

```bash
elmexport inspect OpenELM-tiny-coreml-int4
```
"""
    assert commands(document) == [
        "elmexport coreml --model tiny",
        "elmexport models",
        'echo "1 2" > ids.txt',
        "elmexport logits OpenELM-tiny-coreml-int4    --ids-file ids.txt --out logits.npy",
        "elmexport inspect OpenELM-tiny-coreml-int4",
    ]
