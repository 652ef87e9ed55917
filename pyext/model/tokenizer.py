"""Text to token ids and back, from a checkpoint's tokenizer.json."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from ramify.errors import CheckpointError
from ramify.model.config import read_json


class Tokenizer:
    """`encode` and `decode` over a `tokenizers.Tokenizer`. `prefix` is what every encoded text starts with: () or (bos,)."""

    def __init__(self, fast: FastTokenizer, prefix: Sequence[int] = ()) -> None:
        self.fast = fast
        self.prefix = tuple(prefix)
        self._fingerprint: str | None = None

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer | None":
        """From tokenizer.json and tokenizer_config.json; None where the folder has no tokenizer.json.

        A first token goes before every text where `add_bos_token` says so; where it says nothing, where the file's own
        post-processor puts one (Llama 3). Nothing is ever put after a text: it is there to be continued.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            fast = FastTokenizer.from_file(str(path))
        except Exception as problem:  # the library raises bare Exception
            raise CheckpointError(f"load: {path} cannot be read ({problem}). Fetch the file again.") from None
        settings = path.with_name("tokenizer_config.json")
        return cls(fast, _prefix(fast, read_json(settings) if settings.is_file() else {}, settings))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, `prefix` first."""
        return [*self.prefix, *self.fast.encode(text, add_special_tokens=False).ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids without special tokens; bytes that are no complete character become U+FFFD."""
        return self.fast.decode([int(i) for i in ids], skip_special_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's embedding may be padded beyond it."""
        return self.fast.get_vocab_size(with_added_tokens=True)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary. Two tokenizers of equal fingerprint give every id the same token."""
        if self._fingerprint is None:
            entries = sorted(self.fast.get_vocab(with_added_tokens=True).items(), key=lambda entry: (entry[1], entry[0]))
            self._fingerprint = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
        return self._fingerprint


def _prefix(fast: FastTokenizer, settings: dict[str, Any], file: Path) -> tuple[int, ...]:
    wanted = settings.get("add_bos_token")
    if wanted is None:
        plain, full = (fast.encode("a", add_special_tokens=special).ids for special in (False, True))
        starts = (n for n in range(len(full) - len(plain) + 1) if full[n : n + len(plain)] == plain)
        return tuple(full[: next(starts, 0)])
    if not wanted:
        return ()
    token = settings.get("bos_token")
    token = token.get("content") if isinstance(token, dict) else token
    found = fast.token_to_id(token) if isinstance(token, str) else None
    if found is None:
        raise CheckpointError(f"load: {file} asks for add_bos_token, and tokenizer.json has no bos_token {token!r}. Fetch both again.")
    return (found,)
