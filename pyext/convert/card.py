"""The model card of a converted checkpoint: what was done, what it cost in accuracy, how to do it again."""

from collections.abc import Mapping
from typing import Any

from ramify.convert import calibrate
from ramify.convert.conversion import Conversion

CARD = """---
base_model: {base}
base_model_relation: quantized
library_name: transformers
tags: [ramify, quantized, {format}]
---
# {name}: {format}

The linear layers of {base} in ramify's {formats}{method_line}.
Embeddings, norms and biases are as they were; the head is {head}.

| | before | after |
|---|---|---|
| linear layers | {layers_before:.1f} MB | {layers_after:.1f} MB |
| all tensors | {total_before:.1f} MB | {total_after:.1f} MB |
{perplexity}{errors}
{evaluated}Load it: `ramify.load(FOLDER)`, or `import ramify` and `AutoModelForCausalLM.from_pretrained(FOLDER)`.

Make it again: `ramify convert {command}`.
"""

METHOD_LINES = {
    "rtn": ", by round to nearest",
    "hqq": ", by half-quadratic refinement of scales and zeros (HQQ); no calibration",
    "gptq": ", by GPTQ, calibrated on {tokens:,} tokens of {text}, inputs in act-order, with {threads} of torch's threads",
    "repack": ".\nTheir codes, scales, zeros and order of inputs are those of its {writer} files, bit for bit: nothing was rounded again",
}

WRITERS = {"awq": "AWQ", "gptq": "GPTQ", "ramify_w4": "ramify", "ramify_w8": "ramify"}
"""quant_method of a repacked checkpoint -> what its files are called; others by their own name."""


def card(made: Conversion, config: Mapping[str, Any], name: str) -> str:
    """README.md for a conversion of the model with this config.json. name: the model's, for a config that names no repository."""
    base = str(config.get("_name_or_path") or "")
    base = base if base.count("/") == 1 and not base.startswith((".", "/")) else name
    writer = WRITERS.get(str(made.source_method), str(made.source_method))
    return CARD.format(
        base=base,
        name=name,
        format=made.format,
        formats=formats_line(made),
        method_line=METHOD_LINES[made.method].format(
            tokens=made.calibration_tokens, text=made.calibration, threads=made.threads, writer=writer
        ),
        head=f"held in {made.head} after loading" if made.head else "as it was",
        layers_before=made.layer_bytes[0] / 1e6,
        layers_after=made.layer_bytes[1] / 1e6,
        total_before=made.total_bytes[0] / 1e6,
        total_after=made.total_bytes[1] / 1e6,
        perplexity=_perplexity(made),
        errors=_errors(made),
        evaluated=_evaluated(made),
        command=_command(made, base),
    )


def formats_line(made: Conversion) -> str:
    """The format of the layers; where they differ, how many have which."""
    if len(made.formats) < 2:
        return made.format
    rest = {name: count for name, count in made.formats.items() if name != made.format}
    others = ", ".join(f"{count} {'left dense' if name == 'dense' else f'in {name}'}" for name, count in rest.items())
    return f"{made.format} ({others})"


def _errors(made: Conversion) -> str:
    """What rounding has changed; empty where nothing was rounded."""
    if not made.errors:
        return ""
    rows = ""
    for label, of, errors in (
        ("weight error, root mean square", "weights", made.errors),
        ("output error on calibration text", "outputs", made.output_errors),
    ):
        if errors:
            worst = max(errors, key=lambda tensor: errors[tensor])
            mean = sum(errors.values()) / len(errors)
            rows += f"| {label} | | {mean:.2%} of the {of}', worst {errors[worst]:.2%} in `{worst}` |\n"
    return rows


def _perplexity(made: Conversion) -> str:
    if made.before is None or made.after is None:
        return ""
    rows = [("perplexity", "perplexity", ".3f"), ("nats a token", "nats_per_token", ".4f"), ("bits a byte", "bits_per_byte", ".4f")]
    cells = [(label, getattr(made.before, key), getattr(made.after, key), form) for label, key, form in rows]
    return "".join(f"| {label} | {a:{form}} | {b:{form}} |\n" for label, a, b, form in cells if a is not None)


def _evaluated(made: Conversion) -> str:
    if made.before is None:
        return f"Perplexity was not measured: {made.unmeasured}. `--evaluate FILE` does it.\n\n"
    how = f"as the model layer runs both: sums in float32, {_inputs(made)}"
    return f"Perplexity: {made.before.tokens:,} tokens of {made.evaluated_on}, {how}.\n\n"


def _inputs(made: Conversion) -> str:
    """How the layers that are now low-bit take their input."""
    fp8 = made.format.startswith("fp8")
    return "low-bit layers on their inputs as they are" if fp8 else "low-bit layers on inputs rounded to int8"


def _command(made: Conversion, base: str) -> str:
    source = made.source if made.source.startswith("zoo") else base
    parts = [source, "OUT"]
    if made.method != "repack":
        parts += [f"--to {made.format}", f"--method {made.method}"]
    if made.calibration not in (None, calibrate.ZOO_TEXT):
        parts.append("--calibration FILE")
    if made.calibration_tokens not in (0, calibrate.TOKENS):
        parts.append(f"--calibration-tokens {made.calibration_tokens}")
    return " ".join([*parts, f"--head {made.head or 'dense'}"])
