"""A cell's results: chosen rates, intervals over items and seeds, and the tables that say what is unfinished."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from mlora_jax.config import resolve
from mlora_jax.core import aurac
from mlora_jax.study.report import draw_study, write_study
from mlora_jax.study.results import area_interval, difference, interval, read_cell, regret
from mlora_jax.study.rivals import Rival

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
    with (folder / "curves.jsonl").open("a") as lines:
        for split, scale in (("test", 1.0), ("validation", 0.5)):
            for r, row in zip(ranks, verdicts, strict=True):
                record = {"schema": 1, "trial": trial.name, "readout": rival.readout, "split": split, "at_rank": r}
                record |= {"of_ranks": len(ranks), "accuracy": scale * row.mean(), "items": ITEMS}
                lines.write(json.dumps(record) + "\n")
    return verdicts


@pytest.fixture
def study(tmp_path):
    """A study of one cell: renest is complete, lora is at the edge, dylora lacks a seed, the rest is missing."""
    rng, folder, found = np.random.default_rng(0), tmp_path / "cell", {}
    folder.mkdir()
    base = {
        "schema": 1,
        "trial": "base",
        "readout": "base",
        "split": "test",
        "at_rank": 0,
        "of_ranks": 1,
        "accuracy": 0.1,
    }
    (folder / "curves.jsonl").write_text(json.dumps(base | {"items": ITEMS}) + "\n")
    high, low = (0.6, 0.8, 0.9), (0.05, 0.1, 0.2)
    for name, best, seeds in (("renest", 1e-2, (1, 2)), ("lora", 1e-1, (1, 2)), ("dylora", 1e-2, (1,))):
        for rate in CONFIG["rates"]:
            write_curve(folder, Rival(name), rate, 1, low, rng)
        text = (folder / "curves.jsonl").read_text().splitlines(keepends=True)
        for seed in seeds:
            trial = Rival(name).trial(4, best, seed).name
            text = [line for line in text if json.loads(line)["trial"] != trial]
            (folder / "curves.jsonl").write_text("".join(text))
            found[name, seed] = write_curve(folder, Rival(name), best, seed, high, rng)
            text = (folder / "curves.jsonl").read_text().splitlines(keepends=True)
    for rate in CONFIG["rates"]:
        found["alone", rate] = write_curve(folder, Rival("lora", rank=1), rate, 1, (0.7 + rate,), rng)
    found["alone", 2] = write_curve(folder, Rival("lora", rank=1), 1e-1, 2, (0.8,), rng)
    write_curve(folder, Rival("lora", rank=2), 1e-2, 1, (0.8, 0.9), rng)  # unfinished
    return tmp_path, resolve({"study": CONFIG}), found


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
        "per_example",
        "sandwich",
        "renest_sandwich",
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


def test_the_interval_covers_items_and_seeds():
    """Of normal effects of seed and item the two-way bootstrap has about the standard error of both together."""
    rng, seeds, items = np.random.default_rng(1), 30, 400
    z = rng.normal(size=(seeds, 1)) + 3 * rng.normal(size=items) + rng.normal(size=(seeds, items))
    found = interval(z)
    error = np.sqrt(z.mean(axis=1).var() / seeds + z.mean(axis=0).var() / items)
    assert found.value == pytest.approx(z.mean())
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(error, rel=0.08)
    assert interval(z, confidence=0.5).high < found.high
    only_items = interval(z[:1])
    assert (only_items.high - only_items.low) / (2 * 1.96) == pytest.approx(z[0].std() / np.sqrt(items), rel=0.08)


def test_the_report_says_what_is_there_and_what_is_not(study):
    workdir, config, _ = study
    text = write_study(workdir, {"cell": config, "other": config})
    assert (workdir / "study.md").read_text() == text
    assert "| renest | 1.00 | 0.01 | 2 |" in text and "| lora | 1.00 | 0.1* | 2 |" in text
    assert "| dylora (unfinished) | 1.00 | 0.01 | 1 |" in text
    assert "lora at each rank by itself | 2 |" in text and "### renest less the others" in text
    pairs, less = (text[text.index(title) :].split("### ")[1] for title in ("### Pairs", "### renest less"))
    assert "| lora | " in less and "| dylora | " not in less  # dylora lacks a seed
    (row,) = [line for line in pairs.splitlines() if line.startswith("| renest | ")]
    assert row.count("0/1/0") == 1 and "1/0/0" not in row and "0/0/1" not in row
    assert "- other: lora, lora + squeeze, dylora" in text
    lines = (workdir / "study.csv").read_text().splitlines()
    assert lines[0] == "cell,rival,cost,learning_rate,seed,rank,accuracy,items,complete"
    assert sum(line.startswith("cell,renest,1.0,0.01,") for line in lines) == 6
    assert (workdir / "study.png").stat().st_size > 10_000
    assert isinstance(draw_study([read_cell("cell", config, workdir / "cell")]), Figure)
