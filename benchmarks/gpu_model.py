"""The stage `model` of benchmarks.gpu_day: the tests of the model layer on the device, what a step costs, and whole generations."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from time import perf_counter
from typing import Any

from benchmarks.gpu_run import ROOT, Day, bare, counted
from benchmarks.harness import quantile

FILES = ("tests/model/test_device_model.py", "tests/model/test_device_turns.py")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXT, STEPS, TOKENS, PROMPTS = 256, 50, 256, 4
METHODS = ("plain", "token_recycling")


def model(day: Day) -> None:
    """Tests first; then steps of the zoo model by rows, replayed as a graph and call by call; then tokens a second of two methods, with
    steps that the device takes alone and with steps of the host.
    """
    day.part["model"] = found = {"tests": _tests(day), "steps": [], "generate": []}
    day.save()
    loaded = _load(day)
    for rows in ROWS[:2] if day.rehearsal else ROWS:
        found["steps"].append(_step(loaded, rows, 3 if day.rehearsal else STEPS))
        day.save()
    for method, turns in product(METHODS, (True, False)):
        found["generate"].append(_generate(loaded, method, turns, 8 if day.rehearsal else TOKENS, 1 if day.rehearsal else PROMPTS))
        day.save()
    ids = [row.pop("ids") for row in found["generate"]]
    # of PROMPTS; in bf16 a wider step may round otherwise and part from plain
    found["identical"] = sum(len({tuple(each) for each in text}) == 1 for text in zip(*ids))


def _tests(day: Day) -> dict[str, Any]:
    """Passed, failed and skipped cases of the device, and the first words of what failed."""
    cases = "recorded_once and table-fp32" if day.rehearsal else "cuda"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "--tb=line", *FILES, "-k", cases]
    settings = {"PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)])}
    try:
        limit = max(0.6 * day.left(), 1)
        said = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=limit).stdout
    except subprocess.TimeoutExpired:
        return {"passed": 0, "failed": 1, "skipped": 0, "said": ["did not end in time"]}
    counts = counted(said)
    failures = [bare(line)[:300] for line in said.splitlines() if re.match(r"(FAILED|ERROR|E  )", line)]
    if not counts["passed"] and not counts["failed"]:
        counts["failed"], failures = 1, [bare(line)[:300] for line in said.splitlines() if line.strip()][-1:]
    return {**counts, "said": failures[:10]}


def _load(day: Day) -> Any:
    """The zoo model in bf16: on the GPU, or in a rehearsal on tensors of the CPU."""
    from ramify.testing.device_model import device_model

    return device_model("zoo", "bf16", day.device)


def _step(loaded: Any, rows: int, count: int) -> dict[str, Any]:
    """Microseconds of a step of so many rows behind CONTEXT tokens, all of it: inputs, kernels, results, one wait."""
    from ramify.model.device_steps import DeviceStep
    from ramify.tree import TokenTree

    tokens = [(i * 7919) % loaded.config.vocab_size for i in range(CONTEXT + rows)]
    cache = loaded.new_cache([CONTEXT + rows])
    loaded.prefill([tokens[:CONTEXT]], cache)
    tree, view = TokenTree.chains([tokens[CONTEXT]], [tokens[CONTEXT + 1 :]]), cache.of([0])
    row: dict[str, Any] = {"rows": rows, "context": CONTEXT}
    for name, eager in (("graph_us", False), ("calls_us", True)):
        loaded.eager = eager
        row[name] = _microseconds(lambda: loaded.forward(tree, view), count)
    loaded.eager = False
    steps = [step for step in cache.arena.programs.values() if isinstance(step, DeviceStep)]
    step = max(steps, key=lambda step: step.copies)  # the one that has just been timed
    row |= {"captured": step.graph is not None, "calls": len(step.calls), "backends": sorted({call.backend for call in step.calls})}
    cache.free([0])
    return row


def _microseconds(call: Callable[[], Any], count: int) -> dict[str, float]:
    for _ in range(3):
        call()
    seconds = []
    for _ in range(count):
        start = perf_counter()
        call()
        seconds.append(perf_counter() - start)
    return {name: round(1e6 * quantile(seconds, share), 1) for name, share in (("median", 0.5), ("p10", 0.1), ("p90", 0.9))}


def _generate(loaded: Any, method: str, turns: bool, tokens: int, prompts: int) -> dict[str, Any]:
    """One method over a few prompts of ids, after a first run that records its steps. turns: whether the device takes them alone."""
    import ramify

    loaded._steps.takes_turns = turns
    texts = [[(i * 31 + p * 977) % 200 + 3 for i in range(32)] * 2 for p in range(prompts)]
    size = None if method == "plain" else "fixed:rows_each=32"
    for _ in range(2):
        outs = [ramify.generate(loaded, [text], method=method, max_new_tokens=tokens, size=size)[0] for text in texts]
    new, steps = (sum(values) for values in zip(*((len(out.token_ids), out.stats.steps) for out in outs)))
    seconds = {phase: round(sum(out.stats.seconds[phase] for out in outs), 4) for phase in outs[0].stats.seconds}
    return {
        "method": method,
        "turns": turns,
        "tokens": new,
        "steps": steps,
        "tokens_per_step": round(new / steps, 3),
        "tokens_per_second": round(quantile([out.stats.tokens_per_second for out in outs], 0.5), 1),
        "seconds": seconds,
        "ids": [out.token_ids for out in outs],
    }
