"""What is wrong with a safetensors file that cannot be opened, as an error tells it."""

import json
from pathlib import Path

from ramify.checks import listed, show

SHOWN = 3
"""Tensors of a file cut short that an error names."""


def damage(file: Path, problem: Exception) -> str:
    """What follows the file's name: that it is a pointer, which tensors a file cut short lacks, or what the library said."""
    size = file.stat().st_size
    with file.open("rb") as raw:
        start = raw.read(24)
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the weights. Run git lfs pull."
    if lacking := cut_off(file):
        more = [f"{len(lacking) - SHOWN} more"] if len(lacking) > SHOWN else []
        names = listed([show(name, 200) for name in lacking[:SHOWN]] + more).replace(" or ", " and ")
        tensors = f"tensor {names} lies" if len(lacking) == 1 else f"tensors {names} lie"
        return f"({size:,} bytes) is cut short: {tensors} beyond its end, whole or in part. Fetch it again."
    return f"({size:,} bytes) is cut short or damaged ({problem}). Fetch it again."


def cut_off(file: Path) -> list[str]:
    """Tensors that end beyond the file by its own header, in their order there; none where the header itself is not whole."""
    size = file.stat().st_size
    try:
        with file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            if 8 + length > size:
                return []
            header = json.loads(raw.read(length))
        ends = {str(name): int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"}
    except (OSError, ValueError, TypeError, LookupError, AttributeError):  # what it holds is no header
        return []
    return sorted((name for name, end in ends.items() if 8 + length + end > size), key=ends.__getitem__)
