"""Which ranks to deploy an adapter of a finished run at: its curve, the smallest rank, and ranks per layer."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Hashable, Sequence

import jax.numpy as jnp
import numpy as np

from mlora_jax.adapters import set_profile
from mlora_jax.core import read_out
from mlora_jax.core.hierarchy import check_rank
from mlora_jax.core.readouts import readouts_without_data
from mlora_jax.evaluate import (
    AllocationRow,
    RankCurve,
    adapter_parameters,
    allocation_curve,
    bootstrap_aurac,
    rank_curve,
    smallest_rank,
)
from mlora_jax.evaluate.choice import STARTS
from mlora_jax.report.ranks import BudgetRow, RankReport, RankRow
from mlora_jax.report.spectrum import spectra
from mlora_jax.run.experiment import Experiment
from mlora_jax.run.folder import find_trial
from mlora_jax.training.adapter_file import load_adapter

# What gets a rank of its own.
GROUPS: dict[str, Callable[[str, int], Hashable]] = {
    "both": lambda path, layer: (path, layer),
    "layer": lambda path, layer: layer,
    "module": lambda path, layer: path,
}
# What the search looks at, on the items to choose on; higher is better.
MEASURES = ("likelihood", "accuracy")


def choose_ranks(
    workdir: str | os.PathLike[str],
    trial_name: str,
    *,
    readout: str = "prefix",
    within: float = 0.01,
    budgets: Sequence[int] | None = None,
    choose_on: str = "validation",
    measure: str = "likelihood",
    levels: Sequence[int] | None = None,
    by: str = "both",
    start: str = "both",
    limit: int = 500,
    say: Callable[[str], None] = lambda text: None,
) -> RankReport:
    """Measures an adapter at every rank of S, and searches ranks per layer for some budgets.

    Args:
      workdir: the folder of a run.
      trial_name: the name of one of its trained trials.
      readout: a key of `mlora_jax.core.READOUTS` that takes nothing but the adapter.
      within: accuracy in 0..1 that the smallest rank may lack of the best.
      budgets: ranks; each stands for the adapter parameters of the uniform prefix of that rank. None is all of S but R.
      choose_on: "validation" chooses on the rows that the run held out and reports on its test split; "test" is for a
        run without such rows: every other test item is chosen on, and the rest is reported on.
      measure: a key of `MEASURES`.
      levels, start, limit: as `allocate_ranks`.
      by: a key of `GROUPS`.
      say: called with a line of progress.

    Raises:
      FileNotFoundError, ValueError: a folder, trial, split or option that cannot be used; the message names it.
    """
    options = (("choose_on", choose_on, _NAMES), ("measure", measure, MEASURES), ("by", by, GROUPS))
    for name, value, allowed in (*options, ("readout", readout, readouts_without_data()), ("start", start, STARTS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if not 0 <= within <= 1:
        raise ValueError(f"within must be in 0..1, as accuracies are (0.01 is one percentage point), got {within}")
    config, trial, folder = find_trial(workdir, trial_name)
    for rank in budgets or ():
        check_rank(rank, "every budget", low=1, high=trial.rank)
    experiment = _with_items_to_choose_on(Experiment.load(config), choose_on)
    adapted = experiment.adapted_for(trial)
    adapter, hierarchy, description = load_adapter(folder, adapted.adapter)
    if not description["finite"]:
        raise ValueError(f"the trial {trial_name} failed: its loss was not finite")
    reading = read_out(adapter, hierarchy, readout, trained_profile=experiment.phases.trained_profile(trial))
    adapter, hierarchy = reading.adapter, reading.hierarchy
    curves = {}
    for split in ("validation", "test"):
        curves[split] = rank_curve(adapted.evaluators[split], adapter, hierarchy, readout=reading.name)
        shown = " ".join(f"{accuracy:.3f}" for accuracy in curves[split].accuracies)
        say(f"ranks {' '.join(map(str, hierarchy.ranks))}, {split}: {shown}")
    objectives = {
        "likelihood": lambda adapter, p: -adapted.validation_loss()(adapter, p),
        "accuracy": lambda adapter, p: float(np.mean(adapted.evaluators["validation"](adapter, p))),
    }
    found = allocation_curve(
        objectives[measure],
        adapted.evaluators["test"],
        adapter,
        hierarchy,
        hierarchy.ranks[:-1] if budgets is None else budgets,
        readout=reading.name,
        levels=levels,
        group=GROUPS[by],
        start=start,
        limit=limit,
        note=lambda row: say(
            f"average rank {row.rank}: uniform {row.uniform.value:.3f}, allocated {row.allocated.value:.3f} "
            f"after {row.allocation.evaluations} evaluations"
        ),
    )
    base = float(np.mean(adapted.evaluators["test"](adapter, jnp.zeros(hierarchy.max_rank))))
    return RankReport(
        title=f"{experiment.data.task.name} on {pathlib.PurePath(config.model.path).name}: {trial_name}",
        readout=readout,
        chosen_on=f"the {len(experiment.rows['validation'])} {_NAMES[choose_on][0]}",
        reported_on=f"the {len(experiment.rows['test'])} {_NAMES[choose_on][1]}",
        measure=measure,
        base=base,
        within=within,
        smallest=smallest_rank(curves["validation"], within),
        aurac=bootstrap_aurac(_verdicts(curves["test"]), hierarchy.ranks),
        rows=_rank_rows(curves, adapter),
        budgets=[_budget_row(row) for row in found],
        spectra=spectra(adapter, set_profile(adapted.profile, hierarchy.prefix(hierarchy.ranks[-1]))),
    )


# choose_on -> the items to choose on, the items reported on.
_NAMES = {
    "validation": ("validation items of the run", "test items"),
    "test": ("test items of even number", "test items of odd number"),
}


def _with_items_to_choose_on(experiment: Experiment, choose_on: str) -> Experiment:
    """The experiment with rows "validation" to choose on and "test" to report on."""
    if choose_on == "test":
        rows = experiment.rows["test"]
        if len(rows) < 2:
            raise ValueError(f"{len(rows)} test items cannot be halved")
        return dataclasses.replace(experiment, rows={"validation": rows[::2], "test": rows[1::2]})
    if "validation" not in experiment.rows:
        raise ValueError(
            "the run held no validation rows out: train with config.validation.holdout above 0, or choose on every "
            "other test item and report on the rest, by --choose_on test"
        )
    return experiment


def _verdicts(curve: RankCurve) -> np.ndarray:
    """The per-item results of a curve that was measured just now."""
    if curve.verdicts is None:
        raise ValueError("this curve comes from records, which hold accuracies and no per-item results")
    return curve.verdicts


def _rank_rows(curves: dict[str, RankCurve], adapter) -> list[RankRow]:
    rows = []
    for at, rank in enumerate(curves["test"].ranks):
        one = {split: bootstrap_aurac(_verdicts(curve)[at : at + 1], (rank,)) for split, curve in curves.items()}
        rows.append(RankRow(rank, adapter_parameters(adapter, rank), one["validation"], one["test"]))
    return rows


def _budget_row(row: AllocationRow) -> BudgetRow:
    return BudgetRow(
        rank=row.rank,
        parameters=row.parameters,
        uniform=row.uniform,
        allocated_parameters=row.allocation.parameters,
        allocated=row.allocated,
        difference=row.comparison.aurac,
        p_value=row.comparison.p_values[0],
        uniform_score=row.uniform_score,
        score=row.allocation.score,
        evaluations=row.allocation.evaluations,
        ranks=row.allocation.ranks,
    )
