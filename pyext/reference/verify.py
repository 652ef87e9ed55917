"""Row statistics and verification in plain torch: what a row of logits says, and which path of a tree a step accepts.

Sources: speculative sampling, Leviathan et al. 2023; recursive rejection, Miao et al. 2023 (SpecInfer), without replacement as in
Sequoia, Chen et al. 2024. Slow and plain on purpose: one sequence, one row, one child at a time.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ramify.reference._math import wide
from ramify.sampling.rng import ACCEPT, RESIDUAL, SAMPLE, uniform


class RowStats(NamedTuple):
    """argmax int64 [R], lse [R], max [R]; the floats in the logits' wide dtype."""

    argmax: Tensor
    lse: Tensor
    max: Tensor


def row_stats(logits: Tensor) -> RowStats:
    """Arg-max (the lowest column of equal maxima), natural log-sum-exp and maximum of each row of logits [R, V].

    NaN is larger than every number: a row that holds one has maximum and log-sum-exp NaN, and its first NaN for arg-max.
    """
    x = logits.to(wide(logits))
    top = x.amax(-1)
    columns = torch.arange(x.shape[-1], device=x.device)
    first = torch.where((x == top[:, None]) | x.isnan(), columns, x.shape[-1]).amin(-1)
    return RowStats(first, x.logsumexp(-1), top)


def topk_logits(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of logits [R, V], descending, the lower column first on a tie: values [R, k] and ids int64 [R, k].

    A masked column, -inf, is never among them: where too few are left, the value is -inf and the id -1. NaN is larger than every number.
    """
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k].masked_fill(values[:, :k] == -torch.inf, -1)


def verify_greedy(tokens: Tensor, parents: Tensor, argmax: Tensor, n_rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Walk each tree from its root to the child whose token is the row's arg-max, as long as there is one.

    tokens, parents, argmax [B, T] integers (parent -1 for row 0; a parent stands before its child), n_rows [B]: rows in use.
    Returns path int32 [B, T], ascending, row 0 first, -1 after its end; count int32 [B], its length; bonus int32 [B], the
    arg-max of the last accepted row.
    """

    def decide(b: int, row: int, children: list[int]) -> tuple[int, int]:
        token = int(argmax[b, row])
        return token, _holding(tokens[b], children, token)

    return _walk(tokens, parents, n_rows, decide)


def residual_sample(p: Tensor, q: Tensor, u: Tensor) -> Tensor:
    """Draw from norm([p - q]_+), or from p where nothing is left, by inverse CDF. p, q [R, V], u [R] in [0, 1). Returns ids int64 [R]."""
    ids = [_draw(_residual(p[r], q[r]), float(u[r])) for r in range(len(p))]
    return torch.tensor(ids, dtype=torch.int64, device=p.device)


def verify_sample(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    n_rows: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    q: Tensor | None = None,
    *,
    mode: str = "det",
) -> tuple[Tensor, Tensor, Tensor]:
    """`accept_path` with p = softmax(logits / temperature) and the random numbers of sampling/rng.py.

    logits [B, T, V]; temperature, seed, position [B]: 0 takes the most likely token; the 64 bits of a seed; the absolute position of the
    token that row 0 decides. A sequence of temperature 0 is decided as mode "det" is. The rest as for `accept_path`.
    """
    B, T, _ = logits.shape
    p = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device)
    u = torch.zeros(B, T, 3, dtype=torch.float64, device=logits.device)
    modes = []
    for b in range(B):
        heat, key, at = float(temperature[b]), int(seed[b]) % 2**64, int(position[b])
        modes.append(mode if heat > 0 else "det")
        depth, siblings = [0] * T, [0] * T
        for t in range(int(n_rows[b])):
            above = int(parents[b, t])
            depth[t] = depth[above] + 1 if above >= 0 else 0
            if heat > 0:
                p[b, t] = (logits[b, t].float() / heat).double().softmax(-1)
            else:
                p[b, t, int(row_stats(logits[b, t : t + 1]).argmax)] = 1
            for plane, purpose in ((0, SAMPLE), (2, RESIDUAL)):
                u[b, t, plane] = uniform(key, at + depth[t], purpose)
            if above >= 0:
                u[b, t, 1] = uniform(key, at + depth[above], ACCEPT, siblings[above])
                siblings[above] += 1
    one = [accept_path(tokens[b : b + 1], parents[b : b + 1], p[b : b + 1], n_rows[b : b + 1], u[b : b + 1], modes[b],
                       None if q is None else q[b : b + 1]) for b in range(B)]  # fmt: skip
    path, count, bonus = (torch.cat(each) for each in zip(*one))
    return path, count, bonus


