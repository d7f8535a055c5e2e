"""Chat templates: Jinja2 in a sandbox, as transformers renders them, in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from elmexport.checkpoint.tokenizer.base import Span, Tokenizer
from elmexport.checkpoint.tokenizer.beside import default_template
from elmexport.checkpoint.tokenizer.template_process import TemplateFailure, render
from elmexport.documents import decode_json
from elmexport.errors import ElmExportError


@dataclass(frozen=True)
class Message:
    """Message of a chat: one side's turn."""

    role: str  # "user" or "assistant"
    content: str


def user_turn(tokenizer: Tokenizer, text: str) -> list[Span]:
    """A chat in which the user says `text` and the assistant is to answer; see `chat_spans`."""
    return chat_spans(tokenizer, [Message("user", text)])


def chat_spans(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[Span]:
    """A chat, in which the assistant is to answer `messages`, by the template of `tokenizer`. What is said is text, whatever it spells.

    Raises:
        ElmExportError: the model has no template, the template fails, or it changes what is said beyond spaces around it.
    """
    template = tokenizer.chat_template
    if template is None:
        raise ElmExportError(
            f"{tokenizer.path} comes without a chat template (chat_template in a tokenizer_config.json beside it, or chat_template.jinja), so this is "
            "no chat model, or the template was left out; leave out --chat to continue the prompt as a text"
        )
    now = datetime.now()
    whole = _render(tokenizer, template, messages, now)
    marks = [f"\ufdd2{i}\ufdd3" for i in range(len(messages))]  # in no text: these are no characters
    rest = _render(tokenizer, template, [Message(one.role, mark) for one, mark in zip(messages, marks, strict=True)], now)
    spans: list[Span] = []
    lost = False
    for one, mark in zip(messages, marks, strict=True):
        before, found, rest = rest.partition(mark)
        start = sum(len(span.text) for span in spans) + len(before)
        said = next((said for said in (one.content, one.content.strip()) if found and whole.startswith(said, start)), None)
        # A message with spaces around it fits as it is said only if what follows it fits too.
        if said is not None and not whole.startswith(rest.partition("\ufdd2")[0], start + len(said)):
            said = one.content.strip()
        lost = lost or said is None
        spans += [Span(before, True), Span(said or "", False)]
    spans.append(Span(rest, True))
    if lost or "".join(span.text for span in spans) != whole:
        raise ElmExportError(
            f"the chat template of {tokenizer.path} changes what the user says, or leaves it out, so that it cannot be kept apart from the template's "
            "control tokens; leave out --chat, and give the whole prompt as it should be"
        )
    return spans


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
    template: str | None = text
    if path.suffix == ".json":
        try:
            data = decode_json(text)
        except ValueError as error:
            raise ElmExportError(f"{path} is not JSON ({error}); give a tokenizer_config.json or a Jinja chat template") from None
        template = default_template(data.get("chat_template")) if isinstance(data, dict) else None
    if template is None or not template.strip():
        raise ElmExportError(f"{path} holds no chat template; give a file that does, or leave out --chat-template")
    return template


def _render(tokenizer: Tokenizer, template: str, said: Sequence[Message], now: datetime) -> str:
    pieces, special = tokenizer.pieces(), tokenizer.special
    ids = {"bos_token": special.bos, "eos_token": tokenizer.eos_id, "unk_token": special.unk, "pad_token": special.pad}
    tokens = {role: pieces[token_id].text for role, token_id in ids.items() if token_id is not None and token_id < len(pieces)}
    messages: list[dict[str, Any]] = [{"role": one.role, "content": one.content} for one in said]
    try:
        return render(template, {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True, **tokens}, now)
    except TemplateFailure as failure:
        raise ElmExportError(
            f"the chat template of {tokenizer.path} fails ({failure}); mend it, or leave out --chat and give the whole prompt as it should be"
        ) from None
