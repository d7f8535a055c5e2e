"""Text of tokens as they come."""

from __future__ import annotations

from collections.abc import Sequence

from elmexport.checkpoint.tokenizer.base import Tokenizer

_REPLACEMENT = "\ufffd"


class StreamDecoder:
    """Text of tokens that arrive one at a time: nothing is given out before its character is complete.

    `prompt` is what the text continues, so that a first word keeps its space. The parts, and `finish()`, add up to the text that
    `Tokenizer.decode` adds to the prompt's.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Decoding starts at a token whose text is out already, so that spaces fall as they do in the whole text.
        self._window = list(prompt)
        self._shown = tokenizer.decode(self._window)
        self._pending = len(self._window)  # where in the window the tokens begin whose text is not out yet

    def feed(self, token_id: int) -> str:
        """The text that `token_id` completes, perhaps none."""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        if text.endswith(_REPLACEMENT):
            return ""  # an unfinished character
        new = text[len(self._shown) :]
        self._shown = text
        if new:
            # The window shrinks to the tokens just given out: whole characters, so it never starts in the middle of one.
            self._window = self._window[self._pending :]
            self._shown = self._tokenizer.decode(self._window)
            self._pending = len(self._window)
        return new

    def finish(self) -> str:
        """The rest when no token follows: replacement characters for bytes that never made one."""
        text = self._tokenizer.decode(self._window)[len(self._shown) :]
        self._shown += text
        return text
