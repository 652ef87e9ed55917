"""convert: quantise the linear layers of a checkpoint folder, one layer in memory at a time.

gptq is the default for int4 where there is text, because it loses least: on the zoo's target about 0.4 of what rtn and hqq lose, in every
group size. One scale a token is enough for inputs rounded to int8: it adds 0.0005 nats a token at most, and so does one a group.
benchmarks/accuracy.py measures all of it (benchmarks/results/accuracy.json). gptq sorts inputs (act-order), so groups matter less.
Without text rtn is the default: hqq, for all its refining, is within the noise of it.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ramify.checks import one_of, whole
from ramify.convert import calibrate
from ramify.convert.card import card
from ramify.convert.folder import KEPT_FILES, NewFolder, refuse
from ramify.errors import UnsupportedModelError
from ramify.model.checkpoint import Checkpoint
from ramify.model.config import read_json
from ramify.model.load import ZOO, folder_of
from ramify.model.model import Model
from ramify.model.perplexity import Perplexity, perplexity
from ramify.model.tokenizer import Tokenizer
from ramify.model.weights import Settings, Weights
from ramify.quant import METHODS, Format, QuantizedWeight, quantize
from ramify.quant.sources.ramify import config_of, stored
from ramify.zoo import corpus

HELD_OUT_CHARACTERS = 4500
"""Of each held-out module that a zoo model is judged on: about 21,000 tokens in all."""


@dataclass
class Conversion:
    """What a conversion made. Sizes in bytes, of the quantised layers and of all tensors; errors are |W - Q| / |W| by tensor name,
    output_errors the same of the layer's output on the calibration text, where there was one.
    """

    source: str
    out: str
    format: str
    method: str
    head: str | None
    calibration: str | None = None
    calibration_tokens: int = 0
    layer_bytes: tuple[int, int] = (0, 0)
    total_bytes: tuple[int, int] = (0, 0)
    errors: dict[str, float] = field(default_factory=dict)
    output_errors: dict[str, float] = field(default_factory=dict)
    evaluated_on: str | None = None
    before: Perplexity | None = None
    after: Perplexity | None = None
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)


def convert(
    source: str | Path,
    out: str | Path,
    to: str = "int4-g64",
    method: str | None = None,
    calibration: str | Path | None = None,
    head: str | None = "int8",
    evaluate: str | Path | None = None,
    force: bool = False,
    calibration_tokens: int = calibrate.TOKENS,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Conversion:
    """Write a low-bit copy of a checkpoint folder (or "zoo", "zoo-drafter"): q, k, v, o, gate, up and down of every layer.

    to: a format by name. method: "rtn", "hqq" or "gptq"; None is gptq for int4 with calibration text, rtn for the rest.
    calibration: a text, or the Path of one, of which gptq reads up to calibration_tokens, 128 at least; a warning says where it has
    fewer than a layer has inputs. The zoo has its own. head: the format in which the model layer holds the head after loading; None
    leaves it as it is. evaluate: a text or the Path of one on which perplexity is measured before and after, with all weights in
    memory as float32; the zoo has its own. progress: wraps the layers' numbers, as tqdm does. `out` is written under another name and
    renamed.
    Raises ValueError, UnsupportedModelError and CheckpointError, naming the tensor.
    """
    start, folder, out = time.perf_counter(), folder_of(source), Path(out)
    format, is_zoo = Format.parse(to, "convert: format"), str(source) in ZOO
    head_format = None if head is None else Format.parse(head, "convert: head")
    if method is None:
        has_text = is_zoo or calibration is not None
        method = "gptq" if format.kind == "int4" and has_text else "rtn"
    one_of("method", method, METHODS, "convert")
    if method == "hqq":
        one_of("to", format.kind, ("int4",), 'convert: method "hqq"')
    whole("calibration_tokens", calibration_tokens, calibrate.LEAST, "convert")
    if calibration is not None and method != "gptq":
        raise ValueError(f'convert: calibration is given; method "{method}" takes none. Leave it out, or take method "gptq".')
    if out.exists() and folder.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"convert: OUT {out} holds the checkpoint that is read; takes another folder.")
    refuse(out, force)
    _refuse_quantised(folder)
    checkpoint = Checkpoint(folder, finite=True, name=str(source) if is_zoo else None)
    _check_groups(checkpoint, format, head_format)
    tokenizer = Tokenizer.from_folder(folder)
    texts = calibrate.windows(tokenizer, calibration, is_zoo, calibration_tokens) if method == "gptq" else []
    judged = _judged(evaluate, is_zoo)
    made = Conversion(str(source), str(out), format.name, method, None if head_format is None else head_format.name)
    if texts:
        made.calibration = calibrate.ZOO_TEXT if calibration is None else _named(calibration)
        made.calibration_tokens = sum(map(len, texts))
        calibrate.warn_of_few(checkpoint, made.calibration_tokens, calibration_tokens)
    with NewFolder(out, force) as new, torch.no_grad():  # made first: what cannot be written is told before the work
        if judged:
            made.evaluated_on = "the zoo's held-out modules" if evaluate is None else _named(evaluate)
            made.before = _measured(checkpoint, tokenizer, judged)
        _write_tensors(checkpoint, new, made, format, texts, progress)
        values = read_json(folder / "config.json")
        new.json("config.json", {**values, "quantization_config": config_of(format, method, head_format)})
        for file in sorted({file for pattern in KEPT_FILES for file in folder.glob(pattern) if file.is_file()}):
            new.copy(file)
        if judged:
            made.after = _measured(Checkpoint(new.path), tokenizer, judged, head_format)
        made.seconds = time.perf_counter() - start
        new.text("README.md", card(made, values, checkpoint.config.name))
    return made


def _write_tensors(
    checkpoint: Checkpoint,
    new: NewFolder,
    made: Conversion,
    format: Format,
    texts: Sequence[Sequence[int]],
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> None:
    """Every tensor into the new folder, in order of use; sizes and errors into `made`."""
    stream = calibrate.Stream(checkpoint, texts) if texts else None
    layer_bytes, total_bytes = [0, 0], [0, 0]

    def keep(name: str) -> None:
        tensor = checkpoint.stored(name)
        total_bytes[0] += tensor.nbytes
        total_bytes[1] += tensor.nbytes
        new.add(checkpoint.source_name(name), tensor)

    keep("embed")
    for i in progress(range(checkpoint.config.num_layers)):
        low_bit = {f"layers.{i}.{name}" for stage in calibrate.STAGES for name in stage}
        for name in checkpoint.names:
            if name.startswith(f"layers.{i}.") and name not in low_bit:
                keep(name)
        for name, weight, size in _quantised_layer(checkpoint, i, stream, made, format):
            layer_bytes[0] += size
            layer_bytes[1] += weight.nbytes
            for theirs, tensor in stored(name.removesuffix(".weight"), weight).items():
                new.add(theirs, tensor)
    keep("final_norm")
    if not checkpoint.config.tied_embeddings:
        keep("lm_head")
    new.close()
    made.layer_bytes = (layer_bytes[0], layer_bytes[1])
    made.total_bytes = (total_bytes[0] + layer_bytes[0], total_bytes[1] + layer_bytes[1])


def _quantised_layer(
    checkpoint: Checkpoint, i: int, stream: calibrate.Stream | None, made: Conversion, format: Format
) -> list[tuple[str, QuantizedWeight, int]]:
    """(Hugging Face name, low-bit weight, dense bytes) of a layer's linear layers; moves the calibration text through the layer."""
    prefix, found = f"layers.{i}.", []
    stored = {name.removeprefix(prefix): checkpoint.stored(name) for name in checkpoint.names if name.startswith(prefix)}
    w = {name: tensor.float() for name, tensor in stored.items()}
    for stage in calibrate.STAGES:
        hessian = stream.hessian(i, stage, w) if stream else None
        for name in stage:
            theirs = checkpoint.source_name(prefix + name)
            try:
                weight = quantize(w[name], format, made.method, hessian)
            except ValueError as problem:
                raise ValueError(f'convert: tensor "{theirs}": {problem}') from None
            low_bit = weight.dequantize()
            made.errors[theirs] = _share(low_bit - w[name], w[name])
            if hessian is not None:
                made.output_errors[theirs] = _share(low_bit - w[name], w[name], hessian)
            w[name] = low_bit
            found.append((theirs, weight, stored[name].nbytes))
        if stream:
            stream.advance(i, stage, w)
    return found


