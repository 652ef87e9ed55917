"""convert: a checkpoint folder in, one with low-bit linear layers out.

gptq is the default for int4 where there is text, because it loses least: on the zoo's target about 0.4 of what rtn and hqq lose, in every
group size. One scale a token is enough for inputs rounded to int8: it adds 0.0005 nats a token at most, and so does one a group.
benchmarks/accuracy.py measures all of it (benchmarks/results/accuracy.json). gptq sorts inputs (act-order), so groups matter less.
Without text rtn is the default: hqq, for all its refining, is within the noise of it. What gptq makes depends on the number of torch's
threads, as its sums do; the model card says how many there were.
"""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ramify.checks import one_of, show, whole
from ramify.convert import calibrate
from ramify.convert.card import card
from ramify.convert.conversion import Conversion, Progress, silent
from ramify.convert.evaluate import Judged, judged
from ramify.convert.folder import KEPT_FILES, NewFolder, refuse, refuse_name
from ramify.convert.repack import refuse_rounding, write_repacked
from ramify.convert.rounding import write_rounded
from ramify.model.checkpoint import Checkpoint
from ramify.model.config import read_json
from ramify.model.load import ZOO, folder_of
from ramify.model.tokenizer import Tokenizer
from ramify.quant import METHODS, Format
from ramify.quant.sources.ramify import act_order, config_of

QUANTIZATION = ("quantization_config", "compression_config")
"""Fields of a config.json that say how its weights are stored; the second is compressed-tensors' older name."""


def convert(
    source: str | Path,
    out: str | Path,
    to: str | None = None,
    method: str | None = None,
    calibration: str | Path | None = None,
    head: str | None = None,
    evaluate: str | Path | bool | None = None,
    force: bool = False,
    calibration_tokens: int = calibrate.TOKENS,
    progress: Progress = silent,
) -> Conversion:
    """Write a low-bit copy of a checkpoint folder (or "zoo", "zoo-drafter"): q, k, v, o, gate, up and down of every layer.

    A checkpoint that is quantised already, by whichever method `load` reads, is repacked: the same codes, scales and zeros in ramify's
    own form, which computes the same bits. It takes neither method nor calibration, nor a `to` that is not its own.

    to: a format by name; None is int4-g64. method: "rtn", "hqq" or "gptq"; None is gptq for int4 with calibration text, rtn for the rest.
    calibration: a text, or the Path of one, of which gptq reads up to calibration_tokens, 128 at least; a warning says where it has
    fewer than a layer has inputs. The zoo has its own. head: the format in which the model layer holds the head after loading; None is
    int8, or what a quantised checkpoint says of it, and "dense" leaves it as it is. evaluate: a text or the Path of one on which
    perplexity is measured before and after, with all weights in memory as float32; None is the zoo's held-out modules, fewer of them
    for a large model and none for one that does not fit; False measures nothing. progress: wraps what each stage goes through. `out` is
    written under another name and renamed.
    Raises ValueError, UnsupportedModelError and CheckpointError, naming the tensor.
    """
    for name, path, takes in (("IN", source, 'a checkpoint folder, "zoo" or "zoo-drafter"'), ("OUT", out, "the name of a new folder")):
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"convert: {name} is {show(path)}; takes {takes}.")
        if not str(path):
            raise ValueError(f'convert: {name} is ""; takes {takes}.')
    start, folder, out = time.perf_counter(), folder_of(source), Path(out)
    is_zoo = str(source) in ZOO
    wanted = None if to is None else Format.parse(to, "convert: format")
    held = None if head in (None, "dense") else Format.parse(head, "convert: head", ", dense")
    if method is not None:
        one_of("method", method, METHODS, "convert")
    whole("calibration_tokens", calibration_tokens, calibrate.LEAST, "convert")
    refuse_name(out)
    if out.exists() and folder.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"convert: OUT {out} holds the checkpoint that is read; takes another folder.")
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"convert: OUT {out} lies in the checkpoint that is read; takes another folder.")
    refuse(out, force)
    with _own_name(), torch.no_grad():
        checkpoint = Checkpoint(folder, finite=True, name=str(source) if is_zoo else None)
        before = _head_of(checkpoint)
        repacked = bool(checkpoint.low_bit_names)
        if repacked:
            refuse_rounding(checkpoint, wanted, {"method": method, "calibration": calibration}, head)
            held, layers = before if head is None else held, None
            made = Conversion(str(source), str(out), "", "repack", None)
            made.source_method = (checkpoint.config.quantization or {})["quant_method"]
        else:
            held = Format("int8") if head is None else held
            layers = wanted or Format("int4", 64)
            made = Conversion(str(source), str(out), layers.name, _method(method, layers, is_zoo, calibration), None)
        made.head = None if held is None else held.name
        checkpoint.check_groups(layers, held)
        tokenizer = Tokenizer.from_folder(folder)
        texts: list[list[int]] = []
        if made.method == "gptq":
            for _ in progress(["reading"], "calibration text"):
                texts = calibrate.windows(tokenizer, calibration, is_zoo, calibration_tokens)
            made.calibration = calibrate.ZOO_TEXT if calibration is None else calibrate.named(calibration)
            made.calibration_tokens = sum(map(len, texts))
            made.threads = torch.get_num_threads()
            calibrate.warn_of_few(checkpoint, made.calibration_tokens, calibration_tokens)
        judge = judged(evaluate, checkpoint, tokenizer)
        if isinstance(judge, str):
            made.unmeasured = judge
        with NewFolder(out, force) as new:  # made first: what cannot be written is told before the work
            if isinstance(judge, Judged):
                made.evaluated_on = judge.name
                made.before = judge.measure(checkpoint, before, progress, "perplexity before")
            if layers is None:
                quantization = write_repacked(checkpoint, new, made, wanted, progress)
            else:
                ordered = write_rounded(checkpoint, new, made, layers, texts, progress)
                quantization = config_of(layers, made.method, held, ordered=act_order(ordered, len(made.errors)))
            new.close()
            values = _write_config(folder, new, quantization)
            for file in sorted({file for pattern in KEPT_FILES for file in folder.glob(pattern) if file.is_file()}):
                new.copy(file)
            if isinstance(judge, Judged):
                written = Checkpoint(new.path)
                made.after = judge.measure(written, _head_of(written), progress, "perplexity after")
            made.seconds = time.perf_counter() - start
            new.text("README.md", card(made, values, checkpoint.config.name))
    return made


