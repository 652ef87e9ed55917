"""What the stages of the day on a GPU are made of: turns, the correctness gate, what is read from other programs, who is asked."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_cells, gpu_clock, gpu_run, gpu_speed, gpu_stages, gpu_tests
from benchmarks.gpu_clock import Runner, Wall, race
from benchmarks.gpu_run import Day, DeviceLost
from benchmarks.peers import gpu_attention
from benchmarks.registry import Case, Provider
from benchmarks.tree_attention import Inputs
from ramify.backends import TestBackend
from ramify.testing import emulator

ROOT = Path(__file__).parents[2]
LIMITS = {"read": 1.0, "peak": {"bf16": 1.0}}


def test_turns_go_forth_and_back():
    order = []
    runners = [Runner(name, lambda name=name: order.append(name)) for name in "abc"]
    race(runners, Wall(), rounds=2, calls=2, warm=1)
    assert "".join(order) == "abc" + "aabbcc" + "ccbbaa"
    assert all(len(runner.samples) == 4 and runner.us["p10"] <= runner.us["p90"] and runner.host_us >= 0 for runner in runners)


def cell_of(*args, limit=1e-6):
    x = torch.ones(3)
    case = Case(args or (x,), 1000, 0, "fp32", lambda: (2 * x, torch.arange(3)), limit)
    return gpu_cells.Cell("rope", "f32", {"n": 3}, lambda: case)


def rows_of(*ways, red=None):
    rows = []
    gpu_speed.run_cell(cell_of(), ways, Wall(), LIMITS, red or {}, rows)
    gpu_speed.ratios(rows)
    return {row["provider"]: row for row in rows}


def boom(x):
    raise RuntimeError("no such kernel\nmore")


def test_a_red_check_prints_no_speed():
    order = torch.arange(3)
    rows = rows_of(
        Provider("right", lambda x: (2 * x, order), baseline=True),
        Provider("less", lambda x: 2 * x),
        Provider("off", lambda x: 2 * x + 0.1),
        Provider("id", lambda x: (2 * x, order + 1)),
        Provider("nan", lambda x: x * torch.nan),
        Provider("shape", lambda x: x[:2]),
        Provider("fails", boom),
        Provider("absent", lambda x: x, needs=lambda: "pip install it"),
        Provider("red", lambda x: 2 * x, backend="cuda"),
        red={("rope", "cuda"): "assert 0"},
    )
    assert {name: row["status"] for name, row in rows.items()} == {
        **{"right": "ok", "less": "ok", "off": "wrong", "id": "wrong", "nan": "wrong", "shape": "wrong"},
        **{"fails": "failed", "absent": "not installed", "red": "wrong"},
    }
    assert {name for name, row in rows.items() if "us" in row} == {"right", "less"}
    assert rows["fails"]["reason"] == "RuntimeError: no such kernel" and rows["red"]["reason"] == "its tests failed: assert 0"
    assert rows["right"]["ratio"] == 1 and rows["less"]["floor_us"] == 1 and "ratio" in rows["less"]


def test_a_backend_that_does_not_take_the_cell_is_not_run():
    rows = []
    way = Provider("ramify triton", gpu_cells.ops.silu_mul, backend="triton")
    gpu_speed.run_cell(cell_of(torch.ones(2, 4)), [way], Wall(), LIMITS, {}, rows)
    assert rows[0]["status"] == "not run" and 'backend "triton" was forced' in rows[0]["reason"]


def test_a_lost_device_leaves_what_is_known(monkeypatch):
    """The row that lost it has its reason; those not timed yet have their turn in the next process."""
    monkeypatch.setattr(gpu_speed, "lost", lambda: "an illegal address")
    good, rows = Provider("good", lambda x: 2 * x), []
    with pytest.raises(DeviceLost, match="an illegal address"):
        gpu_speed.run_cell(cell_of(), [good, Provider("bad", boom), good], Wall(), LIMITS, {}, rows)
    assert [(row["provider"], row["status"]) for row in rows] == [("bad", "failed")]
    calls = []

    def later(x):
        calls.append(x)
        return 2 * x if len(calls) < 3 else boom(x)

    with pytest.raises(DeviceLost):
        gpu_speed.run_cell(cell_of(), [good, Provider("later", later)], Wall(), LIMITS, {}, rows)
    assert [row["status"] for row in rows] == ["failed"] * 3 and rows[1]["reason"] == "while the cell was timed: no such kernel"
    assert gpu_clock.lost() == ""  # no device was ever asked here


def test_late_stages_say_so_and_a_second_process_does_not_repeat(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_cells, "cells", lambda *args: [cell_of()])
    monkeypatch.setattr(gpu_cells, "ways", lambda *args: [Provider(name, lambda x: 2 * x) for name in "ab"])
    done = {"op": "rope", "provider": "a", "baseline": False, "shape": {"n": 3}, "status": "failed", "reason": "it lost the device"}
    day = Day(tmp_path, {"tests": [], "limits": LIMITS}, ends=1e12, rehearsal=True, part={"rows": [done]})
    gpu_speed.speed(day)
    assert [(row["provider"], row["status"]) for row in day.part["rows"]] == [("a", "failed"), ("b", "ok")]
    late = Day(tmp_path, {"tests": [], "limits": LIMITS}, ends=0, rehearsal=True)
    gpu_speed.speed(late)
    assert {row["reason"] for row in late.part["rows"]} == {"the stage's time was over"} and len(late.part["rows"]) == 2
    red = {"op": "tree_attention", "backend": "cpu", "failures": [{"test": "t", "said": "assert 1"}]}
    gpu_speed.tune(day := Day(tmp_path, {"tests": [red]}, ends=1e12, rehearsal=True))
    assert day.part["tune"][0]["reason"] == "its tests failed: assert 1"


def test_candidates_begin_with_the_shipped_one():
    found = gpu_speed.candidates(32, (32, 64, 4, 3))
    assert found[0] == (32, 64, 4, 3) and len(found) == len(set(found)) == 3 * 2 * 2 * 3
    assert sum(a != b for a, b in zip(found[1], found[0])) == 1 and {rows for rows, *_ in found} == {16, 32, 64}


def test_a_configuration_is_put_back():
    attention = pytest.importorskip("ramify.kernels.attention")
    before = attention.config
    with pytest.raises(RuntimeError), gpu_speed.configured((16, 32, 4, 2)) as config:
        assert attention.config is config and config(99, 128, 2, masked=True) == (16, 32, 4, 2)
        raise RuntimeError
    assert attention.config is before


def test_every_cell_is_right_on_the_emulated_kernels(monkeypatch):
    """What the stage `speed` asks of the CUDA kernels, tiny: arguments fit, and the check that comes before the clock passes."""
    if why := emulator.missing():
        pytest.skip(f"the emulator cannot be built: {why}")
    monkeypatch.setitem(gpu_cells.OURS, "cpu", ("cuda",))
    with emulator.emulating(emulator.Emulator(emulator.build(ROOT / "csrc", ROOT / "build" / "emulated"))):
        asked = set()
        for cell in gpu_cells.cells("cpu", tiny=True):
            case = cell.make()
            for way in gpu_cells.ways(cell.op, "cpu"):
                if way.backend == "cuda":
                    row = {"status": "ok"}
                    assert gpu_speed.check(way, case, case.want(), row), (cell.op, row)
                    asked.add(cell.op)
    assert asked >= {
        "tree_attention",
        "linear",
        "row_stats",
        "topk_logits",
        "verify_greedy",
        "table_draft",
        "table_learn",
        "kv_commit",
        "rms_norm",
        "silu_mul",
        "rope",
        "embed",
    }


SPILLING = """
Fatbin elf code:
arch = sm_90a
Resource usage:
 Common:
  GLOBAL:0
 Function _ZN6ramify3gpu12_GLOBAL__N_111fill_kernelEPjlj:
  REG:12 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:568 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function wide:
  REG:255 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:904 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_registers_are_read():
    one, two = gpu_stages.resources(SPILLING)
    assert "fill_kernel" in one["kernel"] and (one["registers"], one["stack"], one["local"]) == (12, 0, 0)
    assert two == {"kernel": "wide", "registers": 255, "stack": 16, "shared": 1024, "local": 8}
    assert gpu_stages.resources("cuobjdump fatal") == []


