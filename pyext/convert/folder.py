"""A checkpoint folder that appears whole or not at all: written under another name beside its place, and renamed at the end."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ramify.model.checkpoint import INDEX, SINGLE

SHARD = 2_000_000_000
"""Bytes of tensors in one safetensors file; also what is kept in memory before it is written."""


class NewFolder:
    """`with NewFolder(out, force) as folder:` writes; leaving the block puts it in place, leaving it by an exception removes it.

    Raises ValueError where `out` exists without `force`, or with it is no checkpoint folder that could be replaced, and where it cannot
    be written: no such place, no permission, a full disk.
    """

    def __init__(self, out: Path, force: bool = False) -> None:
        self.out = out
        refuse(out, force)
        self.path = out.parent / f".{out.name}.{os.getpid()}.{time.monotonic_ns():x}.part"
        self._waiting: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = 0

    def __enter__(self) -> "NewFolder":
        with self._writing():
            self.path.mkdir(parents=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                with self._writing():
                    self._put_in_place()
        finally:
            shutil.rmtree(self.path, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor for the current shard, and write the shard first where it would become too large."""
        if self._waiting and sum(t.nbytes for t in self._waiting.values()) + tensor.nbytes > SHARD:
            self._write()
        self._waiting[name] = tensor.contiguous()

    def close(self) -> None:
        """Write the last shard, give the files their names, and write the index where there are several."""
        self._write()
        total = len(self._shards)
        if total == 1:
            (self.path / "1").rename(self.path / SINGLE)
            return
        files = [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
        for i, file in enumerate(files, 1):
            (self.path / str(i)).rename(self.path / file)
        placed = {name: file for names, file in zip(self._shards, files) for name in names}
        self.json(INDEX, {"metadata": {"total_size": self._bytes}, "weight_map": placed})

    def json(self, name: str, values: dict[str, Any]) -> None:
        """Write a JSON file."""
        self.text(name, json.dumps(values, indent=2) + "\n")

    def text(self, name: str, text: str) -> None:
        """Write a text file."""
        with self._writing():
            (self.path / name).write_text(text, encoding="utf-8")

    def copy(self, file: Path) -> None:
        """Copy a file under its own name."""
        held = file.read_bytes()
        with self._writing():
            (self.path / file.name).write_bytes(held)

    def _write(self) -> None:
        self._shards.append(list(self._waiting))
        self._bytes += sum(tensor.nbytes for tensor in self._waiting.values())
        file = self.path / str(len(self._shards))
        with self._writing():
            save_file(self._waiting, file, metadata={"format": "pt"})
        file.chmod(self.path.stat().st_mode & 0o666)  # the library makes files that only their owner reads
        self._waiting = {}

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What the system says against writing, told of the folder that was asked for."""
        try:
            yield
        except (OSError, SafetensorError) as problem:
            reason = getattr(problem, "strerror", None) or problem
            raise ValueError(f"convert: OUT {self.out} cannot be written ({reason}); takes a new folder in a place that can be.") from None

    def _put_in_place(self) -> None:
        if not self.out.exists():
            self.path.rename(self.out)
            return
        old = self.path.with_suffix(".old")
        self.out.rename(old)
        try:
            self.path.rename(self.out)
        except BaseException:
            old.rename(self.out)
            raise
        shutil.rmtree(old)


def refuse(out: Path, force: bool) -> None:
    """ValueError where `out` must not be written."""
    if not out.exists():
        return
    if not force:
        raise ValueError(f"convert: OUT {out} exists; takes a new folder. Name another one, or give --force to replace it.")
    if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file()):
        raise ValueError(f"convert: OUT {out} is no checkpoint folder, so --force does not replace it. Name another one.")
