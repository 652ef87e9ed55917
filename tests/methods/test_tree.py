"""TokenTree: bits and depths against a slow definition, the builders, the prefix rule, and what each bad tree is told."""

import re
from pathlib import Path

import numpy as np
import pytest

from ramify.testing.headers import run_cpp
from ramify.tree import CANDIDATE, MAX_ROWS, PAD, PROBE, TokenTree

COMMON = Path(__file__).resolve().parents[2] / "csrc" / "common"


def random_parents(rng, rows):
    return [-1, *(int(rng.integers(0, row)) for row in range(1, rows))]


def random_batch(rng, B, most=90):
    rows = [int(rng.integers(1, most)) for _ in range(B)]
    return [rng.permutation(1000)[:n].tolist() for n in rows], [random_parents(rng, n) for n in rows]


def sees(tree, row, other):
    return bool(int(tree.ancestors[row, other >> 6]) >> (other & 63) & 1)


@pytest.mark.parametrize("B", [1, 2, 5])
def test_packed_arrays(B):
    rng = np.random.default_rng(B)
    for most in (2, 12, 90, MAX_ROWS + 1):
        tokens, parents = random_batch(rng, B, most)
        tree = TokenTree.from_parents(tokens, parents).check()
        assert (tree.B, tree.M, tree.rows.tolist()) == (B, sum(map(len, tokens)), [len(t) for t in tokens])
        assert tree.ancestors.shape == (tree.M, -(-max(tree.rows) // 64))
        for b, (t, p) in enumerate(zip(tokens, parents)):
            span = tree.span(b)
            assert tree.tokens[span].tolist() == t and tree.parent[span].tolist() == p
            for row in range(len(t)):
                path, at = [], row
                while at >= 0:
                    path.append(at)
                    at = p[at]
                assert tree.path(b, row).tolist() == path[::-1]
                assert tree.depth[span][row] == len(path) - 1
                assert [j for j in range(64 * tree.ancestors.shape[1]) if sees(tree, span.start + row, j)] == path[::-1]
            assert tree.children(b) == [[c for c in range(len(t)) if p[c] == row] for row in range(len(t))]


@pytest.mark.parametrize("B", [1, 2, 5])
def test_chains_and_roots(B):
    rng = np.random.default_rng(B)
    guesses = [rng.integers(0, 9, rng.integers(0, 80)).tolist() for _ in range(B)]
    roots = rng.integers(0, 9, B).tolist()
    tree = TokenTree.chains(roots, guesses).check()
    same = TokenTree.from_parents([[r, *g] for r, g in zip(roots, guesses)], [range(-1, len(g)) for g in guesses])
    for name in ("tokens", "parent", "depth", "row_start", "ancestors", "kind"):
        np.testing.assert_array_equal(getattr(tree, name), getattr(same, name))
    plain = TokenTree.roots(roots).check()
    assert plain.tokens.tolist() == roots and plain.rows.tolist() == [1] * B and plain.ancestors.tolist() == [[1]] * B


@pytest.mark.parametrize("B", [1, 2, 5])
def test_prefix_is_the_tree_of_the_smaller_budget(B):
    rng = np.random.default_rng(B)
    tokens, parents = random_batch(rng, B, 150)
    q = rng.random((sum(map(len, tokens)), 7), np.float32)
    tree = TokenTree.from_parents(tokens, parents, mode="wor", q=q)
    counts = [int(rng.integers(0, len(t) + 2)) for t in tokens]
    kept = [min(max(n, 1), len(t)) for n, t in zip(counts, tokens)]
    want = TokenTree.from_parents([t[:n] for t, n in zip(tokens, kept)], [p[:n] for p, n in zip(parents, kept)])
    got = tree.prefix(counts).check()
    for name in ("tokens", "parent", "depth", "row_start", "ancestors", "kind"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    np.testing.assert_array_equal(got.q, np.concatenate([q[tree.span(b)][:n] for b, n in enumerate(kept)]))
    assert tree.prefix([MAX_ROWS] * B) is tree


def test_shapes_are_shared_and_cannot_be_written():
    first, second = TokenTree.chains([1], [[2, 3]]), TokenTree.chains([4], [[5, 6]])
    assert first.ancestors is second.ancestors and first.parent is second.parent
    with pytest.raises(ValueError, match="read-only"):
        first.parent[1] = 5
    first.tokens[1] = 9  # tokens are the tree's own
    assert second.tokens.tolist() == [4, 5, 6]


def test_equal_siblings_of_a_det_tree_are_merged():
    #      0          children 1 (a) 2 (a) 3 (b); 4 (c) under 1, 5 (c) and 6 (d) under 2; 7 (e) under 5
    tokens, parents = [9, 1, 1, 2, 3, 3, 4, 5], [-1, 0, 0, 0, 1, 2, 2, 5]
    tree = TokenTree.from_parents([tokens, [9]], [parents, [-1]]).check()
    assert tree.tokens.tolist() == [9, 1, 2, 3, 4, 5, 9]
    assert tree.parent.tolist() == [-1, 0, 0, 1, 1, 3, -1]
    q = np.full((8, 10), 0.1, np.float32)
    assert TokenTree.from_parents([tokens], [parents], mode="iid", q=q).M == 8  # drawn with replacement: they may be equal
    with pytest.raises(ValueError, match="token 1 stands twice under row 0 of sequence 0 .again at row 2"):
        TokenTree.from_parents([tokens], [parents], mode="wor", q=q)
    marks = [[CANDIDATE, CANDIDATE, PROBE, PAD, CANDIDATE, PROBE, PROBE, PROBE]]
    kinds = TokenTree.from_parents([tokens], [parents], kinds=marks)
    assert kinds.M == 8 and kinds.children(0) == [[1], [4], [], [], [], [], [], []]
    with pytest.raises(ValueError, match="stands twice"):
        TokenTree.from_parents([tokens], [parents], kinds=[[CANDIDATE] * 8])


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([0, 0], "parent[0] is 0 in sequence 1; takes -1. Row 0 is the root."),
        ([-1, -1], "parent[1] is -1 in sequence 1; only row 0 is a root."),
        ([-1, 2, 0], "parent[1] is 2 in sequence 1; a parent stands before its child."),
        ([-1, 2, 1], "parent[1] is 2 in sequence 1: a cycle"),
        ([-1, 1], "parent[1] is 1 in sequence 1: a cycle"),
        ([-1, 0, 9], "parent[2] is 9 in sequence 1; takes 0 to 1."),
        ([-1, 0, -4], "parent[2] is -4 in sequence 1; takes 0 to 1."),
        ([], "0 rows in sequence 1; takes 1 to 256."),
        ([-1] + [0] * 256, "257 rows in sequence 1; takes 1 to 256. Lower rows= of the size policy."),
    ],
)
@pytest.mark.parametrize("mode", ["det", "iid"])
def test_bad_parents_are_named(parents, message, mode):
    q = np.zeros((2 + len(parents), 3), np.float32)
    with pytest.raises(ValueError, match=re.escape("TokenTree: " + message)):
        TokenTree.from_parents([[5, 6], list(range(len(parents)))], [[-1, 0], parents], mode=mode, q=q)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=re.escape("parents[0] has 1 rows; takes 2, as tokens[0] has")):
        TokenTree.from_parents([[1, 2]], [[-1]])
    with pytest.raises(ValueError, match="parents has 2 sequences; takes 1"):
        TokenTree.from_parents([[1]], [[-1], [-1]])
    with pytest.raises(ValueError, match="guesses has 1 sequences; takes 2"):
        TokenTree.chains([1, 2], [[]])
    with pytest.raises(ValueError, match="257 rows in sequence 0; takes 1 to 256"):
        TokenTree.chains([1], [[2] * 256])
    with pytest.raises(ValueError, match="0 sequences came"):
        TokenTree.roots([])
    with pytest.raises(ValueError, match='q is None and mode is "wor"'):
        TokenTree.from_parents([[1, 2]], [[-1, 0]], mode="wor")
    with pytest.raises(ValueError, match="mode is 'nope'; takes one of det, iid, wor, greedy_plus_one"):
        TokenTree.chains([1], [[2]], mode="nope")
    with pytest.raises(ValueError, match=re.escape("q is [3, 4]; takes [2, V]")):
        TokenTree.chains([1], [[2]], mode="iid", q=np.zeros((3, 4), np.float32))
    with pytest.raises(TypeError, match="q is float64; takes float32"):
        TokenTree.chains([1], [[2]], mode="iid", q=np.zeros((2, 4)))
    assert TokenTree.chains([1], [[]], mode="iid").q is None  # no children, nothing to say about them


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("tokens", lambda a: a.astype(np.int64), TypeError),
        ("tokens", lambda a: a - 100, ValueError),
        ("parent", lambda a: a[:-1], ValueError),
        ("parent", lambda a: np.zeros_like(a), ValueError),
        ("depth", lambda a: a + 1, ValueError),
        ("row_start", lambda a: a + 1, ValueError),
        ("row_start", lambda a: np.array([0, 0, 7], np.int32), ValueError),
        ("ancestors", lambda a: a & ~1, ValueError),
        ("ancestors", lambda a: np.repeat(a, 2, axis=1), ValueError),
        ("ancestors", lambda a: a.astype(np.uint64), TypeError),
        ("kind", lambda a: a.astype(np.int32), TypeError),
        ("mode", lambda a: "guess", ValueError),
    ],
)
def test_check_finds_what_was_broken_by_hand(name, change, error):
    tree = TokenTree.from_parents([[1, 2, 3, 4], [5, 6, 7]], [[-1, 0, 1, 1], [-1, 0, 0]]).check()
    setattr(tree, name, change(getattr(tree, name)))
    with pytest.raises(error, match=f"TokenTree: .*(takes|{name})"):
        tree.check()


