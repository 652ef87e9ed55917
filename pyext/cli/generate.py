"""`ramify generate`: continue a prompt, streamed, with one method or with several beside plain decoding."""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ramify
from ramify.checks import listed
from ramify.cli import compare as comparison
from ramify.cli.stream import Stream, faint
from ramify.registry import drafter as drafters

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def add_parser(commands: Any) -> None:
    """Add `generate` to the subcommands."""
    parser = commands.add_parser("generate", help="continue a prompt", description="Continue a prompt, several tokens a step.")
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="the text to continue; - reads it from standard input")
    add("--model", default="zoo", metavar="PATH", help='a Hugging Face checkpoint folder, or "zoo": the small model that ships with ramify')
    add(
        "--method",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help='name or name:key=value, as ramify.methods() lists; default "auto"',
    )
    add("--drafter", metavar="PATH", help='the model that guesses, for draft_chain and draft_tree: a folder or "zoo"')
    add("--compare", action="store_true", help="measure the methods (default: all that auto picks among) beside plain decoding")
    add(
        "--repeat", type=int, default=3, metavar="N", help="interleaved runs of each method with --compare; figures are medians (default 3)"
    )
    add("--max-new-tokens", type=int, default=128, metavar="N", help="tokens to add at most (default 128)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the most likely token (default 0)")
    add("--top-k", type=int, default=0, metavar="K", help="sample among the K most likely tokens; 0: all")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest tokens that hold P of the probability")
    add("--min-p", type=float, default=0.0, metavar="P", help="sample among tokens at least P times as likely as the likeliest")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="make tokens that were seen less likely; 1: off")
    add("--seed", type=int, default=0, metavar="S", help="the same seed gives the same text (default 0)")
    add("--dtype", default="bf16", choices=("bf16", "fp32"), help="the form in which weights are held (default bf16)")
    add(
        "--weights",
        metavar="FORMAT",
        help="quantise the weights while they are read: int4-g64, int8, fp8, ... (default: as they are stored)",
    )
    add("--device", default="cpu", metavar="D", help="where the model runs: cpu, cuda, cuda:1, ... (default cpu)")
    add("--plugin", action="append", default=[], metavar="FILE", help="a Python file whose decorated classes become methods")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Continue the prompt; the exit code is 1 when a lossless method gave another text."""
    from ramify.cli import CHECK_FAILED, FINE

    prompt = read_prompt(args)
    for file in args.plugin:
        load_plugin(file)
    methods = method_names(args.method)
    check_drafter(args.drafter, methods)
    model = ramify.load(args.model, dtype=args.dtype, weights=args.weights, device=args.device)
    common = {name: getattr(args, name) for name in ("max_new_tokens", *SAMPLING)}

    def decode(method: str, stream: Stream | None = None) -> Any:
        drafter = args.drafter if takes_drafter(method) else None
        [out] = ramify.generate(model, [prompt], method=method, drafter=drafter, stream=stream, **common)
        return out

    if not args.compare:
        single(args, model, prompt, decode, methods)
        return FINE
    if args.repeat < 1:
        raise ValueError(f"generate: --repeat is {args.repeat}; takes 1 or more.")
    found = compare(args, model, prompt, decode, methods)
    return CHECK_FAILED if comparison.wrong(found, args.temperature) else FINE


def single(args: argparse.Namespace, model: Any, prompt: str, decode: Callable[..., Any], methods: list[str]) -> None:
    """Stream one continuation to standard output and its figures to standard error, or print both as JSON."""
    if len(methods) > 1:
        raise ValueError(f"generate: --method names {', '.join(methods)}; takes one name without --compare.")
    method = methods[0] if methods else "auto"
    if args.json:
        each = comparison.Measured(method, is_lossless(method), [decode(method)])
        print(json.dumps(described(args, model, prompt, each, [each.record()]), indent=2))
        return
    terminal = sys.stdout.isatty()
    try:
        sys.stdout.write(faint(prompt, sys.stdout) if terminal else "")
        out = decode(method, Stream(sys.stdout))
    finally:  # after an interrupt too
        sys.stdout.write("\n" if terminal else "")
        sys.stdout.flush()
    print(faint(figures(method, out), sys.stderr), file=sys.stderr)


def compare(args: argparse.Namespace, model: Any, prompt: str, decode: Callable[..., Any], methods: list[str]) -> list[comparison.Measured]:
    """Warm every method up, streaming plain and the first other one; measure; print the table or the JSON object."""
    names = ["plain", *(name for name in methods or default_methods(args) if name != "plain")]
    lossless = {name: is_lossless(name) for name in names}
    for index, name in enumerate(names):
        if args.json or index > 1:
            decode(name)
            continue
        print(faint(f"--- {name} ---", sys.stdout))
        sys.stdout.write(faint(prompt, sys.stdout) if sys.stdout.isatty() else "")
        out = decode(name, Stream(sys.stdout))
        print("\n" + faint(figures(name, out), sys.stdout), end="\n\n")
    found = comparison.measure(decode, list(lossless.items()), args.repeat, progress)
    if args.json:
        print(json.dumps(described(args, model, prompt, found[0], comparison.records(found)), indent=2))
        return found
    print(headline(args, described(args, model, prompt, found[0], [])), end="\n\n")
    print(comparison.describe(found, args.temperature))
    return found


def described(
    args: argparse.Namespace, model: Any, prompt: str, first: comparison.Measured, methods: list[dict[str, Any]]
) -> dict[str, Any]:
    """The JSON object: what ran, on what, and a record for every method."""
    from ramify.cli.env import environment

    found = environment()
    return {
        "model": model.config.name,
        "device": str(getattr(model, "device", "cpu")),
        "backend": getattr(model, "backend", found["cpu"]["level"] or "reference"),
        "prompt_tokens": len(model.tokenizer.encode(prompt)) if model.tokenizer else 0,
        "new_tokens": len(first.last.token_ids),
        "seed": args.seed,
        "temperature": args.temperature,
        "methods": methods,
        "environment": found,
    }


def headline(args: argparse.Namespace, told: dict[str, Any]) -> str:
    """What the table under it was measured on."""
    return (
        f"{told['model']} {args.weights or args.dtype} on {told['device']} {told['backend']}, {told['environment']['threads']} threads; "
        f"{told['prompt_tokens']} prompt tokens, {told['new_tokens']} new, temperature {args.temperature:g}, seed {args.seed}; "
        f"medians of {args.repeat} interleaved runs"
    )


def figures(method: str, out: Any) -> str:
    """One line about one run."""
    stats = out.stats
    return (
        f"{method}: {len(out.token_ids)} tokens in {stats.steps} steps, {stats.tokens_per_step:.2f} a step, "
        f"{stats.tokens_per_second:.0f} tokens/s, ended by {out.finish_reason}"
    )


def method_names(given: list[str]) -> list[str]:
    """The names after --method, in order and once each; "a,b" is two names, the commas of "a:key=1,other=2" part its options."""
    return list(dict.fromkeys(name for word in given for name in ([word] if ":" in word else word.split(","))))


def default_methods(args: argparse.Namespace) -> list[str]:
    """What --compare measures unless it is told: the methods that `auto` picks among and that can run here, and `auto` itself."""
    has_drafter = args.drafter is not None or args.model == "zoo"
    able = [each for each in drafters.all() if has_drafter or getattr(each, "takes_model", "no") != "yes"]
    return [*(each.name for each in able if getattr(each, "portfolio", False)), "auto"]


def is_lossless(method: str) -> bool:
    """What the registry says of a method, by name or name:key=value. ValueError for a name that nobody registered."""
    return bool(registered(method).lossless)


def takes_drafter(method: str) -> bool:
    """Whether the method of this name may draft with a second model."""
    return getattr(registered(method), "takes_model", "no") != "no"


def registered(method: str) -> Any:
    """The drafter's class, by name or name:key=value."""
    return drafters.get(method.partition(":")[0], "generate", "method")


