"""What results of a GPU prove: the sources that they were made with, and nothing after a change of them."""

import json
import shutil
from pathlib import Path

import pytest

from ramify import backends, docs
from ramify.testing import evidence

ROOT = Path(__file__).parents[2]
GPU_ROWS = list(dict.fromkeys((row.op, row.backend) for row in backends.TABLE if row.backend in evidence.GPU))


@pytest.fixture
def checkout(tmp_path):
    """The kernels of this checkout, to be changed."""
    for folder in ("csrc/cuda", "csrc/common", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    return tmp_path


def measured(root, name="a-gpu", date="2026-01-02T00:00:00Z", status="ok", rehearsal=False, **changes):
    """Results in which every op passed; `changes`: op_backend -> keys of its row."""
    rows = []
    for op, backend in GPU_ROWS:
        row = {"op": op, "backend": backend, "passed": 3, "failed": 0, "skipped": 1, "failures": []}
        row["sources"] = evidence.digests(root, op, backend)
        rows.append(row | changes.get(f"{op}_{backend}", {}))
    stages = {"tests": {"status": status, "date": date}}
    doc = {"options": {"rehearsal": rehearsal}, "stages": stages, "tests": rows}
    (root / f"benchmarks/results/gpu_day-{name}.json").write_text(json.dumps(doc))


def test_without_results_nothing_is_proven(checkout):
    assert evidence.unproven(checkout) == {(op, backend): backends.UNPROVEN[backend] for op, backend in GPU_ROWS}
    measured(checkout, rehearsal=True)
    assert evidence.newest(checkout) is None and all(evidence.standing(checkout).values())


def test_passing_tests_prove_and_the_stars_go(checkout):
    assert "Triton*" in docs.ops_table(checkout) and "CUDA*" in docs.ops_table(checkout)
    measured(checkout)
    assert evidence.unproven(checkout) == {} and set(evidence.standing(checkout).values()) == {""}
    text = docs.ops_table(checkout)
    assert "CUDA, Triton |" in text and "CUDA*" not in text and "Triton*" not in text and "\\*" not in text


@pytest.mark.parametrize(
    ("path", "ops"),
    [
        ("csrc/cuda/attention.cu", {("tree_attention", "cuda")}),
        ("csrc/cuda/attention_item.cuh", {("tree_attention", "cuda")}),
        ("csrc/cuda/verify.cu", {("row_stats", "cuda"), ("verify_sample", "cuda")}),
        ("kernels/verify.py", {("row_stats", "triton"), ("verify_sample", "triton")}),
        ("csrc/common/args_cuda.h", {row for row in GPU_ROWS if row[1] == "cuda"}),
        ("kernels/_softmax.py", {("tree_attention", "triton"), ("interval_attention", "triton"), ("merge_states", "triton")}),
    ],
)
def test_a_change_of_a_source_takes_the_proof_away(checkout, path, ops):
    """Of the kernels in it and of all that include or import it."""
    measured(checkout)
    with (checkout / path).open("a") as file:
        file.write("\n")
    found = evidence.unproven(checkout)
    assert ops <= set(found) and set(found.values()) == {"changed since it ran on hardware"}
    assert {backend for _, backend in found} == {backend for _, backend in ops}
    assert "*" in docs.ops_table(checkout) and "changed since it ran on hardware." in docs.ops_table(checkout)


def test_what_is_no_proof(checkout):
    measured(checkout, rms_norm_cuda={"failed": 2}, rope_triton={"passed": 0})
    assert evidence.unproven(checkout) == {
        ("rms_norm", "cuda"): "2 of its tests failed on hardware",
        ("rope", "triton"): "none of its tests ran on hardware",
    }
    standing = evidence.standing(checkout)
    assert standing["csrc/cuda/glue.cu"] == "rms_norm: 2 of its tests failed on hardware" and standing["csrc/cuda/kv.cu"] == ""
    measured(checkout, status="timed out")
    assert set(evidence.unproven(checkout).values()) == {"its tests did not end on hardware"}


def test_the_newest_results_count(checkout):
    measured(checkout, "old", "2026-01-01T00:00:00Z")
    measured(checkout, "new", "2026-02-01T00:00:00Z", rms_norm_cuda={"failed": 1})
    assert list(evidence.unproven(checkout)) == [("rms_norm", "cuda")]


def test_every_op_has_its_files():
    """An op whose files have another name depends on all of its backend; at present none does."""
    for op, backend in GPU_ROWS:
        files = evidence.files_of(ROOT, op, backend)
        assert files and len(files) < len(evidence.kernel_files(ROOT, backend)), f"{op} on {backend}: add it to evidence.ELSEWHERE"
    assert evidence.files_of(ROOT, "no_such_op", "cuda") == evidence.kernel_files(ROOT, "cuda")
    every = {path for backend in evidence.GPU for path in evidence.kernel_files(ROOT, backend)}
    assert every - set(evidence.standing(ROOT)) <= {"csrc/cuda/probe.cu"}, "a kernel file that serves no op: add it to evidence.ELSEWHERE"
