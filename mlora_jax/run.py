"""An experiment from config to report, in named stages."""

from __future__ import annotations

import dataclasses
import importlib.resources
import itertools
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from mlora_jax.adapt import adapt, split
from mlora_jax.config import Trial, expand_trials, resolve
from mlora_jax.core import get_policy
from mlora_jax.data import Pipeline, TaskData, Tokenized, load_task, make_pipeline
from mlora_jax.data.tokenize import tokenize
from mlora_jax.evaluate import (
    ChoiceEvaluator,
    GenerationEvaluator,
    RankCurve,
    accuracy_and_error,
    prepare_choices,
    rank_curve,
)
from mlora_jax.models import Decoder, Tokenizer, load_decoder
from mlora_jax.report import write_report
from mlora_jax.train.adapter_file import save_adapter
from mlora_jax.train.loop import compile_step, train_trial, trial_keys
from mlora_jax.train.progress import RunProgress
from mlora_jax.train.records import JsonLines
from mlora_jax.train.step import Schedule, TrialState, init_state, make_optimizer


@dataclasses.dataclass(frozen=True)
class TrialResult:
    """A finished trial: its adapter's folder and a curve per read-out; none if its loss became infinite or NaN."""

    trial: Trial
    adapter: pathlib.Path
    curves: tuple[RankCurve, ...]
    failed: bool = False


@dataclasses.dataclass(frozen=True)
class Results:
    """What a run found.

    Attributes:
      workdir: folder with config.json, metrics.jsonl, curves.jsonl, adapters/, table.md, table.csv, curves.png.
      base_accuracy: of the model without an adapter.
      trials: one per trial of the config.
      compilations: how many executables the run compiled for training steps and for evaluation.
    """

    workdir: pathlib.Path
    base_accuracy: float
    trials: tuple[TrialResult, ...]
    compilations: dict[str, int]


@dataclasses.dataclass(frozen=True)
class _Adapted:
    """The adapted model of one rank: what every trial of that rank shares."""

    base: Any
    adapter: Any
    profile: Any
    optimizer: Any
    step: Any
    evaluator: Any


def train(config: ConfigDict | dict, workdir) -> Results:
    """Runs an experiment: data, training, evaluation, report.

    Args:
      config: see `mlora_jax.config.DEFAULTS` for the keys; those not set take their defaults.
      workdir: folder for the results; results of an earlier run in it are replaced.

    Raises:
      ValueError: a config, data row, checkpoint or target that cannot be used; the message names it.
      FileNotFoundError: a file of the model or the data is missing.
    """
    config = resolve(config)
    trials = expand_trials(config)
    workdir = pathlib.Path(workdir)
    (workdir / "adapters").mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")

    model, tokenizer = load_model(config)
    data, examples = load_examples(config, tokenizer)
    adapted = {rank: _adapt_for_rank(config, model, tokenizer, data, rank) for rank in config.trials.rank}
    steps = _pipeline(config, examples, seed=0).steps

    with (
        JsonLines(workdir / "metrics.jsonl") as metrics,
        JsonLines(workdir / "curves.jsonl") as curves,
        RunProgress(steps * len(trials)) as progress,
    ):
        progress.say(_describe(config, data, examples, len(trials), steps))
        base_accuracy = _evaluate_base(adapted[trials[0].rank], trials[0].rank, data, curves)
        progress.say(f"base accuracy {base_accuracy:.3f}")
        results = []
        for trial in trials:
            state = _train_one(config, trial, adapted[trial.rank], model, examples, metrics, progress)
            results.append(_finish_one(config, trial, adapted[trial.rank], state, workdir, data, curves, progress))
    write_report(workdir)
    compilations = {
        "train": sum(each.step._cache_size() for each in adapted.values()),
        "evaluation": sum(each.evaluator.compiled._cache_size() for each in adapted.values()),
    }
    return Results(workdir, base_accuracy, tuple(results), compilations)


