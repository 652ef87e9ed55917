"""Aligned columns of plain text: readable in a terminal, in a file and in a pipe."""

from collections.abc import Sequence


def table(heading: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """`rows` under `heading`, columns two spaces apart; the first `left` columns are flush left, the others right."""
    lines = [list(heading), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    texts = []
    for line in lines:
        cells = [cell.ljust(width) if column < left else cell.rjust(width) for column, (cell, width) in enumerate(zip(line, widths))]
        texts.append("  ".join(cells).rstrip())
    return "\n".join(texts)
