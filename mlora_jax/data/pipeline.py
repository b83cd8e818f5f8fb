"""Makes step batches of tokenised examples: shuffled by a seed, with every example once per epoch, and resumable.

The order is grain's: one permutation per epoch, which depends only on the seed and the number of the epoch. A batch may
span epochs, and the last one may have fewer examples. Training takes packed batches (`TrialsPipeline`). A `Pipeline`
gives each example a row of its own, for what looks at examples one by one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import grain
import numpy as np

from mlora_jax.core.ranges import SEEDS
from mlora_jax.data.packing import RowShape, packed_arrays, share_out
from mlora_jax.data.tokenize import Example

# One thread makes the next few batches while the device works. The state counts only batches that were handed out.
READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def batch_shape(examples: Sequence[Example], pad_multiple: int = 32) -> tuple[int, int]:
    """Returns the sizes of the time and answer axes that hold all of these examples.

    Args:
      examples: the examples of one step; or all examples, for one shape in all steps.
      pad_multiple: the time axis is rounded up to a multiple of this. The answer axis is rounded up to a power of two.

    Returns:
      (T, A): the number of tokens and the number of targets per example.

    Example:
      >>> example = Example(np.zeros(5, np.int32), np.array([False, False, True, True, True]))
      >>> batch_shape([example], pad_multiple=8)
      (8, 4)
    """
    length = max(len(example.tokens) for example in examples)
    answers = max(int(example.loss_mask.sum()) for example in examples)
    return _round_up(length, pad_multiple), 1 << (answers - 1).bit_length()


def collate(
    examples: Sequence[Example],
    *,
    batch_size: int,
    accumulation: int = 1,
    pad_multiple: int = 32,
    length: int | None = None,
    answers: int | None = None,
) -> dict[str, np.ndarray]:
    """Makes the batch of one step. The examples keep their order, row by row and then part by part.

    Token t > 0 of an example is predicted by the logits at t - 1, so a target at t appears as position t - 1.

    Args:
      examples: at most `batch_size` examples; missing rows are filled with token 0 and weight 0.
      batch_size: the number of rows of a step, over all parts.
      accumulation: M, the number of parts that the rows of a step are split into.
      pad_multiple: the time axis is rounded up to a multiple of this.
      length: the size of the time axis T; None: the longest example decides.
      answers: the size of the answer axis A; None: the example with the most targets decides.

    Returns:
      tokens [M, B, T] int32 (padding 0), positions [M, B, A] int32, targets [M, B, A] int32,
      weights [M, B, A] float32 (1 for a target, 0 for padding), with B = batch_size // accumulation.

    Raises:
      ValueError: accumulation does not divide the batch size, there are no examples or too many, or `length` or
        `answers` is too small.
    """
    check_batch(batch_size, accumulation)
    if not 0 < len(examples) <= batch_size:
        raise ValueError(f"a batch of {batch_size} rows takes 1 to {batch_size} examples, got {len(examples)}")
    longest, most = batch_shape(examples, pad_multiple)
    needed = max(len(example.tokens) for example in examples)
    length = longest if length is None else length
    answers = most if answers is None else answers
    if length < needed:
        raise ValueError(f"length={length} is shorter than the longest example, which has {needed} tokens")
    tokens = np.zeros((batch_size, length), np.int32)
    positions = np.zeros((batch_size, answers), np.int32)
    targets = np.zeros((batch_size, answers), np.int32)
    weights = np.zeros((batch_size, answers), np.float32)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
        at = np.flatnonzero(example.loss_mask)
        if len(at) > answers:
            raise ValueError(f"answers={answers} is less than the {len(at)} targets of an example")
        positions[row, : len(at)] = at - 1
        targets[row, : len(at)] = example.tokens[at]
        weights[row, : len(at)] = 1.0
    arrays = {"tokens": tokens, "positions": positions, "targets": targets, "weights": weights}
    rows = batch_size // accumulation
    return {name: array.reshape(accumulation, rows, -1) for name, array in arrays.items()}


def check_batch(batch_size: int, accumulation: int) -> None:
    """Checks the size of a batch.

    Args:
      batch_size: the number of rows of a step.
      accumulation: the number of parts that they are split into.

    Raises:
      ValueError: accumulation does not divide the batch size, or one of them is not positive.
    """
    if batch_size < 1 or accumulation < 1 or batch_size % accumulation:
        raise ValueError(
            f"train.batch_size={batch_size} must be a positive multiple of train.accumulation={accumulation}"
        )


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The step batches of some epochs. `iter` returns a grain iterator with `get_state` and `set_state`.

    The state is a small dictionary that JSON can store. An iterator that is set to it continues exactly where the other
    one was.

    Attributes:
      batches: the grain data set, with one list of examples per step.
      batch_size, accumulation, pad_multiple: the arguments of `collate`.
    """

    batches: grain.MapDataset
    batch_size: int
    accumulation: int
    pad_multiple: int

    @property
    def steps(self) -> int:
        """The number of steps, over all epochs."""
        return len(self.batches)

    def __len__(self) -> int:
        return self.steps

    def examples_at(self, step: int) -> list[Example]:
        """Returns the examples of a step in order, from which `collate` makes the batch.

        Raises:
          IndexError: there is no such step.
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is outside 0..{self.steps - 1}")
        # grain's type allows for filtered elements, and nothing is filtered here.
        return cast(list[Example], self.batches[step])

    def collate(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Makes the batch of one step, see the function `collate`."""
        return collate(
            examples,
            batch_size=self.batch_size,
            accumulation=self.accumulation,
            pad_multiple=self.pad_multiple,
        )

    def __iter__(self) -> grain.DatasetIterator[dict[str, np.ndarray]]:
        return iter(self.batches.map(self.collate).to_iter_dataset(READ_OPTIONS))


