"""A run's adapters on tasks of lm-evaluation-harness: every trial at every rank and read-out, each task in one pass."""

from __future__ import annotations

import importlib.metadata
import logging
import pathlib
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from mlora_jax.config import harness_tasks
from mlora_jax.config_type import ConfigDict
from mlora_jax.evaluate import Generator, RankCurve, Scorer, accuracy_and_error
from mlora_jax.run.experiment import Experiment
from mlora_jax.run.folder import RunFolder, task_key
from mlora_jax.run.readouts import read_out_trial
from mlora_jax.training.adapter_file import load_adapter
from mlora_jax.training.curve_records import BASE, CurveKey, CurveRecord, HarnessRun
from mlora_jax.training.phases import AdapterForm
from mlora_jax.trials import Trial, readouts_of

logger = logging.getLogger(__name__)

SPLIT = "test"  # the harness's items count as test items


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


def wanted_curves(config: ConfigDict, folder: RunFolder, trials: Sequence[Trial]) -> list[CurveKey]:
    """The curves on tasks of the harness that the config asks for and the folder does not have.

    Tasks that `folder.not_compared` lists are left out.
    """
    curves, left_out = folder.curves(), folder.not_compared()
    keys = [
        CurveKey(trial.name, SPLIT, readout, *task)
        for task in harness_tasks(config.evaluation.tasks)
        for trial in trials
        if trial.name not in curves.failed and task[0] not in left_out
        for readout in readouts_of(config, trial)
    ]
    return [key for key in keys if key not in curves]


def measure_tasks(experiment: Experiment, folder: RunFolder, trials: Sequence[Trial]) -> Iterator[CurveRecord]:
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
    for form in dict.fromkeys(experiment.form(trial) for trial in trials):
        alike = [trial for trial in trials if experiment.form(trial) == form]
        for name, shots in harness_tasks(experiment.config.evaluation.tasks):
            missing = [
                (trial, key.readout)
                for trial in alike
                for key in wanted
                if (key.trial, key.task, key.asked_shots) == (trial.name, name, shots)
            ]
            if missing:
                yield from _measure(experiment, folder, form, missing, name, shots)


def _measure(experiment: Experiment, folder: RunFolder, form: AdapterForm, missing, name: str, shots: int | None):
    from mlora_jax.evaluate.harness import NestedLM, Variant, evaluate_all, item_verdicts  # slow to import

    config, adapted = experiment.config, experiment.adapted(*form)
    base = Variant(adapted.adapter, jnp.zeros(form.rank))
    variants = {} if CurveKey(BASE, SPLIT, BASE, name, shots) in folder.curves() else {BASE: base}
    loaded: dict[Trial, tuple] = {}
    curves: dict[tuple[Trial, str], tuple] = {}
    for trial, readout in missing:
        if trial not in loaded:
            loaded[trial] = load_adapter(folder.adapter(trial), adapted.adapter)
        adapter, hierarchy, _ = loaded[trial]
        reading = read_out_trial(experiment, trial, adapter, hierarchy, readout, folder.adapter(trial))
        profiles = reading.curve()
        names = [f"{trial.name} {readout} {at}" for at in profiles]
        variants |= {each: Variant(reading.adapter, p) for each, p in zip(names, profiles.values(), strict=True)}
        curves[trial, readout] = tuple(profiles), names
    lm = _language_model(experiment, form, NestedLM, base)
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
        "task": name,
        "split": SPLIT,
        "shots": used,
        "truncated": lm.truncated,
        "harness": HarnessRun(f"lm-eval {importlib.metadata.version('lm-eval')}", metric, shots),
    }
    if BASE in results:
        verdicts = results[BASE][0]
        accuracy, error = accuracy_and_error(verdicts)
        yield CurveRecord(
            trial=None,
            readout=BASE,
            ranks=(0,),
            accuracies=(accuracy,),
            standard_errors=(error,),
            items=len(verdicts),
            **common,
        )
    for (trial, readout), (ranks, names) in curves.items():
        curve = RankCurve.of(readout, ranks, [results[each][0] for each in names])
        folder.save_verdicts(trial.name, readout, task_key(name, used), np.asarray(curve.verdicts))
        yield CurveRecord(
            trial=trial,
            readout=readout,
            ranks=curve.ranks,
            accuracies=curve.accuracies,
            standard_errors=curve.standard_errors,
            items=curve.items,
            **common,
        )


def _language_model(experiment: Experiment, form: AdapterForm, make, variant):
    config, model = experiment.config, experiment.model.config
    adapted = experiment.adapted(*form)
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
