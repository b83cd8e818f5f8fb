"""What every trial of an experiment shares: model, data, and for each rank the compiled step and the evaluators."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mlora_jax.adapt import adapt, set_profile, split
from mlora_jax.adapt.layers import AdaptedLayer
from mlora_jax.config import Trial, expand_trials
from mlora_jax.core import RankHierarchy
from mlora_jax.data import TaskData, Tokenized, TrialsPipeline, batch_shape, make_trials_pipeline
from mlora_jax.data.load import hold_out
from mlora_jax.data.pipeline import collate
from mlora_jax.data.tokenize import check_vocabulary, tokenize
from mlora_jax.evaluate import ChoiceEvaluator, GenerationEvaluator, Scorer, TokenEvaluator
from mlora_jax.evaluate.limits import warn_of_limits
from mlora_jax.inputs import (
    check_context,
    hold_out_validation,
    load_data,
    load_model,
    model_digest,
    model_folder,
    run_mesh,
)
from mlora_jax.interop import start_from_peft
from mlora_jax.models import Decoder, Tokenizer
from mlora_jax.models.generation_config import GenerationSettings, read_generation_settings
from mlora_jax.parallel import hosts
from mlora_jax.parallel.arrays import (
    GlobalBatches,
    fetch,
    local_rows,
    on_one_device,
    put_replicated,
    put_rows,
    put_weights,
)
from mlora_jax.parallel.mesh import EVALUATED, shards_of
from mlora_jax.parallel.rules import shardings
from mlora_jax.train.grid import bytes_on_device, cut_evenly, group_trials, largest_batch, memory_limit, memory_of
from mlora_jax.train.loop import TrialKeys, TrialsStep, Turn, stack_trees, take_trial, trial_keys
from mlora_jax.train.objective import answer_loss
from mlora_jax.train.phases import TrialPhases, squeeze_trials
from mlora_jax.train.step import TrialState, init_state, make_optimizer

SCORED = {"choice": ChoiceEvaluator, "tokens": TokenEvaluator}  # the metrics that need no generated text


@dataclasses.dataclass(frozen=True)
class Adapted:
    """The adapted model of one rank.

    Attributes:
      base, adapter, profile: trees of `mlora_jax.split`; the adapter is one trial's, before training.
      evaluation_graphdef: of the model in evaluation mode.
      optimizer: optax transformation.
      step: trains K trials at once.
      evaluators: split -> (adapter, p [R]) -> verdicts [items].
      validation_loss: () -> a function (adapter, p [R]) -> nats per answer token on the validation rows; made once.
    """

    base: Any
    adapter: Any
    profile: Any
    evaluation_graphdef: Any
    optimizer: Any
    step: TrialsStep
    evaluators: dict[str, Any]
    validation_loss: Any


class StepTiming(NamedTuple):
    """Tokens of a timed step with padding, and the median of its seconds."""

    tokens: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config stands for, loaded.

    Attributes:
      config: resolved.
      model, tokenizer: the frozen base.
      data: the task's rows.
      examples: what is trained on.
      rows: split -> the rows to evaluate on: "test", and "validation" if some are held out.
      mesh: of all devices; None if there is but one.
    """

    config: ConfigDict
    model: Decoder
    tokenizer: Tokenizer
    data: TaskData
    examples: Tokenized
    rows: dict[str, list[dict]]
    mesh: Mesh | None = None

    @classmethod
    def load(cls, config: ConfigDict) -> Experiment:
        """Loads model and data.

        Raises:
          ValueError, FileNotFoundError: a model or data that cannot be used; the message names it.
        """
        mesh = run_mesh(config)
        model, tokenizer = load_model(config, mesh)
        data = hosts.first_then_others(lambda: load_data(config, tokenizer))
        check_context(config, model, generates=data.task.metric == "exact_match")
        train, validation = hold_out_validation(data, config.validation.holdout, config.validation.limit)
        options = config.data
        if 0 < options.limit < len(train):
            kept = hold_out(len(train), options.limit / len(train), limit=options.limit, name="data.limit")
            train = [train[row] for row in sorted(kept)]
        examples = tokenize(train, tokenizer, seam=data.seam, max_length=options.max_length, overflow=options.overflow)
        rows = {"test": list(itertools.islice(data.test, config.evaluation.limit or None))}
        if validation:
            rows["validation"] = validation
        elif config.validation.every:
            raise ValueError(
                "config.validation.every needs rows to validate on: raise config.validation.holdout above 0"
            )
        for name, some in {"train": train, **rows}.items():
            size = model.config.vocab_size
            check_vocabulary(some, tokenizer, vocab_size=size, seam=data.seam, split=name)
        context = model.config.max_position_embeddings
        warn_of_limits(config, data, rows, tokenizer, context=context, eos={*tokenizer.eos_ids})
        experiment = cls(config, model, tokenizer, data, examples, rows, mesh)
        if data.task.metric == "exact_match":
            experiment.generation_settings.check()
        if experiment.validates_by_loss:
            experiment.validation  # noqa: B018 - now rather than after the first steps, if no row is left
        if config.adapter.start_from:
            alike = {(trial.rank, trial.method, trial.scaling): trial for trial in expand_trials(config)}
            for trial in alike.values():  # now rather than behind the trials before it
                experiment._first_adapter(trial, jax.random.key(0))
        return experiment

    def digests(self) -> dict[str, str]:
        """Name -> digest, of the base model, the tokens that are trained on and the rows that are evaluated on."""
        train = hashlib.sha256()
        for example in self.examples.examples:
            train.update(np.asarray(example.tokens, np.int64).tobytes())
            train.update(np.asarray(example.loss_mask, np.int8).tobytes())
        found = {"base model": model_digest(self.config.model.path), "train rows": train.hexdigest()}
        for name, rows in self.rows.items():
            text = json.dumps(rows, sort_keys=True, default=str)
            found[f"{name} rows"] = hashlib.sha256(text.encode()).hexdigest()
        return {name: digest[:16] for name, digest in found.items()}

    @functools.cached_property
    def generation_settings(self) -> GenerationSettings:
        """What the base's files say of generation."""
        return read_generation_settings(model_folder(self.config.model.path))

    @property
    def validates_by_loss(self) -> bool:
        """Whether the validation loss is looked at while training."""
        return bool(self.config.validation.every) and self.config.validation.measure == "loss"

    @functools.cached_property
    def validation(self) -> Tokenized:
        """What the validation loss is over; rows above `data.max_length` are no part of it."""
        return tokenize(
            self.rows["validation"],
            self.tokenizer,
            seam=self.data.seam,
            max_length=self.config.data.max_length,
            overflow="drop",
            split="validation",
        )

    @functools.cached_property
    def _by_rank(self) -> dict[int, Adapted]:
        return {}

    def adapted(self, rank: int) -> Adapted:
        """The adapted model of a rank; made once."""
        if rank not in self._by_rank:
            self._by_rank[rank] = self._adapt_for_rank(rank)
        return self._by_rank[rank]

    @property
    def compilations(self) -> dict[str, int]:
        """How many executables were compiled for training steps and for evaluation."""
        every = self._by_rank.values()
        evaluators = [evaluator for each in every for evaluator in each.evaluators.values()]
        return {
            "train": sum(each.step.compilations for each in every),
            "evaluation": sum(evaluator.compilations for evaluator in evaluators),
        }

    def batches(self, trials: Sequence[Trial]):
        """An iterator over the batches of these trials, with `get_state` and `set_state`.

        With several processes each of them makes the rows that its devices hold.
        """
        if hosts.count() == 1:
            return iter(self.pipeline(trials))
        rows = self.config.train.batch_size // self.config.train.accumulation
        columns = local_rows(self.mesh, rows)
        return GlobalBatches(iter(self.pipeline(trials, columns=columns)), self.mesh, rows, columns)

    def pipeline(self, trials: Sequence[Trial], columns: tuple[int, int] | None = None) -> TrialsPipeline:
        """The batches of these trials; of their rows those of `columns`, see `mlora_jax.data.pipeline.collate`."""
        return make_trials_pipeline(
            self.examples.examples,
            seeds=[trial.seed for trial in trials],
            batch_size=self.config.train.batch_size,
            accumulation=self.config.train.accumulation,
            epochs=self.config.train.epochs,
            pad_multiple=self.config.data.pad_multiple,
            columns=columns,
        )

    @functools.cached_property
    def steps(self) -> int:
        """Optimizer steps of a trial."""
        return -(-len(self.examples.examples) * self.config.train.epochs // self.config.train.batch_size)

    def start(self, trials: Sequence[Trial]) -> tuple[TrialState, TrialKeys]:
        """State and keys [K] of trials of one rank before their first step."""
        adapted = self.adapted(trials[0].rank)
        keys = [trial_keys(trial.seed) for trial in trials]
        adapters = [self._first_adapter(trial, key.adapter) for trial, key in zip(trials, keys, strict=True)]
        first = functools.partial(init_state, optimizer=adapted.optimizer)
        if self.mesh is None:
            return stack_trees(map(first, adapters)), stack_trees(keys)
        # By way of the host, so that no device holds more than its part.
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *map(jax.device_get, adapters))
        placed = shardings(jax.eval_shape(jax.vmap(first), stacked), self.mesh, trials=True)
        state = jax.jit(jax.vmap(first), out_shardings=placed)(put_weights(stacked, self.mesh, trials=True))
        return state, stack_trees(keys)

    def _first_adapter(self, trial: Trial, key: jax.Array):
        model, path = self._adapt(trial.rank, key), self.config.adapter.start_from
        if not path:
            return split(model)[2]
        return start_from_peft(path, model, self.phases.function(trial, 0))

    @functools.cached_property
    def phases(self) -> TrialPhases:
        """Which policy trains a trial when."""
        return TrialPhases(self.config, self.steps)

    def turns(self, trials: Sequence[Trial], keys: TrialKeys) -> list[Turn]:
        """What happens between the phases of trials that train together."""
        starts = self.phases.method(trials[0]).starts(self.steps)
        squeezed = functools.partial(self._squeeze, trials, keys)
        return [Turn(step, functools.partial(squeezed, phase)) for phase, step in enumerate(starts[1:])]

    def _squeeze(self, trials: Sequence[Trial], keys: TrialKeys, phase: int, state: TrialState) -> TrialState:
        """The state at the end of a phase as that at the beginning of the next one."""
        adapted, carry = self.adapted(trials[0].rank), self.phases.method(trials[0]).carry
        functions = jnp.stack([self.phases.function(trial, phase) for trial in trials])
        fresh = jax.vmap(lambda key: jax.random.fold_in(key, phase))(keys.adapter)
        options = {"init": self.config.adapter.init}
        squeeze = functools.partial(squeeze_trials, adapted.optimizer, carry, adapted.profile, **options)
        if self.mesh is None:
            return squeeze(state, functions, fresh)
        # One trial after the other on one device, the results on the host.
        done = []
        for slot in range(len(trials)):
            one = jax.tree.map(lambda leaf: leaf[None], on_one_device(take_trial(state, slot)))
            done.append(jax.device_get(squeeze(one, functions[slot : slot + 1], fresh[slot : slot + 1])))
        return put_weights(jax.tree.map(lambda *x: np.concatenate(x), *done), self.mesh, trials=True)

    def hierarchy(self, trial: Trial) -> RankHierarchy:
        """S, scales and weights that a trained trial is read out with."""
        return self.phases.hierarchy(trial)

    def plan(
        self, trials: Sequence[Trial], *, before_each: Callable[[], None] = lambda: None
    ) -> list[tuple[tuple[Trial, ...], int]]:
        """Cuts trials into batches: (trials, slots) each. Compiles where the size is to be found out.

        Args:
          trials: what is to be trained.
          before_each: called before every group of trials that share an executable; may raise to leave.

        Raises:
          ValueError: not even one trial fits in memory.
        """
        groups = group_trials(trials, lambda trial: (trial.rank, self.phases.shape(trial)))
        batches = []
        for group in groups:
            before_each()
            at_once = self.config.train.trials_at_once or self._fitting(group)
            # Slots fill the trial axis of the mesh.
            batches += [(some, self._filled(slots)) for some, slots in cut_evenly(group, min(at_once, len(group)))]
        return batches

    def _filled(self, count: int) -> int:
        axis = 1 if self.mesh is None else self.mesh.shape["trial"]
        return -(-count // axis) * axis

    def _fitting(self, group: Sequence[Trial]) -> int:
        base, beside = bytes_on_device(self.adapted(group[0].rank).base), self._beside_a_step(group[0].rank)
        limit = memory_limit(self.config.train.memory_gib)
        phases = range(len(self.phases.shape(group[0])))

        def needed(count):
            count = self._filled(count)
            return max(memory_of(self.compile_largest(group[0], count, phase)) for phase in phases) + count * beside

        most = hosts.agree(largest_batch(needed, base, len(group), limit))
        fewest = min(self._filled(1), len(group))
        if most <= fewest or jax.default_backend() != "cpu":
            return most
        # On a CPU many trials at once fall out of its caches, and may be slower than one after the other.
        per_trial = lambda count: self.time_steps(self._slotted(group, count), 2).seconds / count  # noqa: E731
        return hosts.agree(min((most, fewest), key=per_trial))

    def _slotted(self, group: Sequence[Trial], count: int) -> list[Trial]:
        return [*group[:count], *[group[0]] * (self._filled(count) - count)]

    def _beside_a_step(self, rank: int) -> int:
        """Bytes of one trial while it trains besides those of its step: its best adapter, and a copy that is saved."""
        best = self.adapted(rank).adapter if self.config.validation.keep == "best" else None
        return self._trial_bytes(self._one_state(rank)) + 2 * self._trial_bytes(best)

    def _trial_bytes(self, tree) -> int:
        """Of one trial's share of a tree that lies along the trial axis, on one device."""
        axis = 1 if self.mesh is None else self.mesh.shape["trial"]
        return -(-bytes_on_device(tree, None if self.mesh is None else shardings(tree, self.mesh)) // axis)

    def _one_state(self, rank: int) -> TrialState:
        """Shapes of one trial's state."""
        adapted = self.adapted(rank)
        return jax.eval_shape(lambda adapter: init_state(adapter, adapted.optimizer), adapted.adapter)

    def time_steps(self, trials: Sequence[Trial], steps: int, phase: int = 0) -> StepTiming:
        """Trains trials of one group for a few steps as in one of their phases, and forgets them."""
        adapted, schedule = self.adapted(trials[0].rank), self.phases.schedules(trials)(0)
        state, keys = self.start(trials)
        arrays, draws = next(self.batches(trials)), self.phases.draws_in(phase, trials, keys)
        seconds = []
        for number in range(steps + 1):
            start = time.monotonic()
            state, metrics = adapted.step(
                adapted.base, adapted.profile, state, arrays, draws(number), schedule, keys.dropout
            )
            jax.block_until_ready(metrics)
            seconds.append(time.monotonic() - start)
        return StepTiming(arrays["tokens"].size, float(np.median(seconds[1:])))  # the first one compiles

    def compile_largest(self, trial: Trial, count: int, phase: int) -> jax.stages.Compiled:
        """The step of `count` trials like this one in one of its phases at the largest batch shape there is."""
        adapted, options = self.adapted(trial.rank), self.config.train
        one = self._one_state(trial.rank)
        rows = options.batch_size // options.accumulation
        length, answers = batch_shape(self.examples.examples, self.config.data.pad_multiple)
        integers = jax.ShapeDtypeStruct((options.accumulation, rows, length), jnp.int32)
        positions = jax.ShapeDtypeStruct((options.accumulation, rows, answers), jnp.int32)
        batch = {
            "tokens": integers,
            "positions": positions,
            "targets": positions,
            "weights": jax.ShapeDtypeStruct(positions.shape, jnp.float32),
        }
        keys = jax.eval_shape(lambda: trial_keys(0))
        draw = jax.eval_shape(self.phases.draws_in(phase, [trial], stack_trees([trial_keys(0)])), 0)
        many = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), tree)  # noqa: E731
        draw = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), draw)
        schedule = jax.eval_shape(lambda: self.phases.schedules([trial] * count)(0))
        return adapted.step.compile(
            adapted.base, adapted.profile, many(one), many(batch), draw, schedule, many(keys.dropout)
        )

    def _adapt(self, rank: int, key: jax.Array) -> nnx.Module:
        options = self.config.adapter
        model = adapt(self.model, rank, options.targets, key=key, init=options.init, dropout=options.dropout)
        if isinstance(getattr(model, "embed_tokens", None), AdaptedLayer):
            raise ValueError(
                f"config.adapter.targets {tuple(options.targets)} take embed_tokens too, which is no linear layer and "
                "has no place in an export: name the layers to adapt, for example q_proj, v_proj"
            )
        return model

    def _adapt_for_rank(self, rank: int) -> Adapted:
        config, adapted = self.config, self._adapt(rank, jax.random.key(0))
        train_graphdef, base, adapter, profile = split(adapted)
        base = put_weights(base, self.mesh)
        if self.mesh is not None:
            adapter = jax.device_get(adapter)  # a template, of no use on a device
        graphdef, *_ = split(_in_evaluation_mode(adapted))
        names = ("beta1", "beta2", "epsilon", "weight_decay", "clip")
        optimizer = make_optimizer(**{name: config.train[name] for name in names})
        evaluators = {name: self._evaluator(graphdef, base, profile, rows) for name, rows in self.rows.items()}
        options = dict(chunk=config.train.loss_chunk, mesh=self.mesh, engine=config.parallel.engine)
        step = TrialsStep(train_graphdef, optimizer, **options)
        loss = functools.partial(self._validation_loss, graphdef, base, profile)
        return Adapted(base, adapter, profile, graphdef, optimizer, step, evaluators, functools.cache(loss))

    def _evaluator(self, graphdef, base, profile, rows: Sequence[dict]):
        """The evaluator of the task's metric: (adapter, p [R]) -> verdicts [items]."""
        config, data = self.config, self.data
        shapes = dict(
            seam=data.seam,
            max_length=config.data.max_length,
            batch_size=config.evaluation.batch_size,
            pad_multiple=config.data.pad_multiple,
            mesh=self.mesh,
        )
        if data.task.metric in SCORED:
            seam = shapes.pop("seam")
            scorer = Scorer(graphdef, base, profile, chunk=config.train.loss_chunk, **shapes)
            return SCORED[data.task.metric](scorer, rows, self.tokenizer, seam=seam)
        # As the harness does, a long prompt makes room for its answer.
        room = self.model.config.max_position_embeddings - config.evaluation.max_new_tokens
        shapes["max_length"] = min(config.data.max_length, room)
        return GenerationEvaluator(
            graphdef,
            base,
            profile,
            rows,
            self.tokenizer,
            task=data.task,
            max_new_tokens=config.evaluation.max_new_tokens,
            stop=sorted(self.tokenizer.eos_ids),
            settings=self.generation_settings,
            **shapes,
        )

    def _validation_loss(self, graphdef, base, profile):
        """(adapter, p [R]) -> nats per answer token on the validation rows."""
        config, examples, mesh = self.config, self.validation.examples, self.mesh
        shards = shards_of(mesh, EVALUATED)
        size = -(-config.evaluation.batch_size // shards) * shards
        parts = [
            collate(examples[start : start + size], batch_size=size, pad_multiple=config.data.pad_multiple)
            for start in range(0, len(examples), size)
        ]
        answers = sum(part["weights"].sum() for part in parts)
        # [S, B / S, ...]
        batches = [{name: x.reshape(shards, -1, x.shape[-1]) for name, x in part.items()} for part in parts]
        batches = [put_rows(batch, mesh, 0, over=EVALUATED) for batch in batches]

        @jax.jit
        def total(base, adapter, p, batch):
            values = set_profile(profile, p)
            one = lambda part: answer_loss(  # noqa: E731
                graphdef, base, adapter, values, part, chunk=config.train.loss_chunk
            )
            if mesh is None:
                return one(jax.tree.map(lambda x: x[0], batch))
            return jnp.sum(jax.vmap(one, spmd_axis_name=EVALUATED)(batch))

        def mean(adapter, p):
            adapter, p = put_weights(adapter, mesh), put_replicated(p, mesh)
            return sum(float(fetch(total(base, adapter, p, batch))) for batch in batches) / answers

        return mean


def _in_evaluation_mode(model: nnx.Module) -> nnx.Module:
    model.eval()
    return model
