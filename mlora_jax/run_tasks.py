"""A run's adapters on tasks of lm-evaluation-harness: every trial at every rank and read-out, each task in one pass."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from mlora_jax.config import Trial, harness_tasks
from mlora_jax.evaluate import Generator, RankCurve, Scorer, accuracy_and_error
from mlora_jax.experiment import Experiment
from mlora_jax.readouts import read_out_trial
from mlora_jax.run_folder import RunFolder, task_key
from mlora_jax.train.adapter_file import load_adapter

logger = logging.getLogger(__name__)


class TaskCurve(NamedTuple):
    """A curve of one trial on one task, and the records of it for curves.jsonl."""

    trial: str
    task: str
    curve: RankCurve
    records: list[dict[str, Any]]


def readouts_of(config: ConfigDict, trial: Trial) -> tuple[str, ...]:
    """The read-outs of a trial's method."""
    return config.evaluation.readouts.get(trial.method, ("prefix",))


def unavailable_tasks(config: ConfigDict) -> dict[str, str]:
    """The tasks of the config that local data do not hold, and what is missing; needs `config.evaluation.raw_dir`.

    Raises:
      ValueError: a task that the harness does not know either.
      FileNotFoundError: there is no such folder of raw data.
    """
    names = list(dict.fromkeys(name for name, _ in harness_tasks(config.evaluation.tasks)))
    if not names:
        return {}
    from mlora_jax.evaluate.task_files import check_names, gather_local  # slow to import

    check_names(names)
    if not config.evaluation.raw_dir:
        return {}
    if not pathlib.Path(config.evaluation.raw_dir).expanduser().is_dir():
        raise FileNotFoundError(f"there is no folder {config.evaluation.raw_dir} (config.evaluation.raw_dir)")
    return gather_local(names, raw_dir=config.evaluation.raw_dir, cache_dir=config.data.cache_dir)[1]


def wanted_curves(config: ConfigDict, folder: RunFolder, trials: Sequence[Trial]) -> list[tuple]:
    """The (trial name, read-out, task, shots) that the config asks for and the folder does not have.

    Tasks that `folder.not_compared` lists are left out.
    """
    measured, failed, left_out = folder.harness_curves(), folder.failed(), folder.not_compared()
    keys = [
        (trial.name, readout, *task)
        for task in harness_tasks(config.evaluation.tasks)
        for trial in trials
        if trial.name not in failed and task[0] not in left_out
        for readout in readouts_of(config, trial)
    ]
    return [key for key in keys if key not in measured]


def measure_tasks(experiment: Experiment, folder: RunFolder, trials: Sequence[Trial]) -> Iterator[TaskCurve]:
    """Measures what `wanted_curves` names: one pass over a task's requests for all trials of one rank.

    Per-item results are saved in the folder too, for paired comparisons and intervals.

    Args:
      experiment: loaded.
      folder: holds the trained adapters.
      trials: whose adapters are measured; all of them trained.

    Yields:
      One curve each; the base model's, of one point, where it is not on record yet.

    Raises:
      ValueError: a task that the harness does not know.
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
    base = Variant(adapted.adapter, jnp.zeros(rank))
    variants = {} if ("base", "base", name, shots) in folder.harness_curves() else {"base": base}
    loaded: dict[Trial, tuple] = {}
    curves: dict[tuple[Trial, str], tuple] = {}
    for trial, readout in missing:
        if trial not in loaded:
            loaded[trial] = load_adapter(folder.adapter(trial), adapted.adapter)
        adapter, hierarchy, _ = loaded[trial]
        adapter, profiles = read_out_trial(experiment, trial, adapter, hierarchy, readout, folder.adapter(trial))
        names = [f"{trial.name} {readout} {at}" for at in profiles]
        variants |= {each: Variant(adapter, p) for each, p in zip(names, profiles.values(), strict=True)}
        curves[trial, readout] = tuple(profiles), names
    lm = _language_model(experiment, rank, NestedLM, base)
    results = evaluate_all(
        lm,
        variants,
        [name],
        raw_dir=config.evaluation.raw_dir,
        cache_dir=config.data.cache_dir,
        num_fewshot=shots,
        limit=config.evaluation.limit or None,
        keep=lambda found: (*item_verdicts(found), max(found["n-shot"].values())),
    )
    _, metric, used = next(iter(results.values()))
    if shots is not None and used != shots:
        logger.warning("%s is defined with %d examples and was not given %d", name, used, shots)
    common = {
        "harness": _harness_version(),
        "task": name,
        "shots": used,
        "asked_shots": shots,
        "metric": metric,
        "split": "test",
        "truncated_requests": lm.truncated,
    }
    if "base" in results:
        verdicts = results["base"][0]
        curve = RankCurve("base", (0,), *([value] for value in accuracy_and_error(verdicts)), len(verdicts), 0, 0, 0)
        yield TaskCurve("base", name, curve, _records(curve, {"trial": "base", **common}))
    for (trial, readout), (ranks, names) in curves.items():
        curve = RankCurve.of(readout, ranks, [results[each][0] for each in names])
        folder.save_verdicts(trial.name, readout, task_key(name, used), curve.verdicts)
        records = _records(curve, {"trial": trial.name, **dataclasses.asdict(trial), **common})
        yield TaskCurve(trial.name, name, curve, records)


def _language_model(experiment: Experiment, rank: int, make, variant):
    config, model = experiment.config, experiment.model.config
    adapted = experiment.adapted(rank)
    trees = adapted.evaluation_graphdef, adapted.base, adapted.profile
    shapes = dict(
        max_length=model.max_position_embeddings,
        batch_size=config.evaluation.batch_size,
        pad_multiple=config.data.pad_multiple,
        mesh=experiment.mesh,
    )
    tokenizer = experiment.tokenizer
    scorer = Scorer(*trees, chunk=config.train.loss_chunk, **shapes)
    eos = sorted({*tokenizer.eos_ids} - {*tokenizer.shown_stops})
    settings = experiment.generation_settings
    generator = Generator(*trees, eos=eos, ends=tokenizer.eos_ids, settings=settings, **shapes)
    return make(scorer, generator, tokenizer, variant, max_length=model.max_position_embeddings)


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
