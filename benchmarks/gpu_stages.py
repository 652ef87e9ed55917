"""Stages of benchmarks.gpu_day that time no kernel of ours: identify, build, sanitize, probes."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.gpu_run import ROOT, Day, counted, output

SMI = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu", "memory.total")
NVCC_ARCHS = {(9, 0): "90a", (10, 0): "100a", (10, 3): "103a", (12, 0): "120a"}
"""Compute capability -> the target with that chip's own instructions, where there is one."""


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on the path, in CUDA_HOME, in the usual place, or what Triton brings."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    triton = importlib.util.find_spec("triton")
    homes += [str(Path(folder) / "backends/nvidia") for folder in (triton and triton.submodule_search_locations or [])]
    return next((found for place in [name, *(f"{h}/bin/{name}" for h in homes if h)] if (found := shutil.which(place))), None)


def smi() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; empty without it."""
    said = output("nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader", "--id=0")
    return dict(zip(SMI, map(str.strip, said.split(",")))) if said else {}


def identify(day: Day) -> None:
    """The machine, its versions and the digest of every kernel file."""
    import torch

    from ramify.testing import evidence

    found = report.environment(day.seed)
    nvcc = re.search(r"release ([\d.]+)", output(tool("nvcc") or "nvcc", "--version"))
    found |= {"gpu": "none, a rehearsal", "nvcc": nvcc[1] if nvcc else "", "cuda": torch.version.cuda or ""}
    found["versions"] |= {name: each for name in ("triton", "pytest", "flashinfer-python") if (each := report.version(name))}
    if not day.rehearsal:
        if not torch.cuda.is_available():
            raise SystemExit("gpu_day: torch finds no GPU; needs one. --rehearse runs every stage on the CPU.")
        chip = torch.cuda.get_device_properties(0)
        found |= {"gpu": chip.name, "capability": [chip.major, chip.minor], "multiprocessors": chip.multi_processor_count}
        found |= {"memory": chip.total_memory, "last_level_cache": chip.L2_cache_size, "smi": smi()}
    day.part["environment"] = found
    paths = [path for backend in evidence.GPU for path in evidence.kernel_files(ROOT, backend)]
    day.part["sources"] = {path: evidence.digest(ROOT, path) for path in paths}


def build(day: Day) -> None:
    """ramify._cuda for this chip alone, and the registers that its kernels take. A rehearsal compiles nothing."""
    capability = tuple(day.document["environment"].get("capability", ()))
    arch = NVCC_ARCHS.get(capability, "".join(map(str, capability)))
    words = ["build_ext", "--inplace"] if not day.rehearsal else ["--version"]
    settings = {"RAMIFY_CUDA": "off" if day.rehearsal else "on", "RAMIFY_CUDA_ARCHS": arch, "RAMIFY_CPU": "off"}
    start = time.monotonic()
    done = subprocess.run([sys.executable, "setup.py", *words], cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [line for line in said if "error" in line.lower()] or said[-3:]
    found = {"arch": arch, "ok": done.returncode == 0, "seconds": round(time.monotonic() - start, 1)}
    found |= {"said": [line[:300] for line in errors[:5]] if done.returncode else [], "kernels": []}
    day.part["build"] = found
    day.save()
    loads = subprocess.run([sys.executable, "-c", "import ramify.ops, ramify.model.load"], cwd=ROOT, capture_output=True, text=True)
    if loads.returncode:
        raise SystemExit(f"gpu_day: what was built cannot be imported: {(loads.stderr.strip().splitlines() or [''])[-1]}"[:300])
    modules = sorted((ROOT / "pyext").glob("_cuda.*.so"))
    cuobjdump = tool("cuobjdump")
    if found["ok"] and modules and cuobjdump:
        found["kernels"] = resources(output(cuobjdump, "--dump-resource-usage", str(modules[-1]), timeout=60))
    elif not day.rehearsal:
        found["said"].append("cuobjdump is not here: registers are not known" if found["ok"] else "")
    if not found["ok"]:
        raise SystemExit(f"gpu_day: the build failed: {errors[0] if errors else ''}"[:300])


def resources(text: str) -> list[dict[str, Any]]:
    """Registers, stack, shared and local bytes of each kernel, from `cuobjdump --dump-resource-usage`."""
    pattern = r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    names = ("registers", "stack", "shared", "local")
    rows = [{"kernel": found[0], **dict(zip(names, map(int, found[1:])))} for found in re.findall(pattern, text)]
    plain = output("c++filt", *(row["kernel"] for row in rows)).splitlines() if rows else []
    for row, name in zip(rows, plain):
        row["kernel"] = re.sub(r"\(anonymous namespace\)::|ramify::gpu::|^void ", "", name)
    return rows


TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
WATCHED = (
    "tests/gates/test_cuda_emulated.py",
    "tests/gates/test_cuda_attention.py::test_large_scores",
    "tests/ops/test_kv.py::test_commit_of_all_layers",
    "tests/ops/test_verify.py::test_rows_of_nothing_but_masks",
    "tests/ops/test_attention.py::test_scores_of_any_size",
)
"""Tests that launch every CUDA kernel and the main Triton kernels, each a few times."""

SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (.*)")


def sanitize(day: Day) -> None:
    """compute-sanitizer over a few tests, its four tools side by side; a row each. A rehearsal looks whether the tests are there.

    Raises SystemExit when no tool ran: a day without them is not finished.
    """
    program = tool("compute-sanitizer")
    rows = [{"tool": name, "status": "not run", "reason": "compute-sanitizer is not here"} for name in TOOLS]
    day.part["sanitize"] = rows
    day.save()
    if day.rehearsal:
        count = watched()
        for row in rows:
            row["reason"] = f"a rehearsal: {count} tests are there to be watched"
        return
    if program is None:
        raise SystemExit("gpu_day: compute-sanitizer is not here; it comes with the CUDA toolkit. Put it on PATH.")
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_tests", *WATCHED]
    settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "RAMIFY_GPU_DAY_BACKENDS": "cuda,triton", "RAMIFY_GPU_DAY_FEW": "1"}
    jobs = []
    for row in rows:
        log = day.folder / f"{row['tool']}.txt"
        command = [program, "--tool", row["tool"], "--error-exitcode", "9", *tests]
        row["reason"] = "did not end in time"
        with log.open("w") as words:
            jobs.append((row, log, subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stdout=words, stderr=subprocess.STDOUT)))
    day.save()
    while jobs and day.left() > 2:
        for job in [job for job in jobs if job[2].poll() is not None]:
            job[0].update(verdict(job[1].read_text(errors="replace"), job[2].returncode))
            jobs.remove(job)
            day.save()
        time.sleep(0.5)
    if all(row["status"] == "not run" for row in rows):
        raise SystemExit(f"gpu_day: no sanitizer ran ({rows[0]['reason']})")


def watched() -> int:
    """How many tests the sanitizers would watch. Raises SystemExit where one of WATCHED is gone."""
    words = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *WATCHED]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if line.startswith("ERROR")] or done.stdout.splitlines()[-1:]
        raise SystemExit(f"gpu_day: what the sanitizers watch cannot be collected: {''.join(said)[:200]}")
    return sum("::" in line for line in done.stdout.splitlines())


def verdict(text: str, code: int) -> dict[str, Any]:
    """What a sanitizer's words come to: status ok, failed or not run, and why."""
    found, tests = SUMMARY.findall(text), counted(text)
    if not found or not tests["passed"] + tests["failed"]:
        lines = [line for line in text.splitlines() if line.strip()]
        return {"status": "not run", "reason": f"no summary, code {code}: {lines[-1][:200] if lines else ''}"}
    if code == 0 and re.match(r"0 (errors|hazards)", found[-1]):
        return {"status": "ok", "reason": "", "tests": tests["passed"], "said": found[-1]}
    said = [line.removeprefix("=========").strip() for line in text.splitlines() if line.startswith("=========")]
    at = [line for line in said if re.match(r"Invalid|Error|.*[Rr]ace|Barrier|Uninit|at ", line)]
    at += [f"{tests['failed']} failed, {tests['passed']} passed"] if tests["failed"] else []
    return {"status": "failed", "reason": "; ".join([found[-1], *at[:3]])[:300], "tests": tests["passed"]}


