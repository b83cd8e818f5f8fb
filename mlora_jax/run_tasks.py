"""A run's adapters on tasks of lm-evaluation-harness: every trial at every rank and read-out, each task in one pass."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from mlora_jax.config import Trial, harness_tasks
from mlora_jax.core import get_policy, readout_profile
from mlora_jax.evaluate import Generator, RankCurve, Scorer, accuracy_and_error, read_out
from mlora_jax.experiment import Experiment
from mlora_jax.run_folder import RunFolder
from mlora_jax.train.adapter_file import load_adapter


class TaskCurve(NamedTuple):
    """A curve of one trial on one task, and the records of it for curves.jsonl."""

    trial: str
    task: str
    curve: RankCurve
    records: list[dict[str, Any]]


def readouts_of(config: ConfigDict, trial: Trial) -> tuple[str, ...]:
    """The read-outs of a trial's method."""
    return config.evaluation.readouts.get(trial.method, ("prefix",))


def wanted_curves(config: ConfigDict, folder: RunFolder, trials: Sequence[Trial]) -> list[tuple]:
    """The (trial name, read-out, task, shots) that the config asks for and the folder does not have."""
    measured, failed = folder.harness_curves(), folder.failed()
    keys = [
        (trial.name, readout, *task)
        for task in harness_tasks(config.evaluation.tasks)
        for trial in trials
        if trial.name not in failed
        for readout in readouts_of(config, trial)
    ]
    return [key for key in keys if key not in measured]


def measure_tasks(experiment: Experiment, folder: RunFolder, trials: Sequence[Trial]) -> Iterator[TaskCurve]:
    """Measures what `wanted_curves` names: one pass over a task's requests for all trials of one rank.

    Args:
      experiment: loaded.
      folder: holds the trained adapters.
      trials: whose adapters are measured; all of them trained.

    Yields:
      One curve each; the base model's, of one point, where it is not on record yet.

    Raises:
      ValueError: a task that the harness does not know or that local data do not hold.
    """
    wanted = wanted_curves(experiment.config, folder, trials)
    for rank in dict.fromkeys(trial.rank for trial in trials):
        of_rank = [trial for trial in trials if trial.rank == rank]
        for name, shots in harness_tasks(experiment.config.evaluation.tasks):
            missing = [(t, key[1]) for t in of_rank for key in wanted if key[0] == t.name and key[2:] == (name, shots)]
            if missing:
                yield from _measure(experiment, folder, rank, missing, name, shots)


def _measure(experiment: Experiment, folder: RunFolder, rank: int, missing, name: str, shots: int | None):
    from mlora_jax.evaluate.harness import NestedLM, Variant, evaluate_all, item_verdicts  # slow to import

    config, adapted = experiment.config, experiment.adapted(rank)
    base = ("base", "base", name, shots)
    variants, curves = {}, {}
    if base not in folder.harness_curves():
        variants["base"] = Variant(adapted.adapter, jnp.zeros(rank))
    for trial, readout in missing:
        adapter, hierarchy, _ = load_adapter(folder.adapter(trial), adapted.adapter)
        function = get_policy(trial.method).function(hierarchy)
        adapter, hierarchy, how = read_out(adapter, adapted.profile, hierarchy, readout, function)
        names = [f"{trial.name} {readout} {at}" for at in hierarchy.ranks]
        profiles = (readout_profile(hierarchy, how, at) for at in hierarchy.ranks)
        variants |= {each: Variant(adapter, p) for each, p in zip(names, profiles, strict=True)}
        curves[trial, readout] = hierarchy.ranks, names
    lm = _language_model(experiment, rank, NestedLM, Variant(adapted.adapter, jnp.zeros(rank)))
    results = evaluate_all(
        lm,
        variants,
        [name],
        raw_dir=config.evaluation.raw_dir,
        cache_dir=config.data.cache_dir,
        num_fewshot=shots,
        limit=config.evaluation.limit or None,
    )
    first = next(iter(results.values()))
    common = {
        "harness": _harness_version(),
        "task": name,
        "shots": max(first["n-shot"].values()),
        "asked_shots": shots,
        "metric": item_verdicts(first)[1],
        "split": "test",
        "truncated": lm.truncated,
    }
    if "base" in results:
        verdicts, _ = item_verdicts(results["base"])
        curve = RankCurve("base", (0,), *([value] for value in accuracy_and_error(verdicts)), len(verdicts), 0, 0, 0)
        yield TaskCurve("base", name, curve, _records(curve, {"trial": "base", **common}))
    for (trial, readout), (ranks, names) in curves.items():
        curve = RankCurve.of(readout, ranks, [item_verdicts(results[each])[0] for each in names])
        yield TaskCurve(
            trial.name, name, curve, _records(curve, {"trial": trial.name, **dataclasses.asdict(trial), **common})
        )


def _language_model(experiment: Experiment, rank: int, make, variant):
    config, model = experiment.config, experiment.model.config
    adapted = experiment.adapted(rank)
    trees = adapted.evaluation_graphdef, adapted.base, adapted.profile
    shapes = dict(
        max_length=model.max_position_embeddings,
        batch_size=config.evaluation.batch_size,
        pad_multiple=config.data.pad_multiple,
    )
    eos = sorted({*experiment.tokenizer.eos_ids, *model.eos_token_ids})
    scorer = Scorer(*trees, chunk=config.train.loss_chunk, **shapes)
    generator = Generator(*trees, eos=eos, **shapes)
    return make(scorer, generator, experiment.tokenizer, variant, max_length=model.max_position_embeddings)


def _records(curve: RankCurve, fields: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            **fields,
            "readout": curve.readout,
            "at_rank": rank,
            "of_ranks": len(curve.ranks),
            "accuracy": accuracy,
            "stderr": error,
            "items": curve.items,
        }
        for rank, accuracy, error in zip(curve.ranks, curve.accuracies, curve.standard_errors, strict=True)
    ]


def _harness_version() -> str:
    return f"lm-eval {importlib.metadata.version('lm-eval')}"
