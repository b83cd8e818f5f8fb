"""The singular values of an adapter's products, against those of the whole matrices in NumPy."""

import numpy as np
import pytest

from mlora_jax.report.spectrum import draw_spectra, effective_ranks, spectra, spectrum_table, spectrum_text


def adapter_of(layers, features_in, features_out, rank, *, gate=False):
    rng = np.random.default_rng(0)
    leaves = {
        "a": rng.normal(size=(*layers, features_in, rank)),
        "b": rng.normal(size=(*layers, rank, features_out)),
    }
    return leaves | ({"gate": rng.normal(size=(*layers, rank))} if gate else {})


@pytest.mark.parametrize(
    ("layers", "features_in", "features_out", "rank", "gate"),
    [((3,), 7, 5, 4, False), ((), 6, 8, 3, True), ((2,), 3, 9, 5, False)],  # the last is narrower than R
)
def test_spectra_are_those_of_the_whole_products(layers, features_in, features_out, rank, gate):
    leaves = adapter_of(layers, features_in, features_out, rank, gate=gate)
    p = np.linspace(0.5, 2.0, rank) * np.ones((*layers, 1))
    (found,) = spectra({"block": {"q_proj": leaves}}, {"block": {"q_proj": {"p": p}}}).items()
    scales = p * leaves.get("gate", 1.0)
    whole = np.linalg.svd((leaves["a"] * scales[..., None, :]) @ leaves["b"], compute_uv=False).reshape(
        -1, min(features_in, features_out)
    )
    assert found[0] == "block.q_proj" and found[1].shape == (max(1, *layers) if layers else 1, rank)
    both = min(rank, whole.shape[1])
    np.testing.assert_allclose(found[1][:, :both], whole[:, :both], rtol=1e-10, atol=1e-12)
    assert not found[1][:, both:].any()


def test_the_effective_rank_keeps_its_share():
    values = np.sort(np.random.default_rng(1).uniform(size=(5, 8)), axis=1)[:, ::-1]
    for energy in (0.5, 0.9, 1.0):
        for row, rank in zip(values**2, effective_ranks(values, energy=energy), strict=True):
            assert row[:rank].sum() >= energy * row.sum() - 1e-9
            assert row[: rank - 1].sum() < energy * row.sum()


def test_the_table_and_the_figure_show_every_module():
    found = {"layers.q_proj": np.array([[2.0, 1.0, 0.0], [1.0, 0.0, 0.0]]), "head": np.array([[0.0, 0.0, 0.0]])}
    table = spectrum_table(found, (1, 2))
    assert table.header[:3] == ["module", "kept by rank 1", "kept by rank 2"]
    assert table.rows == [["layers.q_proj", "0.900", "1.000", "1.5", "2 1"], ["head", "1.000", "1.000", "0.0", "0"]]
    assert "| layers.q_proj |" in spectrum_text(found, (1, 2))
    figure = draw_spectra(found, "a title")
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["q_proj", "head"]
    assert np.isnan(figure.axes[1].images[0].get_array().filled(np.nan)[1, 1])  # the head has one layer
