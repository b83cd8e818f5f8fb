"""What the figures show, read from matplotlib's artists."""

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex

from mlora_jax.core import POLICIES
from mlora_jax.report import choose_rows, draw_curves, draw_learning_rates, read_runs
from mlora_jax.report.figure import LEAST_GAP, PALETTE, are_apart
from tests.report.runs import write_run

CURVES = {
    ("lora", "prefix", 0.1): {
        "test": {1: (0.1, 0.2, 0.3), 2: (0.2, 0.3, 0.4)},
        "validation": {1: (0.5, 0.6, 0.7), 2: (0.6, 0.7, 0.8)},
    },
    ("lora", "prefix", 0.2): {
        "test": {1: (0.3, 0.4, 0.5), 2: (0.4, 0.5, 0.6)},
        "validation": {1: (0.4, 0.5, 0.6), 2: (0.4, 0.5, 0.6)},
    },
    ("lora", "prefix", 0.4): {"test": {1: (0.9, 0.9, 0.9)}, "validation": {1: (0.9, 0.9, 0.9)}},
    ("matryoshka", "masked", 0.1): {
        "test": {1: (0.6, 0.6, 0.6), 2: (0.6, 0.7, 0.6)},
        "validation": {1: (0.2, 0.2, 0.2), 2: (0.2, 0.2, 0.2)},
    },
}
BASES = (("test", 0.25), ("validation", 0.125))


def figures(path, curves, split="validation", **options):
    (experiment,) = read_runs([write_run(path, curves, base=BASES, failed=[("lora", 0.4, 2)], **options)])
    choice = choose_rows(experiment.rows, split)
    return draw_curves(experiment, choice), draw_learning_rates(experiment, choice)


def line(area, label):
    (found,) = [line for line in area.lines if line.get_label().startswith(label)]
    return found


def band(collection):
    """Lowest and highest y of a band at every x."""
    points = collection.get_paths()[0].vertices
    return {x: (points[points[:, 0] == x, 1].min(), points[points[:, 0] == x, 1].max()) for x in set(points[:, 0])}


def legend(area):
    return [text.get_text() for text in area.get_legend().get_texts()]


def test_curves_show_the_chosen_rows_and_the_base(tmp_path):
    (area,) = figures(tmp_path, CURVES)[0].axes
    assert legend(area) == ["lora  0.250", "matryoshka (masked)  0.625", "base  0.250"]
    drawn = line(area, "lora")
    np.testing.assert_allclose(drawn.get_xydata(), [(1, 0.15), (2, 0.25), (4, 0.35)])
    lora, _ = area.collections
    deviation = np.std([0.1, 0.2], ddof=1)
    for rank, mean in ((1, 0.15), (2, 0.25), (4, 0.35)):
        assert band(lora)[rank] == pytest.approx((mean - deviation, mean + deviation))
    np.testing.assert_allclose(line(area, "base").get_ydata(), 0.25)
    assert area.get_xscale() == "log" and list(area.get_xticks()) == [1, 2, 4]
    assert area.get_ylabel() == "accuracy, test split" and area.get_title() == "R = 4, scaling none"


def test_lines_differ_in_colour_by_method_and_in_style_by_read_out(tmp_path):
    same = {"test": {1: (0.5, 0.5, 0.5)}}
    readouts = ("prefix", "squeeze", "nested", "masked", "a new one")
    curves = {(method, readout, 0.1): same for method in ("lora", "sandwich") for readout in readouts}
    (area,) = draw(tmp_path, curves).axes
    lines = [drawn for drawn in area.lines if not drawn.get_label().startswith("base")]
    looks = {(to_hex(drawn.get_color()), drawn.get_linestyle(), drawn.get_marker()) for drawn in lines}
    assert len(looks) == 10
    assert len(POLICIES) <= len(set(PALETTE)) == len(PALETTE)


def draw(path, curves):
    (experiment,) = read_runs([write_run(path, curves)])
    return draw_curves(experiment, choose_rows(experiment.rows, "test"))


def test_many_rows_get_a_panel_per_read_out(tmp_path):
    same = {"test": {1: (0.5, 0.5, 0.5)}}
    methods = ("lora", "dylora", "matryoshka", "sandwich")
    figure = draw(
        tmp_path, {(method, readout, 0.1): same for method in methods for readout in ("prefix", "nested", "masked")}
    )
    assert [area.get_title() for area in figure.axes] == [
        f"read-out {readout}, R = 4, scaling none" for readout in ("prefix", "nested", "masked")
    ]
    assert legend(figure.axes[1]) == [*(f"{method} (nested)  0.500" for method in methods), "base  0.250"]


