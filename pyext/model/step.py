"""One step of the model over at most `rows` packed rows, captured as a list of kernel calls.

`capture` runs the model's description once, in Python: each line of it makes one kernel call over fixed buffers. What changes from
step to step (row count, tokens, positions, lengths, trees, page tables) is read through pointers, so replaying the list is one
native call. Running the same list one call at a time is the eager mode, and gives the same bits.
"""

import numpy as np
import torch

from ramify import native
from ramify.backends import check_model_backend
from ramify.cache.arena import PREFILL_ROWS, Arena
from ramify.cache.base import PageFormat
from ramify.cache.cache import CacheView
from ramify.model.config import ModelConfig
from ramify.model.describe import Plan, describe
from ramify.model.pace import Pace
from ramify.model.rope import RopeTable
from ramify.model.shape import DRAFT_PAGES, WORDS, Shape
from ramify.model.step_out import StepOut
from ramify.model.weights import Linears, Weights
from ramify.tree import TokenTree


class Steps:
    """The captured steps of a model on the CPU: one for each plan that was asked for, kept by the arena over which it runs."""

    prefill_rows, draws, takes_turns = PREFILL_ROWS, False, False

    def __init__(self, config: ModelConfig, weights: Weights):
        self.config, self.weights = config, weights
        self._rope = RopeTable(config.rope, config.head_dim, config.max_positions)

    def backend(self) -> str:
        """The ISA level in use."""
        return native.isa()

    def arena(self, page_format: PageFormat, pages: int, draft_pages: int) -> Arena:
        """Memory for a cache."""
        return Arena(self.config, page_format, pages, draft_pages)

    def step(
        self, view: CacheView, shape: Shape, tree: TokenTree, span: tuple[int, int], head: bool, topk: int, taps: tuple, _: bool
    ) -> "Step":
        """The step for rows of this shape, captured when it is first asked for."""
        check_model_backend()
        arena, pages, B = view.cache.arena, view.cache.page_table.shape[1], len(view.slots)
        bucket = 1 << (max(shape.M, len(tree.tokens)) - 1).bit_length()
        key = (bucket, B, span, head, topk, taps, pages)
        step = arena.programs.get(key)
        if step is None or step.threads != native.threads():
            plan = Plan(bucket, B, span, head, topk, taps)
            step = arena.programs[key] = Step(self.config, self.weights, self._rope, arena, plan, pages)
        return step

    def reach(self, position: int) -> None:
        """Make the rotary tables ready for this position."""
        if position >= self._rope.ready:
            self._rope.reach(position + 1)


class Inputs:
    """What a step reads through pointers: int32 arrays, sized for `rows` packed rows of `sequences` sequences."""

    def __init__(self, rows: int, sequences: int, pages: int):
        def ints(*shape: int, dtype: type = np.int32) -> np.ndarray:
            return np.zeros(shape, dtype)

        self.count = ints(1)  # rows of this step
        self.tokens, self.position, self.draft_slot, self.depth = (ints(rows) for _ in range(4))
        self.tail_depth = ints(rows)
        self.row_start, self.tail_offset = ints(sequences + 1), ints(sequences + 1)
        self.prefix, self.tail, self.draft_page = (ints(sequences) for _ in range(3))
        self.page_table = ints(sequences, pages)
        self.ancestors = ints(rows, WORDS, dtype=np.int64)


