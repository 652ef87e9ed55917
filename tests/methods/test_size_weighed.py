"""The policy that cuts trees by the chance of their rows: against a simulated machine, and on real decoding."""

import itertools

import numpy as np
import pytest

import ramify
from ramify.draft.base import Drafter, Wants
from ramify.size import weighed
from ramify.size._cost import BUCKETS, CostTable
from ramify.size.base import SizePolicy
from ramify.size.fixed import Fixed
from ramify.size.weighed import Weighed
from ramify.testing import FakeModel
from ramify.testing.machine import STEP, Machine, cpu_like, geometric
from ramify.tree import TokenTree


def per_row(rows):
    """A machine on which every row costs a quarter of a step more."""
    return STEP * (0.75 + 0.25 * rows)


def even(alpha):
    """The chance of each row of a chain whose guesses are all right with probability alpha."""
    return lambda n: alpha ** np.arange(n)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_cut_is_the_best_of_all_cuts(batch, monkeypatch):
    """Trees of all shapes: no other choice of prefixes brings more tokens per second."""
    monkeypatch.setattr(weighed, "_GAIN", 1.0)
    rng = np.random.default_rng(batch)
    costs = CostTable([per_row(rows) for rows in BUCKETS])
    policy = Weighed(costs=costs)
    for _ in range(60):
        sizes = rng.integers(1, 5, batch)
        tree = TokenTree.from_parents(
            [list(range(n)) for n in sizes], [[-1, *(int(rng.integers(0, row)) for row in range(1, n))] for n in sizes]
        )
        own = [np.concatenate([[1.0], np.sort(rng.random(n - 1))[::-1]]) for n in sizes]  # rows stand in order of priority
        tree.chance = np.concatenate(own)
        cut = policy.trim(tree)

        def worth(rows, own=own):
            kept = [each[:n] for each, n in zip(own, rows, strict=True)]
            return sum(each.sum() for each in kept) / costs.at(sum(map(len, kept)))

        best = max(map(worth, itertools.product(*(range(1, n + 1) for n in sizes))))
        assert worth(cut.rows) == pytest.approx(best)
        cut.check()
        assert cut.M == batch or len(cut.chance) == cut.M
        assert [cut.tokens[cut.span(b)].tolist() for b in range(batch)] == [list(range(n)) for n in cut.rows]


def test_a_tree_that_says_nothing_is_verified_whole():
    policy = Weighed(costs=CostTable([per_row(rows) for rows in BUCKETS]))
    tree = TokenTree.chains([1], [[2, 3, 4]])
    assert policy.trim(tree) is tree
    assert SizePolicy.trim(Fixed(4), tree) is tree


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("step", [cpu_like, per_row])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_as_fast_as_the_best_fixed_width(alpha, step, batch):
    """Where chances are true the policy needs no trials: from the first step on it is where the best width is, if that pays well."""
    machine = Machine(Weighed(), accepts=geometric(alpha), step=step, batch=batch, chance=even(alpha)).run(300)

    def rate(n):
        return (1 - alpha**n) / (1 - alpha) / (step(batch * n) + 2e-5)

    best = max(map(rate, range(1, 33)))
    assert machine.tokens / machine.seconds > 0.93 * (best if best > 1.25 * rate(1) else rate(1))


def test_hopeless_guesses_are_not_verified():
    machine = Machine(Weighed(), accepts=lambda n: 0, step=per_row, chance=even(0.1)).run(200)
    assert set(machine.verified) == {1} and machine.speedup == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("ask", [0.01 * STEP, 0.2 * STEP])
def test_asking_in_vain_keeps_to_its_share(ask):
    """A drafter whose asking is dear is asked seldom, a cheap one in every step; both at once again after a right guess."""
    good = [False]
    policy = Weighed()
    machine = Machine(policy, accepts=lambda n: n - 1 if good[0] else 0, draft=lambda n: ask if n > 1 else 0.0, chance=even(0.9))
    policy.trim = lambda tree: tree if good[0] else TokenTree.roots([0])
    machine.run(1000)
    assert machine.speedup > 0.97
    asked = np.mean(np.array(machine.widths[100:]) > 1)
    assert asked == 1 if ask < 0.02 * STEP else 0.05 < asked < 0.15
    good[0] = True
    machine.run(60)
    assert min(machine.widths[-20:]) > 1