def _method(method: str | None, format: Format, is_zoo: bool, calibration: str | Path | None) -> str:
    """The quantizer of float weights; ValueError where it does not go with the format or the calibration text."""
    if method is None:
        method = "gptq" if format.kind == "int4" and (is_zoo or calibration is not None) else "rtn"
    if method == "hqq":
        one_of("to", format.kind, ("int4",), 'convert: method "hqq"')
    if calibration is not None and method != "gptq":
        raise ValueError(f'convert: calibration is given; method "{method}" takes none. Leave it out, or take method "gptq".')
    return method


def _head_of(checkpoint: Checkpoint) -> Format | None:
    """In which format `load` holds the head of this checkpoint."""
    name = (checkpoint.config.quantization or {}).get("head")
    return None if name is None else Format.parse(name, "convert: head of IN")


def _write_config(folder: Path, new: NewFolder, quantization: dict[str, Any]) -> dict[str, Any]:
    """config.json as it was but for how the weights are stored. Returns what it was."""
    values = read_json(folder / "config.json")
    changed = {key: value for key, value in values.items() if key not in QUANTIZATION}
    if "lm_head" not in quantization["modules_to_not_convert"]:
        changed["tie_word_embeddings"] = False  # a low-bit head is a tensor of its own, whatever it was made of
    new.json("config.json", {**changed, "quantization_config": quantization})
    return values


@contextmanager
def _own_name() -> Iterator[None]:
    """What other parts say against a file is told of what the user has called; the error stays what it is."""
    try:
        yield
    except ValueError as problem:  # CheckpointError and UnsupportedModelError too
        if problem.args and isinstance(problem.args[0], str):
            problem.args = (re.sub("^(load|perplexity): ", "convert: ", problem.args[0]), *problem.args[1:])
        raise