def load_model(config: ConfigDict) -> tuple[Decoder, Tokenizer]:
    """The frozen base and its tokenizer, from `config.model`."""
    dtype = config.model.dtype
    if dtype == "float64" and not jax.config.jax_enable_x64:
        raise ValueError("config.model.dtype='float64' needs the environment variable JAX_ENABLE_X64=1")
    folder = model_folder(config.model.path)
    model = load_decoder(folder, dtype=jnp.dtype(dtype) if dtype else None)
    model.remat = config.train.remat
    return model, Tokenizer.load(folder)


def model_folder(path: str) -> pathlib.Path:
    """The folder of a model: the path itself, or the base that the package ships for "quickstart"."""
    if path == "quickstart":
        return pathlib.Path(str(importlib.resources.files("mlora_jax") / "assets" / "quickstart"))
    if not path:
        raise ValueError("config.model.path is not set: give a Hugging Face folder by --config.model.path=FOLDER")
    return pathlib.Path(path)


def load_examples(config: ConfigDict, tokenizer: Tokenizer) -> tuple[TaskData, Tokenized]:
    """The task's rows, and its training rows as tokens and loss masks, from `config.data`."""
    options = config.data
    data = load_task(
        options.task,
        raw_dir=options.raw_dir,
        cache_dir=options.cache_dir,
        style=options.style,
        file=options.file,
        evaluation_file=options.evaluation_file,
        holdout=options.holdout,
        tokenizer=tokenizer,
    )
    examples = tokenize(data.train, tokenizer, seam=data.seam, max_length=options.max_length, overflow=options.overflow)
    return data, examples


def make_evaluator(config: ConfigDict, graphdef, base, profile, rows: Sequence[dict], data: TaskData, tokenizer, stop):
    """The evaluator of the task's metric: (adapter, p [R]) -> verdicts [items]."""
    shapes = dict(
        seam=data.seam,
        max_length=config.data.max_length,
        batch_size=config.evaluation.batch_size,
        pad_multiple=config.data.pad_multiple,
    )
    if data.task.metric == "choice":
        requests = prepare_choices(rows, tokenizer, **shapes)
        return ChoiceEvaluator(graphdef, base, profile, requests, chunk=config.train.loss_chunk)
    return GenerationEvaluator(
        graphdef,
        base,
        profile,
        rows,
        tokenizer,
        task=data.task,
        max_new_tokens=config.evaluation.max_new_tokens,
        stop=stop,
        **shapes,
    )


def _adapt(config, model, rank, key) -> nnx.Module:
    options = config.adapter
    return adapt(model, rank, options.targets, key=key, init=options.init, dropout=options.dropout)


def _adapt_for_rank(config, model, tokenizer, data, rank) -> _Adapted:
    adapted = _adapt(config, model, rank, jax.random.key(0))
    train_graphdef, base, adapter, profile = split(adapted)
    graphdef, *_ = split(_in_evaluation_mode(adapted))
    optimizer = make_optimizer(**{k: config.train[k] for k in ("beta1", "beta2", "epsilon", "weight_decay", "clip")})
    rows = list(itertools.islice(data.test, config.evaluation.limit or None))
    stop = sorted({*tokenizer.eos_ids, *model.config.eos_token_ids})
    evaluator = make_evaluator(config, graphdef, base, profile, rows, data, tokenizer, stop)
    step = compile_step(train_graphdef, optimizer, chunk=config.train.loss_chunk)
    return _Adapted(base, adapter, profile, optimizer, step, evaluator)


def _in_evaluation_mode(model: nnx.Module) -> nnx.Module:
    model.eval()
    return model


def _pipeline(config, examples: Tokenized, seed: int) -> Pipeline:
    return make_pipeline(
        examples.examples,
        seed=seed,
        batch_size=config.train.batch_size,
        accumulation=config.train.accumulation,
        epochs=config.train.epochs,
        pad_multiple=config.data.pad_multiple,
    )


