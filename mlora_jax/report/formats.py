"""Tables of cells, written as Markdown or as LaTeX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from mlora_jax.report.choice import Difference
from mlora_jax.report.rows import Spread

Cell = str | Spread | Difference


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; the cells of its first column are text.

    Attributes:
      header: [columns], the names of the columns.
      rows: [rows][columns], the cells.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def to_markdown(table: Table) -> str:
    """Returns a Markdown table; all columns but the first are aligned to the right."""
    lines = [[_MARKDOWN[type(cell)](cell) for cell in row] for row in (table.header, *table.rows)]
    lines.insert(1, ["---", *["---:"] * (len(table.header) - 1)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_latex(table: Table, caption: str) -> str:
    r"""Returns a LaTeX table that is no wider than the text; it needs \usepackage{booktabs,graphicx}."""
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering\setlength{\tabcolsep}{3pt}",
            rf"\caption{{{escape_latex(caption)}}}",
            r"\medskip",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
            r"\toprule",
            _latex_row(table.header),
            r"\midrule",
            *map(_latex_row, table.rows),
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
            "",
        ]
    )


_LATEX_SPECIAL = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "/": r"/\allowbreak{}",  # a path in a caption
        **{character: f"\\{character}" for character in "&%$#_{}"},
    }
)


def escape_latex(text: str) -> str:
    r"""Returns text in which the characters that LaTeX reads as commands are escaped.

    >>> escape_latex("dylora_frozen & 5%")
    'dylora\\_frozen \\& 5\\%'
    """
    return text.translate(_LATEX_SPECIAL)


def _latex_row(cells: Sequence[Cell]) -> str:
    return f"{' & '.join(_LATEX[type(cell)](cell) for cell in cells)} \\\\"


def _markdown_spread(spread: Spread) -> str:
    return f"{spread.mean:.3f}" + ("" if spread.deviation is None else f" ± {spread.deviation:.3f}")


def _latex_spread(spread: Spread) -> str:
    return f"${spread.mean:.3f}" + ("$" if spread.deviation is None else rf" \pm {spread.deviation:.3f}$")


# Difference.clear -> the format of its value.
_MARKDOWN_CLEAR = {True: "**{:+.3f}**", False: "{:+.3f}", None: "({:+.3f})"}
_LATEX_CLEAR = {True: r"$\mathbf{{{:+.3f}}}$", False: "${:+.3f}$", None: "$({:+.3f})$"}

_MARKDOWN: dict[type, Callable[..., str]] = {
    str: lambda text: text.replace("|", r"\|"),
    Spread: _markdown_spread,
    Difference: lambda difference: _MARKDOWN_CLEAR[difference.clear].format(difference.value),
}
_LATEX: dict[type, Callable[..., str]] = {
    str: escape_latex,
    Spread: _latex_spread,
    Difference: lambda difference: _LATEX_CLEAR[difference.clear].format(difference.value),
}
