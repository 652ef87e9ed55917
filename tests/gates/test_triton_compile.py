"""Every Triton kernel and shipped config, compiled for four chips: registers, spills, shared memory and the instructions it must have.

The attention kernels are compiled in every config that their own config functions give, at every head size, in bfloat16 and float32;
float16, mixed dtypes and pages with a window, which differ from those in their loads, are slow: `make test-slow`.

The most registers a kernel may use stand in baselines/triton-<version>.json, read from the compiler once; a kernel may take a tenth
more, and in a slow case what the chip has. A kernel without a baseline fails; a release of Triton without a file skips that comparison
and nothing else. After a change that is meant:

    python tests/gates/test_triton_compile.py
"""

import functools
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
import triton.language as tl  # noqa: E402

from ramify.backends import HEAD_SIZES  # noqa: E402
from ramify.testing.triton_compile import Report, compiling, inspect  # noqa: E402

ARCHS = (80, 90, 100, 120)
PROCESSES = 2
BASELINE = Path(__file__).parent / "baselines" / f"triton-{triton.__version__}.json"
BF16, F16, F32, I32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64
MMA = {80: "HMMA", 90: "HMMA", 100: "HMMA", 120: "HMMA"}
WIDE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}  # 64 rows and more: Hopper's and Blackwell's own instructions
GROUP, TREE_ROWS = 4, (4, 8, 16, 64)  # query heads a KV head; rows that reach every branch of the config functions

# (dtypes of q and of keys, pages and a window) of the attention kernels -> the end of a case's name
KINDS = {
    ((BF16, BF16), False): "",
    ((F32, F32), False): "f32",
    ((F16, F16), False): "f16",
    ((F32, BF16), False): "f32 over bf16",
    ((BF16, BF16), True): "paged window",
    ((F32, F32), True): "f32 paged window",
}
FAST = list(KINDS)[:2]
FAST_TOO = ("tree_attention T16 D128 paged window", "attention_colsum T4 D64 paged window")


class Case(NamedTuple):
    """A launch, the instructions its first kernel must have (by chip, or for all), the chips it is compiled for."""

    launch: Callable[[], None]
    need: tuple = ()
    chips: tuple[int, ...] = ARCHS
    slow: bool = False


