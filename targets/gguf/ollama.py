"""The `Modelfile` by which Ollama takes the artifact: `ollama create NAME -f Modelfile`."""

from __future__ import annotations

from pathlib import Path

# A base model continues its prompt: without a template of its own Ollama would have to guess one.
_PLAIN = 'TEMPLATE """{{ .Prompt }}"""\n'


def write_modelfile(folder: Path, model: Path, context: int, *, chat: bool) -> None:
    """Write `folder/Modelfile`. With `chat`, the template inside the `.gguf` counts."""
    text = f"FROM ./{model.name}\n{'' if chat else _PLAIN}PARAMETER num_ctx {context}\n"
    (folder / "Modelfile").write_text(text, encoding="utf-8")
