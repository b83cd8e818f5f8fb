"""The spectra of an adapter: how fast the singular values of ``A diag(p) B`` fall, by layer and module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mlora_jax.core.product import factors_and_scales
from mlora_jax.core.rank_axes import by_parent
from mlora_jax.report.figure import PALETTE, PANEL
from mlora_jax.report.formats import Table, to_markdown

ENERGY = 0.9  # the share of the squared singular values that the effective rank has to reach
SHOWN = 1e-4  # singular values below this share of the largest one are not drawn


def spectra(adapter: Any, profile: Any) -> dict[str, np.ndarray]:
    """Returns path of a module -> the singular values of ``A diag(p) B``, float64 [L, R], in decreasing order.

    L is the number of layers that are stacked in the module, 1 if there is none. The D x F product is not formed: the
    values are those of the product of the triangles of the QR of ``A diag(p)`` and of ``B^T``.

    Args:
      adapter: a tree of an adapter's leaves, A [..., D, R] and B [..., R, F].
      profile: a tree of profiles [..., R], not per example.

    Raises:
      ValueError: a profile does not fit its factors.
    """
    factors, profiles = by_parent(adapter), by_parent(profile)
    found = {}
    for parent in factors:
        a, b, scales = (np.asarray(x, np.float64) for x in factors_and_scales(parent, factors, profiles))
        left = np.asarray(np.linalg.qr(a * scales[..., None, :], mode="r"))
        right = np.asarray(np.linalg.qr(b.swapaxes(-1, -2), mode="r"))
        values = np.linalg.svd(left @ right.swapaxes(-1, -2), compute_uv=False)
        padded = np.zeros((*values.shape[:-1], a.shape[-1]))
        padded[..., : values.shape[-1]] = values  # fewer than R where a layer is narrower than R
        found[".".join(parent)] = padded.reshape(-1, a.shape[-1])
    return found


def effective_ranks(values: np.ndarray, *, energy: float = ENERGY) -> np.ndarray:
    """Returns the least number of singular values whose squares sum to this share of all, int [L]; 0 for a zero matrix.

    Args:
      values: [L, R], in decreasing order.
      energy: the share, in 0..1.

    >>> effective_ranks(np.array([[3.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])).tolist()
    [1, 3, 0]
    """
    squares = values**2
    total = squares.sum(axis=-1, keepdims=True)
    reached = np.cumsum(squares, axis=-1) >= energy * total * (1 - 1e-12)
    return np.where(total[..., 0] > 0, reached.argmax(axis=-1) + 1, 0)


def spectrum_table(found: Mapping[str, np.ndarray], ranks: Sequence[int]) -> Table:
    """Returns a row for a module: the share of the squared singular values that each rank keeps, and effective ranks.

    Args:
      found: what `spectra` returns.
      ranks: the ranks to show.
    """
    header = ["module", *(f"kept by rank {rank}" for rank in ranks), "effective rank", "by layer"]
    rows = []
    for path, values in found.items():
        kept, effective = _kept(values), effective_ranks(values)
        cells = [f"{kept[:, min(rank, kept.shape[1]) - 1].mean():.3f}" for rank in ranks]
        rows.append([path, *cells, f"{effective.mean():.1f}", " ".join(map(str, effective))])
    return Table(header, rows)


def spectrum_text(found: Mapping[str, np.ndarray], ranks: Sequence[int]) -> str:
    """Returns the table with a sentence that says what it shows, in Markdown."""
    table = to_markdown(spectrum_table(found, ranks))
    return (
        f"Singular values of A diag(p) B at the largest rank. The effective rank is the least rank that keeps "
        f"{ENERGY:.0%} of their squares; shares are means over the layers.\n\n{table}"
    )


def draw_spectra(found: Mapping[str, np.ndarray], title: str) -> Figure:
    """Draws the mean spectrum of every module, and the effective rank of every layer and module.

    Args:
      found: what `spectra` returns; modules may have different numbers of layers.
      title: the title of the figure.
    """
    layers = max(len(values) for values in found.values())
    figure = Figure(figsize=(2 * PANEL[0], PANEL[1] + 0.5), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = [path.rsplit(".", 1)[-1] for path in found]
    for number, (name, values) in enumerate(zip(names, found.values(), strict=True)):
        largest = values[:, :1]
        shares = np.where(largest > 0, values / np.where(largest > 0, largest, 1), 0).mean(axis=0)
        style = "-" if number < len(PALETTE) else "--"
        drawn = np.where(shares >= SHOWN, shares, np.nan)
        left.plot(np.arange(1, len(drawn) + 1), drawn, style, color=PALETTE[number % len(PALETTE)], label=name)
    left.set_yscale("log")
    left.set_xlabel("number of the singular value")
    left.set_ylabel("share of the largest one, mean over layers")
    left.grid(alpha=0.25)
    left.legend(fontsize=8)
    table = np.full((len(found), layers), np.nan)
    for row, values in zip(table, found.values(), strict=True):
        row[: len(values)] = effective_ranks(values)
    image = right.imshow(table, aspect="auto", cmap="viridis", interpolation="nearest")
    right.set_yticks(range(len(names)), names, fontsize=8)
    right.set_xlabel("layer")
    right.set_title(f"rank that keeps {ENERGY:.0%} of the squared singular values", fontsize=10)
    figure.colorbar(image, ax=right)
    figure.suptitle(title, fontsize=11)
    return figure


def _kept(values: np.ndarray) -> np.ndarray:
    """Returns the share of the squared singular values up to each rank, [L, R]; 1 for a zero matrix."""
    squares = np.cumsum(values**2, axis=-1)
    total = squares[:, -1:]
    return np.where(total > 0, squares / np.where(total > 0, total, 1), 1.0)
