"""Build `ramify._cpu` (always) and `ramify._cuda` (where nvcc is found) with one ninja file; the rest is in pyproject.toml.

    python setup.py build_ext --inplace         the developer's loop: only what changed is compiled

Environment: CXX, MAX_JOBS, RAMIFY_CXXFLAGS (appended to every compile and link, e.g. "-g -O1 -fsanitize=address"),
RAMIFY_CUDA=auto|on|off, RAMIFY_CUDA_ARCHS ("80;90a;90+PTX"), CUDACXX, CUDA_HOME, RAMIFY_CPU=on|off (off: `_cuda` alone, for a GPU
machine that is in a hurry). auto builds `_cuda` where nvcc is, for the GPUs of this machine; on is for wheels: every chip.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OBJECTS = ROOT / "build" / f"ninja-{sys.implementation.cache_tag}-{platform.machine()}"  # shared by every way to install

AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma -mf16c"
LEVELS = {
    "portable": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx2_vnni": "-mavx2 -mfma -mf16c -mavxvnni",
    "avx512_vnni": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16",
}
ONCE = {"dispatch", "replay"}  # sources of csrc/cpu built once, with the baseline's flags; every other one is built for each level

# -ffp-contract=off: a fused multiply-add is written out or it is not there, so every level rounds as its source says.
CXXFLAGS = "-O3 -std=c++20 -fPIC -fvisibility=hidden -fopenmp -ffp-contract=off -Wall -Wextra -Wno-maybe-uninitialized -Wno-uninitialized"
NVCCFLAGS = "-O3 -std=c++17 --expt-relaxed-constexpr --threads 2 -Xcompiler -fPIC,-fvisibility=hidden -Xfatbin -compress-all"
NVCCFLAGS += " -diag-suppress=177"  # functions that a target without their instructions does not use
ARCHS = "80;86;89;90a;100a;120a;90+PTX"  # the "a" targets run on that chip alone; the PTX serves the chips between and after
ANYWHERE = "80+PTX"  # one target, compiled further by the driver of whatever GPU comes

NINJA_RULES = """\
rule cxx
  command = $cxx -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = c++ $out
rule nvcc
  command = $nvcc -MD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = nvcc $out
rule link
  command = $cxx -shared -o $out $in $flags
  description = link $out
rule nvlink
  command = $nvcc -shared -cudart static -o $out $in $flags
  description = link $out
"""


class BuildError(SystemExit):
    """A one-line reason why the extension modules cannot be built."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"ramify: {reason}")


def output(*command: str) -> str:
    """Standard output of a command, or "" when it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def find_cxx() -> str:
    """The C++ compiler: CXX, g++, c++ or clang++."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise BuildError("no C++ compiler found; install g++ (gcc 10 or later) or name one in CXX")


def find_nvcc() -> str | None:
    """The CUDA compiler, or None where there is none or RAMIFY_CUDA=off; RAMIFY_CUDA=on insists on one."""
    wanted = os.environ.get("RAMIFY_CUDA", "auto")
    if wanted not in {"auto", "on", "off", "1", "0"}:
        raise BuildError(f"RAMIFY_CUDA is {wanted!r}; takes auto, on or off")
    if wanted in {"off", "0"}:
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes if home), "nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next((shutil.which(place) for place in places if place and shutil.which(place)), None)
    if found is None and wanted in {"on", "1"}:
        raise BuildError("RAMIFY_CUDA=on and nvcc is not found; install the CUDA toolkit, set CUDA_HOME, or take RAMIFY_CUDA=auto")
    return found


def cpu_levels(cxx: str) -> dict[str, str]:
    """Instruction set levels that this machine's compiler can build: name -> flags, lowest first."""
    if platform.machine() not in {"x86_64", "AMD64"}:
        return {"portable": ""}
    can = [level for level, flags in LEVELS.items() if _compiles(cxx, flags)]
    if missing := sorted(LEVELS.keys() - can):
        print(f"ramify: {cxx} cannot build {', '.join(missing)}; a newer compiler can")
    return {level: LEVELS[level] for level in can}


