"""Text as it lands: what one step emits appears at once, shaded when it was more than one token."""

import os
from collections.abc import Sequence
from typing import TextIO

SHADES = ("\x1b[48;5;24;38;5;231m", "\x1b[48;5;29;38;5;231m")  # blue and green by turns, so that neighbouring runs can be told apart
FAINT, PLAIN = "\x1b[2m", "\x1b[0m"


def has_colour(file: TextIO) -> bool:
    """True for a terminal that shows colours and a user who wants them (NO_COLOR is not set)."""
    return file.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Stream:
    """Writes one sequence to `file` as it is decoded: the `stream=` of `ramify.generate`."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.colour = has_colour(file)
        self._runs = self._landed = 0

    def __call__(self, index: int, tokens: Sequence[int], piece: str) -> None:
        """Show the text that one step finished."""
        self._landed += len(tokens)  # a step that ended inside a character shows with the next one
        if not piece:
            return
        if self._landed > 1 and self.colour:
            shade = SHADES[self._runs % len(SHADES)]
            self._runs += 1
            piece = "\n".join(f"{shade}{line}{PLAIN}" if line else "" for line in piece.split("\n"))
        self._landed = 0
        self.file.write(piece)
        self.file.flush()


def faint(text: str, file: TextIO) -> str:
    """`text` in the background of the reader's attention, where the terminal can."""
    return f"{FAINT}{text}{PLAIN}" if has_colour(file) else text