def test_prices_follow_the_machine():
    """Steps that turn out dearer than the table says are cut shorter."""
    dear = [False]
    machine = Machine(Weighed(), accepts=geometric(0.9), step=lambda rows: (per_row if dear[0] else cpu_like)(rows), chance=even(0.9))
    machine.run(100)
    wide = np.median(machine.verified[50:])
    dear[0] = True
    machine.run(600)
    assert np.median(machine.verified[-100:]) < wide / 2


def test_a_burst_of_other_work_is_forgotten():
    """While other programs ran wide steps were dear; nobody tries them then, and yet they are tried again afterwards."""
    busy = [False]
    step = lambda rows: cpu_like(rows) * ((4 if rows == 1 else 30) if busy[0] else 1)  # noqa: E731
    machine = Machine(Weighed(), accepts=geometric(0.8), step=step, draft=lambda n: 1e-5, chance=even(0.8)).run(100)
    wide = np.median(machine.verified[50:])
    busy[0] = True
    machine.run(400)
    assert machine.verified[-200:].count(1) > 150
    busy[0] = False
    machine.run(500)
    assert np.median(machine.verified[-50:]) == wide


class HalfRight(Drafter):
    """Branching guesses of which some are right, with chances at random; rows in order of chance."""

    name = "half_right"

    def __init__(self):
        self.random = np.random.default_rng(0)

    def propose(self, slots, roots, rows):
        tokens, parents, chance = [], [], []
        for root, most in zip(roots, rows, strict=True):
            n = int(self.random.integers(1, most + 1))
            tokens.append([root, *self.random.permutation(48)[: n - 1].tolist()])
            parents.append([-1, *(int(self.random.integers(0, row)) for row in range(1, n))])
            chance += [1.0, *sorted(self.random.random(n - 1), reverse=True)]
        tree = TokenTree.from_parents(tokens, parents)
        tree.chance = np.array(chance)
        return tree


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_text_under_trees_that_are_cut(batch, temperature):
    model = FakeModel(48, sharpness=2.0)
    prompts = [[(11 * i + b) % 48 for i in range(2 + 3 * b)] for b in range(batch)]
    params = {"max_new_tokens": 60, "temperature": temperature, "seed": 3}
    plain = ramify.generate(model, prompts, method="plain", **params)
    size = Weighed(share=1, costs=CostTable([cpu_like(rows) for rows in BUCKETS]))
    cuts = []
    size.trim = lambda tree: cuts.append((tree.M, (cut := Weighed.trim(size, tree)).M)) or cut
    outs = ramify.generate(model, prompts, method=HalfRight(), size=size, **params)
    assert [out.token_ids for out in outs] == [out.token_ids for out in plain]
    assert any(batch < kept < rows for rows, kept in cuts)


class NeverRight(Drafter):
    """Counts how often it is asked. No chance: no row of it is verified."""

    name, wants = "never_right", Wants()

    def __init__(self, about):
        self.about, self.asked = about, 0

    def size_policy(self):
        return Weighed(share=0, about=self.about, costs=CostTable([per_row(rows) for rows in BUCKETS]))

    def propose(self, slots, roots, rows):
        self.asked += 1
        tree = TokenTree.chains(roots, [[0]] * len(roots))
        tree.chance = np.array([1.0, 0.0] * len(roots))
        return tree


def test_later_calls_know_how_asking_went():
    """A drafter that was never right is asked a few times in a new text, not as if nobody had met it; sampled texts are another kind."""
    model = FakeModel(48)

    def asked(about, temperature=0.0):
        drafter = NeverRight(about)
        ramify.generate(model, [[1, 2]], method=drafter, max_new_tokens=60, temperature=temperature)
        return drafter.asked

    assert [asked("x"), asked("x"), asked("x")] == [weighed._PATIENCE, weighed._FRESH, weighed._FRESH]
    assert asked("x", 0.8) == asked("y") == asked("") == asked("") == weighed._PATIENCE


def test_arguments():
    with pytest.raises(ValueError, match="weighed: most is 257; takes 1 to 256"):
        Weighed(most=257)
    with pytest.raises(TypeError, match="weighed: costs is 3; takes a CostTable or None"):
        Weighed(costs=3)
    with pytest.raises(TypeError, match="weighed: about is 3; takes a string"):
        Weighed(about=3)