def _compiles(cxx: str, flags: str) -> bool:
    command = [*cxx.split(), *flags.split(), "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input="int main() {}", text=True, capture_output=True).returncode == 0


def wanted_archs() -> str:
    """RAMIFY_CUDA_ARCHS; else every target with RAMIFY_CUDA=on, and the chips of this machine without: seven targets take minutes."""
    if given := os.environ.get("RAMIFY_CUDA_ARCHS"):
        return given
    if os.environ.get("RAMIFY_CUDA", "auto") != "auto":
        return ARCHS
    smi = shutil.which("nvidia-smi")
    chips = output(smi, "--query-gpu=compute_cap", "--format=csv,noheader").split() if smi else []
    numbers = sorted({int(digits) for chip in chips if (digits := chip.replace(".", "")).isdigit() and int(digits) >= 80})
    if not numbers:
        print("ramify: no GPU of sm_80 or newer here, so CUDA kernels are built as PTX for any chip; RAMIFY_CUDA=on builds for each")
        return ANYWHERE
    return ";".join(f"{number}a" if number >= 90 else str(number) for number in numbers)


def gencode(nvcc: str) -> str:
    """Flags for the wanted GPU targets that this nvcc knows."""
    known = {code.removeprefix("sm_") for code in output(nvcc, "--list-gpu-code").split()}
    flags = []
    for arch in wanted_archs().split(";"):
        number, ptx = arch.removesuffix("+PTX"), arch.endswith("+PTX")
        if number.rstrip("af") in known:
            flags.append(f"-gencode=arch=compute_{number},code={'compute' if ptx else 'sm'}_{number}")
    if not flags:
        raise BuildError(f"{nvcc} knows none of the GPU targets asked for; it knows {' '.join(sorted(known))}; set RAMIFY_CUDA_ARCHS")
    return " ".join(flags)


class NinjaFile:
    """The text of a build.ninja: one `object` or `link` call is one edge."""

    def __init__(self, cxx: str, nvcc: str | None) -> None:
        self.text = f"cxx = {cxx}\nnvcc = {nvcc or 'nvcc'}\n{NINJA_RULES}"

    def object(self, rule: str, source: Path, flags: str, label: str = "") -> Path:
        """Compile `source`; `label` tells apart the objects of one source."""
        place = source.relative_to(ROOT).with_suffix(f".{label}.o" if label else ".o")
        return self._edge(rule, [source], OBJECTS / place, flags)

    def link(self, rule: str, objects: list[Path], target: Path, flags: str) -> Path:
        """Link `objects` into the shared object `target`."""
        return self._edge(rule, objects, target, flags)

    def _edge(self, rule: str, sources: list[Path], target: Path, flags: str) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        inputs = " ".join(map(_escaped, sources))
        self.text += f"build {_escaped(target)}: {rule} {inputs}\n  flags = {flags}\n"
        return target


def _escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """`build_ext` by ninja, one object per source and instruction set level."""

    def build_extensions(self) -> None:
        """Write build.ninja and build the modules that were asked for."""
        cxx, nvcc = find_cxx(), find_nvcc()
        extra = os.environ.get("RAMIFY_CXXFLAGS", "")
        ninja = NinjaFile(cxx, nvcc)
        targets = [self._module(ninja, extension, cxx, nvcc, extra) for extension in self.extensions]
        OBJECTS.mkdir(parents=True, exist_ok=True)
        (OBJECTS / "build.ninja").write_text(ninja.text)
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        quiet = [] if self.distribution.verbose else ["--quiet"]  # the compiler's own messages are shown all the same
        done = subprocess.run([find_ninja(), "-C", str(OBJECTS), *quiet, *jobs, *map(str, targets)])
        if done.returncode != 0:
            hint = "; RAMIFY_CUDA=off builds without the GPU module" if nvcc else ""
            raise BuildError(f"compilation failed, the compiler's message is above{hint}")

    def _module(self, ninja: NinjaFile, extension: Extension, cxx: str, nvcc: str | None, extra: str) -> Path:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        common = f"{CXXFLAGS} -I{_flag(ROOT / 'csrc')}"
        binding = f"{common} {python_flags()} {extra}"
        if extension.name == "ramify._cuda":
            assert nvcc is not None
            cuda = f"{NVCCFLAGS} -I{_flag(ROOT / 'csrc')} {gencode(nvcc)}"
            if "sm_90a" in cuda:
                cuda += " -DRAMIFY_SM90A"  # only then does a host launch what no other target holds
            objects = [ninja.object("nvcc", source, cuda) for source in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
            objects.append(ninja.object("cxx", ROOT / "csrc/bind_cuda.cpp", binding))
            return ninja.link("nvlink", objects, target, "")
        levels = cpu_levels(cxx)
        names = " ".join(f"X({level})" for level in levels)
        once = f"'-DRAMIFY_LEVELS(X)={names}'"  # dispatch.cpp lists the levels with it
        objects = [ninja.object("cxx", ROOT / "csrc/bind_cpu.cpp", f"{binding} {once}")]
        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            if source.stem in ONCE:
                objects.append(ninja.object("cxx", source, f"{common} {once} {extra}"))
                continue
            for level, flags in levels.items():
                isa = f"{common} -fno-exceptions {flags} -DRAMIFY_ISA={level} {extra}"
                objects.append(ninja.object("cxx", source, isa, level))
        return ninja.link("link", objects, target, f"-fopenmp {extra}")


def _flag(path: Path) -> str:
    return "'" + str(path).replace("$", "$$") + "'"


def python_flags() -> str:
    """Include flags of this interpreter and of pybind11."""
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").exists():
        raise BuildError(f"{include}/Python.h is missing; install Python's development files (python3-dev on Debian)")
    return f"-isystem {_flag(include)} -isystem {_flag(find_pybind11())}"


def find_pybind11() -> Path:
    """The folder of pybind11's headers: of the package, or of the copy that torch brings."""
    try:
        import pybind11

        return Path(pybind11.get_include())
    except ImportError:
        torch = importlib.util.find_spec("torch")
        include = Path(torch.origin).parent / "include" if torch and torch.origin else Path()
        if (include / "pybind11" / "pybind11.h").exists():
            return include
    raise BuildError("pybind11 is not found; pip install pybind11")


def find_ninja() -> str:
    """The ninja that the build requirements brought, or the one on PATH."""
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        if found := shutil.which("ninja"):
            return found
    raise BuildError("ninja is not found; pip install ninja")


class CleanBuild(build):
    """`build` from an empty folder: a Python file that was deleted since must not reach the next wheel."""

    def run(self) -> None:
        """Remove the last wheel's files, then build."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def packages(folder: str, name: str) -> list[str]:
    """Import names of every package under `folder`, which is imported as `name`."""
    inits = sorted((ROOT / folder).rglob("__init__.py"))
    return [".".join([name, *init.parent.relative_to(ROOT / folder).parts]) for init in inits]


def main() -> None:
    """Name the packages and the modules; the rest is in pyproject.toml."""
    modules = [] if os.environ.get("RAMIFY_CPU") == "off" else [Extension("ramify._cpu", ["csrc/bind_cpu.cpp"])]
    if find_nvcc():
        modules.append(Extension("ramify._cuda", ["csrc/bind_cuda.cpp"]))
    setup(
        packages=packages("pyext", "ramify") + packages("kernels", "ramify.kernels"),
        package_dir={"ramify": "pyext", "ramify.kernels": "kernels"},
        ext_modules=modules,
        cmdclass={"build": CleanBuild, "build_ext": NinjaBuild},
        zip_safe=False,
    )


main()
