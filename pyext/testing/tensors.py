"""Tensors that catch a careless kernel: padded strides, NaN wherever nobody may look, random trees, shuffled pages.

Used by the tests of the ops, and by anyone who tests a kernel or a plugin of their own against `ramify.reference`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ramify import backends
from ramify.testing.on_device import OnDevice

TREES = ("chain", "star", "random", "bushy")


@contextmanager
def running(backend: str, level: str | None = None) -> Iterator[None]:
    """Run on this backend, and on this ISA level if the backend is "cpu"; put both back afterwards.

    Triton kernels run in the mended, guarded interpreter where TRITON_INTERPRET=1 is set. Elsewhere they and the CUDA kernels run on the
    GPU, whose turn of a call ramify.testing.on_device plays: tests give CPU tensors and get them. A call that the backend does not
    take skips the test there, with the reason.
    """
    if level is None:
        with _at(backend):
            yield
        return
    native = backends.native()
    before = native.isa()
    native.set_isa(level)
    try:
        with backends.backend(backend):
            yield
    finally:
        native.set_isa(before)


@contextmanager
def _at(backend: str) -> Iterator[None]:
    """Where a backend without ISA levels runs."""
    if backends.DEVICE_OF.get(backend, "cpu") == "cpu":
        with backends.backend(backend):
            yield
    elif backend == "triton" and backends.interpreted():
        with backends.backend(backend), import_module("ramify.testing.triton_interpreter").guarded():
            yield
    else:
        import pytest

        try:
            with backends.backend(backend), OnDevice(backends.DEVICE_OF[backend]):
                yield
        except ValueError as error:
            if f'backend "{backend}" was forced' not in str(error):
                raise
            pytest.skip(str(error))


def runs(op: str, **sizes: Any) -> list:
    """pytest parameters (backend, level) of what takes `op` at these sizes: reference, CPU kernels at every ISA level, Triton, CUDA.

    A backend that cannot run here is skipped and says why.
    """
    import pytest

    found = []
    for param in backends.params(op, **sizes):
        name = param.values[0].name
        if name != "cpu" or param.marks:
            found.append(pytest.param(name, None, id=name, marks=param.marks))
            continue
        for level, here in backends.native().levels().items():
            skip = [] if here else [pytest.mark.skip(reason=f"this machine does not run {level}")]
            found.append(pytest.param(name, level, id=f"{name}-{level}", marks=skip))
    return found


def levels() -> list[str]:
    """ISA levels of the CPU kernels that this machine runs; none without the CPU extension."""
    if backends.missing("cpu"):
        return []
    return [level for level, here in backends.native().levels().items() if here]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Kernels use this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def poisoned(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """An output that nobody has written yet: NaN, or -7 for integers."""
    return torch.full(tuple(shape), torch.nan if dtype.is_floating_point else -7, dtype=dtype)


def padded(x: Tensor, gap: int = 3) -> Tensor:
    """The same values with dense last axis and a gap after every other axis; the gaps hold NaN (-7 for integers)."""
    if x.ndim == 0:
        return x
    big = poisoned([n + gap for n in x.shape], x.dtype)
    view = big[tuple(slice(0, n) for n in x.shape)]
    view.copy_(x)
    return view


def random_tree(T: int, kind: str = "random", generator: torch.Generator | None = None) -> list[int]:
    """Parents of T rows, -1 first, a parent before its child. kind: one of TREES."""
    if kind == "chain":
        return [i - 1 for i in range(T)]
    if kind == "star":
        return [-1] + [0] * (T - 1)
    reach = 4 if kind == "bushy" else T  # bushy: parents are recent, so the tree is deep as well as wide
    draw = torch.randint(0, 1 << 30, (T,), generator=generator).tolist()
    return [-1] + [max(0, i - reach) + draw[i] % min(i, reach) for i in range(1, T)]


def ancestor_words(parents: Sequence[int], W: int | None = None) -> Tensor:
    """Ancestor words int64 [T, W] of a tree: every row sees its path from the root, itself included."""
    T = len(parents)
    bits = torch.zeros(T, 64 * (W or -(-T // 64)), dtype=torch.bool)
    for i, parent in enumerate(parents):
        if parent >= 0:
            bits[i] = bits[parent]
        bits[i, i] = True
    weight = torch.ones(64, dtype=torch.int64) << torch.arange(64)
    return (bits.view(T, -1, 64) * weight).sum(-1)


def path_of(parents: Sequence[int], row: int) -> list[int]:
    """Rows from the root to this one, both included."""
    path = [row]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


def intervals(kind: str, B: int, T: int, S: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """start and end int32 [B, T] of one kind of mask: "causal", "window", "blocks", "full", or "random", of which half are empty."""
    t, whole = torch.arange(T).expand(B, T), torch.full((B, T), S)
    start, end = {
        "causal": (t * 0, t + 1 + S - T),
        "window": (t + 1 + S - T - 9, t + 1 + S - T),
        "blocks": (t // 8 * 8 * S // T, (t // 8 + 1) * 8 * S // T),
        "full": (t * 0, whole),
        "random": tuple(torch.randint(0, S + 1, (2, B, T), generator=generator)),
    }[kind]
    return start.clamp(0, S).int(), end.clamp(0, S).int()


def unseen_slots(start: Tensor, end: Tensor, S: int) -> Tensor:
    """bool [B, S]: slots that no row of a sequence sees."""
    slot = torch.arange(S)
    return ~((slot >= start[..., None]) & (slot < end[..., None])).any(1)


def sample_case(
    B: int, T: int, V: int, seed: int = 0, dtype: torch.dtype = torch.float32, mode: str = "det", tree: str = "random"
) -> tuple[Tensor, ...]:
    """The arguments of verify_sample for B at most 5 trees whose children are likely, so that paths have every length, and q.

    Temperatures and seeds differ; the fourth sequence is greedy.
    """
    g = torch.Generator().manual_seed(seed)
    logits = padded((5 * torch.randn(B, T, V, generator=g)).to(dtype))
    logits[..., ::7] = -torch.inf
    parents = torch.tensor([random_tree(T, tree, g) for _ in range(B)]).int()
    n_rows = torch.randint(max(1, T // 2), T + 1, (B,), generator=g).int()
    q = torch.softmax(logits.float() + torch.randn(B, T, V, generator=g), -1)
    tokens = torch.zeros(B, T, dtype=torch.int32)
    for b in range(B):
        for t in range(1, T):
            above = int(parents[b, t])
            taken = [int(tokens[b, i]) for i in range(1, t) if int(parents[b, i]) == above]
            weight = q[b, above].clone()
            if mode != "iid":
                weight[taken] = 0
            tokens[b, t] = int(torch.multinomial(weight, 1, generator=g))
    temperature = torch.tensor([0.7, 1.0, 1.6, 0.0, 1.0][:B])
    seeds = torch.tensor([3, -1, 2**62 + 5, 9, 1 << 33][:B])  # -1 is the seed 2^64 - 1
    return logits, padded(tokens), padded(parents), n_rows, temperature, seeds, torch.tensor([5, 2**31 + 7, 0, 1, 77][:B]), q


@dataclass
class AttentionCase:
    """Inputs of one tree_attention call, and the trees they were made from."""

    q: Tensor
    k: Tensor
    v: Tensor
    tail_k: Tensor
    tail_v: Tensor
    ancestors: Tensor
    prefix_len: Tensor
    page_table: Tensor | None
    tail_rows: Tensor | None
    parents: list[list[int]]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The positional arguments of the op."""
        return self.q, self.k, self.v, self.tail_k, self.tail_v, self.ancestors, self.prefix_len

    @property
    def options(self) -> dict[str, Tensor | None]:
        """The keyword arguments that belong to the data."""
        return {"page_table": self.page_table, "tail_rows": self.tail_rows}

    def double(self) -> "AttentionCase":
        """The same numbers in float64, for the oracle."""
        names = ("q", "k", "v", "tail_k", "tail_v")
        return replace(self, **{name: getattr(self, name).double() for name in names})

    def row(self, b: int, r: int) -> "AttentionCase":
        """Plain decoding of tree row r: its path up to itself committed behind the prefix, and the row alone."""
        *path, _ = path_of(self.parents[b], r)
        n = int(self.prefix_len[b])
        k, v = (torch.cat([_dense(c, self.page_table, b, n), t[b, path]])[None] for c, t in ((self.k, self.tail_k), (self.v, self.tail_v)))
        one = slice(b, b + 1), slice(r, r + 1)
        return AttentionCase(
            self.q[one], k, v, self.tail_k[one], self.tail_v[one], torch.ones(1, 1, 1, dtype=torch.int64),
            torch.tensor([n + len(path)], dtype=torch.int32), None, None, [[-1]],
        )  # fmt: skip