def test_check_takes_a_lower_limit():
    tree = TokenTree.chains([1], [[2] * 9])
    with pytest.raises(ValueError, match="10 rows in sequence 0; takes 1 to 8"):
        tree.check(max_rows=8)


def test_header_gives_the_same_bits(tmp_path):
    source = (
        '#include "tree_bits.h"\n#include <stdio.h>\nint main() {\n'
        "  static int32_t parent[ramify::kMaxRows], depth[ramify::kMaxRows];\n  static int64_t words[ramify::kMaxRows * 5];\n  int n;\n"
        '  while (scanf("%d", &n) == 1) {\n    for (int i = 0; i < n; ++i)\n      if (scanf("%d", parent + i) != 1) return 1;\n'
        "    const int W = int(ramify::tree_words(n));\n    const long bad = long(ramify::tree_bits(parent, n, W, W + 1, words, depth));\n"
        '    printf("%ld %d\\n", bad, ramify::kMaxRows);\n    if (bad >= 0) continue;\n    for (int i = 0; i < n; ++i) {\n'
        '      printf("%d", depth[i]);\n      for (int w = 0; w < W; ++w) printf(" %ld", long(words[i * (W + 1) + w]));\n'
        '      for (int j = 0; j < n; ++j) printf(" %d", int(ramify::sees(words + i * (W + 1), j)));\n      printf("\\n");\n    }\n  }\n}\n'
    )
    rng = np.random.default_rng(1)
    trees = [random_parents(rng, n) for n in (1, 2, 63, 64, 65, 200, MAX_ROWS)]
    fed = "\n".join(" ".join(map(str, [len(p), *p])) for p in [*trees, [-1, 0, 2], [0], [-1, -1]])
    lines = iter([list(map(int, line.split())) for line in run_cpp(source, fed, COMMON, tmp_path).splitlines()])
    for parents in trees:
        assert next(lines) == [-1, MAX_ROWS]
        tree = TokenTree.from_parents([range(len(parents))], [parents])
        for row in range(tree.M):
            want = [int(tree.depth[row]), *tree.ancestors[row].tolist(), *(int(sees(tree, row, j)) for j in range(tree.M))]
            assert next(lines) == want
    assert [line[0] for line in lines] == [2, 0, 1]  # the first row whose parent does not stand before it