def accept_path(
    tokens: Tensor, parents: Tensor, p: Tensor, n_rows: Tensor, u: Tensor, mode: str = "det", q: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Accept a path so that every emitted token follows p, whatever was guessed.

    tokens, parents [B, T], n_rows [B] as in `verify_greedy`. p [B, T, V]: the target's distribution after each row. q [B, T, V]: what
    the children of each row were drawn from, in row order. u [B, T, 3] in [0, 1), one plane per use: to draw a token at a row, to test a
    row against its parent's distributions, to draw a token at a row whose children were all rejected.

    mode "det": one draw y from p per visited row; go on to the child that holds y. q is not read.
    mode "iid": children in row order, child x passes with min(1, p(x)/q(x)), each rejection makes p = norm([p - q]_+).
    mode "wor": the same, and after each rejection q loses x and is normalised; without support left the walk stops.
    A row without children draws from p. Returns (path, count, bonus) as `verify_greedy` does.
    """
    if mode not in ("det", "iid", "wor"):
        raise ValueError(f'verify_sample: mode is "{mode}"; takes det, iid or wor. Say how the children were chosen.')
    if mode != "det" and q is None:
        raise ValueError(f'verify_sample: q is None and mode is "{mode}"; takes [B, T, V]. Give what the children were drawn from.')

    def decide(b: int, row: int, children: list[int]) -> tuple[int, int]:
        target = p[b, row].double()
        if q is None or mode == "det" or not children:
            token = _draw(target, float(u[b, row, 0]))
            return token, _holding(tokens[b], children, token)
        draft = q[b, row].double() / q[b, row].double().sum()
        for child in children:
            x = int(tokens[b, child])
            if float(u[b, child, 1]) * float(draft[x]) < float(target[x]):
                return x, child
            target = _residual(target, draft)
            if mode == "wor":
                draft = draft.clone()
                draft[x] = 0
                if float(draft.sum()) <= 0:
                    break
                draft = draft / draft.sum()
        return _draw(target, float(u[b, row, 2])), -1

    return _walk(tokens, parents, n_rows, decide)


Decide = Callable[[int, int, list[int]], tuple[int, int]]  # (sequence, row, its children) -> (token, the child to go on to or -1)


def _walk(tokens: Tensor, parents: Tensor, n_rows: Tensor, decide: Decide) -> tuple[Tensor, Tensor, Tensor]:
    path = torch.full(tokens.shape, -1, dtype=torch.int32, device=tokens.device)
    count = torch.zeros(len(tokens), dtype=torch.int32, device=tokens.device)
    bonus = torch.zeros_like(count)
    for b in range(len(tokens)):
        row, steps = 0, 0
        while row >= 0:
            path[b, steps] = row
            steps += 1
            children = [r for r in range(int(n_rows[b])) if int(parents[b, r]) == row]
            bonus[b], row = decide(b, row, children)
        count[b] = steps
    return path, count, bonus


def _holding(tokens: Tensor, children: list[int], token: int) -> int:
    return next((child for child in children if int(tokens[child]) == token), -1)


def _residual(p: Tensor, q: Tensor) -> Tensor:
    rest = (p - q).clamp(min=0)
    return rest / rest.sum() if float(rest.sum()) > 0 else p


def _draw(p: Tensor, u: float) -> int:
    cdf = p.double().cumsum(-1)
    above = (cdf > u * cdf[-1]).nonzero()
    return int(above[0]) if len(above) else int(p.nonzero()[-1])