def meta(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


def scratch(shape, dtype):
    return meta(*shape, dtype={"f32": F32, "f64": torch.float64, "i32": I32, "i64": I64}[dtype])


def tree_attention(T, D, q_dtype=BF16, dtype=BF16, paged=False):
    from ramify.kernels import attention

    B, Hkv, S, page, window = 2, 8, 8192, 64, 1024 if paged else 0
    q, tail = meta(B, T, GROUP * Hkv, D, dtype=q_dtype), meta(B, T, Hkv, D, dtype=dtype)
    cache = meta(B * S // page, page, Hkv, D, dtype=dtype) if paged else meta(B, S, Hkv, D, dtype=dtype)
    words, lengths, table = meta(B, T, -(-T // 64) + paged, dtype=I64), meta(B, dtype=I32), meta(B, S // page, dtype=I32) if paged else None
    attention.tree_attention(
        q, cache, cache, tail, tail, words, lengths, table,
        1 / math.sqrt(D), window, 4 if window else 0, lengths if paged else None, meta(*q.shape, dtype=q_dtype),
        meta(B, T, GROUP * Hkv, dtype=F32), scratch,
    )  # fmt: skip


def interval_attention(T, D, q_dtype=BF16, dtype=BF16):
    from ramify.kernels import interval

    q, k, at = meta(2, T, GROUP * 8, D, dtype=q_dtype), meta(2, 4096, 8, D, dtype=dtype), meta(2, T, dtype=I32)
    interval.interval_attention(q, k, k, at, at, 0.1, q, meta(2, T, GROUP * 8, dtype=F32))


def attention_colsum(T, D, q_dtype=BF16, dtype=BF16, paged=False):
    from ramify.kernels import colsum

    B, Hkv, S, page = 2, 8, 8192, 64
    q = meta(B, T, GROUP * Hkv, D, dtype=q_dtype)
    k = meta(B * S // page, page, Hkv, D, dtype=dtype) if paged else meta(B, S, Hkv, D, dtype=dtype)
    lengths, table, words = meta(B, dtype=I32), meta(B, S // page, dtype=I32), meta(B, T, 2, dtype=I64)
    lse, out = meta(B, T, GROUP * Hkv, dtype=F32), meta(B, Hkv, S, dtype=F32)
    rest = (words, table, 0.1, 1024, 4, lengths) if paged else (None, None, 0.1, 0, 0, None)
    colsum.attention_colsum(q, k, lse, lengths, *rest, out)


def chips_of(op, T, D, itemsize, masked):
    """The chips on which T rows a sequence take a config that no smaller T of TREE_ROWS takes: each config is compiled once."""
    from ramify.kernels import attention, colsum

    def config(T):
        if op is attention_colsum:
            return colsum.config(T * GROUP, D, itemsize)
        return attention.config(T * GROUP, D, itemsize, masked)

    chips = []
    for arch in ARCHS:
        with compiling(arch):
            if config(T) not in map(config, TREE_ROWS[: TREE_ROWS.index(T)]):
                chips.append(arch)
    return chips


def attention_cases():
    """Name -> Case of every config, head size and dtype of the three attention kernels; what has a twin in instructions is slow."""
    cases = {}
    for op, (kinds, paged), D, T in itertools.product((tree_attention, interval_attention, attention_colsum), KINDS, HEAD_SIZES, TREE_ROWS):
        if paged and op is interval_attention:
            continue
        itemsize = max(kind.itemsize for kind in kinds)
        chips = chips_of(op, T, D, itemsize, masked=paged or op is interval_attention)
        if not chips:
            continue
        need = () if itemsize == 4 else (MMA,) if op is attention_colsum else (WIDE if T * GROUP >= 64 else MMA, "LDGSTS")
        name = f"{op.__name__} T{T} D{D} {KINDS[kinds, paged]}".strip()
        more = {"paged": True} if paged else {}
        launch = functools.partial(op, T, D, *kinds, **more)
        cases[name] = Case(launch, need, tuple(chips), slow=(kinds, paged) not in FAST and name not in FAST_TOO)
    return cases


def merge_states():
    from ramify.kernels import interval

    interval.merge_states(meta(64, 128), meta(64, dtype=F32), meta(64, 128), meta(64, dtype=F32), meta(64, 128), meta(64, dtype=F32))


def sample(name):
    from ramify.kernels import sample

    F64, logits, rows = torch.float64, meta(2, 64, 128256), meta(2, 64, dtype=I32)
    per_sequence = meta(2, dtype=I32), meta(2, dtype=F32), meta(2, dtype=I64), meta(2, dtype=I32)
    stats = rows, meta(2, 64, dtype=F32), meta(2, 64, dtype=F64)
    q, count = meta(2, 64, 128256, dtype=F32), meta(2, dtype=I32)
    step, ids, vector, real, long = meta(64, 128256, dtype=F32), meta(64, 32, dtype=I32), rows[0], meta(64, dtype=F32), meta(64, dtype=I64)
    {
        "decide_rows": lambda: sample.decide_rows(
            step, vector, real, real, meta(64, 32, dtype=F32), ids, real, long, long, vector, scratch
        ),
        "draw_rows": lambda: sample.draw_rows(logits, rows, *per_sequence, scratch),
        "judge": lambda: sample.judge(logits, q, *stats, rows, rows, *per_sequence, True, rows, count, count, scratch),
        "residual_sample": lambda: sample.residual_sample(q[0], q[0], meta(64, dtype=F64), meta(64, dtype=I32), scratch),
    }[name]()


def glue(name):
    from ramify.kernels import glue

    table, x = meta(4096, 64, dtype=F32), meta(8, 4096)
    {
        "rms_norm": lambda: glue.rms_norm(x, meta(4096), None, x, None, 1e-6),
        "rms_norm residual": lambda: glue.rms_norm(x, meta(4096), x, x, x, 1e-6),
        "rope": lambda: glue.rope(meta(8, 32, 128), table, table, meta(8, dtype=I32), meta(8, 32, 128)),
        "rope_append": lambda: glue.rope_append(
            meta(8, 48 * 128), table, table, meta(8, dtype=I32), meta(8, dtype=I32), meta(8, 32, 128), *meta(2, 8192, 8, 128), None, x, 1e-6
        ),
        "silu_mul": lambda: glue.silu_mul(meta(8, 28672), meta(8, 14336)),
        "embed": lambda: glue.embed(meta(8, dtype=I32), meta(128256, 4096), x),
    }[name]()


def verify(name):
    from ramify.kernels import verify

    logits, rows, vector = meta(64, 128256), meta(2, 64, dtype=I32), meta(64, dtype=I32)
    {
        "row_stats": lambda: verify.row_stats(logits, vector, meta(64, dtype=F32), meta(64, dtype=F32), scratch),
        "topk_logits": lambda: verify.topk_logits(logits, meta(64, 8), meta(64, 8, dtype=I32), scratch),
        "topk_logits 32": lambda: verify.topk_logits(logits, meta(64, 32), meta(64, 32, dtype=I32), scratch),
        "verify_greedy": lambda: verify.verify_greedy(rows, rows, rows, vector, rows, vector, vector),
    }[name]()


def table(name, T=81):
    from ramify.kernels import draft

    ids, tree = functools.partial(meta, dtype=I32), meta(T, dtype=I32)
    rest = {"table_draft": (ids(8), tree, tree, ids(8, T)), "table_learn": (ids(8 * T), ids(8 * T, 10))}[name]
    getattr(draft, name)(ids(128256, 8), *rest)


def place(page):
    from ramify.kernels import kv

    tail, lengths = meta(4, 2, 16, 8, 128), meta(2, dtype=I32)
    cache = meta(4, 256, 64, 8, 128) if page else meta(4, 2, 8192, 8, 128)
    kv.place(tail, tail, cache, cache, meta(2, 16, dtype=I32), lengths, lengths, meta(2, 128, dtype=I32) if page else None)


def linear(form, M, dtype=BF16, N=4096, K=4096):
    from ramify.kernels import linear_low_bit as low_bit
    from ramify.quant.formats import Format

    f, x = Format.parse(form), meta(M, N, dtype=dtype)
    planes, groups = low_bit.planes_of(f.kind, K, dtype.itemsize), f.scale_shape(N, K)
    words = {1: torch.uint8, 2: torch.int16, 4: I32, 8: I64}
    rows = meta(M, K // planes, dtype=words[planes * dtype.itemsize] if planes > 1 else dtype)
    codes, scale = meta(N, K // planes, dtype=words[planes * f.bits // 8]), meta(*groups, dtype=F16)
    zero = scale if f.zero_point else None
    low_bit.linear_low_bit(rows, codes, scale, zero, f.kind, f.group, planes, meta(N), True, x, x, dtype, scratch)


def reorder():
    from ramify.kernels import linear_low_bit as low_bit

    low_bit.reorder(meta(8, 4096), meta(4096, dtype=I32), meta(8, 4096))


LOW_BIT = [("int4-g64", 1), ("int4-g128", 128), ("int4-g32", 16), ("int4-g32-zp", 32), ("int8", 16), ("int8", 32), ("fp8-b128", 32)]

CASES = {
    **attention_cases(),
    **{name: Case(lambda name=name: glue(name), ("LDG.E.128",)) for name in ("rms_norm", "rms_norm residual", "silu_mul", "embed")},
    "rope": Case(lambda: glue("rope")),
    "rope_append": Case(lambda: glue("rope_append")),
    **{name: Case(lambda name=name: verify(name), ("LDG.E.128",)) for name in ("row_stats", "topk_logits", "topk_logits 32")},
    "verify_greedy": Case(lambda: verify("verify_greedy")),
    **{name: Case(lambda name=name: table(name)) for name in ("table_draft", "table_learn")},
    "table_draft T256": Case(lambda: table("table_draft", 256)),
    "kv_commit": Case(lambda: place(0)),
    "kv_commit paged": Case(lambda: place(64)),
    **{name: Case(lambda name=name: sample(name), ("LDG.E.128",)) for name in ("decide_rows", "draw_rows", "judge", "residual_sample")},
    "merge_states": Case(merge_states),
    **{f"linear {form} M{M}": Case(lambda form=form, M=M: linear(form, M), ("HMMA", "LDGSTS")) for form, M in LOW_BIT},
    "linear int4-g64-zp M16 f16": Case(lambda: linear("int4-g64-zp", 16, F16), ("HMMA", "LDGSTS")),
    "linear fp8 M16 f16": Case(lambda: linear("fp8", 16, F16), ("HMMA", "LDGSTS")),
    "linear fp8-b128 M32 K4095": Case(lambda: linear("fp8-b128", 32, K=4095), ("HMMA",)),
    "linear int8 M1 one chunk": Case(lambda: linear("int8", 1, N=131072), ("HMMA", "LDGSTS")),
    "linear int4-g32 M16 f32": Case(lambda: linear("int4-g32", 16, F32), ("LDGSTS",)),
    "linear fp8-b128 M16 f32": Case(lambda: linear("fp8-b128", 16, F32), ("LDGSTS",)),
    "reorder": Case(reorder),
}


def pairs(slow):
    """(case, chip) of the slow cases, or of the others."""
    return [(name, arch) for name, case in CASES.items() if case.slow == slow for arch in case.chips]


def compile_part(slow, part):
    """Print the reports of every PROCESSES-th (case, chip), a JSON line each. Runs in a process of its own."""
    for case, arch in pairs(slow)[part::PROCESSES]:
        with compiling(arch) as kernels:
            CASES[case].launch()
        print(json.dumps([case, arch, [asdict(inspect(kernel)) for kernel in kernels]]), flush=True)


@functools.cache
def compile_all(slow):
    """(case, chip) -> reports of the kernels that the case launches, of the slow cases or of the others."""
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1"}  # what 3.9 does anyway, with a warning

    def compiled(part):
        command = [sys.executable, __file__, str(int(slow)), str(part)]
        return subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True)

    with ThreadPoolExecutor(PROCESSES) as pool:  # each worker has its reader: a full pipe would stop it
        lines = [line for done in pool.map(compiled, range(PROCESSES)) for line in done.stdout.splitlines()]
    return {(case, arch): [Report(**each) for each in found] for case, arch, found in map(json.loads, lines)}


def reports_of(case, arch):
    """What the case launches there. A worker that ended early has said why on stderr, in the test that came first."""
    found = compile_all(CASES[case].slow)
    assert (case, arch) in found, "its worker ended before it got there"
    return found[case, arch]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("case", "arch"), [pytest.param(*pair, marks=[pytest.mark.slow] * slow) for slow in (False, True) for pair in pairs(slow)]
)
def test_kernel(case, arch):
    """No spills, shared memory that the chip has, and the instructions it must have."""
    need = [word[arch] if isinstance(word, dict) else word for word in CASES[case].need]
    faults = [report.faults(need=() if i else need) for i, report in enumerate(reports_of(case, arch))]
    assert sum(faults, []) == []


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if not case.slow])
def test_registers(case):
    """At most a tenth more than the baseline of this release of Triton."""
    if not BASELINE.exists():
        pytest.skip(f"no baseline of triton {triton.__version__}: run {Path(__file__).name}")
    limits, faults = json.loads(BASELINE.read_text()).get(case, {}), []
    for arch in CASES[case].chips:
        for report in reports_of(case, arch):
            most = limits.get(f"sm_{arch}", {}).get(report.name)
            assert most is not None, f"{report.name} of {case} has no baseline: run {Path(__file__).name}"
            faults += report.faults(registers=min(255, int(most * 1.1) + 1))
    assert faults == []


@pytest.mark.timeout(3600)
def test_every_kernel_is_here():
    """Each @triton.jit function that a launch names is compiled by some case."""
    from ramify import kernels

    folder = Path(kernels.__file__).parent
    launched = {word.split("[")[0].strip() for path in folder.glob("*.py") for word in path.read_text().splitlines() if "[(" in word}
    launched = {name for name in launched if name.startswith("_")}
    assert launched and launched <= {report.name for found in compile_all(False).values() for report in found}


# ---- the tester, tested


@triton.jit
def _product(a, b, c, K, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, TENSOR_CORE: tl.constexpr):
    i, j, k = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, DEPTH)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for lo in range(0, K, DEPTH):
        x = tl.load(a + i[:, None] * K + lo + k[None, :])
        y = tl.load(b + (lo + k)[:, None] * COLS + j[None, :])
        if TENSOR_CORE:
            acc = tl.dot(x, y, acc)
        else:
            acc += tl.sum(tl.maximum(x[:, :, None], y[None, :, :]).to(tl.float32), 1)  # of products 3.6 makes a dot by itself
    tl.store(c + i[:, None] * COLS + j[None, :], acc)


def product(arch, rows=64, depth=32, warps=4, stages=2, tensor_core=True):
    a, b, c = meta(rows, 1024), meta(1024, rows), meta(rows, rows, dtype=F32)
    with compiling(arch) as kernels:
        _product[(1,)](a, b, c, 1024, ROWS=rows, COLS=rows, DEPTH=depth, TENSOR_CORE=tensor_core, num_warps=warps, num_stages=stages)
    return inspect(kernels[0])


def test_a_config_that_spills_is_caught():
    assert product(80).faults(need=("HMMA", "LDGSTS")) == []
    faults = product(80, rows=128, warps=1).faults()
    assert len(faults) == 1 and "_product on sm_80: spills" in faults[0]


def test_a_missing_tensor_core_instruction_is_caught():
    assert product(80, rows=16, depth=16, tensor_core=False).faults(need=("HMMA",)) == ["_product on sm_80: no HMMA instruction."]


def test_too_much_shared_memory_is_caught():
    """Compiling does not look at the limit; the first launch would fail."""
    faults = product(80, rows=128, depth=128, warps=8, stages=4).faults()
    assert any("bytes of shared memory; takes 166912" in fault for fault in faults)


@triton.jit
def _gather(x, at, out, stride, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.load(at + i)
    tl.store(out + i, tl.load(x + (row.to(tl.int64) if WIDE else row) * stride))


def test_a_product_that_wraps_is_caught():
    for wide in (True, False):
        with compiling(80) as kernels:
            _gather[(1,)](meta(64), meta(64, dtype=I32), meta(64), 48, BLOCK=64, WIDE=wide)
        faults = inspect(kernels[0]).faults()
        assert faults == [] if wide else len(faults) == 1 and faults[0].endswith("in 32 bits; takes 64.")


def test_too_many_registers_are_caught():
    report = product(80)
    assert report.faults(registers=report.registers) == []
    assert "registers a thread" in report.faults(registers=report.registers - 1)[0]


def write_baseline():
    found = {}
    for (case, arch), reports in sorted(compile_all(False).items()):
        found.setdefault(case, {})[f"sm_{arch}"] = {report.name: report.registers for report in reports}
        for report in reports:
            print(case, report, *report.faults(), sep="\n    ")
    BASELINE.parent.mkdir(exist_ok=True)
    BASELINE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    compile_part(*map(int, sys.argv[1:])) if len(sys.argv) > 1 else write_baseline()
