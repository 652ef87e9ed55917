"""The model card of a zoo model: what it is, what it read, how well it predicts, how to make it again."""

import platform
from collections.abc import Sequence
from pathlib import Path

from ramify.zoo import corpus

CARD = """---
license: apache-2.0
library_name: transformers
tags: [ramify, python, tiny]
---
# ramify zoo: {name}

A Llama with {millions:.1f} M parameters that continues Python source, trained from nothing by `python -m ramify.zoo.train` so that
ramify's demo, tests and benchmarks decode real text with real weights and no download. It knows no facts and follows no
instructions: use it to see decoding methods work, not to write software.

| | |
|---|---|
| parameters | {parameters:,} (bf16; tied embeddings; head size 64; 2,048 positions) |
| vocabulary | byte-level BPE, 4,096 tokens, shared by target and drafter |
| training text | sources of the Python {python} standard library{packages}: {unique:.1f} M tokens |
| training length | {tokens:.1f} M tokens, {schedule}, {autocast}, {hours:.1f} hours |{aim}
| held-out loss | **{nats:.3f} nats a token**, {bits:.3f} bits a byte, over {held:,} tokens of the held-out modules |
| held-out modules | {modules} (and every file named after them) |

Conversions and the benchmark of accuracy read the beginnings of these modules only, mostly docstrings, and come to a higher loss.

To train it again: `pip install 'ramify[zoo]'`, then `python -m ramify.zoo.train --out zoo --only {name} --tokens {tokens_flag}{flags}`.
{again}The training text is licensed under the PSF licence; the weights are released with ramify under Apache-2.0.
"""

AGAIN = "That is one schedule for all tokens; these weights, taken up again, had more than one, and it comes to others.\n"
AIM = """
| training aim | the law of the {teacher}; both think the same token likeliest at **{agreement:.1%}** of held-out positions |"""


def write_card(folder: Path, summary: dict, packages: Sequence[str] = ()) -> None:
    """Write README.md into a model's folder from its training summary."""
    (folder / "README.md").write_text(
        CARD.format(
            name=summary["name"],
            millions=summary["parameters"] / 1e6,
            parameters=summary["parameters"],
            python=platform.python_version(),
            packages="".join(f", {name}" for name in packages),
            unique=summary["unique_tokens"] / 1e6,
            tokens=summary["tokens"] / 1e6,
            schedule=_schedule(summary["planned"]),
            aim=AIM.format(**summary) if summary.get("teacher") else "",
            autocast=summary["autocast"],
            hours=summary["seconds"] / 3600,
            nats=summary["held_out"]["nats_per_token"],
            bits=summary["held_out"]["bits_per_byte"],
            held=summary["held_out"]["tokens"],
            modules=", ".join(f"`{name}`" for name in corpus.HELD_OUT),
            tokens_flag=f"{summary['tokens']:.3g}".replace("e+0", "e"),
            again=AGAIN if len(summary["planned"]) > 1 else "",
            flags=" --distil" * bool(summary.get("teacher")) + "".join(f" --package {name}" for name in packages),
        )
    )


def _schedule(planned: Sequence[int]) -> str:
    first, *later = (f"{tokens / 1e6:.1f} M" for tokens in planned)
    return "cosine schedule" + "".join(f", planned for {first} and then taken up again to {tokens}" for tokens in later)
