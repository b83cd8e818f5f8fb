"""What an experiment will cost by arithmetic: no weights, no accelerator, and of the data at most the raw rows."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mlora_jax.adapters import adapt, split
from mlora_jax.compile_report.shapes import model_shape
from mlora_jax.config import harness_tasks, resolve
from mlora_jax.config_type import ConfigDict
from mlora_jax.data import find_task, load_task
from mlora_jax.models import Decoder, DecoderConfig
from mlora_jax.models.decoder import choose_remat
from mlora_jax.run.inputs import model_folder
from mlora_jax.training.phases import AdapterForm, TrialPhases
from mlora_jax.trials import Trial, expand_trials, readouts_of

# English with numbers under a vocabulary of 128k; smaller vocabularies need more tokens.
CHARACTERS_PER_TOKEN = 3.5
SAMPLE = 500  # rows whose lengths are looked at


class TextSize(NamedTuple):
    """Rows of a data set (0: of no such split) and the mean characters of their prompts and answers."""

    train: int
    test: int
    validation: int
    prompt: float
    answer: float


class TaskSize(NamedTuple):
    """Items of a task of the harness, choices of each (0: generated), characters of a question and of an answer."""

    items: int
    choices: int
    question: float
    answer: float


# Counted on the published rows; Open-Platypus from the sizes that the hub states (its bytes, one half each).
PUBLISHED = {"gsm8k": TextSize(7473, 1319, 0, 255, 287), "platypus": TextSize(24926, 0, 0, 600, 600)}
# Items as published. Characters: gsm8k, arc_challenge and hellaswag counted, the others rough means.
HARNESS = {
    "gsm8k": TaskSize(1319, 0, 255, 287),
    "arc_challenge": TaskSize(1172, 4, 150, 30),
    "arc_easy": TaskSize(2376, 4, 130, 20),
    "hellaswag": TaskSize(10042, 4, 226, 135),
    "mmlu": TaskSize(14042, 4, 450, 3),
    "winogrande": TaskSize(1267, 2, 70, 40),
}


class Requests(NamedTuple):
    """Measurements on the tasks of `config.evaluation.tasks`.

    Attributes:
      curves: rank-accuracy curves, over trials, read-outs and tasks.
      requests: texts to score or to answer, over all ranks of all curves; the base's once.
      tokens: the number of tokens that those texts have, roughly; examples in the prompts are included.
      unknown: tasks whose size is not known, left out.
    """

    curves: int
    requests: int
    tokens: int
    unknown: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The cost of an experiment by arithmetic.

    Attributes:
      trials: how many there are.
      steps: optimizer steps of each; rows that are dropped for their length are not known and count.
      rows: the number of rows to train on.
      tokens: the approximate number of tokens that are trained on, over all trials and epochs.
      passes: the mean cost of a step in LoRA steps.
      parameters: the number of parameters of the base.
      base_bytes: the bytes of the base in `config.model.dtype`.
      adapter_parameters: the number of adapter parameters of one trial at each form: a rank, with or without gates, and
        an optimizer.
      adapter_bytes: the bytes of all trained adapters in float32.
      trial_bytes: one trial's adapter, gradients and optimizer at the largest rank, in float32.
      training_operations: floating-point operations of all training, roughly.
      curves: the number of curves on the experiment's own rows.
      own_operations: the operations that measure those curves.
      tasks: what `config.evaluation.tasks` asks for.
      task_operations: the operations that measure those tasks.
    """

    trials: int
    steps: int
    rows: int
    tokens: int
    passes: float
    parameters: int
    base_bytes: int
    adapter_parameters: dict[AdapterForm, int]
    adapter_bytes: int
    trial_bytes: int
    training_operations: float
    curves: int
    own_operations: float
    tasks: Requests
    task_operations: float

    @property
    def operations(self) -> float:
        """Floating-point operations of training and of all evaluation together, roughly."""
        return self.training_operations + self.own_operations + self.task_operations


