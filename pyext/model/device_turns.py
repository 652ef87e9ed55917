"""Turns of a model on a device: each drafts from a table, runs, decides, commits and learns there, and hands on to the next.

What a turn needs of the one before (roots, lengths, the table) never leaves the device, so the next is queued before anybody has read
what this one emitted: the host reads a turn late, and the device does not wait for it.
Status: run on tensors of the CPU and under the emulator, its ops in Triton's interpreter; not yet on hardware.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ramify import backends
from ramify.cache.cache import CacheView
from ramify.cache.device_arena import DeviceArena
from ramify.cache.mirror import Mirror, mark, wait
from ramify.checks import whole
from ramify.model.describe import Plan, describe
from ramify.model.device_graph import Recording
from ramify.model.device_record import DeviceRecorder
from ramify.model.step_out import check_finite
from ramify.ops import _bound as bound
from ramify.sampling.pipeline import Draws
from ramify.tree import MAX_ROWS, StaticTree, TokenTree
from ramify.tree.static_tree import Links, deepest

if TYPE_CHECKING:
    from ramify.model.device_steps import DeviceSteps

F32, I32, I64 = torch.float32, torch.int32, torch.int64
AHEAD = 2
"""Turns in flight: one that runs, and one for the device to go on with while the host reads."""


class TurnState:
    """What turns hand on: of every sequence its root, its committed tokens and how many it may still emit; and the table.

    root is -1 once none are left: such a text drafts nothing, commits nothing and teaches nothing.
    """

    def __init__(self, device: torch.device, sequences: int, pages: int, table: tuple[int, int]):
        each = (sequences,)
        arrays = {"root": (each, I32), "length": (each, I32), "left": (each, I32), "page_table": ((sequences, pages), I32)}
        self.mirror = Mirror(device, arrays | {"temperature": (each, F32), "seed": (each, I64)})
        self.root, self.length, self.left, self.page_table, self.temperature, self.seed = self.mirror.device.values()
        self.table = torch.full(table, -1, dtype=I32, device=device)


class DeviceTurn(Recording):
    """A recorded turn over one tree. What it tells the host, and in which of the host's buffers, is in `results`."""

    def __init__(self, steps: DeviceSteps, arena: DeviceArena, plan: Plan, links: Links, state: TurnState):
        self.plan, self.state, self.links = plan, state, links
        self.turn = 0
        self._of: Any = None  # a weak reference to the DeviceTurns whose temperatures and seeds its rows have
        B, T, device = plan.sequences, plan.rows, steps.device
        tree = TokenTree.filled(np.zeros((B, T), np.int32), links[0])
        self.deepest = deepest(links[0])
        self.results = Mirror(
            device,
            {"tokens": ((B, T), I32), "path": ((B, T), I32), "count": ((B,), I32), "bonus": ((B,), I32), "lse": ((B * T,), F32)},
            hosts=AHEAD,
        )

        def rows(dtype: torch.dtype = I32, *shape: int) -> Tensor:
            return torch.zeros(B * T, *shape, dtype=dtype, device=device)

        def fixed(array: np.ndarray) -> Tensor:
            return torch.tensor(array, device=device)

        slots = np.arange(B, dtype=np.int32)[:, None] * MAX_ROWS + np.arange(T, dtype=np.int32)
        self._parents, self._depth = fixed(tree.parent.reshape(B, T)), fixed(tree.depth[:T])
        self._ranks, self._all = fixed(np.array(links[1], np.int32)), fixed(np.full(B, T, np.int32))
        self._nobody, self._goes_on = fixed(np.full(B, -1, np.int32)), torch.zeros(B, dtype=torch.bool, device=device)
        inputs = {"tokens": rows(), "position": rows(), "slot": fixed(slots.ravel()), "tail_rows": self._all}
        inputs |= {"ancestors": fixed(tree.ancestors.reshape(B, T, -1)), "prefix": state.length, "page_table": state.page_table}
        inputs |= {"temperature": rows(F32), "seed": rows(I64), "index": rows(I64)} if plan.draws else {}
        decided = {name: rows(dtype) for name, dtype in (("argmax", I32), ("top", F32), ("drawn", I32))}
        decided |= {"topk_ids": rows(I32, plan.topk), "topk_values": rows(F32, plan.topk)} if plan.topk else {}
        self.inputs = inputs
        record = DeviceRecorder(steps.config, steps.weights, arena, plan, inputs, decided | {"lse": self.results.device["lse"]})
        record.calls += self._draft(len(arena.cos) - 1)
        describe(record)
        record.calls += self._decide(arena, decided)
        super().__init__(steps, record.calls)

    def _draft(self, last: int) -> list[bound.Bound]:
        """The tree's tokens, and where their rows stand. A row without a token is computed as if it held token 0."""
        state, inputs, tokens = self.state, self.inputs, self.results.device["tokens"]
        calls = [_torch("copy", tokens[:, 0].copy_, state.root)]
        if self.plan.topk:
            calls = [bound.table_draft(state.table, state.root, self._parents[0], self._ranks, tokens)]
        position = inputs["position"].view(tokens.shape)
        calls.append(_torch("clamp", torch.clamp, tokens.view(-1), min=0, out=inputs["tokens"]))
        calls.append(_torch("add", torch.add, state.length[:, None], self._depth, out=position))
        calls.append(_torch("clamp", position.clamp_, max=last))  # a text that has ended may stand behind the last position
        if self.plan.draws:
            calls.append(_torch("add", torch.add, inputs["position"], 1, out=inputs["index"]))
        return calls

    def _decide(self, arena: DeviceArena, decided: dict[str, Tensor]) -> list[bound.Bound]:
        """The path, as long as its text may still grow; its keys and values into pages; what the rows teach; the next roots."""
        state, got, (B, T) = self.state, self.results.device, (self.plan.sequences, self.plan.rows)
        chosen = decided["drawn" if self.plan.draws else "argmax"].view(B, T)
        calls = [bound.verify_greedy(got["tokens"], self._parents, chosen, self._all, (got["path"], got["count"], got["bonus"]))]
        calls.append(_torch("minimum", torch.minimum, got["count"], state.left, out=got["count"]))
        drafts = (x[:, : B * MAX_ROWS].unflatten(1, (B, MAX_ROWS))[:, :, :T] for x in (arena.draft_k, arena.draft_v))
        calls.append(bound.kv_commit(*drafts, arena.k, arena.v, got["path"], got["count"], state.length, state.page_table))
        if self.plan.topk:
            calls.append(bound.table_learn(state.table, got["tokens"].view(-1), decided["topk_ids"]))
        calls.append(_torch("add", state.length.add_, got["count"]))
        calls.append(_torch("sub", state.left.sub_, got["count"]))
        calls.append(_torch("gt", torch.gt, state.left, 0, out=self._goes_on))
        calls.append(_torch("where", torch.where, self._goes_on, got["bonus"], self._nobody, out=state.root))
        return calls

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Texts that have ended, over the state as it is."""
        kept = self.state.mirror.buffer.clone()
        self.state.root.fill_(-1)
        self.state.left.zero_()
        yield
        self.state.mirror.buffer.copy_(kept)

    def queue(self, turns: object, eager: bool) -> int:
        """Have the turn run and its results brought to a buffer of the host, whose number this returns. Waits for nothing."""
        if self.plan.draws and (self._of is None or self._of() is not turns):
            for name, each in (("temperature", self.state.temperature), ("seed", self.state.seed)):
                self.inputs[name].view(self.plan.sequences, -1).copy_(each[:, None])
            self._of = weakref.ref(turns)
        self.launch(eager)
        self.turn = (self.turn + 1) % AHEAD
        self.results.download(self.turn)
        return self.turn


class Taken(NamedTuple):
    """What a turn did: its tree, and of every sequence the rows committed and the tokens emitted."""

    tree: TokenTree
    path: list[np.ndarray]
    emitted: list[list[int]]


class DeviceTurns:
    """The turns of a view's sequences, from their roots to the last of the tokens `left` to each. Its pages are taken before the first.

    The view's lengths move as turns are taken. One of a cache at a time: `close` before anything else is done with it, or free one of its
    slots. open: until then.
    """

    def __init__(
        self, steps: DeviceSteps, view: CacheView, tree: StaticTree, roots: Sequence[int], left: Sequence[int], draws: Draws | None
    ):
        self._steps, self._view, self._tree, self._draws = steps, view, tree, draws is not None
        cache, arena = view.cache, view.cache.arena
        arena.idle("turns")
        lengths = view.lengths
        for slot, length, more in zip(view.slots, lengths.tolist(), left, strict=True):
            cache.reserve(slot, length + more)
        self._last = lengths + np.array(left, np.int32) - 1  # of each, where its last root may stand
        arena.flush()
        pages, table = cache.page_table.shape[1], (0, 0) if tree.table is None else tree.table.shape
        key = len(view.slots), pages, table
        state = arena.states.get(key)
        if state is None:
            state = arena.states[key] = TurnState(steps.device, len(view.slots), pages, table)
        host = state.mirror.host
        host["root"][:], host["left"][:], host["length"][:], host["page_table"][:] = roots, left, lengths, cache.page_table[view.slots]
        if draws is not None:
            host["temperature"][:], host["seed"][:] = draws.temperature, draws.seed
        state.mirror.upload()
        if tree.table is not None:
            state.table.copy_(torch.from_numpy(tree.table), non_blocking=True)
        self._state, self._flight = state, deque[tuple[DeviceTurn, int, Any]]()
        cache.draft = None  # turns write there
        self.slots = frozenset(view.slots)
        self.open, arena.turns = True, weakref.ref(self)

    def __len__(self) -> int:
        """Turns in flight."""
        return len(self._flight)

    def queue(self, rows: int, eager: bool = False) -> int:
        """Start one more turn over the tree of at most `rows` rows, 1 to MAX_ROWS, fewer where the positions of the model end; returns
        how many it has. Raises ValueError for other rows, with AHEAD turns in flight, and when they are closed or a slot was freed.
        Whatever goes wrong while a turn starts closes all.
        """
        if not 1 <= whole("rows", rows, caller="turns") <= MAX_ROWS:
            raise ValueError(f"turns: rows is {rows}; takes 1 to {MAX_ROWS}.")
        if not self.open:
            raise ValueError("turns: they are closed or a slot was freed; takes no more. Ask model.turns for others.")
        if len(self._flight) == AHEAD:
            raise ValueError(f"turns: {AHEAD} are in flight; takes no more before one was taken. Call take.")
        ahead = sum(turn.deepest + 1 for turn, _, _ in self._flight)  # tokens that turns in flight may emit
        root = int(np.minimum(self._view.lengths + ahead, self._last).max())
        turn = self._turn(self._tree.fitted(rows, self._steps.config.max_positions - 1 - root))
        try:
            self._flight.append((turn, turn.queue(self, eager), mark(self._steps.device)))
        except BaseException:  # the device may have committed what nobody will ever read
            self.close()
            raise
        return turn.plan.rows

    def take(self) -> Taken:
        """Wait for the oldest turn. Raises ValueError when none is queued, and where its logits are not finite: all are closed then, and
        the view keeps what was taken before.
        """
        if not self._flight:
            raise ValueError("turns: nothing is in flight; takes a turn that was queued. Call queue first.")
        turn, host, event = self._flight.popleft()
        wait(self._steps.device, event)
        got = turn.results.hosts[host]
        tokens, path, emitted = got["tokens"].copy(), [], []
        try:
            check_finite(np.where(tokens.ravel() >= 0, got["lse"], 0))  # rows of no token are computed, and nobody looks at them
        except ValueError:
            self.close()
            raise
        self._view.moved(got["count"])
        for b, (count, bonus) in enumerate(zip(got["count"].tolist(), got["bonus"].tolist(), strict=True)):
            rows = got["path"][b]
            path.append(rows[:count].copy())
            after = [row for row in rows[1 : count + 1].tolist() if row >= 0]
            emitted.append(([*tokens[b, after].tolist(), bonus])[:count])
        return Taken(TokenTree.filled(tokens, turn.links[0]), path, emitted)

    def close(self) -> None:
        """Wait for what is in flight, unread, and write what was learned into the drafter's table. Once is enough."""
        if not self.open:
            return
        self.open = False
        self._flight.clear()
        if self._tree.table is not None:
            torch.from_numpy(self._tree.table).copy_(self._state.table, non_blocking=True)
        wait(self._steps.device)

    def _turn(self, links: Links) -> DeviceTurn:
        steps, arena, B = self._steps, self._view.cache.arena, len(self._view.slots)
        pages = self._view.cache.page_table.shape[1]
        key = ("turn", links, B, self._draws, self._state.table.shape, pages, backends.forced(), backends.invariant())
        turn = arena.programs.get(key)
        if turn is None:
            steps.recorded += 1
            span = 0, steps.config.num_layers
            plan = Plan(len(links[0]), B, span, True, self._tree.width, (), self._draws)
            turn = arena.programs[key] = DeviceTurn(steps, arena, plan, links, self._state)
        return turn


def _torch(op: str, function: Callable[..., Any], *args: Any, **named: Any) -> bound.Bound:
    return bound.Bound(op, "torch", partial(function, *args, **named))
