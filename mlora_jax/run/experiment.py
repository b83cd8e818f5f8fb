"""An experiment, loaded: its model, its data, and the adapted model of every form that its trials have."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Sequence

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from mlora_jax.config_type import ConfigDict
from mlora_jax.core import RankHierarchy
from mlora_jax.data.load import TaskData, hold_out
from mlora_jax.data.packing import RowShape, choose_row_shape
from mlora_jax.data.pipeline import TrialsPipeline, make_trials_pipeline
from mlora_jax.data.tokenize import Tokenized, check_vocabulary, tokenize
from mlora_jax.evaluate.limits import warn_of_limits
from mlora_jax.models import Decoder, Tokenizer
from mlora_jax.models.generation_config import GenerationSettings, read_generation_settings
from mlora_jax.parallel import hosts
from mlora_jax.parallel.arrays import GlobalBatches, local_rows
from mlora_jax.parallel.mesh import shards_of
from mlora_jax.run.adapted import Adapted, make_adapted, with_optimizer
from mlora_jax.run.inputs import (
    check_context,
    hold_out_validation,
    load_data,
    load_model,
    model_digest,
    model_folder,
    run_mesh,
)
from mlora_jax.training.phases import AdapterForm, TrialPhases
from mlora_jax.trials import Trial


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The loaded model and data of a config.

    Attributes:
      config: resolved.
      model, tokenizer: the frozen base.
      data: the task's rows.
      examples: what is trained on.
      rows: split -> the rows to evaluate on: "test", and "validation" if some are held out.
      mesh: the mesh of all devices; None if there is only one device.
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
        examples = tokenize(
            train, tokenizer, boundary=data.boundary, max_length=options.max_length, overflow=options.overflow
        )
        rows = {"test": list(itertools.islice(data.test, config.evaluation.limit or None))}
        if validation:
            rows["validation"] = validation
        elif config.validation.every:
            raise ValueError(
                "config.validation.every needs rows to validate on: raise config.validation.holdout above 0"
            )
        for name, some in {"train": train, **rows}.items():
            size = model.config.vocab_size
            check_vocabulary(some, tokenizer, vocab_size=size, boundary=data.boundary, split=name)
        context = model.config.max_position_embeddings
        warn_of_limits(config, data, rows, tokenizer, context=context, eos={*tokenizer.eos_ids})
        experiment = cls(config, model, tokenizer, data, examples, rows, mesh)
        if data.task.metric == "exact_match":
            experiment.generation_settings.check()
        if experiment.validates_by_loss:
            experiment.validation  # noqa: B018 - now rather than after the first steps, if no row is left
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
        """The settings for generation in the base's files."""
        return read_generation_settings(model_folder(self.config.model.path))

    @property
    def validates_by_loss(self) -> bool:
        """Whether the validation loss is measured while training."""
        return bool(self.config.validation.every) and self.config.validation.measure == "loss"

    @functools.cached_property
    def validation(self) -> Tokenized:
        """The tokenized rows that the validation loss is computed on, without rows longer than `data.max_length`."""
        return tokenize(
            self.rows["validation"],
            self.tokenizer,
            boundary=self.data.boundary,
            max_length=self.config.data.max_length,
            overflow="drop",
            split="validation",
        )

    @functools.cached_property
    def _by_form(self) -> dict[AdapterForm, Adapted]:
        return {}

    def adapted(self, rank: int, gate: bool = False, optimizer: str = "adam") -> Adapted:
        """The adapted model of a form; made once. Forms that differ in the optimizer share all but the training step.

        Args:
          rank: R.
          gate: whether every adapted layer has a gate.
          optimizer: a key of `mlora_jax.core.optimizers.OPTIMIZERS`.
        """
        form = AdapterForm(rank, gate, optimizer)
        if form not in self._by_form:
            like = next((found for each, found in self._by_form.items() if each[:2] == form[:2]), None)
            self._by_form[form] = make_adapted(self, form) if like is None else with_optimizer(self, form, like)
        return self._by_form[form]

    def form(self, trial: Trial) -> AdapterForm:
        """The form of a trial's adapter."""
        return self.phases.form(trial)

    def adapted_for(self, trial: Trial) -> Adapted:
        """The adapted model that a trial trains."""
        return self.adapted(*self.form(trial))

    @property
    def compilations(self) -> dict[str, int]:
        """How many executables were compiled for training steps and for evaluation."""
        every = self._by_form.values()
        evaluators = {id(evaluator): evaluator for each in every for evaluator in each.evaluators.values()}
        return {
            "train": sum(each.step.compilations for each in every),
            "evaluation": sum(evaluator.compilations for evaluator in evaluators.values()),
        }

    def batches(self, trials: Sequence[Trial]) -> grain.DatasetIterator[dict[str, np.ndarray]] | GlobalBatches:
        """Returns an iterator over the batches of some trials, with `get_state` and `set_state`.

        With several processes, each makes only the rows that its devices hold.

        Args:
          trials: the trials that train together.
        """
        if self.mesh is None or hosts.count() == 1:
            return iter(self.pipeline(trials))
        shards = shards_of(self.mesh)
        columns = local_rows(self.mesh, shards)
        return GlobalBatches(iter(self.pipeline(trials, columns=columns)), self.mesh, shards, columns)

    @functools.cached_property
    def row_shape(self) -> RowShape:
        """The shapes of the packed rows of all trials.

        Raises:
          ValueError: `config.train.row_widths` has no width that holds the longest example.
        """
        options, lengths = self.config.train, [len(example.tokens) for example in self.examples.examples]
        if options.row_widths:
            widths = tuple(sorted(options.row_widths, reverse=True))
            if widths[0] < max(lengths):
                raise ValueError(
                    f"the longest example has {max(lengths)} tokens, more than the largest of "
                    f"config.train.row_widths {widths}: give a width of {max(lengths)} or more, or leave it at ()"
                )
            return RowShape(widths, max(options.rows_at_once, 1))
        device = jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]
        shape = choose_row_shape(
            lengths,
            -(-options.batch_size // shards_of(self.mesh)),
            accumulation=options.accumulation,
            accelerator=device.platform != "cpu",
        )
        return shape._replace(rows=options.rows_at_once or shape.rows)

    def pipeline(self, trials: Sequence[Trial], columns: tuple[int, int] | None = None) -> TrialsPipeline:
        """The packed batches of these trials; of their shards those of `columns`."""
        return make_trials_pipeline(
            self.examples.examples,
            seeds=[trial.seed for trial in trials],
            batch_size=self.config.train.batch_size,
            accumulation=self.config.train.accumulation,
            epochs=self.config.train.epochs,
            pad_multiple=self.config.data.pad_multiple,
            shape=self.row_shape,
            shards=shards_of(self.mesh),
            columns=columns,
        )

    @functools.cached_property
    def steps(self) -> int:
        """The number of optimizer steps of a trial."""
        return -(-len(self.examples.examples) * self.config.train.epochs // self.config.train.batch_size)

    @functools.cached_property
    def phases(self) -> TrialPhases:
        """The phases of the trials: which policy trains a trial at which steps."""
        return TrialPhases(self.config, self.steps)

    def hierarchy(self, trial: Trial) -> RankHierarchy:
        """Returns the hierarchy (S, scales and weights) that a trained trial is read out with."""
        return self.phases.hierarchy(trial)