def test_two_settings_get_a_panel_each(tmp_path):
    same = {("lora", "prefix", 0.1): {"test": {1: (0.5, 0.5, 0.5)}}}
    runs = [write_run(tmp_path / scaling, same, scaling=scaling) for scaling in ("none", "sqrt")]
    (experiment,) = read_runs(runs)
    figure = draw_curves(experiment, choose_rows(experiment.rows, "test"))
    assert [area.get_title() for area in figure.axes] == ["R = 4, scaling none", "R = 4, scaling sqrt"]


def test_learning_rates_on_the_split_of_the_choice(tmp_path):
    (area,) = figures(tmp_path, CURVES)[1].axes
    assert area.get_ylabel() == "AURAC (log2), validation split" and area.get_xscale() == "log"
    np.testing.assert_allclose(line(area, "lora").get_xydata(), [(0.1, 0.65), (0.2, 0.5), (0.4, 0.9)])
    np.testing.assert_allclose(line(area, "matryoshka (masked)").get_xydata(), [(0.1, 0.2)])
    assert band(area.collections[0])[0.1] == pytest.approx((0.65 - 0.005**0.5, 0.65 + 0.005**0.5))
    assert [text.get_text() for text in area.get_xticklabels()] == ["0.1", "0.2", "0.4"]
    assert legend(area) == ["lora", "matryoshka (masked)", "chosen", "seeds missing"]


def marks(area):
    """Size -> where marks of that size lie."""
    scatters = [each for each in area.collections if isinstance(each, PathCollection)]
    return {int(each.get_sizes()[0]): tuple(np.round(each.get_offsets()[0], 6)) for each in scatters}


def test_the_chosen_learning_rate_is_ringed_and_the_left_out_hollow(tmp_path):
    (area,) = figures(tmp_path / "a", CURVES)[1].axes
    assert marks(area) == {130: (0.1, 0.65), 22: (0.4, 0.9)}
    (area,) = figures(tmp_path / "b", CURVES, split="test")[1].axes
    assert area.get_ylabel() == "AURAC (log2), test split"
    assert marks(area) == {130: (0.2, 0.45), 22: (0.4, 0.9)}


def test_without_a_choice_every_learning_rate_is_drawn_on_the_test_split(tmp_path):
    curves, rates = figures(tmp_path, {key: {"test": splits["test"]} for key, splits in CURVES.items()})
    assert [area.get_title() for area in curves.axes] == [
        "lora, R = 4, scaling none",
        "matryoshka (masked), R = 4, scaling none",
    ]
    lora, _ = curves.axes
    assert legend(lora) == ["0.1  0.250", "0.2  0.450", "0.4  0.900", "base  0.250"]
    assert len({to_hex(drawn.get_color()) for drawn in lora.lines}) == 4
    (area,) = rates.axes
    assert area.get_ylabel() == "AURAC (log2), test split" and marks(area) == {}
    assert legend(area) == ["lora", "matryoshka (masked)"]


def test_learning_rates_too_near_to_be_named_are_not():
    assert are_apart([0.1]) and are_apart([1e-3, 2e-3, 4e-3]) and are_apart([3e-4, 5e-4, 1e-3, 2e-3, 3e-3])
    assert not are_apart([9e-6, 1e-5, 1e-4, 1e-3]) and not are_apart(list(np.geomspace(1, 2, int(2 / LEAST_GAP))))


@pytest.mark.parametrize("which", [0, 1])
def test_nothing_is_cut_off_or_overlaps(tmp_path, which):
    same = {split: {1: (0.5, 0.5, 0.5), 2: (0.4, 0.5, 0.6)} for split in ("test", "validation")}
    readouts = ("prefix", "squeeze", "nested", "masked")
    curves = {(method, readout, rate): same for method in POLICIES for readout in readouts for rate in (1e-3, 2e-3)}
    figure = figures(tmp_path, curves)[which]
    figure.draw_without_rendering()
    boxes = [area.get_tightbbox() for area in figure.axes]  # legend, labels and titles included
    assert len(boxes) == 4
    for index, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        for other in boxes[index + 1 :]:
            assert not box.padded(-1).overlaps(other.padded(-1))
