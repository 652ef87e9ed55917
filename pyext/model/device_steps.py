"""Steps of a model on a device: recorded once for each plan, one copy in and one copy out.

Status: run on tensors of the CPU, under the emulator and in Triton's interpreter, not yet on hardware.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ramify import backends
from ramify.cache.base import PageFormat
from ramify.cache.cache import CacheView
from ramify.cache.device_arena import MOST_MOVES, DeviceArena
from ramify.cache.mirror import Mirror, wait
from ramify.model.config import ModelConfig
from ramify.model.describe import Plan, describe
from ramify.model.device_graph import Recording
from ramify.model.device_record import DeviceRecorder
from ramify.model.rope import rope_tables
from ramify.model.shape import DRAFT_PAGES, Shape
from ramify.model.step_out import DeviceStepOut
from ramify.model.weights import Weights
from ramify.sampling.pipeline import Draws
from ramify.tree import MAX_ROWS, TokenTree

F32, I32, I64 = torch.float32, torch.int32, torch.int64
MOVES = 32
"""Committed rows a sequence that every step carries out at least; more than it can are made by a launch of their own."""


class DeviceSteps:
    """The recorded steps of a model on `device`: one for each plan that was asked for, kept by the arena over which it runs."""

    prefill_rows, draws, takes_turns = MAX_ROWS, True, True

    def __init__(self, config: ModelConfig, weights: Weights, device: torch.device):
        self.config, self.weights, self.device = config, weights, device
        self._tables = rope_tables(config.rope, config.head_dim, 0)
        self.recorded = 0
        """Steps recorded so far."""
        if device.type == "cuda":
            self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    @property
    def device_name(self) -> str:
        """The device as measurements are filed under it."""
        return f"on {torch.cuda.get_device_name(self.device) if self.device.type == 'cuda' else self.device}"

    def backend(self) -> str:
        """The backend of attention."""
        dtype = self.weights.dtype
        return backends.choose("tree_attention", self.device.type, dtype=dtype, D=self.config.head_dim, kv=dtype)

    def arena(self, page_format: PageFormat, pages: int, draft_pages: int) -> DeviceArena:
        """Memory for a cache, and rotary tables for every position in it; caches share them while they are long enough."""
        positions = min(self.config.max_positions, pages * 64 + MAX_ROWS)
        if positions > len(self._tables[0]):
            cos, sin = rope_tables(self.config.rope, self.config.head_dim, positions)
            self._tables = cos.to(self.device), sin.to(self.device)
        return DeviceArena(self.config, page_format, pages, draft_pages, self.device, self._tables)

    def step(
        self, view: CacheView, shape: Shape, tree: TokenTree, span: tuple[int, int], head: bool, topk: int, taps: tuple, draws: bool
    ) -> "DeviceStep":
        """The step for rows of this shape, recorded when it is first asked for. Raises ValueError where a forced backend lacks an op."""
        if self.device.type == "cuda":
            backends.check_model_backend(str(self.device))
        arena, pages, B = view.cache.arena, view.cache.page_table.shape[1], len(view.slots)
        arena.idle("forward")
        bucket = 1 << (int(shape.rows.max()) - 1).bit_length()
        key = (bucket, B, span, head, topk, taps, draws, pages, backends.forced(), backends.invariant())
        step = arena.programs.get(key)
        if step is None:
            self.recorded += 1
            step = arena.programs[key] = DeviceStep(self, arena, Plan(bucket, B, span, head, topk, taps, draws), pages)
        return step

    def reach(self, position: int) -> None:
        """The tables of an arena are ready for all of its positions."""


class DeviceStep(Recording):
    """A recorded step: its inputs and results, each in one buffer here and there. Results hold until the next run.

    copies: times that results were brought here.
    """

    def __init__(self, steps: DeviceSteps, arena: DeviceArena, plan: Plan, pages: int):
        self.plan, self.arena = plan, arena
        config, B, T = steps.config, plan.sequences, plan.rows
        rows = B * T
        arrays: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"ancestors": ((B, T, -(-T // 64)), I64)}
        arrays |= {name: ((rows,), I32) for name in ("tokens", "position", "slot")}
        arrays |= {"prefix": ((B,), I32), "tail_rows": ((B,), I32), "page_table": ((B, pages), I32)}
        arrays |= {name: ((min(B * max(T, MOVES), MOST_MOVES),), I32) for name in ("source", "target", "moved")}
        if plan.draws:
            arrays |= {"temperature": ((rows,), F32), "seed": ((rows,), I64), "index": ((rows,), I64)}
        if plan.layers[0] > 0:
            arrays["hidden"] = ((rows, config.hidden_size), F32)
        self.inputs = Mirror(steps.device, arrays)
        arrays = {"argmax": ((rows,), I32), "lse": ((rows,), F32), "top": ((rows,), F32)} if plan.head else {}
        if plan.head and plan.topk:
            arrays |= {"topk_ids": ((rows, plan.topk), I32), "topk_values": ((rows, plan.topk), F32)}
        arrays |= {"drawn": ((rows,), I32)} if plan.draws else {}
        arrays |= {f"tap{i}": ((rows, config.hidden_size), F32) for i in plan.taps}
        self.results = Mirror(steps.device, arrays)
        self.draft_page = np.arange(B, dtype=np.int32) * DRAFT_PAGES
        self.copies = 0
        self._shape: Shape | None = None
        self._at: slice | np.ndarray = slice(0, 0)  # of every row of the tree that is computed, its place in the step
        record = DeviceRecorder(config, steps.weights, arena, plan, self.inputs.device, self.results.device)
        record.calls.insert(0, arena.moves(self.inputs))  # what the last commits have asked for
        describe(record)
        self.logits = record.logits
        super().__init__(steps, record.calls)

    def fill(self, shape: Shape, tree: TokenTree, tokens: np.ndarray, lengths: np.ndarray, page_table: np.ndarray) -> None:
        """Write the inputs. A shape that the step has seen last is not written again."""
        inputs = self.inputs.host
        if self._shape is not shape:
            self._lay_out(shape)
        at = self._at
        inputs["tokens"][at] = tokens
        inputs["position"][at] = shape.depth + (lengths[0] if len(lengths) == 1 else lengths[shape.sequence])
        inputs["prefix"][:], inputs["page_table"][:] = lengths, page_table

    def _lay_out(self, shape: Shape) -> None:
        """Where the rows of this shape stand in the step, and which of them see which; all others write to a slot of nobody."""
        inputs, T = self.inputs.host, self.plan.rows
        at = shape.sequence * T + shape.draft_slot % MAX_ROWS
        whole = bool((at == np.arange(shape.M)).all())
        self._at = slice(0, shape.M) if whole else at
        inputs["tokens"][:], inputs["position"][:], inputs["slot"][:] = 0, 0, self.arena.spare_draft
        inputs["slot"][at] = shape.draft_slot
        inputs["tail_rows"][:] = shape.rows
        words, ancestors = inputs["ancestors"], shape.arrays[2]  # of the whole tree, rows that were run before included
        width = min(words.shape[2], ancestors.shape[1])  # no row sees a later one, so what is beyond stays 0
        for b, (start, stop) in enumerate(zip(shape.arrays[1][:-1], shape.arrays[1][1:], strict=True)):
            words[b, : stop - start, :width] = ancestors[start:stop, :width]
        self._shape = shape

    def start_from(self, hidden: np.ndarray) -> None:
        """Hidden states f32 [M, hidden] for a step whose layers start above 0."""
        self.inputs.host["hidden"][self._at] = hidden

    def draw(self, draws: Draws, shape: Shape) -> None:
        """What the tokens of a step whose plan draws are drawn with."""
        inputs, at = self.inputs.host, self._at
        inputs["temperature"][:] = 0  # rows of nobody take the likeliest
        inputs["temperature"][at], inputs["seed"][at] = draws.temperature[shape.sequence], draws.seed[shape.sequence]
        inputs["index"][at] = draws.position[shape.sequence] + shape.depth

    def run(self, eager: bool = False) -> None:
        """Compute the step: a copy there, one launch of the graph or one call after the other, a copy back, and one wait."""
        self.arena.hand(self.inputs.host)
        self.inputs.upload()
        self.launch(eager)
        self.results.download()
        self.copies += 1
        wait(self.device)

    def out(self, shape: Shape) -> DeviceStepOut:
        """What the last `run` left: views, or where sequences are of unequal rows, copies without the rows between."""
        at, named = self._at, self.results.host
        out = DeviceStepOut(taps={i: named[f"tap{i}"][at] for i in self.plan.taps})
        if self.plan.head:
            out.argmax, out.top, out.lse = (named[name][at] for name in ("argmax", "top", "lse"))
            out.logits = self._download_logits
            out.drawn = named["drawn"][at] if self.plan.draws else None
            if self.plan.topk:
                out.topk_ids, out.topk_values = named["topk_ids"][at], named["topk_values"][at]
        return out

    def _download_logits(self) -> np.ndarray:
        assert self.logits is not None
        at = self._at if isinstance(self._at, slice) else torch.from_numpy(self._at).to(self.device)
        return self.logits[at].cpu().numpy()

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Rows and moves of nobody."""
        self.inputs.host["slot"][:] = self.arena.spare_draft
        moves = {name: self.inputs.host[name] for name in ("source", "target", "moved")}
        moves["source"][:], moves["target"][:], moves["moved"][:] = self.arena.spare_draft, self.arena.spare_slot, 0
        self.inputs.upload()
        yield
