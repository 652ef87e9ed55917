"""verify_sample and residual_sample: decisions by chance, a function of seed and position on every device."""

import torch
from torch import Tensor

from ramify import reference
from ramify.checks import one_of
from ramify.ops import _cuda, _native
from ramify.ops._checks import FLOATS, INDICES, INT32, INT64, Results, Shapes
from ramify.ops._library import Op
from ramify.ops.verify import check_rows, check_tree

MODES = ("det", "iid", "wor")


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
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Accept a path of each tree so that every emitted token follows softmax(logits / temperature), whatever was guessed.

    logits [B, T, V] float, -inf for what must not be drawn (top-k, top-p and min-p are masks); tokens, parents int32 or int64 [B, T] and
    n_rows int32 [B] as for verify_greedy. temperature float32 [B]; 0 takes the most likely token. seed int64 [B], read as 64 bits without
    a sign; position int32 or int64 [B]: the absolute position of the token that row 0 decides. Random numbers are those of the
    verifiers (Philox4x32-10), so equal logits give equal decisions on every backend, up to a number within rounding of its border.
    Rows that the walk does not come to may hold anything.
    mode: how the children of a row were chosen. "det": by any rule; one draw a row, and on to the child that holds it. "iid", "wor": drawn
    from q float32 [B, T, V] of their parent's row, in row order, with or without replacement; tested one by one, each rejection leaves
    norm([p - q]_+).

    Returns path int32 [B, T], count and bonus int32 [B] as verify_greedy does; `out` takes the same. Nothing waits for the device.
    Raises ValueError for shapes and modes, and on the CPU for values; TypeError for dtypes. Sources: Leviathan et al. 2023; Miao et al.
    2023; Chen et al. 2024.
    """
    one_of("mode", mode, MODES, "verify_sample")
    return _verify_sample(logits, tokens, parents, n_rows, temperature, seed, position, None if mode == "det" else q, mode, out=out)


def residual_sample(p: Tensor, q: Tensor, u: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Draw from norm([p - q]_+), or from p where nothing is left, by inverse CDF.

    p, q float [R, V] of one dtype, weights not below 0, some of p above it; u float64 [R] in [0, 1). Returns ids int32 [R], never one
    of weight 0. Raises ValueError for shapes, and on the CPU for values; TypeError for dtypes. Source: Leviathan et al. 2023.
    """
    return _residual_sample(p, q, u, out=out)


def _check_verify_sample(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    n_rows: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    q: Tensor | None,
    how: str,
) -> Results:
    check = Shapes("verify_sample")
    check("logits", logits, "B T V", FLOATS)
    check("tokens", tokens, "B T", INDICES)
    check("parents", parents, "B T", INDICES)
    check("n_rows", n_rows, "B", INT32)
    check("temperature", temperature, "B", (torch.float32,))
    check("seed", seed, "B", INT64)
    check("position", position, "B", INDICES)
    one_of("mode", how, MODES, "verify_sample")
    check_rows(check, "logits", logits.shape[1])
    if logits.shape[2] == 0:
        raise check.fail(f"logits is {list(logits.shape)}", "one column or more")
    if how != "det":
        if q is None:
            raise check.fail(f'q is None and mode is "{how}"', "float32 [B, T, V]", "Give what the children were drawn from.")
        check("q", q, "B T V", (torch.float32,))
    return (tokens.shape, torch.int32), (n_rows.shape, torch.int32), (n_rows.shape, torch.int32)


def _check_residual_sample(p: Tensor, q: Tensor, u: Tensor) -> Results:
    check = Shapes("residual_sample")
    check("p", p, "R V", FLOATS)
    check("q", q, "R V", (p.dtype,))
    check("u", u, "R", (torch.float64,))
    return ((u.shape, torch.int32),)


