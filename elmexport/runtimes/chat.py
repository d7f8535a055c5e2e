"""Chat with an artifact: turns of a user and a model, as far back as the context reaches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from elmexport.checkpoint.tokenizer.chat import Message, chat_spans
from elmexport.errors import ElmExportError
from elmexport.files import write_text
from elmexport.runtimes.text import Completion, TextModel, TextOptions, text_of

_ANSWER = 4  # part of the context that is kept free for an answer


class Chat:
    """Conversation with `model`. `messages` is what both sides have said and the model still reads."""

    def __init__(self, model: TextModel, options: TextOptions) -> None:
        """
        Raises:
            ElmExportError: a model without a chat template.
        """
        self.messages: list[Message] = []
        self._model, self._options = model, options
        self._ids([Message("user", "Hello")])

    def say(self, text: str, write: Callable[[str], None], note: Callable[[str], None] = lambda line: None) -> Completion:
        """Say `text`, hand the answer to `write` piece by piece, and keep both. What no longer fits the context is forgotten, which `note` hears.

        An answer that is interrupted is kept as far as it came.

        Raises:
            ElmExportError: a text that alone is too long for the context.
        """
        turn = [Message("user", text_of(text))]
        context = self._model.runtime.context
        room = context - min(self._options.max_tokens, context // _ANSWER)
        forgotten = 0
        while len(ids := self._ids([*self.messages, *turn])) > room and self.messages:
            del self.messages[:2]
            forgotten += 1
        if forgotten:
            turns = "turn is" if forgotten == 1 else f"{forgotten} turns are"
            note(f"the oldest {turns} forgotten: the context holds {context} tokens")
        said: list[str] = []

        def show(piece: str) -> None:
            said.append(piece)
            write(piece)

        self._model.check_fits(len(ids))
        try:
            return self._model.complete_ids(ids, self._options, show)
        finally:
            self.messages += [*turn, Message("assistant", "".join(said))]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` as the next turn, after what is kept.

        Raises:
            ElmExportError: a text that is none.
        """
        return self._ids([*self.messages, Message("user", text_of(text))])

    def reset(self) -> None:
        """Forget everything."""
        self.messages = []

    def save(self, path: Path) -> None:
        """Write the conversation as JSON, `[{"role": …, "content": …}, …]`.

        Raises:
            ElmExportError: the place cannot be written, or something is there.
        """
        if path.exists():
            raise ElmExportError(f"{path} exists already; name another file")
        said = [{"role": message.role, "content": message.content} for message in self.messages]
        write_text(path, json.dumps(said, ensure_ascii=False, indent=2) + "\n")

    def _ids(self, messages: list[Message]) -> list[int]:
        tokenizer = self._model.tokenizer
        return tokenizer.encode_spans(chat_spans(tokenizer, messages))
