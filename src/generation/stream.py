"""Writes text while it is generated, token by token."""

from collections.abc import Callable, Sequence

from src.data.tokenizer import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""Decoded in place of bytes that are not, or not yet, a character."""


class TextStream:
    """Writes a text as its tokens arrive; bytes of an incomplete character wait for the rest.

    Args:
        prompt: tokens of the prompt, whose text is written at once.
        tokenizer: decodes the tokens.
        write: called with each piece of text.
    """

    def __init__(
        self, prompt: Sequence[int], tokenizer: Tokenizer, *, write: Callable[[str], None]
    ) -> None:
        self.ids, self.tokenizer, self.write = list(prompt), tokenizer, write
        self.num_written = 0
        self._write_up_to(self._text())

    def add(self, place: int, token: int) -> None:
        """Adds one token; `place`, the index of the prompt, is ignored: there is only one."""
        self.ids.append(token)
        text = self._text()
        if not text.endswith(UNFINISHED):
            self._write_up_to(text)

    def finish(self) -> None:
        """Writes the remaining text."""
        self._write_up_to(self._text())

    def _text(self) -> str:
        return self.tokenizer.decode(self.ids)

    def _write_up_to(self, text: str) -> None:
        self.write(text[self.num_written :])
        self.num_written = len(text)