def _check_values(logits, tokens, parents, n_rows, temperature, seed, position, q, how) -> None:
    """Trees are trees, no temperature and no position is below 0, and tokens that were drawn from q are columns of it."""
    check_tree("verify_sample", parents, n_rows)
    if not bool(((temperature >= 0) & temperature.isfinite()).all()):
        raise ValueError(f"verify_sample: temperature is {temperature.tolist()}; takes 0 or more, finite.")
    if not bool((position >= 0).all()):
        raise ValueError(f"verify_sample: position is {position.tolist()}; takes 0 or more.")
    if q is None:
        return
    row, V = torch.arange(tokens.shape[1], device="cpu"), q.shape[2]
    wrong = (row > 0) & (row < n_rows[:, None]) & ((tokens < 0) | (tokens >= V))  # the root was not drawn
    if wrong.any():
        b, i = wrong.nonzero()[0].tolist()
        raise ValueError(f"verify_sample: tokens[{b}, {i}] is {tokens[b, i]}; takes 0 to {V - 1}, the columns of q.")


def _check_visited(path: Tensor, logits: Tensor, q: Tensor | None) -> None:
    """The rows that the walk came to hold laws. The others may hold anything. On the CPU only."""
    if path.device.type != "cpu":
        return
    sequence, step = (path >= 0).nonzero(as_tuple=True)
    for b, row in zip(sequence.tolist(), path[sequence, step].tolist()):
        if not bool(logits[b, row].amax().isfinite()):
            raise ValueError(f"verify_sample: logits[{b}, {row}] hold NaN or +inf, or -inf alone; takes finite numbers and -inf.")
        if q is None:
            continue
        _check_weights("verify_sample", f"q[{b}, {row}]", q[b, row])
        if not q[b, row].any():
            raise ValueError(f"verify_sample: q[{b}, {row}] holds no weight; takes what the children were drawn from.")


def _check_weights(op: str, name: str, weights: Tensor) -> None:
    wrong = ~(weights.isfinite() & (weights >= 0))
    if wrong.any():
        raise ValueError(f"{op}: {name} holds {float(weights[wrong][0])}; takes finite weights of 0 or more.")


def _sample_reference(logits, tokens, parents, n_rows, temperature, seed, position, q, mode):
    result = reference.verify_sample(logits, tokens, parents, n_rows, temperature, seed, position, q, mode=mode)
    _check_visited(result[0], logits, q)
    return result


def _check_residual_values(p: Tensor, q: Tensor, u: Tensor) -> None:
    _check_weights("residual_sample", "p", p)
    _check_weights("residual_sample", "q", q)
    if not p.any(1).all():
        raise ValueError(f"residual_sample: p[{int(p.any(1).int().argmin())}] holds no weight above 0; takes one or more.")
    outside = ~((u >= 0) & (u < 1))
    if outside.any():
        raise ValueError(f"residual_sample: u holds {float(u[outside][0])}; takes 0 up to and without 1.")


def _sample_cpu(outs, logits, tokens, parents, n_rows, temperature, seed, position, q, mode):
    _native.verify_sample(outs, logits, tokens, parents, n_rows, temperature, seed, position, q, mode)
    _check_visited(outs[0], logits, q)


_verify_sample = Op(  # its mode is `how` in the schema: torch has a use of its own for an argument `mode`
    "verify_sample",
    "Tensor logits, Tensor tokens, Tensor parents, Tensor n_rows, Tensor temperature, Tensor seed, Tensor position, Tensor? q, str how",
    ["path", "count", "bonus"],
    check=_check_verify_sample,
    sizes=lambda logits, *_: {"dtype": logits.dtype, "T": logits.shape[1], "V": logits.shape[2]},
    reference=_sample_reference,
    cpu=_sample_cpu,
    cuda=_cuda.verify_sample,
    triton="verify_sample",
    values=_check_values,
)
_residual_sample = Op(
    "residual_sample",
    "Tensor p, Tensor q, Tensor u",
    ["ids"],
    check=_check_residual_sample,
    sizes=lambda p, *_: {"dtype": p.dtype, "V": p.shape[1]},
    reference=lambda *inputs: (reference.residual_sample(*inputs),),
    cpu=_native.residual_sample,
    cuda=_cuda.residual_sample,
    triton="residual_sample",
    values=_check_residual_values,
)