def check_drafter(drafter: str | None, methods: list[str]) -> None:
    """A drafter that no method would ask for is a mistake."""
    if drafter is not None and methods and not any(map(takes_drafter, methods)):
        able = [each.name for each in drafters.all() if takes_drafter(each.name)]
        none = f"{', '.join(methods)} take{'s' * (len(methods) == 1)} none"
        raise ValueError(f"generate: --drafter is {drafter} and {none}; takes it with {listed(able)}. Leave it out.")


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt: the argument, the last word after --method where none is left, or standard input for "-". UTF-8, whatever the locale."""
    if args.prompt is None and len(args.method) > 1 and args.method[-1] not in drafters.names():
        args.prompt = args.method.pop()
    if args.prompt is None:
        raise ValueError(
            "generate: PROMPT is missing; takes a text, or - to read standard input. ramify generate --help lists the options."
        )
    if args.prompt == "-":
        if sys.stdin is None:
            raise ValueError("generate: standard input is closed; takes a text.")
        name, text = "standard input", sys.stdin.buffer.read()
    else:
        name, text = "PROMPT", args.prompt.encode(errors="surrogateescape")  # the bytes that the locale could not read
    if not text:
        raise ValueError(f"generate: {name} is empty; takes a text.")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"generate: {name} is not UTF-8 at byte {error.start}; takes text.") from None


def load_plugin(file: str) -> None:
    """Run a Python file, so that its decorated classes are registered."""
    path, before = Path(file), set(drafters.names())
    if not path.is_file():
        raise ValueError(f"generate: --plugin is {file}, and there is no such file; takes a Python file.")
    spec = importlib.util.spec_from_file_location(f"ramify_plugin_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"generate: --plugin is {file}; takes a Python file, .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except SystemExit as ended:
        raise ValueError(f"generate: --plugin {file} ended with exit code {ended.code}; takes one that registers classes.") from None
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else "no message"
        raise ValueError(f"generate: --plugin {file} raised {type(error).__name__}: {said}") from error
    if set(drafters.names()) == before:
        raise ValueError(f"generate: --plugin {file} registers no method; takes a file with a class decorated by @drafter.")


def progress(text: str) -> None:
    """One line on a terminal's standard error that the next one replaces."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()