class Step:
    """A captured step: its inputs, its outputs and its program. Outputs hold until the next replay."""

    def __init__(self, config: ModelConfig, weights: Weights, rope: RopeTable, arena: Arena, plan: Plan, pages: int):
        self.plan, self.threads = plan, native.threads()
        self._pace = Pace(self.threads)
        self.inputs = Inputs(plan.rows, plan.sequences, pages)
        self.inputs.count[0] = plan.rows  # scratch is sized for the widest step
        self.draft_page = self.inputs.draft_page
        self.draft_page[:] = np.arange(plan.sequences) * DRAFT_PAGES
        capture = _Capture(config, weights, rope, arena, plan, self.inputs, pages)
        describe(capture)
        capture.share_scratch()
        self.x, self.outputs, self.taps = capture.x.numpy(), capture.outputs, capture.taps
        self.calls = capture.calls
        self.shape: object = None  # of the tree whose rows `inputs` describes
        self.program = native.Program(capture.calls, (capture, self.inputs))

    def fill(self, shape: Shape, tree: TokenTree, tokens: np.ndarray, lengths: np.ndarray, page_table: np.ndarray) -> None:
        """Write the inputs. A shape that the step has seen last is not written again."""
        i, M = self.inputs, shape.M
        i.tokens[:M] = tokens
        i.prefix[:] = lengths
        i.page_table[:] = page_table
        np.add(shape.depth, lengths[0] if len(lengths) == 1 else lengths[shape.sequence], out=i.position[:M])
        if self.shape is not shape:
            i.count[0] = M
            i.depth[:M], i.draft_slot[:M], i.row_start[:] = shape.depth, shape.draft_slot, shape.row_start
            i.ancestors[:M, : shape.ancestors.shape[1]] = shape.ancestors
            i.tail_depth[: len(tree.depth)], i.tail_offset[:], i.tail[:] = tree.depth, tree.row_start, shape.rows
            self.shape = shape

    def start_from(self, hidden: np.ndarray) -> None:
        """Hidden states f32 [M, hidden] for a step whose layers start above 0."""
        self.x[: len(hidden)] = hidden

    def out(self, shape: Shape) -> StepOut:
        """What the last `run` left, as views."""
        M, topk = shape.M, self.plan.topk
        out = StepOut(taps={i: rows[:M] for i, rows in self.taps.items()})
        if self.plan.head:
            named = self.outputs
            out.argmax, out.top, out.lse, out.logits = named["argmax"][:M], named["top"][:M], named["lse"][:M], named["logits"][:M]
            if topk:
                out.topk_ids, out.topk_values = named["topk_ids"][:M], named["topk_values"][:M]
        return out

    def run(self, eager: bool = False) -> None:
        """Compute the step: one native call, or one per kernel."""
        if eager:
            for args in self.calls:
                native.run(args)
        else:
            self._pace.run(self.program.replay)