def probes(day: Day) -> None:
    """Copy bandwidth by size, the peak of a bf16 product, and what a launch costs: the ceilings that this run's figures are held to."""
    import torch

    from benchmarks.gpu_clock import clock
    from benchmarks.harness import quantile

    with_clock, device = clock(day.device), day.device

    def seconds(call: Any, count: int = 10) -> float:
        with_clock.burst(call, 3)
        return quantile([each for each, _ in with_clock.burst(call, count)], 0.5)

    copy = {}
    sizes = (1 << 16, 1 << 20) if day.rehearsal else (1 << 20, 1 << 24, 1 << 28, 1 << 30, 1 << 32)
    for size in [size for size in sizes if 4 * size < day.document["environment"].get("memory", 1 << 30)]:
        source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in "st")
        copy[str(size)] = round(2 * size / 1e9 / seconds(lambda s=source, t=target: t.copy_(s)), 1)
    n = 128 if day.rehearsal else 8192
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in "ab")
    peak = round(2 * n**3 / 1e9 / seconds(lambda: a @ b), 1)
    # the three largest are far beyond any cache; a floor is what memory gives
    limits = {
        "source": day.document["environment"]["gpu"],
        "threads": 0,
        "read": max(list(copy.values())[-3:]),
        "copy": copy,
        "peak": {"bf16": peak},
    }
    one = torch.zeros(1, device=device)
    limits["launch_us"] = round(1e6 * quantile([host for _, host in with_clock.burst(lambda: one.add_(1), 200, cold=False)], 0.5), 2)
    day.part["limits"] = limits
    day.save()
    if day.rehearsal:
        return
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        for _ in range(50):
            one.add_(1)
    limits["node_us"] = round(1e6 * seconds(graph.replay) / 50, 2)
    for _ in range(1000):  # longer than nvidia-smi takes to answer
        a @ b
    limits["smi_under_load"] = smi()
    torch.cuda.synchronize()