def _share(error: Tensor, w: Tensor, hessian: Tensor | None = None) -> float:
    """|error| / |w|, in the norm of the Hessian where there is one."""
    squares = [float((t if hessian is None else t @ hessian).mul(t).sum(dtype=torch.float64)) for t in (error, w)]
    return (max(squares[0], 0.0) / squares[1]) ** 0.5 if squares[1] > 0 else 0.0


def _measured(checkpoint: Checkpoint, tokenizer: Tokenizer | None, texts: list[str], head: Format | None = None) -> Perplexity:
    """Perplexity of a checkpoint as the model layer runs it: low-bit layers on rounded activations, the rest in float32."""
    model = Model(checkpoint.config, Weights.load(checkpoint, Settings(torch.float32, head=head)), tokenizer)
    return perplexity(model, texts, window=min(1024, model.config.max_positions - 1))


def _judged(evaluate: str | Path | None, is_zoo: bool) -> list[str]:
    """The texts that perplexity is measured on; none where there are none."""
    if evaluate is None:
        return [text[:HELD_OUT_CHARACTERS] for text in corpus.held_out_texts().values()] if is_zoo else []
    return [calibrate.read_text(evaluate) if isinstance(evaluate, Path) else evaluate]


def _named(text: str | Path) -> str:
    return text.name if isinstance(text, Path) else f"a text of {len(text):,} characters"


def _refuse_quantised(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        return  # Checkpoint says what is wrong with the folder
    config = read_json(folder / "config.json")
    settings = config.get("quantization_config") or config.get("compression_config")  # compressed-tensors' older name
    if settings:
        what = settings.get("quant_method", "unnamed") if isinstance(settings, dict) else settings
        raise UnsupportedModelError(
            f"convert: {folder.name} is quantised already ({what}); takes float32, bfloat16 and float16 weights. "
            "Fetch the unquantised checkpoint."
        )


def _check_groups(checkpoint: Checkpoint, format: Format, head: Format | None) -> None:
    """ValueError for the first tensor whose inputs are no multiple of its format's group."""
    linears = {name for stage in calibrate.STAGES for name in stage}
    wanted = [(name, format) for name in checkpoint.names if name.rpartition(".")[2] in linears and name.startswith("layers.")]
    if head is not None:
        wanted.append(("embed" if checkpoint.config.tied_embeddings else "lm_head", head))
    for name, each in wanted:
        K = checkpoint.shape(name)[1]
        if each.kind == "int4" and K % each.group:
            raise ValueError(
                f'convert: tensor "{checkpoint.source_name(name)}" has K = {K}; {each.name} takes multiples of {each.group}. '
                "Choose a smaller group, or int8."
            )
