"""`ramify convert`: a checkpoint folder in, a low-bit one out."""

import argparse
import json
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ramify.cli.table import table

if TYPE_CHECKING:
    from ramify.convert import Conversion


def add_parser(commands: Any) -> None:
    """Add `convert` to the subcommands."""
    parser = commands.add_parser(
        "convert",
        help="quantise a checkpoint, or repack a quantised one",
        description="Write a low-bit copy of a checkpoint folder, and say what it cost. One that is quantised already (GPTQ, AWQ, "
        "compressed-tensors, torchao, fp8) is repacked bit for bit, with no --to, --method or --calibration.",
    )
    add = parser.add_argument
    add("source", metavar="IN", help='a Hugging Face checkpoint folder, or "zoo" or "zoo-drafter"')
    add("out", metavar="OUT", help="the folder to write; it appears whole or not at all")
    add("--to", metavar="FORMAT", help="int8, int4-g32, -g64 or -g128 (each also with -zp), fp8, fp8-b128 (default int4-g64)")
    add(
        "--method",
        metavar="NAME",
        help="rtn, hqq or gptq; the default is gptq for int4 with calibration text, rtn for the rest; "
        "files of rtn and hqq are always the same, those of gptq under the same number of torch's threads (OMP_NUM_THREADS)",
    )
    add("--calibration", type=named_file, metavar="FILE", help="text for gptq, like what the model will read; the zoo has its own")
    add("--calibration-tokens", type=int, default=16384, metavar="N", help="tokens of it to use at most, 128 or more (default 16384)")
    add(
        "--head",
        metavar="FORMAT",
        help='format of the head once loaded, or "dense" to leave it (default int8, or as a quantised IN has it); the file holds it as it '
        'was, and ramify.load rounds it so unless head="dense"; transformers keeps it dense, so logits differ',
    )
    add(
        "--evaluate",
        type=named_file,
        metavar="FILE",
        help='measure perplexity on this text before and after, or "none" (default: modules that the zoo has not seen)',
    )
    add("--force", action="store_true", help="replace OUT where it is a checkpoint folder and holds nothing else")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert, with a progress bar on a terminal."""
    from ramify.convert import convert

    with signals_as_exits():
        made = convert(
            args.source,
            args.out,
            to=args.to,
            method=args.method,
            calibration=args.calibration,
            head=args.head,
            evaluate=False if args.evaluate == Path("none") else args.evaluate,
            force=args.force,
            calibration_tokens=args.calibration_tokens,
            progress=progress,
        )
    print(json.dumps(made.record(), indent=2) if args.json else describe(made))
    return 0


def named_file(name: str) -> Path:
    """A path that is not empty: an empty one would be this folder."""
    if not name:
        raise argparse.ArgumentTypeError('"" is no file')
    return Path(name)


@contextmanager
def signals_as_exits() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise SystemExit (128 + the signal), so that what was begun is removed, as it is on Ctrl-C."""

    def leave(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not break off the removal
        raise SystemExit(128 + number)

    in_main = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
    ours = [each for each in (signal.SIGTERM, signal.SIGHUP) if in_main and signal.getsignal(each) is signal.SIG_DFL]
    for each in ours:
        signal.signal(each, leave)
    try:
        yield
    finally:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)


def progress(items: Sequence[Any], stage: str) -> Iterable[Any]:
    """What a stage goes through, behind a bar on standard error that names it, where that is a terminal."""
    from tqdm import tqdm

    return tqdm(items, desc=f"convert: {stage}", disable=None, leave=False)


def describe(made: "Conversion") -> str:
    """What a person reads: sizes, errors and, where it was measured, perplexity before and after."""
    from ramify.convert.card import formats_line

    how = f" by {made.method}" if made.source_method is None else f", repacked from {made.source_method} bit for bit"
    text = f", calibrated on {made.calibration_tokens:,} tokens" if made.calibration_tokens else ""
    rows = [
        ["linear layers, MB", *(f"{size / 1e6:.1f}" for size in made.layer_bytes)],
        ["all tensors, MB", *(f"{size / 1e6:.1f}" for size in made.total_bytes)],
    ]
    for label, errors in (("weight error", made.errors), ("output error", made.output_errors)):
        if errors:
            rows.append([label, "", f"{sum(errors.values()) / len(errors):.2%}"])
    if made.before and made.after:
        rows.append(["nats a token", *(f"{each.nats_per_token:.4f}" for each in (made.before, made.after))])
        rows.append(["perplexity", *(f"{each.perplexity:.3f}" for each in (made.before, made.after))])
    head = made.head or "as it is"
    lines = [f"{made.source} -> {made.out}: {formats_line(made)}{how}{text}; head {head}; {made.seconds:.0f} s", ""]
    lines.append(table(["", "before", "after"], rows))
    if made.before:
        lines.append(f"\nPerplexity on {made.before.tokens:,} tokens of {made.evaluated_on}, as the model layer runs both.")
    else:
        lines.append(f"\nPerplexity was not measured: {made.unmeasured}.")
    return "\n".join(lines)