def attention_case(
    prefix: Sequence[int],
    T: int,
    Hq: int = 4,
    Hkv: int = 2,
    D: int = 64,
    *,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    tree: str = "random",
    tail_rows: Sequence[int] | None = None,
    page: int | None = None,
    seed: int = 0,
) -> AttentionCase:
    """Random inputs for one sequence per entry of `prefix`. What no row may read is NaN, or a wrong bit, or a wrong page."""
    g = torch.Generator().manual_seed(seed)
    B, kv_dtype = len(prefix), kv_dtype or dtype
    rows = [T] * B if tail_rows is None else list(tail_rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    k, v = torch.full((2, B, max(prefix) + 5, Hkv, D), torch.nan)
    tails = torch.full((2, B, T, Hkv, D), torch.nan)
    W = -(-T // 64) + 1
    ancestors = torch.full((B, T, W), -1)
    parents = [random_tree(n, tree, g) for n in rows]
    for b, n in enumerate(prefix):
        k[b, :n], v[b, :n] = normal(n, Hkv, D), normal(n, Hkv, D)
        tails[:, b, : rows[b]] = normal(2, rows[b], Hkv, D)
        if rows[b]:
            ancestors[b, : rows[b]] = ancestor_words(parents[b], W)
    k, v, table = (k, v, None) if page is None else _paged(k, v, page, g)
    q = normal(B, T, Hq, D).transpose(1, 2).contiguous().transpose(1, 2)  # heads outermost, as a projection may leave them
    return AttentionCase(
        q.to(dtype), padded(k.to(kv_dtype)), padded(v.to(kv_dtype), 5), padded(tails[0].to(kv_dtype)), tails[1].to(kv_dtype),
        ancestors, torch.tensor(prefix, dtype=torch.int32), table,
        None if tail_rows is None else torch.tensor(rows, dtype=torch.int32), parents,
    )  # fmt: skip


def _paged(k: Tensor, v: Tensor, page: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Cut into pages of a shuffled pool that also holds pages of nobody."""
    B, S, Hkv, D = k.shape
    P = -(-S // page)
    order = torch.randperm(B * P + 3, generator=g)[: B * P]
    pool = torch.full((2, B * P + 3, page, Hkv, D), torch.nan)
    whole = torch.full((2, B, P * page, Hkv, D), torch.nan)
    whole[0, :, :S], whole[1, :, :S] = k, v
    pool[:, order] = whole.view(2, B * P, page, Hkv, D)
    return pool[0], pool[1], order.view(B, P).int()


def _dense(cache: Tensor, page_table: Tensor | None, b: int, n: int) -> Tensor:
    if page_table is None:
        return cache[b, :n]
    return cache[page_table[b].long()].flatten(0, 1)[:n]
