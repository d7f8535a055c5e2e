"""`elmexport logits`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from elmexport.cli.progress import progress_bar
from elmexport.errors import ElmExportError
from elmexport.files import check_writable


def logits(
    artifact: Annotated[Path, typer.Argument(help="An artifact folder, a bare .onnx, .mlpackage or .gguf, or a checkpoint folder.")],
    ids_file: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Text file of token ids, separated by spaces, commas or lines, or a JSON list. BOS is not added."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE.npy", help="NumPy file to write (.npy), replaced if it exists.")],
) -> None:
    """Save the logits an artifact gives for token ids.

    The file holds float32 [tokens, vocabulary]; row t is what the model says after tokens 0 to t.

    \b
    Example:
      echo "1 450 4996 17354" > ids.txt
      elmexport logits 450M-onnx --ids-file ids.txt --out logits.npy
    """
    ids = read_ids(ids_file)
    if not out.parent.is_dir():
        raise ElmExportError(f"{out.parent} is not a folder; create it, or choose another --out")
    check_writable(out)

    import numpy as np

    from elmexport.runtimes import open_artifact

    with progress_bar(transient=True) as progress:
        progress.stage(f"opening {artifact.name}")
        runtime = open_artifact(artifact)
        progress.stage(f"reading {len(ids)} tokens")
        result = runtime.logits(ids)
    try:
        with out.open("wb") as file:  # an open file, because numpy adds a suffix to a name that lacks it
            np.save(file, result)
    except OSError as error:
        raise ElmExportError(f"cannot write {out}: {error.strerror or error}; free space or choose another --out") from error
    typer.echo(f"{out}: float32 [{result.shape[0]}, {result.shape[1]}]")


def read_ids(path: Path) -> list[int]:
    """The token ids in a text file.

    Raises:
        ElmExportError: no such file, not text, or something that is no token id.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ElmExportError(f"cannot read {path}: {error.strerror or error}; --ids-file takes a text file of token ids") from None
    except UnicodeDecodeError:
        raise ElmExportError(
            f"{path} is not text; --ids-file takes token ids separated by spaces, commas or lines, or a JSON list"
        ) from None
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    words = [word for word in re.split(r"[\s,]+", text) if word]
    for place, word in enumerate(words, start=1):
        if not re.fullmatch(r"\d{1,9}", word):
            raise ElmExportError(f"{path}: entry {place} is {word!r}; token ids are whole numbers, 0 or above")
    return [int(word) for word in words]
