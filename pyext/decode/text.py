"""Ids to text while the ids are still coming: whole characters only, and stop strings."""

from collections.abc import Sequence
from typing import Any

HALF = "\ufffd"
"""What a tokenizer decodes an unfinished UTF-8 character to."""


class TextStream:
    """The text of ids[start:] as it grows, and whether a stop string is in it.

    Decodes a short window instead of the whole text: from the last id but one batch, so that tokenizers which drop a leading space see
    what stands before it. Text that may still change (an unfinished character) or be cut (the beginning of a stop string) is held back.
    """

    def __init__(self, tokenizer: Any, ids: list[int], start: int, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.ids, self.stops = tokenizer, ids, stops
        self.text = ""
        self.stopped = False
        self._window = self._read = start  # the window begins at _window; ids before _read are wholly in `text`
        self._known = 0  # characters of the window that are in `text`
        self._shown = 0
        self._longest = max(map(len, stops), default=0)

    def read(self) -> bool:
        """Take in the ids that came since. Returns True once a stop string is there; `text` ends before it, and stays so."""
        if self.stopped or self._read == len(self.ids):
            return self.stopped
        return self._extend(self.tokenizer.decode(self.ids[self._window :]), whole=False)

    def finish(self) -> None:
        """No more ids come: an unfinished character is now what it decodes to."""
        if not self.stopped and self._window < len(self.ids):
            self._extend(self.tokenizer.decode(self.ids[self._window :]), whole=True)

    def take(self, last: bool = False) -> str:
        """Return the text that was not yet returned and can no longer change; with `last`, all of it."""
        end = len(self.text) if last or self.stopped else len(self.text) - self._held()
        piece = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _extend(self, window: str, whole: bool) -> bool:
        sure = window if whole else window.rstrip(HALF)
        old = len(self.text)
        self.text += sure[self._known :]
        self._known = max(self._known, len(sure))
        if len(sure) == len(window):
            self._window, self._read = self._read, len(self.ids)
            self._known = len(self.tokenizer.decode(self.ids[self._window :]))
        if self.stops and len(self.text) > old:
            begin = max(0, old - self._longest + 1)
            found = [at for at in (self.text.find(stop, begin) for stop in self.stops) if at >= 0]
            if found:
                self.text = self.text[: min(found)]
                self.stopped = True
        return self.stopped

    def _held(self) -> int:
        """Characters at the end of the text that begin a stop string."""
        for n in range(min(self._longest - 1, len(self.text)), 0, -1):
            tail = self.text[-n:]
            if any(stop.startswith(tail) for stop in self.stops):
                return n
        return 0
