"""A tokenizer of a few dozen tokens in which characters and stop strings can begin and end inside tokens."""

from collections.abc import Sequence


class FakeTokenizer:
    """Token i is pieces[i], some bytes; text is cut into the longest pieces that fit. decode joins the bytes, halves become U+FFFD."""

    def __init__(self, pieces: Sequence[bytes] | None = None, size: int = 64) -> None:
        if pieces is None:
            euro = "€".encode()
            pieces = [b"<eos>", b" ", b"ab", b"bc", b"\n\n", euro[:1], euro[1:2], euro[2:], b"a" + euro[:2]]
            pieces += [bytes([letter]) for letter in range(ord("a"), ord("z") + 1)]
            pieces += [f"w{i}".encode() for i in range(size - len(pieces))]
        self.pieces = list(pieces)[:size]
        self._by_length = sorted(range(len(self.pieces)), key=lambda i: -len(self.pieces[i]))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, greedily the longest pieces. Raises ValueError where no piece fits."""
        data, ids = text.encode(), []
        while data:
            fits = next((i for i in self._by_length if self.pieces[i] and data.startswith(self.pieces[i])), None)
            if fits is None:
                raise ValueError(f"FakeTokenizer: text has {data[:4]!r}; takes what its pieces spell.")
            ids.append(fits)
            data = data[len(self.pieces[fits]) :]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")
