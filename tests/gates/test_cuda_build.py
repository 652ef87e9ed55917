"""Every CUDA source builds for every chip that ramify ships for, without a spilled register, and within its register budget.

    RAMIFY_UPDATE_REGISTERS=1 pytest -m '' tests/gates/test_cuda_build.py     writes registers.json anew

Runs wherever nvcc is; what it printed for a source is kept under build/ until the source, a header or nvcc changes.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ramify.testing import emulator

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
HOPPER = [path for path in SOURCES if ROOT / "csrc/cuda/rt_hopper.cuh" in emulator.included(path, ROOT / "csrc")]
BASELINE = Path(__file__).with_name("registers.json")
CEILING = 1.1
# sm_86 to sm_120 are assembled from the same PTX as sm_80: their front ends differ in nothing that these sources use
SHARED = ("sm_80", "sm_86", "sm_89", "sm_100", "sm_120")
TARGETS = {f"arch=compute_80,code=[{','.join(SHARED)}]": SHARED, "arch=compute_90a,code=sm_90a": ("sm_90a",)}
LATER = {f"arch=compute_{a},code=sm_{a}": (f"sm_{a}",) for a in ("100a", "120a")}
"""Targets of the slow run, as a wheel has them: the same chips through front ends of their own."""
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120", "sm_100a", "sm_120a")
RUNS = [pytest.param(TARGETS, id="every-chip"), pytest.param(LATER, id="own-front-end", marks=pytest.mark.slow)]
STRICT = "-Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage,-Werror"

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: CUDA sources are only emulated here")


def disassembler():
    """cuobjdump of the toolkit or of a triton wheel, or None."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else Path()
    return shutil.which("cuobjdump") or shutil.which(Path(NVCC).parent / "cuobjdump") or shutil.which(bundled / "cuobjdump")


def products(object_file):
    """A line "wgmma: N in KERNEL" for each sm_90a kernel of an object file: N of its instructions are a warpgroup's products."""
    listing = subprocess.run([disassembler(), "-arch", "sm_90a", "-sass", object_file], capture_output=True, text=True).stdout
    found = re.findall(r"Function : (\S+)([\s\S]*?)(?=Function : |\Z)", listing)
    return "".join(f"wgmma: {len(re.findall(r'HGMMA', body))} in {_plain(mangled)}\n" for mangled, body in found)


def compile_all(source, folder, wanted):
    """nvcc's exit code and words for the wanted targets, and the products of sm_90a where a disassembler is."""
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "--threads", "2", "-DRAMIFY_SM90A", f"-I{ROOT / 'csrc'}", STRICT]
    targets = [f"-gencode={target}" for target in wanted]
    done = subprocess.run([NVCC, *flags, *targets, "-c", source, "-o", folder / "out.o"], capture_output=True, text=True, timeout=900)
    found = products(folder / "out.o") if done.returncode == 0 and disassembler() else ""
    return done.returncode, done.stdout + done.stderr + found


def registers(text):
    """arch -> kernel -> registers, from what `ptxas -v` prints."""
    found = {}
    for mangled, arch, used in re.findall(r"Compiling entry function '(\S+)' for '(\w+)'[\s\S]*?Used (\d+) registers", text):
        found.setdefault(arch, {})[_plain(mangled)] = int(used)
    return found


def _plain(mangled):
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|ramify::gpu::|^void |\(.*\)$|\(\w+\)", "", name.strip())
    return name.partition("(")[0]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """compiled(source, targets): what the build of one source gave."""
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout

    def call(source, wanted=TARGETS):
        made_of = [path.read_bytes() for path in emulator.included(source, ROOT / "csrc") if "emulate" not in path.parts]
        digest = hashlib.sha256(b"".join(made_of) + f"{version}{[*wanted]}{STRICT}{bool(disassembler())}".encode()).hexdigest()
        kept = ROOT / "build/nvcc" / f"{source.stem}-{digest[:16]}.txt"
        if not kept.exists():
            code, text = compile_all(source, tmp_path_factory.mktemp("nvcc"), wanted)
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(f"{code}\n{text}")
        code, _, text = kept.read_text().partition("\n")
        return int(code), text

    return call


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
@pytest.mark.parametrize("wanted", RUNS)
def test_builds_without_spills_in_its_registers(compiled, source, wanted):
    code, text = compiled(source, wanted)
    assert code == 0, "\n".join(line for line in text.splitlines() if "error" in line) or text[-3000:]
    slow = [line for line in text.splitlines() if "wgmma" in line and "serialized" in line]  # C7510 and its like: a wait after each
    assert slow == []
    found = registers(text)
    archs = [arch for each in wanted.values() for arch in each]
    assert set(found) == set(archs)
    kept = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    if os.environ.get("RAMIFY_UPDATE_REGISTERS"):
        known = kept.get(source.name, {})
        mixed = {kernel: {**known.get(kernel, {}), **{arch: found[arch][kernel] for arch in archs}} for kernel in sorted(found[archs[0]])}
        kept[source.name] = {kernel: {arch: used[arch] for arch in ARCHS if arch in used} for kernel, used in mixed.items()}
        BASELINE.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
    assert source.name in kept, "no baseline; RAMIFY_UPDATE_REGISTERS=1 writes one"
    baseline = kept[source.name]
    assert set(baseline) == set(found[archs[0]]), "kernels came or went; RAMIFY_UPDATE_REGISTERS=1 writes a new baseline"
    above = [
        f"{kernel} on {arch}: {found[arch][kernel]} registers, {baseline[kernel][arch]} before"
        for kernel in baseline
        for arch in archs
        if found[arch][kernel] > CEILING * baseline[kernel][arch]
    ]
    assert above == []


@pytest.mark.parametrize("source", HOPPER, ids=lambda path: path.name)
def test_wgmma_is_in_the_machine_code(compiled, source):
    """Every kernel of a source of sm_90a multiplies by HGMMA on sm_90a, all products of a tile in a row."""
    if disassembler() is None:
        pytest.skip("no cuobjdump: of the CUDA toolkit, or of a triton wheel")
    found = re.findall(r"^wgmma: (\d+) in (.*)", compiled(source)[1], re.M)
    kernels = json.loads(BASELINE.read_text())[source.name]
    assert {name for _, name in found} >= set(kernels) and all(int(count) >= 8 for count, name in found if name in kernels)


def test_a_spill_is_an_error(tmp_path):
    """The same flags refuse a kernel that keeps an array where registers do not reach."""
    source = tmp_path / "spill.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) spill(float* x) {\n  float v[80];\n"
        "#pragma unroll\n  for (int i = 0; i < 80; ++i) v[i] = x[i * 1024 + threadIdx.x];\n  __syncthreads();\n"
        "#pragma unroll\n  for (int i = 0; i < 80; ++i) x[i * 1024 + threadIdx.x] = v[i] * v[79 - i] + v[(i + 7) % 80];\n}\n"
    )
    command = [NVCC, "-std=c++17", "-O3", STRICT, "-gencode=arch=compute_80,code=sm_80", "-cubin", source, "-o", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "spill" in done.stdout + done.stderr
