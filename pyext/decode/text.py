"""Ids to text while the ids are still coming: whole characters only, and stop strings."""

from collections.abc import Sequence
from typing import Any

HALF = "\ufffd"
"""What a tokenizer decodes an unfinished UTF-8 character to."""

CONTEXT = 16
"""Ids before the text that are decoded with its beginning, at most."""


class TextStream:
    """The text of ids[start:] as it grows, and whether a stop string is in it.

    Decodes a short window instead of the whole text. It begins with ids whose text is known already, of the prompt at first, so that
    tokenizers which drop the space of a first word see that this is none. Text that may still change (an unfinished character) or be cut
    (the beginning of a stop string) is held back.
    """

    def __init__(self, tokenizer: Any, ids: list[int], start: int, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.ids, self.stops = tokenizer, ids, stops
        self.text = ""
        self.stopped = False
        self._window, self._read = start, start  # the window begins at _window; ids before _read are wholly in `text`, or before it
        self._known = 0  # characters of the window that are in `text`, or before it
        while self._window > max(0, start - CONTEXT) and not self._known:
            self._window -= 1
            self._known = len(tokenizer.decode(ids[self._window : start]).rstrip(HALF))
        self._shown = 0
        self._longest = max(map(len, stops), default=0)

    def read(self) -> bool:
        """Take in the ids that came since. Returns True once a stop string is there; `text` ends before it, and stays so."""
        if self.stopped or self._read == len(self.ids):
            return self.stopped
        return self._extend(self.tokenizer.decode(self.ids[self._window :]), whole=False)

    def finish(self) -> None:
        """No more ids come: an unfinished character is now what it decodes to."""
        if not self.stopped and self._read < len(self.ids):
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
            known = self.tokenizer.decode(self.ids[self._read :])
            if known:  # what shows nothing, a special id or a space that was dropped, is no beginning
                self._window, self._known = self._read, len(known)
            self._read = len(self.ids)
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
