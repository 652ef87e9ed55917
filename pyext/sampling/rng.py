"""Counter-based random numbers: a number is a function of what it is for, never of when or beside whom it is drawn.

Philox4x32-10 (Salmon et al. 2011, Random123). The key is the request's seed; the counter is made of the absolute position of the token
that is being decided, of the purpose, and of a lane (which sibling, which vocabulary entry). So a text depends on its seed alone,
whatever else is in the batch, and every position has fresh numbers. csrc/common/rng.h computes the same bits.
"""

import numpy as np

SAMPLE, DRAFT, ACCEPT, RESIDUAL = 0, 1, 2, 3
"""Purposes: decide a token from the target, draw a guess, test a guess, decide a token after a rejection."""

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_UNIT = 2.0**-53


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the four output words of Philox4x32-10; all words are 32 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, index: int, purpose: int, lane: int = 0) -> float:
    """Return the number in [0, 1), a multiple of 2^-53, that belongs to these four.

    seed: 0 to 2^64 - 1. index: absolute position of the token that is decided. purpose: SAMPLE, DRAFT, ACCEPT or RESIDUAL.
    """
    counter = (index & _MASK, (index >> 32) & _MASK, lane & _MASK, purpose)
    r0, r1, _, _ = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return ((r1 << 32 | r0) >> 11) * _UNIT


def uniforms(seed: int | np.ndarray, index: int | np.ndarray, purpose: int, lane: int | np.ndarray = 0) -> np.ndarray:
    """Return `uniform` of every element; seed, index and lane broadcast. float64, bit for bit what `uniform` gives."""
    seed, index, lane = np.broadcast_arrays(np.asarray(seed, np.uint64), np.asarray(index, np.uint64), np.asarray(lane, np.uint64))
    mask, half = np.uint64(_MASK), np.uint64(32)
    c0, c1, c2, c3 = index & mask, index >> half, lane & mask, np.full(lane.shape, purpose, np.uint64)
    k0, k1 = seed & mask, seed >> half
    for _ in range(10):
        p0, p1 = c0 * np.uint64(_M0), c2 * np.uint64(_M1)
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ k0, p1 & mask, (p0 >> half) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + np.uint64(_W0)) & mask, (k1 + np.uint64(_W1)) & mask
    return ((c1 << half | c0) >> np.uint64(11)).astype(np.float64) * _UNIT
