"""`ramify env`: what is installed, what the CPU can do, which kernel would run, and which environment variables are in force."""

import argparse
import json
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from ramify.cli.table import table

PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "transformers", "triton")
WHY = 'Why another kernel is not taken, and which one a GPU would take: ramify.explain("linear", device=...) in Python.'
VARIABLES = re.compile(r"(RAMIFY|OMP|GOMP|MKL|KMP|CUDA)_\w+|CUDACXX|XDG_CACHE_HOME")


def add_parser(commands: Any) -> None:
    """Add `env` to the subcommands."""
    parser = commands.add_parser("env", help="versions, CPU, kernels and variables", description="What ramify finds on this machine.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the environment."""
    found = environment()
    print(json.dumps(found, indent=2) if args.json else describe(found))
    return 0


def environment() -> dict[str, Any]:
    """Everything that `ramify env` prints, as plain JSON values. Reads files and versions; starts nothing on a GPU."""
    import torch

    import ramify
    from ramify import memory

    return {
        "ramify": ramify.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "cpu": cpu(),
        "triton": triton(),
        "cuda": cuda(),
        "threads": torch.get_num_threads(),
        "openmp": openmp(),
        "memory": memory.system(),
        "kernels": kernels(),
        "generate": generation(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if VARIABLES.fullmatch(name)},
    }


def cpu() -> dict[str, Any]:
    """The processor, the cores this process may use, the instruction set levels that run here, and the one taken."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"model": _cpu_model(), "cores": os.cpu_count(), "usable": usable, "levels": {}, "level": None}
    try:
        from ramify import native
    except ImportError as error:
        return {**found, "missing": f"ramify._cpu: {error}"}
    return {**found, "levels": native.levels(), "level": native.isa()}


def triton() -> str:
    """Whether the Triton kernels can be looked at here, in a line."""
    if _version("triton") is None:
        return "not installed"
    return "interpreted, on the CPU" if os.environ.get("TRITON_INTERPRET") == "1" else "installed; takes tensors on a GPU"


def cuda() -> dict[str, Any]:
    """What the CUDA module and its driver say. `state` is the one-line answer."""
    try:
        from ramify import _cuda
    except ImportError:
        return {"built": False, "state": "ramify._cuda was not built"}
    probe = _cuda.probe()
    state = f"{probe['devices']} device(s)" if probe["error"] == 0 else f"no device: {probe['message']}"
    return {"built": True, "state": state, **probe}


def openmp() -> list[str]:
    """File names of the OpenMP runtimes in this process; more than one means idle threads that fight for the cores."""
    try:
        maps = Path("/proc/self/maps").read_text().split()
    except OSError:
        return []
    return sorted({Path(part).name for part in maps if re.search(r"/lib(g|i|)omp", part)})


def kernels() -> list[dict[str, Any]]:
    """One row per op: the dtype asked about, the first that its kernels take; why a backend cannot run it on tensors on the CPU; and the
    one taken, None where the forced one cannot.
    """
    from ramify import backends

    rows = []
    for op in backends.OPS:
        dtype = next(row.dtypes[0] for row in backends.TABLE if row.op == op)
        why = backends.reasons(op, "cpu", dtype, {})
        taken = backends.taken(op, "cpu", dtype, {})
        rows.append(
            {"op": op, "dtype": backends.short(dtype), "taken": taken, "why_not": {name: reason for name, reason in why.items() if reason}}
        )
    return rows


def generation() -> dict[str, Any]:
    """The backend of the model layer, on which `ramify generate` runs, and why it is refused, if it is."""
    from ramify import backends

    try:
        backends.check_model_backend()
    except ValueError as error:
        return {"taken": None, "why_not": str(error)}
    return {"taken": backends.MODEL_BACKEND, "why_not": backends.missing(backends.MODEL_BACKEND)}


def describe(found: dict[str, Any]) -> str:
    """The environment as a person reads it: facts, one a line, then the kernels."""
    packages = "   ".join(f"{name} {version}" for name, version in found["packages"].items())
    cpu, threads, generate = found["cpu"], found["threads"], found["generate"]
    openmp = ", ".join(found["openmp"]) or "not known"
    facts = [
        ("cpu", f"{cpu['model']}, {cpu['usable']} of {cpu['cores']} cores usable, {threads} thread{'s' * (threads != 1)}"),
        ("levels", _levels(cpu)),
        ("openmp", openmp + ("   more than one: expect slow steps" if len(found["openmp"]) > 1 else "")),
        ("memory", found["memory"]),
        ("triton", found["triton"]),
        ("cuda", found["cuda"]["state"]),
        ("generate", generate["why_not"].removeprefix("generate: ") or f"the model layer runs on {generate['taken']}"),
    ]
    if found["cuda"].get("devices"):
        facts.append(("", 'a model of device="cuda" runs on ops, each on the kernel that ramify.explain names for tensors on a GPU'))
    variables = [f"{name}={value}" for name, value in found["variables"].items()] or ["none of RAMIFY_*, OMP_*, MKL_*, CUDA_* is set"]
    facts += [("" if i else "variables", variable) for i, variable in enumerate(variables)]
    lines = [f"ramify     {found['ramify']}   python {found['python']}   {packages}"]
    lines += [f"{name:<9}  {fact}" for name, fact in facts]
    return "\n".join([*lines, "", *_kernel_table(found), "", WHY])


def _levels(cpu: dict[str, Any]) -> str:
    """The instruction set level that is taken, those that would run too, and those that would not."""
    if "missing" in cpu:
        return f"none: {cpu['missing']}"
    others = " ".join(level for level, can in cpu["levels"].items() if can and level != cpu["level"])
    cannot = " ".join(level for level, can in cpu["levels"].items() if not can)
    said = [f"{cpu['level']} taken", f"here too: {others}" if others else "", f"not on this machine: {cannot}" if cannot else ""]
    return "; ".join(filter(None, said))


def _kernel_table(found: dict[str, Any]) -> list[str]:
    """A row for each op; a backend that takes none of them has no column."""
    from ramify.backends import BACKENDS, UNPROVEN

    level = found["cpu"]["level"]
    names = [name for name in BACKENDS if any(name not in row["why_not"] for row in found["kernels"])]
    rows = []
    for row in found["kernels"]:
        cells = ["-" if name in row["why_not"] else level if name == "cpu" else "yes" + "*" * (name in UNPROVEN) for name in names]
        rows.append([row["op"], row["dtype"], *cells, row["taken"] or "refused"])
    notes = [f"* {UNPROVEN[name]}" for name in names if name in UNPROVEN]
    return [table(["on the CPU", "dtype", *names, "taken here"], rows, left=len(names) + 3), *notes]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