def make_pipeline(
    examples: Sequence[Example],
    *,
    seed: int,
    batch_size: int,
    accumulation: int = 1,
    epochs: int = 1,
    pad_multiple: int = 32,
) -> Pipeline:
    """Makes a pipeline over the examples.

    Args:
      examples: the examples of `tokenize`.
      seed: 0 to 2**32 - 1; it determines the order of every epoch.
      batch_size: the number of rows of a step, over all parts of the accumulation.
      accumulation: M, the number of parts that the rows of a step are split into.
      epochs: how often every example appears.
      pad_multiple: the time axis is rounded up to a multiple of this.

    Raises:
      ValueError: there are no examples, or a value is out of its range.

    Example:
      >>> example = Example(np.array([1, 5, 2], np.int32), np.array([False, True, True]))
      >>> pipeline = make_pipeline([example] * 3, seed=0, batch_size=2, epochs=2)
      >>> pipeline.steps, next(iter(pipeline))["tokens"].shape
      (3, (1, 2, 32))
    """
    check_batch(batch_size, accumulation)
    if not len(examples):
        raise ValueError("there are no examples to train on")
    for name, value in {"epochs": epochs, "pad_multiple": pad_multiple}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if seed not in SEEDS:
        raise ValueError(f"the seed must be in 0..{SEEDS.high}, got {seed}")
    # `seed` hashes the seed before `shuffle` adds the number of the epoch, so neighbouring seeds share no permutation.
    shuffled = grain.MapDataset.source(examples).seed(seed).shuffle().repeat(epochs)
    batches = shuffled.batch(batch_size, drop_remainder=False, batch_fn=list)
    return Pipeline(batches, batch_size, accumulation, pad_multiple)


@dataclasses.dataclass(frozen=True)
class TrialsPipeline:
    """The packed step batches of K trials that train together, each in the order of its own seed.

    `iter` returns a grain iterator, as for `Pipeline`. Its batches are dictionaries: the arrays of
    `mlora_jax.data.packing.packed_arrays` with the leading axes [K, S], those of its plan, and "real_tokens", the mean
    number of tokens of a trial in the step. All batches have the same shapes.

    Attributes:
      pipelines: one pipeline for each different seed.
      members: [K], the index into `pipelines` of each trial.
      shape: the shapes of the rows.
      shards: S, the number of parts of a step that are computed side by side.
      columns: (first, end), the range of the shards that this process makes; None: all of them.
    """

    pipelines: tuple[Pipeline, ...]
    members: tuple[int, ...]
    shape: RowShape
    shards: int = 1
    columns: tuple[int, int] | None = None

    @property
    def steps(self) -> int:
        """The number of steps, over all epochs; the same for every trial."""
        return self.pipelines[0].steps

    @property
    def passes(self) -> int:
        """P, the size of the axis of passes."""
        return self.shape.passes(-(-self.pipelines[0].batch_size // self.shards))

    def shared_out(self, parts: Sequence[Sequence[Example]]) -> tuple[list[list[Example]], list[list[int]]]:
        """Shares the examples of a step out among the shards.

        Args:
          parts: for each pipeline, the examples of the step.

        Returns:
          For each pipeline and each of its shards, the examples, and their numbers in the step.
        """
        members, numbers = [], []
        for part in parts:
            for own in share_out([len(example.tokens) for example in part], self.shards):
                members.append([part[index] for index in own])
                numbers.append(own)
        return members, numbers

    def stack(self, parts: Sequence[Sequence[Example]]) -> dict[str, np.ndarray]:
        """Makes one batch of the examples of every pipeline at one step.

        Args:
          parts: for each pipeline, the examples of the step.

        Returns:
          The batch, as the class describes it.
        """
        arrays, plan = packed_arrays(*self.shared_out(parts), self.shape, self.passes)
        first, end = self.columns or (0, self.shards)
        for name, array in arrays.items():
            by_pipeline = array.reshape(len(parts), self.shards, *array.shape[1:])[:, first:end]
            arrays[name] = by_pipeline[list(self.members)]
        tokens = [sum(len(example.tokens) for example in parts[member]) for member in self.members]
        return {**arrays, **plan, "real_tokens": np.array(np.mean(tokens), np.float32)}

    def __iter__(self) -> grain.DatasetIterator[dict[str, np.ndarray]]:
        joined = grain.experimental.ZipMapDataset([pipeline.batches for pipeline in self.pipelines])
        return iter(joined.map(self.stack).to_iter_dataset(READ_OPTIONS))


def make_trials_pipeline(
    examples: Sequence[Example],
    *,
    seeds: Sequence[int],
    shape: RowShape,
    shards: int = 1,
    columns: tuple[int, int] | None = None,
    **options: Any,
) -> TrialsPipeline:
    """Makes the pipeline of trials with these seeds.

    Args:
      examples: the examples of `tokenize`.
      seeds: [K], the seed of each trial.
      shape: the shapes of the rows; the first width holds every example.
      shards: S, the number of parts of a step that are computed side by side.
      columns: the range of the shards that this process makes; None: all of them.
      **options: the other arguments of `make_pipeline`.

    Example:
      >>> example = Example(np.array([1, 5, 2], np.int32), np.array([False, True, True]))
      >>> pipeline = make_trials_pipeline([example] * 3, seeds=(7, 8, 7), batch_size=2, shape=RowShape((8, 4)))
      >>> pipeline.steps, next(iter(pipeline))["tokens"].shape
      (2, (3, 1, 3, 1, 8))
    """
    different = list(dict.fromkeys(seeds))
    pipelines = tuple(make_pipeline(examples, seed=seed, **options) for seed in different)
    return TrialsPipeline(pipelines, tuple(different.index(seed) for seed in seeds), shape, shards, columns)
