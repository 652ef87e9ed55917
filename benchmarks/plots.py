"""One picture per benchmark, drawn from its JSON document. matplotlib is imported when a picture is asked for."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

OURS, PEER, FAINT = "#0b6e99", "#8a8a8a", "#c9c9c9"


def tree_attention(doc: dict[str, Any], path: Path) -> None:
    """Time over tree rows, one panel per head shape, dtype and context: the best torch way, ramify, the floor."""
    plt = _pyplot()
    rows = [row for row in doc["rows"] if row["status"] == "ok"]
    kinds = list(dict.fromkeys((row["shape"]["size"], row["shape"]["dtype"]) for row in rows))
    contexts = sorted({row["shape"]["context"] for row in rows})
    size = (3.3 * len(contexts) + 1, 2.7 * len(kinds) + 0.9)
    figure, axes = plt.subplots(len(kinds) or 1, len(contexts) or 1, figsize=size, squeeze=False)
    for (size, dtype), line in zip(kinds, axes):
        for context, panel in zip(contexts, line):
            here = [r for r in rows if (r["shape"]["size"], r["shape"]["dtype"], r["shape"]["context"]) == (size, dtype, context)]
            for name in dict.fromkeys(row["provider"] for row in here):
                mine = [row for row in here if row["provider"] == name]
                if not mine[0]["baseline"]:
                    _line(panel, mine, name, OURS, "-" if name == "ramify" else "--", 2.2 if name == "ramify" else 1.2)
                if name == "ramify":
                    _ratios(panel, mine)
            torch = [r for r in here if r["baseline"]]
            best = [min((r for r in torch if r["shape"]["T"] == T), key=lambda r: r["us"]["median"]) for T in _values(torch)]
            _line(panel, best, "best torch way", PEER, "-", 1.6)
            floor = [next(row for row in here if row["shape"]["T"] == T) for T in _values(here)]
            limit = [row["floor_us"] / 1e3 for row in floor]
            panel.plot(_values(here), limit, ":", color="black", linewidth=1.2, label="floor of this machine")
            panel.set(xscale="log", yscale="log", title=f"{size}, {dtype} cache, context {context}")
            panel.set_xticks(_values(here), [str(T) for T in _values(here)])
            panel.minorticks_off()
            panel.yaxis.set_major_formatter("{x:g}")
            panel.set_xlabel("tree rows T")
        line[0].set_ylabel("ms per call")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0.03, 1, 0.95 if len(kinds) > 1 else 0.9))
    _caption(figure, doc)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def end_to_end(doc: dict[str, Any], path: Path) -> None:
    """Tokens a second of every way to decode, one panel per model, one bar per temperature."""
    plt = _pyplot()
    rows = [row for row in doc["rows"] if row["status"] == "ok"]
    models = list(dict.fromkeys(row["shape"]["model"] for row in rows))
    counts = [len({row["provider"] for row in rows if row["shape"]["model"] == model}) for model in models]
    size = (8.4, 0.52 * sum(counts) + 1.1 * len(models) + 0.6)
    figure, axes = plt.subplots(len(models) or 1, 1, figsize=size, squeeze=False, height_ratios=counts or None)
    for model, panel in zip(models, axes[:, 0]):
        here = [row for row in rows if row["shape"]["model"] == model]
        names = list(dict.fromkeys(row["provider"] for row in here))
        temperatures = sorted({row["shape"]["temperature"] for row in here})
        height = 0.8 / len(temperatures)
        fastest = max(row["tokens_per_second"] for row in here)
        for number, temperature in enumerate(temperatures):
            for row in (row for row in here if row["shape"]["temperature"] == temperature):
                place = names.index(row["provider"]) + (number - (len(temperatures) - 1) / 2) * height
                colour = OURS if row["backend"].startswith("ramify") else PEER
                panel.barh(place, row["tokens_per_second"], 0.92 * height, color=colour, alpha=1 if number == 0 else 0.5)
                text = f" {row['tokens_per_second']:.0f}  ({row['ratio']:.1f}x)" if "ratio" in row else f" {row['tokens_per_second']:.0f}"
                panel.text(row["tokens_per_second"], place, text, va="center", fontsize=8)
        panel.set_yticks(range(len(names)), names)
        panel.invert_yaxis()
        panel.set_xlim(0, 1.18 * fastest)
        panel.set_title(here[0].get("model_title", model), loc="left", fontsize=10)
        panel.tick_params(axis="y", length=0)
    axes[-1, 0].set_xlabel("new tokens per second, prompt included; in brackets: times the fastest plain transformers generate")
    _temperature_legend(plt, axes[0, 0], sorted({row["shape"]["temperature"] for row in rows}))
    figure.tight_layout(rect=(0, 0.6 / figure.get_figheight() / 2, 1, 1))
    _caption(figure, doc)
    figure.savefig(path, dpi=150)
    plt.close(figure)


LINEAR = {"ramify int4-g64": (OURS, "-", 2.2), "ramify int8": (OURS, "--", 1.2), "ramify bf16": (OURS, ":", 1.2)}
"""The rows of ramify that the picture of `linear` shows: colour, line and width."""

STEPS = {"torch int4pack_mm g128": ":", "onnxruntime int4 b128": "-.", "llama.cpp Q4_0": "-", "torch dynamic int8": "--"}
"""The peers whose curve in single steps it shows."""


def linear(doc: dict[str, Any], path: Path) -> None:
    """A column per layer: time of a call over rows above, the same in single steps below; ramify, the best peers, the floor of int4."""
    plt = _pyplot()
    rows = [row for row in doc["rows"] if row["status"] == "ok"]
    names = list(dict.fromkeys(row["shape"]["layer"] for row in rows))
    figure, axes = plt.subplots(2, len(names) or 1, figsize=(max(8.0, 3.6 * len(names) + 1), 6.4), squeeze=False)
    for column, name in enumerate(names):
        here = [row for row in rows if row["shape"]["layer"] == name]
        counts = sorted({row["shape"]["M"] for row in here})
        for title, look in LINEAR.items():
            _over_rows(axes[:, column], [row for row in here if row["provider"] == title], title, look)
        peers = [row for row in here if row["baseline"]]
        int4 = [row for row in peers if row["dtype"].startswith("int4")]
        best = [_fastest(int4, M) for M in counts if any(row["shape"]["M"] == M for row in int4)]
        _line(axes[0, column], best, "best int4 peer", PEER, "-", 1.6, "M") if best else None
        best = [_fastest(peers, M) for M in counts if any(row["shape"]["M"] == M for row in peers)]
        _line(axes[0, column], best, "best peer of any kind", "black", "--", 1.0, "M") if best else None
        for title, style in STEPS.items():
            _steps(axes[1, column], [row for row in peers if row["provider"] == title], title, PEER, style, 1.2)
        floor = sorted((row for row in here if row["provider"] == "ramify int4-g64"), key=lambda row: row["shape"]["M"])
        limit = [row["floor_us"] / 1e3 for row in floor]
        axes[0, column].plot([row["shape"]["M"] for row in floor], limit, ":", color="black", linewidth=1, label="floor of ramify int4-g64")
        axes[0, column].set(yscale="log", title=f"N x K = {name}")
        axes[1, column].set(xlabel="rows M")
        axes[1, column].set_yscale("log", base=2)
        for panel in axes[:, column]:
            _log2(panel, counts)
            panel.yaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_ylabel("ms per call")
    axes[1, 0].set_ylabel("single steps: time(M) / time(1)")
    for panel in axes[:, -1]:
        panel.legend(frameon=False, fontsize=7)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    _caption(figure, doc)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def step(doc: dict[str, Any], path: Path) -> None:
    """A panel per model: the time of a pass over its rows, in single steps."""
    plt = _pyplot()
    rows = [row for row in doc["rows"] if row["status"] == "ok"]
    models = list(dict.fromkeys(row["shape"]["model"] for row in rows))
    figure, axes = plt.subplots(1, len(models) or 1, figsize=(max(8.0, 4.2 * len(models)), 3.8), squeeze=False)
    for model, panel in zip(models, axes[0]):
        for title in dict.fromkeys(row["provider"] for row in rows):
            mine = [row for row in rows if row["provider"] == title and row["shape"]["model"] == model]
            _steps(panel, mine, title, *LINEAR.get(title, (PEER, "-", 1.4)))
        _log2(panel, sorted({row["shape"]["M"] for row in rows}))
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set(title=model, xlabel="rows M", ylabel="single steps: time(M) / time(1)")
        panel.legend(frameon=False, fontsize=7)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    _caption(figure, doc)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def accuracy(doc: dict[str, Any], path: Path) -> None:
    """Nats a token above the dense model, a bar per row with its standard error."""
    plt = _pyplot()
    rows = [row for row in doc["rows"] if row["status"] == "ok" and not row["baseline"]]
    figure, panel = plt.subplots(figsize=(8.4, 0.26 * len(rows) + 1.4))
    names = [
        row["provider"] + (f", {row['shape']['activations']} inputs" if row["shape"]["activations"] != "exact" else "") for row in rows
    ]
    colours = [OURS if row["shape"]["activations"] == "exact" else PEER for row in rows]
    panel.barh(names, [row["above_dense"] for row in rows], xerr=[row["standard_error"] for row in rows], color=colours, height=0.7)
    panel.invert_yaxis()
    panel.tick_params(axis="y", labelsize=7)
    panel.set_xlabel("nats a token above the dense model")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    _caption(figure, doc, "mean over held-out tokens, one standard error")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _log2(panel: Any, counts: list[int]) -> None:
    """An axis of rows."""
    panel.set_xscale("log", base=2)
    panel.set_xticks(counts, [str(M) for M in counts])
    panel.minorticks_off()


def _over_rows(panels: Any, rows: list[dict], title: str, look: tuple[str, str, float]) -> None:
    """One provider in both panels of a layer."""
    if rows:
        _line(panels[0], rows, title, *look, "M")
        _steps(panels[1], rows, title, *look)


def _steps(panel: Any, rows: list[dict], title: str, colour: str, style: str, width: float) -> None:
    rows = [row for row in sorted(rows, key=lambda row: row["shape"]["M"]) if "single_steps" in row]
    x, y = [row["shape"]["M"] for row in rows], [row["single_steps"] for row in rows]
    if rows:
        panel.plot(x, y, style, color=colour, linewidth=width, marker="o", markersize=3, label=title)


def _fastest(rows: list[dict], M: int) -> dict:
    return min((row for row in rows if row["shape"]["M"] == M), key=lambda row: row["us"]["median"])


def _temperature_legend(plt: Any, panel: Any, temperatures: list[float]) -> None:
    if len(temperatures) > 1:
        patches = [plt.Rectangle((0, 0), 1, 1, color=OURS, alpha=1 if number == 0 else 0.5) for number in range(len(temperatures))]
        panel.legend(patches, [f"temperature {value:g}" for value in temperatures], frameon=False, loc="upper right", fontsize=8)


def _line(panel: Any, rows: list[dict], name: str, colour: str, style: str, width: float, axis: str = "T") -> None:
    rows = sorted(rows, key=lambda row: row["shape"][axis])
    x = [row["shape"][axis] for row in rows]
    panel.plot(x, [row["us"]["median"] / 1e3 for row in rows], style, color=colour, linewidth=width, marker="o", markersize=3.5, label=name)
    low, high = ([row["us"][bound] / 1e3 for row in rows] for bound in ("p20", "p80"))
    panel.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def _ratios(panel: Any, rows: list[dict]) -> None:
    """How many times faster than the best torch way, half way up to it."""
    for row in rows:
        if "ratio" in row:
            middle = row["us"]["median"] / 1e3 * row["ratio"] ** 0.5
            panel.text(row["shape"]["T"], middle, f"{row['ratio']:.1f}x", fontsize=7, color=OURS, ha="center", va="center")


def _values(rows: Iterable[dict]) -> list[int]:
    return sorted({row["shape"]["T"] for row in rows})


def _caption(figure: Any, doc: dict[str, Any], what: str = "medians of interleaved runs") -> None:
    """Where the numbers come from: a picture travels without its JSON."""
    where = doc["environment"]
    text = f"{where['cpu']}, {where['threads']} threads, {where['isa']}; {what}, {where['date'][:10]}"
    text += f", commit {where['commit']}" if where["commit"] else ""
    text += "; QUICK RUN, NOT A MEASUREMENT" if doc["options"]["quick"] else ""
    figure.text(0.01, 0.008, text, fontsize=7, color="#555555")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 9})
    return plt
