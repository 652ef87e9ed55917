"""What decodes in end_to_end: transformers, llama.cpp and ramify, each behind one call that returns a Run."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.models import Generate, Run, quiet, weights_read
from ramify.results import HOPELESS

NO_SECOND = "no second model has this vocabulary"


class Transformers:
    """A Hugging Face model as its users run it."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        quiet()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self._stamps: list[float] = []
        self.model.register_forward_hook(lambda *_: self._stamps.append(time.perf_counter()))

    @torch.inference_mode()
    def run(self, prompt: list[int], new_tokens: int, temperature: float, seed: int, **extra: Any) -> Run:
        """`generate` with these further arguments (an assistant, prompt lookup)."""
        torch.manual_seed(seed)
        self._stamps.clear()
        ids = torch.tensor([prompt])
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, pad_token_id=0, **sampling, **extra)
        seconds, steps = time.perf_counter() - self._stamps[0], len(self._stamps)
        return Run(out[0, len(prompt) :].tolist(), steps, seconds, steps - 1)


def transformers_entries(folder: Path, drafter: Path | None, dtypes: tuple[str, ...]) -> dict[str, tuple[Generate | None, dict]]:
    """Provider name -> (how to run it, facts of its row). A dtype more than twice as slow as the best in a first look is left out."""
    named = {"bf16": torch.bfloat16, "f32": torch.float32}
    engines = {dtype: Transformers(folder, named[dtype]) for dtype in dtypes}
    seconds = {dtype: _first_look(engine) for dtype, engine in engines.items()}
    best = min(seconds, key=seconds.__getitem__)
    entries: dict[str, tuple[Generate | None, dict]] = {}
    for dtype, engine in engines.items():
        slow = seconds[dtype] / seconds[best]
        facts = {"dtype": dtype, "backend": "transformers", "baseline": True, "bytes": weights_read(folder) * named[dtype].itemsize}
        if slow > 2:
            facts["reason"] = f"{slow:.1f} times slower than {best} in a first look"
        entries[f"transformers generate, {dtype}"] = (None if slow > 2 else engine.run, facts)
    engine, facts = engines[best], {**entries[f"transformers generate, {best}"][1], "baseline": False}
    lookup = "transformers prompt lookup"
    entries[lookup] = (lambda *a: engine.run(*a, prompt_lookup_num_tokens=10), facts)
    if drafter:
        assistant = Transformers(drafter, named[best]).model
        entries["transformers assistant model"] = (lambda *a: engine.run(*a, assistant_model=assistant), facts)
    else:
        entries["transformers assistant model"] = (None, {**facts, "reason": NO_SECOND})
    return entries


def _first_look(engine: Transformers) -> float:
    engine.run(list(range(1, 17)), 2, 0.0, 0)
    return engine.run(list(range(1, 17)), 8, 0.0, 0).decode_seconds


def ramify_entries(folder: Path, drafter: Path | None, methods: list[str], weights: list[str]) -> dict[str, tuple[Generate | None, dict]]:
    """The same for ramify: one entry per method in bf16, and for each low-bit format of `weights` one more, named after it."""
    from benchmarks.report import isa

    entries: dict[str, tuple[Generate | None, dict]] = {}
    try:
        import ramify

        second = ramify.load(drafter, dtype="bf16") if drafter else None
        names = methods or default_methods()
    except (ImportError, AttributeError, OSError) as error:
        return {"ramify plain": (None, {**_ramify_facts("bf16", isa()), "reason": _first_line(error), "status": "not installed"})}
    for format in ("bf16", *weights):
        facts, suffix = _ramify_facts(format, isa()), "" if format == "bf16" else f", {format}"
        try:
            model = ramify.load(folder, dtype="bf16", **({} if format == "bf16" else {"weights": format}))
        except (OSError, ValueError) as error:
            entries[f"ramify plain{suffix}"] = (None, {**facts, "reason": _first_line(error), "status": "failed"})
            continue
        facts["bytes"] = model.weights.step_bytes
        for name in names:
            if second is None and needs_model(name):
                entries[f"ramify {name}{suffix}"] = (None, {**facts, "reason": NO_SECOND})
            else:
                entries[f"ramify {name}{suffix}"] = (_ramify_run(model, second, name), facts)
    return entries


def _ramify_facts(format: str, isa: str) -> dict[str, Any]:
    return {"dtype": format, "backend": f"ramify {isa}", "baseline": False}


def _ramify_run(model: Any, second: Any, method: str) -> Generate:
    import ramify

    def run(prompt: list[int], new_tokens: int, temperature: float, seed: int) -> Run:
        [out] = ramify.generate(
            model, [prompt], method=method, drafter=second, max_new_tokens=new_tokens, temperature=temperature, seed=seed
        )
        spent = sum(seconds for phase, seconds in out.stats.seconds.items() if phase != "prefill")
        return Run(list(out.token_ids), out.stats.steps, spent, out.stats.steps, dict(out.stats.seconds))

    return run


def llama_cpp_entries(folder: Path, slots: int) -> dict[str, tuple[Generate | None, dict]]:
    """The same for llama.cpp, on the same weights in Q4_0. slots: tokens of the longest text."""
    from benchmarks.peers import llama_model

    name, facts = f"llama.cpp {llama_model.TYPE}", {"dtype": llama_model.TYPE, "backend": "llama.cpp", "baseline": False}
    if reason := llama_model.missing():
        return {name: (None, {**facts, "reason": reason, "status": "not installed"})}
    try:
        with TemporaryDirectory() as temporary:
            file = Path(temporary) / "model.gguf"
            facts["bytes"] = llama_model.convert(folder, file)
            engine = llama_model.Engine(file, slots)
    except (OSError, RuntimeError, ValueError) as error:
        return {name: (None, {**facts, "reason": _first_line(error), "status": "failed"})}
    return {name: (engine.run, facts)}


def llama_bench_entry(folder: Path, context: int, new_tokens: int, repeat: int) -> tuple[str, list[float], dict]:
    """llama.cpp's own benchmark: its name, the seconds of each repetition (none where it did not run) and the facts of its row."""
    from benchmarks.peers import llama_model

    name, facts = f"llama-bench {llama_model.TYPE}, no prompt", {"dtype": llama_model.TYPE, "backend": "llama.cpp", "baseline": False}
    if reason := llama_model.bench_missing():
        return name, [], {**facts, "reason": reason, "status": "not installed"}
    try:
        read, seconds = llama_model.own_bench(folder, context, new_tokens, repeat)
    except (OSError, RuntimeError, ValueError) as error:
        return name, [], {**facts, "reason": _first_line(error), "status": "failed"}
    return name, seconds, {**facts, "bytes": read, "status": "ok", "prompt_counted": False}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def needs_model(method: str) -> bool:
    """Whether a method drafts with a second model."""
    from ramify.registry import drafter

    return getattr(drafter.get(method.partition(":")[0]), "takes_model", "no") == "yes"


def default_methods() -> list[str]:
    """plain, every method that `auto` picks among, auto, and guesses at random: what a drafter costs that is never right."""
    from ramify.registry import drafter

    portfolio = [method.name for method in drafter.all() if getattr(method, "portfolio", False) and method.name != "plain"]
    return ["plain", *portfolio, *(name for name in ("auto", HOPELESS) if name in drafter.names())]