class _Capture:
    """Records the calls of one step. Activations are f32 whatever the weights are."""

    def __init__(self, config, weights, rope, arena, plan, inputs, pages):
        self.config, self.weights, self.arena, self.plan, self.inputs = config, weights, arena, plan, inputs
        self.cos, self.sin = rope.cos, rope.sin
        self.max_slots = pages * native.TILE + plan.rows
        self.calls: list = [arena.commit_args]
        self.outputs: dict[str, np.ndarray] = {}
        self.taps: dict[int, np.ndarray] = {}
        self._keep: list = []
        self._scratch = torch.empty(0, dtype=torch.uint8, device="cpu")
        c, rows = config, plan.rows
        self.q_size, self.kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.x = self._buffer(rows, c.hidden_size)
        self.qkv = self._buffer(rows, self.q_size + 2 * self.kv_size)
        self.attention_out = self._buffer(rows, self.q_size)
        self.gate_up = self._buffer(rows, 2 * c.inner_size)

    def embed(self) -> None:
        table = self.weights.embed
        self._call(
            native.EmbedArgs(
                tokens=_address(self.inputs.tokens),
                table=table.data_ptr(),
                dtype=native.DTYPES[table.dtype],
                V=self.config.vocab_size,
                hidden=self.config.hidden_size,
                out=self.x.data_ptr(),
                out_stride=self.x.stride(0),
            )
        )

    def linear(self, x: torch.Tensor, parts: Linears, out: torch.Tensor, *, norm=None, gated: bool = False, residual=None, **stats) -> None:
        column, prologue = 0, native.SILU_MUL if gated else native.COPY if norm is None else native.RMS_NORM
        for part in parts:
            args = part.arguments()
            args.x, args.x_stride = x.data_ptr(), x.stride(0)
            args.prologue, args.norm_weight, args.eps = prologue, native.pointer(norm), self.config.norm_eps
            if residual is not None:
                args.residual, args.residual_stride = residual[:, column:].data_ptr(), residual.stride(0)
            args.out, args.out_stride = out[:, column:].data_ptr(), out.stride(0)
            for name, value in stats.items():
                setattr(args, name, value)
            self._call(args)
            column += part.N

    def rope_append(self, i: int) -> None:
        c, arena, layer, size = self.config, self.arena, self.weights.layers[i], self.arena.draft_k.element_size()
        offset = i * arena.draft_pages * arena.page_elements * size
        self._call(
            native.RopeAppendArgs(
                qkv=self.qkv.data_ptr(),
                stride=self.qkv.stride(0),
                Hq=c.num_heads,
                Hkv=c.num_kv_heads,
                D=c.head_dim,
                q_norm=native.pointer(layer.q_norm),
                k_norm=native.pointer(layer.k_norm),
                eps=c.norm_eps,
                cos=self.cos.data_ptr(),
                sin=self.sin.data_ptr(),
                position=_address(self.inputs.position),
                draft_slot=_address(self.inputs.draft_slot),
                kv_dtype=native.DTYPES[arena.page_format.dtype],
                k=arena.draft_k.data_ptr() + offset,
                v=arena.draft_v.data_ptr() + offset,
                page_stride=arena.page_elements,
            )
        )

    def attention(self, i: int) -> None:
        c, arena, inputs = self.config, self.arena, self.inputs
        size, D = arena.k.element_size(), c.head_dim
        committed, draft = (i * pages * arena.page_elements * size for pages in (arena.pages, arena.draft_pages))
        self._call(
            native.AttentionArgs(
                row_start=_address(inputs.row_start),
                B=self.plan.sequences,
                T=self.plan.rows,
                Hq=c.num_heads,
                Hkv=c.num_kv_heads,
                D=D,
                q=self.qkv.data_ptr(),
                q_stride_t=self.qkv.stride(0),
                q_stride_h=D,
                out=self.attention_out.data_ptr(),
                out_stride_t=self.attention_out.stride(0),
                out_stride_h=D,
                scale=D**-0.5,
                window=c.sliding_windows[i] or 0,
                prefix_len=_address(inputs.prefix),
                tail_len=_address(inputs.tail),
                ancestors=_address(inputs.ancestors),
                words=WORDS,
                row_depth=_address(inputs.depth),
                tail_depth=_address(inputs.tail_depth),
                tail_offset=_address(inputs.tail_offset),
                kv_dtype=native.DTYPES[arena.page_format.dtype],
                k=arena.k.data_ptr() + committed,
                v=arena.v.data_ptr() + committed,
                page_stride=arena.page_elements,
                page_table=_address(inputs.page_table),
                table_stride=inputs.page_table.shape[1],
                page=native.TILE,
                tail_k=arena.draft_k.data_ptr() + draft,
                tail_v=arena.draft_v.data_ptr() + draft,
                tail_page_stride=arena.page_elements,
                tail_page=_address(inputs.draft_page),
                max_slots=self.max_slots,
            ),
            counted=False,
        )

    def head(self) -> None:
        rows, k, parts = self.plan.rows, self.plan.topk, self.weights.lm_head
        logits, top, lse = self._buffer(rows, self.config.vocab_size), self._buffer(rows), self._buffer(rows)
        argmax = torch.zeros(rows, dtype=torch.int32, device="cpu")
        ids, values = torch.zeros(rows, k, dtype=torch.int32, device="cpu"), self._buffer(rows, k)
        self.linear(
            self.x,
            parts,
            logits,
            norm=self.weights.final_norm,
            argmax=argmax.data_ptr(),
            top=top.data_ptr(),
            lse=lse.data_ptr(),
            topk=k,
            topk_ids=ids.data_ptr(),
            topk_values=values.data_ptr(),
        )
        named = {"argmax": argmax, "top": top, "lse": lse, "logits": logits, "topk_ids": ids, "topk_values": values}
        self.outputs = {name: tensor.numpy() for name, tensor in named.items()}

    def tap(self, i: int) -> None:
        if i not in self.plan.taps:
            return
        out = self._buffer(self.plan.rows, self.config.hidden_size)
        self._call(
            native.CopyRowsArgs(
                x=self.x.data_ptr(), x_stride=self.x.stride(0), width=out.shape[1], out=out.data_ptr(), out_stride=out.stride(0)
            )
        )
        self.taps[i] = out.numpy()

    def _buffer(self, *shape: int) -> torch.Tensor:
        tensor = torch.zeros(*shape, dtype=torch.float32, device="cpu")
        self._keep.append(tensor)
        return tensor

    def _call(self, args, counted: bool = True) -> None:
        if counted:
            args.rows = _address(self.inputs.count)
        self.calls.append(args)

    def share_scratch(self) -> None:
        """One scratch for all calls: they run one after another."""
        users = [args for args in self.calls if hasattr(args, "scratch")]
        size = max(native.scratch_bytes(args) for args in users) if users else 0
        self._scratch = torch.empty(size + 64, dtype=torch.uint8, device="cpu")
        address = (self._scratch.data_ptr() + 63) // 64 * 64
        for args in users:
            args.scratch = address


def _address(array: np.ndarray) -> int:
    return array.ctypes.data
