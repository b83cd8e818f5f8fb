"""A cell's results: chosen rates, intervals over items and seeds, and the tables that say what is unfinished."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.stats import t, ttest_1samp

from mlora_jax.core import aurac
from mlora_jax.study.keys import resolve_cell
from mlora_jax.study.regimes import draw_regimes, regrets
from mlora_jax.study.report import draw_study, write_study
from mlora_jax.study.results import area_interval, difference, interval, read_cell, regret
from mlora_jax.study.rivals import Rival
from mlora_jax.training.curve_records import BASE, CURVES, CurveRecord
from mlora_jax.training.records import JsonLines

RANKS, ITEMS = (1, 2, 4), 40
CONFIG = {"rank": 4, "rates": (1e-3, 1e-2, 1e-1), "start": (1e-2,), "seeds": (1, 2), "groups": ("leading", "separate")}


def write_curve(folder, rival, rate, seed, accuracies, rng):
    """Records and verdicts as a run writes them; returns the verdicts on the test rows."""
    trial = rival.trial(4, rate, seed)
    ranks = [r for r in RANKS if r <= trial.rank]
    verdicts = rng.uniform(size=(len(ranks), ITEMS)) < np.array(accuracies)[: len(ranks), None]
    file = folder / "verdicts" / "test" / f"{trial.name}-{rival.readout}.npy"
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, verdicts)
    with JsonLines(folder / CURVES) as lines:
        for split, scale in (("test", 1.0), ("validation", 0.5)):
            accuracies = tuple(scale * verdicts.mean(axis=1))
            errors = (None,) * len(ranks)
            record = CurveRecord(trial, "trec", split, rival.readout, tuple(ranks), accuracies, errors, ITEMS)
            lines.write(*record.to_lines())
    return verdicts


@pytest.fixture
def study(tmp_path):
    """A study of one cell: renest and the worse per_example are complete, lora is at the edge, dylora lacks a seed."""
    rng, folder, found = np.random.default_rng(0), tmp_path / "cell", {}
    folder.mkdir()
    with JsonLines(folder / CURVES) as lines:
        lines.write(*CurveRecord(None, "trec", "test", BASE, (0,), (0.1,), (None,), ITEMS).to_lines())
    high, low = (0.6, 0.8, 0.9), (0.05, 0.1, 0.2)
    begun = (("renest", 1e-2, (1, 2)), ("lora", 1e-1, (1, 2)), ("dylora", 1e-2, (1,)), ("per_example", 1e-2, (1, 2)))
    for name, best, seeds in begun:
        for rate in CONFIG["rates"]:
            write_curve(folder, Rival(name), rate, 1, low, rng)
        text = (folder / "curves.jsonl").read_text().splitlines(keepends=True)
        for seed in seeds:
            trial = Rival(name).trial(4, best, seed).name
            text = [line for line in text if json.loads(line)["trial"] != trial]
            (folder / "curves.jsonl").write_text("".join(text))
            reached = (0.3, 0.3, 0.4) if name == "per_example" else high
            found[name, seed] = write_curve(folder, Rival(name), best, seed, reached, rng)
            text = (folder / "curves.jsonl").read_text().splitlines(keepends=True)
    for rate in CONFIG["rates"]:
        found["alone", rate] = write_curve(folder, Rival("lora", rank=1), rate, 1, (0.9 if rate == 1e-1 else 0.5,), rng)
    found["alone", 2] = write_curve(folder, Rival("lora", rank=1), 1e-1, 2, (0.8,), rng)
    write_curve(folder, Rival("lora", rank=2), 1e-2, 1, (0.8, 0.9), rng)  # unfinished
    return tmp_path, resolve_cell({"study": CONFIG}), found


def test_a_cell_knows_its_best_rates_and_what_is_missing(study):
    workdir, config, found = study
    cell = read_cell("cell", config, workdir / "cell")
    assert (cell.base, cell.items) == (0.1, ITEMS)
    shown = {r.name: (m.learning_rate, m.at_edge, tuple(m.verdicts), m.complete) for r, m in cell.measured.items()}
    assert shown["renest"] == (1e-2, False, (1, 2), True)
    assert shown["lora"] == (1e-1, True, (1, 2), True)
    assert shown["dylora"] == (1e-2, False, (1,), False)
    missing = {rival.name for rival in cell.unfinished}
    assert missing == {
        "dylora",
        "lora + squeeze",
        "renest_30_rotated",
        "lora (R = 2)",
    }
    renest = cell.measured[Rival("renest")]
    np.testing.assert_array_equal(renest.verdicts[2], found["renest", 2])
    assert renest.areas()[0] == pytest.approx(aurac(found["renest", 1].mean(axis=1), RANKS))
    assert area_interval(renest).value == pytest.approx(renest.areas().mean())
    assert sorted(cell.separate()) == [1, 4]


def test_differences_and_regret_are_paired(study):
    workdir, config, found = study
    cell = read_cell("cell", config, workdir / "cell")
    renest, lora, dylora = (cell.measured[Rival(name)] for name in ("renest", "lora", "dylora"))
    assert difference(renest, lora).value == pytest.approx(renest.areas().mean() - lora.areas().mean())
    same = difference(renest, renest)
    assert (same.low, same.value, same.high) == (0.0, 0.0, 0.0)
    assert difference(renest, dylora).value == pytest.approx(renest.areas()[0] - dylora.areas()[0])  # the shared seed
    alone = cell.separate()[1]
    expected = np.mean([alone.verdicts[seed].mean() - found["renest", seed][0].mean() for seed in (1, 2)])
    assert regret(renest, alone).value == pytest.approx(expected)


def test_the_map_of_regimes_is_the_regret_at_the_ends_of_the_ranks(study):
    """At rank 1 against LoRA of rank 1 alone, at rank R against plain LoRA; what is not finished is in brackets."""
    workdir, config, found = study
    text = write_study(workdir, {"cell": config})
    mapped = {(each.rival.name, each.rank): each for each in regrets([read_cell("cell", config, workdir / "cell")])}
    assert set(mapped) == {("renest", 1), ("renest", 4)}
    first = found["alone", 1e-1][0].mean(), found["alone", 2][0].mean()
    assert mapped["renest", 1].ceiling == pytest.approx(np.mean(first))
    for rank, at, alone in ((1, 0, None), (4, 2, "lora")):
        seeds = (1, 2)
        ceiling = first if alone is None else [found[alone, seed][at].mean() for seed in seeds]
        own = [found["renest", seed][at].mean() for seed in seeds]
        assert mapped["renest", rank].loss.value == pytest.approx(np.mean(ceiling) - np.mean(own))
        assert mapped["renest", rank].finished
    shown = mapped["renest", 1].loss
    row = f"| cell | 0.100 | 1 | {np.mean(first):.3f} | {shown.value:+.3f} ({shown.low:+.3f} to {shown.high:+.3f}) |"
    assert row in text
    assert (workdir / "regimes.png").stat().st_size > 10_000
    figure = draw_regimes([mapped["renest", 4]._replace(finished=False)])
    assert [area.get_title() for area in figure.axes] == ["rank 1", "the largest rank R"]


@pytest.mark.parametrize(("of_seeds", "of_items"), [(3.0, 0.3), (1.0, 1.0), (0.3, 3.0), (0.0, 0.0)])
def test_the_interval_covers_what_it_says_with_three_seeds(of_seeds, of_items):
    """Whether the seeds' noise is larger than the items' or smaller; a bootstrap over seeds covers .77 of the first."""
    rng, seeds, items, times = np.random.default_rng(1), 3, 100, 1500
    held = 0
    for _ in range(times):
        noise = 0.1 * of_seeds * rng.normal(size=(seeds, 1)) + of_items * rng.normal(size=items)
        found = interval(0.4 + noise + rng.normal(size=(seeds, items)))
        held += found.low <= 0.4 <= found.high
    assert held / times == pytest.approx(0.95, abs=0.025)


def test_the_interval_is_that_of_an_analysis_of_variance():
    """By loops over the sums of squares; of one seed it is the one-sample t interval."""
    z = np.random.default_rng(2).normal(size=(4, 7)) + np.arange(4)[:, None] + np.arange(7)
    mean = sum(sum(row) for row in z) / 28
    of_seed = [sum(row) / 7 for row in z]
    of_item = [sum(z[s][i] for s in range(4)) / 4 for i in range(7)]
    by_seed = sum(7 * (m - mean) ** 2 for m in of_seed) / 3
    by_item = sum(4 * (m - mean) ** 2 for m in of_item) / 6
    rest = sum((z[s][i] - of_seed[s] - of_item[i] + mean) ** 2 for s in range(4) for i in range(7)) / 18
    both = by_seed + by_item - rest
    half = t.ppf(0.975, both**2 / (by_seed**2 / 3)) * (both / 28) ** 0.5
    found = interval(z)
    np.testing.assert_allclose((found.low, found.value, found.high), (mean - half, mean, mean + half))
    assert interval(z, confidence=0.5).high < found.high
    only_items, expected = interval(z[:1]), ttest_1samp(z[0], 0.0).confidence_interval()
    np.testing.assert_allclose((only_items.low, only_items.high), (expected.low, expected.high))
    # Nothing but the items differs: all degrees of freedom.
    assert np.isfinite(interval(np.tile(z[0], (3, 1))).high)


def test_the_report_says_what_is_there_and_what_is_not(study):
    workdir, config, found = study
    text = write_study(workdir, {"cell": config, "other": config})
    assert (workdir / "study.md").read_text() == text
    assert "| renest | 1.00 | 0.01 | 2 |" in text and "| lora | 1.00 | 0.1* | 2 |" in text
    assert "| dylora (unfinished) | 1.00 | 0.01 | 1 |" in text
    assert "lora at each rank by itself | 2 |" in text and "### renest less the others" in text
    pairs, less = (text[text.index(title) :].split("### ")[1] for title in ("### Pairs", "### renest less"))
    assert "| lora | " in less and "| dylora | " not in less  # dylora lacks a seed
    header, *rows = [[value.strip() for value in line.split("|")[1:-1]] for line in pairs.splitlines() if "|" in line]
    outcomes = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert (outcomes["renest"]["lora"], outcomes["lora"]["renest"]) == ("0/1/0", "0/1/0")
    assert (outcomes["renest"]["per_example"], outcomes["per_example"]["renest"]) == ("1/0/0", "0/0/1")
    assert outcomes["renest"]["dylora"] == "0/0/0"
    # Regret of what is finished, at every rank whose ceiling is: 1, and R by LoRA itself.
    table = text[text.index("### Regret") :].split("### ")[1]
    regrets = {row[1]: row[2:] for line in table.splitlines() if (row := [v.strip() for v in line.split("|")[1:-1]])}
    assert regrets[""] == ["1", "4"] and set(regrets) == {"", "---:", "lora", "per_example", "renest"}
    of_rank_1 = [found["alone", 1e-1].mean(), found["alone", 2].mean()]
    for name in ("renest", "per_example"):
        expected = np.mean(of_rank_1) - np.mean([found[name, seed][0].mean() for seed in (1, 2)])
        assert regrets[name][0].strip("*").startswith(f"{expected:+.3f} (")
    assert regrets["lora"][1].startswith("+0.000 (") and float(regrets["per_example"][1].split()[0].strip("*")) > 0.3
    rates = text[text.index("### The best learning rate") :].split("### ")[1]
    assert "| lora | 0.1* |" in rates and "| dylora | (0.01) |" in rates and "| lora (R = 1) | 0.1* |" in rates
    (ceiling,) = [line for line in text.splitlines() if line.startswith("| lora at each rank by itself")]
    assert f"| {np.mean(of_rank_1):.3f}* |" in ceiling
    assert "- other: lora, lora + squeeze, dylora" in text
    lines = (workdir / "study.csv").read_text().splitlines()
    assert lines[0] == "cell,rival,cost,learning_rate,seed,rank,accuracy,items,complete"
    assert sum(line.startswith("cell,renest,1.0,0.01,") for line in lines) == 6
    assert (workdir / "study.png").stat().st_size > 10_000
    assert isinstance(draw_study([read_cell("cell", config, workdir / "cell")]), Figure)
