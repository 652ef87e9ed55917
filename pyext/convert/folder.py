"""A checkpoint folder that appears whole or not at all: written under another name beside its place, and renamed at the end."""

import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ramify.errors import CheckpointError
from ramify.model.checkpoint import INDEX, SINGLE
from ramify.model.config import read_json

SHARD = 2_000_000_000
"""Bytes of tensors in one safetensors file; also what is kept in memory before it is written."""

LONGEST = 150
"""Bytes of a name that are taken over into that of the folder which is written: the process, machine and time besides need up to 100,
and file systems take 255."""

KEPT_FILES = (
    *("generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
"""Files of a checkpoint that a copy of it holds unchanged."""

CHECKPOINT_FILES = (*KEPT_FILES, "*.safetensors", "*.json", "README*", "*.md", "*.model", "*.jinja", ".gitattributes")
"""What --force may delete: a folder that holds anything else is more than a checkpoint."""


class NewFolder:
    """`with NewFolder(out, force) as folder:` writes; leaving the block puts it in place, leaving it by an exception removes it.

    Removes first what runs that were killed on this machine have left beside `out`. Raises ValueError where `out` exists without
    `force`, whether from the start or only at the end, or with it is no checkpoint folder that could be replaced, and where it cannot
    be written: no such place, no permission, a full disk.
    """

    def __init__(self, out: Path, force: bool = False) -> None:
        self.out, self.force = out, force
        refuse(out, force)
        self.path = out.parent / f".{_stem(out)}.{os.getpid()}@{platform.node()}.{time.monotonic_ns():x}.part"
        self._old = self.path.with_suffix(".old")
        self._parents: list[Path] = []
        self._waiting: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = 0

    def __enter__(self) -> "NewFolder":
        try:
            with self._writing():
                self._parents = [folder for folder in self.path.parents if not folder.exists()]
                _remove_leftovers(self.out)
                self.path.mkdir(parents=True)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                refuse(self.out, self.force)  # again: the work took long enough for others to write here
                with self._writing():
                    self._put_in_place()
        finally:
            self._remove()

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
            raise _unwritable(self.out, problem) from None

    def _put_in_place(self) -> None:
        if not self.force or not self.out.exists():
            self.path.rename(self.out)  # the system refuses where a file, a link or a folder with files has come since the check
            return
        try:
            self.out.rename(self._old)
            self.path.rename(self.out)
        except BaseException:
            if not self.out.exists():
                self._old.rename(self.out)
            raise

    def _remove(self) -> None:
        """What has not been put in place, what it replaced, and the folders above it that were made for it and hold nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self.out.exists():
            shutil.rmtree(self._old, ignore_errors=True)
        with suppress(OSError):  # one that holds something, OUT above all
            for folder in self._parents:
                folder.rmdir()


def refuse_name(out: Path) -> None:
    """ValueError where the system takes no such name, or does not let us look there."""
    try:
        os.lstat(out)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as problem:
        raise _unwritable(out, problem) from None


def refuse(out: Path, force: bool) -> None:
    """ValueError where `out` must not be written."""
    refuse_name(out)
    if out.is_symlink():
        raise ValueError(
            f"convert: OUT {out} is a symbolic link to {out.readlink()}; takes a folder. Name the folder itself, or another one."
        )
    if not out.exists():
        return
    if not force:
        raise ValueError(f"convert: OUT {out} exists; takes a new folder. Name another one, or give --force to replace it.")
    reason = _no_checkpoint(out)
    if reason:
        raise ValueError(f"convert: OUT {out} is no checkpoint folder, so --force does not replace it: {reason}. Name another one.")


def _no_checkpoint(folder: Path) -> str:
    """Why --force must not delete this; empty for a folder that is empty, or holds a checkpoint and nothing else."""
    if not folder.is_dir():
        return "it is a file"
    held = sorted(folder.iterdir())
    if not held:
        return ""
    try:
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    except CheckpointError:
        config = {}
    if not config.keys() & {"model_type", "architectures", "quantization_config"}:
        return "it has no config.json of a model"
    if not any(each.name.endswith((".safetensors", ".safetensors.index.json")) for each in held):
        return "it has no safetensors"
    other = [each.name for each in held if not each.is_file() or not any(each.match(pattern) for pattern in CHECKPOINT_FILES)]
    return f"it holds {other[0]} besides" if other else ""


def _unwritable(out: Path, problem: Exception) -> ValueError:
    reason = getattr(problem, "strerror", None) or problem
    return ValueError(f"convert: OUT {out} cannot be written ({reason}); takes a new folder in a place that can be.")


def _stem(out: Path) -> str:
    """The name of OUT in that of what is written beside it, which is longer: a long one by its beginning and a digest of the whole."""
    name = os.fsencode(out.name)
    if len(name) <= LONGEST:
        return out.name
    return f"{name[: LONGEST - 20].decode(errors='ignore')}~{hashlib.sha256(name).hexdigest()[:16]}"


def _remove_leftovers(out: Path) -> None:
    """Delete what processes of this machine that are no more had begun to write as `out`, and what they had put aside for a new one."""
    name = re.compile(rf"\.{re.escape(_stem(out))}\.(\d+)@{re.escape(platform.node())}\.[0-9a-f]+\.(part|old)")
    for each in out.parent.iterdir() if out.parent.is_dir() else ():
        found = name.fullmatch(each.name)
        if found and not _lives(int(found[1])) and (found[2] == "part" or out.exists()):  # else it is the only one left
            shutil.rmtree(each, ignore_errors=True)


def _lives(pid: int) -> bool:
    """Whether a process has this number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return True
