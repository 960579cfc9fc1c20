"""Text as it grows, token by token."""

from collections.abc import Callable, Sequence

from src.data.tokenizer import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""Stands in a decoded text for bytes that are no character, or none yet."""


class TextStream:
    """Writes a text as its tokens come; bytes of an unfinished character wait for the rest.

    Args:
        prompt: tokens that are there already; their text is written at once.
        tokenizer: of the tokens.
        write: takes each piece of text.
    """

    def __init__(
        self, prompt: Sequence[int], tokenizer: Tokenizer, *, write: Callable[[str], None]
    ) -> None:
        self.ids, self.tokenizer, self.write = list(prompt), tokenizer, write
        self.num_written = 0
        self._write_up_to(self._text())

    def add(self, place: int, token: int) -> None:
        """Takes one token; `place` is that of the prompt, which is one alone."""
        self.ids.append(token)
        text = self._text()
        if not text.endswith(UNFINISHED):
            self._write_up_to(text)

    def finish(self) -> None:
        """Writes what has waited."""
        self._write_up_to(self._text())

    def _text(self) -> str:
        return self.tokenizer.decode(self.ids)

    def _write_up_to(self, text: str) -> None:
        self.write(text[self.num_written :])
        self.num_written = len(text)
