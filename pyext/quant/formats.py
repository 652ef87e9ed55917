"""The weight formats by name: int8, int4-g32, int4-g64, int4-g128 (each also with -zp), fp8, fp8-b128."""

from dataclasses import dataclass

from ramify.checks import show

GROUPS = (32, 64, 128)
"""Inputs that share one scale of an int4 row."""

BLOCK = 128
"""Side of a square block that shares one fp8 scale."""


@dataclass(frozen=True)
class Format:
    """How the numbers of a weight [N, K] are stored.

    kind: "int8" (symmetric), "int4" or "fp8" (e4m3). group: inputs that share a scale; 0 is a whole row. zero_point: int4
    codes count from a stored zero of their group instead of 8.
    """

    kind: str
    group: int = 0
    zero_point: bool = False

    def __post_init__(self) -> None:
        taken = {"int8": (0,), "int4": GROUPS, "fp8": (0, BLOCK)}
        if self.kind not in taken:
            raise ValueError(f'Format: kind is "{self.kind}"; takes {", ".join(taken)}.')
        if self.group not in taken[self.kind]:
            raise ValueError(f"Format: group is {self.group}; {self.kind} takes {' or '.join(map(str, taken[self.kind]))}.")
        if self.zero_point and self.kind != "int4":
            raise ValueError(f"Format: zero_point is True; {self.kind} takes False: only int4 groups have zero points.")

    @classmethod
    def parse(cls, name: str, what: str = "format", besides: str = "") -> "Format":
        """The format of a name such as "int4-g64"; "int4" alone is int4-g64. Raises ValueError that lists the names.

        what: the caller and the argument that gave the name, for the message; besides: what else that argument takes.
        """
        wanted = "int4-g64" if name == "int4" else name
        for known in ALL:
            if known.name == wanted:
                return known
        raise ValueError(f"{what} is {show(name)}; takes {', '.join(known.name for known in ALL)}{besides}.")

    @property
    def name(self) -> str:
        """The name that `parse` takes."""
        group = "" if not self.group else f"-b{self.group}" if self.kind == "fp8" else f"-g{self.group}"
        return f"{self.kind}{group}{'-zp' if self.zero_point else ''}"

    @property
    def bits(self) -> int:
        """Bits of one code, scales not counted."""
        return 4 if self.kind == "int4" else 8

    def scale_shape(self, N: int, K: int) -> tuple[int, int]:
        """Shape of the scales of a weight [N, K]."""
        if self.kind == "fp8" and self.group:
            return -(-N // BLOCK), -(-K // BLOCK)
        return N, K // self.group if self.group else 1


ALL = (
    Format("int8"),
    *(Format("int4", group) for group in GROUPS),
    *(Format("int4", group, zero_point=True) for group in GROUPS),
    Format("fp8"),
    Format("fp8", BLOCK),
)
"""Every format, in the order that messages list them."""