@pytest.mark.parametrize(
    ("text", "code", "status", "said"),
    [
        ("== 12 passed in 3s\n========= ERROR SUMMARY: 0 errors", 0, "ok", ""),
        ("== 12 passed in 1s\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, "ok", ""),
        (
            "========= Invalid __global__ read of size 4 bytes\n=========     at k+0x1\n2 passed in 4.1s\n========= ERROR SUMMARY: 1 error",
            9, "failed", "1 error; Invalid __global__ read of size 4 bytes; at k+0x1",
        ),
        ("========= ERROR SUMMARY: 0 errors\n1 failed, 3 passed in 2s", 1, "failed", "0 errors; 1 failed, 3 passed"),
        ("========= ERROR SUMMARY: 0 errors\n3 passed, 2 errors in 0:01:02", 1, "failed", "0 errors; 2 failed, 3 passed"),
        ("========= ERROR SUMMARY: 0 errors\n4 errors in 2s", 1, "failed", "0 errors; 4 failed, 0 passed"),
        ("Device not supported", 1, "not run", "no summary, code 1: Device not supported"),
        ("", 3, "not run", "no summary, code 3: "),
    ],
)  # fmt: skip
def test_verdict_of_a_sanitizer(text, code, status, said):
    found = gpu_stages.verdict(text, code)
    assert (found["status"], found["reason"]) == (status, said)


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("7 failed and more\n== 1 failed, 3 passed, 2 skipped, 9 deselected, 1 warning, 2 errors in 61.20s (0:01:01) ==", (3, 3, 2)),
        ("1 error in 0.2s", (0, 1, 0)),
        ("5 skipped in 0.2s", (0, 0, 5)),
        ("checked 12 passed tensors\nno tests ran in 0.01s", (0, 0, 0)),
        ("", (0, 0, 0)),
    ],
)
def test_what_pytest_sums_up(text, counts):
    assert tuple(gpu_run.counted(text).values()) == counts