def _describe(config, data, examples, trials, steps) -> str:
    device = jax.devices()[0]
    return (
        f"{config.model.path} on {jax.device_count()} x {device.device_kind}; task {data.task.name}: "
        f"{examples.kept} examples to train on ({examples.dropped} dropped, {examples.truncated} truncated), "
        f"{len(data.test)} to test on; {trials} trials of {steps} steps"
    )


def _evaluate_base(adapted: _Adapted, rank: int, data: TaskData, curves: JsonLines) -> float:
    verdicts = adapted.evaluator(adapted.adapter, jnp.zeros(rank))
    accuracy, error = accuracy_and_error(verdicts)
    curves.write(trial="base", **_measured(data, "base", 0, accuracy, error, len(verdicts)))
    return accuracy


def _train_one(config, trial: Trial, adapted: _Adapted, model, examples, metrics, progress) -> TrialState:
    keys = trial_keys(trial.seed)
    _, _, adapter, _ = split(_adapt(config, model, trial.rank, keys.adapter))
    pipeline = _pipeline(config, examples, trial.seed)
    logged = 0

    def log(step: int, values: dict[str, Any]) -> None:
        nonlocal logged
        metrics.write(trial=trial.name, step=step, time=time.time(), **values)
        shown = {name: values[name] for name in ("loss", "tokens_per_second")}
        progress.advance(step - logged, trial=trial.name, step=step, **shown)
        logged = step

    state = train_trial(
        adapted.step,
        adapted.base,
        adapted.profile,
        init_state(adapter, adapted.optimizer),
        pipeline,
        policy=get_policy(trial.method),
        hierarchy=trial.hierarchy(config.adapter.ranks),
        schedule=Schedule(trial.learning_rate, config.train.warmup_steps, pipeline.steps),
        keys=keys,
        log_every=config.train.log_every,
        log=log,
    )
    progress.skip(pipeline.steps - logged)
    return state


def _finish_one(config, trial: Trial, adapted: _Adapted, state: TrialState, workdir, data, curves, progress):
    hierarchy, policy = trial.hierarchy(config.adapter.ranks), get_policy(trial.method)
    description = {
        "trial": dataclasses.asdict(trial),
        "base_model": config.model.path,
        "task": data.task.name,
        "targets": list(config.adapter.targets),
        "steps": int(state.step),
        "finite": bool(state.finite),
    }
    folder = save_adapter(workdir / "adapters" / trial.name, state.adapter, hierarchy, description)
    if not state.finite:
        curves.write(trial=trial.name, **dataclasses.asdict(trial), failed=True)
        progress.say(f"{trial.name}: FAILED, the loss is not finite; the last finite adapter is saved, not evaluated")
        return TrialResult(trial, folder, (), failed=True)
    found = []
    for readout in config.evaluation.readouts.get(trial.method, ("prefix",)):
        curve = rank_curve(
            adapted.evaluator,
            state.adapter,
            adapted.profile,
            hierarchy,
            readout=readout,
            function=policy.function(hierarchy),
        )
        found.append(curve)
        for rank, accuracy, error in zip(curve.ranks, curve.accuracies, curve.standard_errors, strict=True):
            measured = _measured(data, readout, rank, accuracy, error, curve.items)
            curves.write(trial=trial.name, **dataclasses.asdict(trial), **measured)
        shown = " ".join(f"{accuracy:.3f}" for accuracy in curve.accuracies)
        progress.say(f"{trial.name} {readout:8} {shown}  AURAC {curve.linear:.3f} linear, {curve.log2:.3f} log2")
    return TrialResult(trial, folder, tuple(found))


def _measured(data: TaskData, readout: str, at_rank: int, accuracy: float, error: float, items: int) -> dict[str, Any]:
    return dict(
        task=data.task.name,
        split="test",
        shots=0,
        readout=readout,
        at_rank=at_rank,
        accuracy=accuracy,
        stderr=error,
        items=items,
    )
