"""A chat template, from either of the files that hold one."""

from __future__ import annotations

import json
from pathlib import Path

from elmexport.errors import ElmExportError


def read_template(path: Path) -> str:
    """The Jinja text of `path`: a `tokenizer_config.json`'s `chat_template`, or the whole of any other file.

    Raises:
        ElmExportError: no such file, not text, or no template in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ElmExportError(
            f"cannot read {path}: {error.strerror or error}; --chat-template takes a Jinja file or a tokenizer_config.json"
        ) from None
    except UnicodeDecodeError:
        raise ElmExportError(f"{path} is not text; give a Jinja chat template or a tokenizer_config.json") from None
    template: object = text
    if path.suffix == ".json":
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ElmExportError(f"{path} is not JSON ({error}); give a tokenizer_config.json or a Jinja chat template") from None
        template = data.get("chat_template") if isinstance(data, dict) else None
        if isinstance(template, list):  # several, by name
            template = next((one.get("template") for one in template if isinstance(one, dict) and one.get("name") == "default"), None)
    if not isinstance(template, str) or not template.strip():
        raise ElmExportError(f"{path} holds no chat template; give a file that does, or leave out --chat-template")
    return template