def test_watched_tests_exist():
    for name in gpu_stages.WATCHED:
        path, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / path).read_text() if function else (ROOT / path).is_file(), name


class Item:
    """A collected test, as far as the plugin looks."""

    def __init__(self, name, **params):
        self.nodeid, self.callspec = name, type("Spec", (), {"params": params})()


def test_the_cases_of_gpu_backends_are_kept(monkeypatch):
    dropped = []
    config = type("Config", (), {"hook": type("Hook", (), {"pytest_deselected": staticmethod(lambda items: dropped.extend(items))})})
    names = {"a[1]": "triton", "a[2]": "triton", "a[3]": "cuda", "b[1]": "cpu", "c[1]": "reference"}
    items = [Item(name, backend=backend) for name, backend in names.items()] + [Item("d[1]", place="gpu"), Item("d[2]", place="emulated")]
    items.append(Item("e[1]", place=TestBackend("triton", "cuda")))
    kept = list(items)
    gpu_tests.pytest_collection_modifyitems(config, kept)
    assert [item.nodeid for item in kept] == ["a[1]", "a[2]", "a[3]", "d[1]", "e[1]"] and len(dropped) == 3
    monkeypatch.setenv(gpu_tests.FEW, "1")
    gpu_tests.pytest_collection_modifyitems(config, kept := list(items))
    assert [item.nodeid for item in kept] == ["a[1]", "a[3]", "d[1]", "e[1]"]


def test_tests_are_told_op_by_op(tmp_path):
    log = tmp_path / "log"
    lines = [("passed", [["rope", "triton"]], ""), ("failed", [["rope", "triton"], ["embed", "triton"]], "assert 1 == 2")]
    lines += [("skipped", [["rope", "cuda"]], "dtype is float32"), ("passed", [["tree_uniforms", "cuda"]], "")]
    tests = [{"test": f"t{i}", "outcome": each, "ran": ran, "said": said, "seconds": 0.5} for i, (each, ran, said) in enumerate(lines)]
    log.write_text("".join(json.dumps(test) + "\n" for test in tests))
    rows = {(row["op"], row["backend"]): row for row in gpu_tests.summary(log)}
    assert list(rows) == [("embed", "triton"), ("rope", "cuda"), ("rope", "triton"), ("tree_uniforms", "cuda")]
    rope = rows["rope", "triton"]
    assert (rope["passed"], rope["failed"], rope["seconds"]) == (1, 1, 1.0) and rope["failures"] == [
        {"test": "t1", "said": "assert 1 == 2"}
    ]
    assert rows["rope", "cuda"]["skips"] == ["dtype is float32"] and list(rows["rope", "cuda"]["sources"]) == ["csrc/cuda/glue.cu"]
    assert rows["tree_uniforms", "cuda"]["sources"] == {}
    assert gpu_tests.total(log) == {"passed": 2, "failed": 1, "skipped": 1}  # though its failure stands in two rows
    with log.open("a") as more:  # passed, and then its teardown failed
        more.write(json.dumps(tests[0] | {"outcome": "failed", "said": "E"}) + "\n")
    assert gpu_tests.total(log) == {"passed": 1, "failed": 2, "skipped": 1}
    assert gpu_speed.red_ops({"tests": list(rows.values())}) == {("embed", "triton"): "assert 1 == 2", ("rope", "triton"): "assert 1 == 2"}


def test_the_masks_of_peers_say_the_tree():
    x = Inputs("tiny", 70, 40, "bf16", 0)
    words = gpu_attention.mask_words(x.visible)
    assert words.shape == (1, 40, 4) and words.dtype == torch.uint16
    for row in range(40):
        seen = [j for j in range(64) if int(words[0, row, j // 16]) >> j % 16 & 1]
        assert seen == x.visible[row].nonzero().flatten().tolist()
    k, _, total = gpu_attention.paged(x, 16)
    assert total == 110 and k.shape == (7, 16, 2, 64)
    assert torch.equal(k.flatten(0, 1)[:110], torch.cat([x.k, x.tail_k], 1)[0]) and not k.flatten(0, 1)[110:].any()
    assert gpu_attention.missing("torch", "torch") == "" and gpu_attention.missing("no_such_package", "x") == "pip install x"


def test_no_folder_of_the_machine_is_written(tmp_path):
    gpu_run.write(tmp_path / "x.json", {"a": ["File /opt/x.y/z/file.py line 3", "12/34 a/b", 1.5, float("inf")], 3: None})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": ["File file.py line 3", "12/34 a/b", 1.5, "inf"], "3": None}