def estimate(config: ConfigDict | dict) -> Estimate:
    """Counts what a config asks for.

    The model's shape is that of a known hub id or from config.json; no network is asked. Rows are counted and their
    characters measured where they are local (`data.raw_dir`, `data.file`, the quickstart's); else published sizes are
    taken.

    Operations per token: 2 for each parameter of a matrix going forward and as many again for the gradient of the
    inputs; the frozen matrices have no gradients of their own. The head counts at answers only. An adapter's matrices
    count three times, since they have gradients. Attention is counted as causal, over sequences of mean length. What
    the backward pass computes again counts once more: attention if `train.remat` is "dots", and the whole layer if it
    is "full".

    Args:
      config: as `mlora_jax.train` takes it.

    Raises:
      ValueError: a config that cannot be, a model whose shape is not known, or a task of unknown size without local
        rows.
      FileNotFoundError: raw files that are not there.
    """
    resolved = resolve(config)
    trials, shape = expand_trials(resolved), _shape(resolved.model.path)
    size = _text_size(resolved)
    train, evaluated = _rows(resolved, size)
    steps = -(-train * resolved.train.epochs // resolved.train.batch_size)
    limit = min(resolved.data.max_length, shape.max_position_embeddings)
    length = min((size.prompt + size.answer) / CHARACTERS_PER_TOKEN + 2, limit)
    answer = min(size.answer / CHARACTERS_PER_TOKEN + 1, length)
    dtype = jnp.dtype(resolved.model.dtype or "bfloat16")
    base = _base(shape, dtype)
    phases = TrialPhases(resolved, steps)
    forms = [phases.form(trial) for trial in trials]
    adapters = {form: _adapter_parameters(base, resolved, form) for form in dict.fromkeys(forms)}
    passes = [phases.cost(trial) for trial in trials]
    tokens = train * resolved.train.epochs * length
    remat = choose_remat(resolved.train.remat, shape.num_layers)
    forward, full = _per_token(shape, length), remat == "full"
    again = {"none": 0.0, "dots": _attention(shape, length), "full": forward}[remat]
    each = {
        form: tokens * (2 * forward + again + 2 * (3 + full) * extra)
        + tokens / length * answer * 2 * (2 * shape.vocab_size * shape.hidden_size)
        for form, extra in adapters.items()
    }
    points = _points(resolved, trials)
    generates = find_task(resolved.data.task).metric == "exact_match"
    own = sum(evaluated) * (length + generates * resolved.evaluation.max_new_tokens)
    tasks = task_requests(resolved, trials)
    return Estimate(
        trials=len(trials),
        steps=steps,
        rows=train,
        tokens=round(tokens * len(trials)),
        passes=sum(passes) / len(passes),
        parameters=_size(base),
        base_bytes=_size(base) * dtype.itemsize,
        adapter_parameters=adapters,
        adapter_bytes=sum(4 * adapters[form] for form in forms),
        trial_bytes=4 * 4 * max(adapters.values()),
        training_operations=sum(each[form] * cost for form, cost in zip(forms, passes, strict=True)),
        curves=len(evaluated) * sum(len(readouts_of(resolved, trial)) for trial in trials),
        own_operations=(points + 1) * own * _per_token(shape, length, head=generates),
        tasks=tasks,
        task_operations=tasks.tokens * _per_token(shape, 1024),
    )


def task_requests(config: ConfigDict, trials: Sequence[Trial]) -> Requests:
    """Counts the requests and tokens that `config.evaluation.tasks` asks for.

    Args:
      config: the resolved config.
      trials: the trials of the config.
    """
    curves = sum(len(readouts_of(config, trial)) for trial in trials)
    points = _points(config, trials) + 1  # and the base
    asked = harness_tasks(config.evaluation.tasks)
    requests, tokens = 0, 0.0
    for name, shots in asked:
        if name not in HARNESS:
            continue
        size = HARNESS[name]
        items = min(size.items, config.evaluation.limit or size.items)
        texts = max(size.choices, 1)
        answers = size.choices * size.answer / CHARACTERS_PER_TOKEN or config.evaluation.max_new_tokens
        prompt = ((shots or 0) * (size.question + size.answer) + size.question) / CHARACTERS_PER_TOKEN
        requests += items * texts * points
        tokens += items * (prompt + answers) * points  # a prompt is run once for all of its choices
    unknown = tuple(dict.fromkeys(name for name, _ in asked if name not in HARNESS))
    return Requests(curves * len(asked), requests, round(tokens), unknown)


def _points(config: ConfigDict, trials: Iterable[Trial]) -> int:
    """Returns the number of ranks of all curves on one set of rows."""
    ranks = config.adapter.ranks
    return sum(len(readouts_of(config, trial)) * len(trial.hierarchy(ranks).ranks) for trial in trials)


def _shape(path: str) -> DecoderConfig:
    return model_shape(str(model_folder(path)) if path in ("", "quickstart") else path)


def _text_size(config: ConfigDict) -> TextSize:
    options = config.data
    local = options.raw_dir or options.file or options.task == "quickstart"
    if not local:
        if options.task in PUBLISHED:
            return PUBLISHED[options.task]
        raise ValueError(
            f"the size of the task {options.task!r} is not known: give its rows by config.data.raw_dir; known: "
            f"{', '.join(PUBLISHED)}"
        )
    names = ("raw_dir", "cache_dir", "style", "file", "evaluation_file", "holdout", "ignored_keys")
    data = load_task(options.task, **{name: options[name] for name in names})
    rows = list(itertools.islice(data.train, SAMPLE))
    prompt, answer = (sum(len(row[name]) for row in rows) / len(rows) for name in ("prompt", "answer"))
    return TextSize(len(data.train), len(data.test), len(data.validation), prompt, answer)


def _rows(config: ConfigDict, size: TextSize) -> tuple[int, list[int]]:
    """Returns the number of rows to train on, and the number of rows of every split to evaluate on."""
    options, train, test = config.validation, size.train, size.test
    if not test:
        test = max(1, round(train * config.data.holdout))
        train -= test
    held = min(size.validation or max(1, round(train * options.holdout)), options.limit) if options.holdout else 0
    train -= 0 if size.validation else held
    splits = [min(test, config.evaluation.limit or test), held]
    return min(train, config.data.limit or train), [rows for rows in splits if rows]


def _base(shape: DecoderConfig, dtype) -> nnx.Module:
    """The decoder without arrays."""
    return nnx.eval_shape(lambda: Decoder(shape, dtype=dtype, rngs=nnx.Rngs(0)))


def _size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(tree)))


def _adapter_parameters(base: nnx.Module, config: ConfigDict, form: AdapterForm) -> int:
    graphdef, state = nnx.split(base)
    options = config.adapter

    def adapted(state):
        model = nnx.merge(graphdef, state)
        key = jax.random.key(0)
        model = adapt(model, form.rank, options.targets, key=key, init=options.init, gate=form.gate)
        return split(model)[2]

    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(adapted, state)))


def _per_token(shape: DecoderConfig, length: float, *, head: bool = False) -> float:
    """Operations of a forward pass through the layers for one token of a sequence of a length."""
    width = shape.num_heads * shape.head_dim
    projections = shape.hidden_size * (2 * width + 2 * shape.num_kv_heads * shape.head_dim)
    matrices = shape.num_layers * (projections + 3 * shape.hidden_size * shape.intermediate_size)
    return 2 * (matrices + head * shape.vocab_size * shape.hidden_size) + _attention(shape, length)


def _attention(shape: DecoderConfig, length: float) -> float:
    """Operations of the scores and weighted values for one token, in all layers: half of the square."""
    return 2 * shape.num_layers * 2 * shape.num_heads * shape.head_dim * length / 2
