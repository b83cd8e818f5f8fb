"""Every example exactly once an epoch, in an order of the seed, in batches from which it can be read back."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlora_jax.data.packing import RowShape
from mlora_jax.data.pipeline import batch_shape, collate, make_pipeline, make_trials_pipeline
from mlora_jax.data.tokenize import Example

KEYS = {"tokens": np.int32, "positions": np.int32, "targets": np.int32, "weights": np.float32}


@st.composite
def example_lists(draw):
    """Examples whose first token is their own number, so that a row of a batch says whose it is."""
    examples = []
    for number in range(draw(st.integers(1, 12))):
        length = draw(st.integers(2, 20))
        mask = np.array([False, *draw(st.lists(st.booleans(), min_size=length - 1, max_size=length - 1))])
        mask[draw(st.integers(1, length - 1))] = True
        body = draw(st.lists(st.integers(0, 9), min_size=length - 1, max_size=length - 1))
        examples.append(Example(np.array([100 + number, *body], np.int32), mask, number))
    return examples


def some_examples(count, length=6):
    mask = np.arange(length) >= length - 2
    return [Example(np.full(length, 100 + number, np.int32), mask, number) for number in range(count)]


def make_example(length, targets, row):
    return Example(np.full(length, 100 + row, np.int32), np.arange(length) >= length - targets, row)


def rows_of(batch):
    """The rows of a batch in order, over its parts: dictionaries without the part axis."""
    parts, rows = batch["tokens"].shape[:2]
    return [{key: batch[key][part, row] for key in KEYS} for part in range(parts) for row in range(rows)]


def numbers_of(batches):
    return [int(row["tokens"][0]) - 100 for batch in batches for row in rows_of(batch) if row["weights"].any()]


@settings(max_examples=40, deadline=None)
@given(
    examples=example_lists(),
    seed=st.integers(0, 2**32 - 1),
    parts=st.integers(1, 3),
    rows=st.integers(1, 3),
    epochs=st.integers(1, 3),
    multiple=st.sampled_from([1, 4, 32]),
)
def test_batches_hold_exactly_the_examples(examples, seed, parts, rows, epochs, multiple):
    settings_ = {"seed": seed, "batch_size": parts * rows, "epochs": epochs, "pad_multiple": multiple}
    pipeline = make_pipeline(examples, accumulation=parts, **settings_)
    batches = list(pipeline)
    assert len(batches) == pipeline.steps == len(pipeline) == -(-len(examples) * epochs // (parts * rows))

    for batch in batches:
        B, T, A = rows, batch["tokens"].shape[2], batch["positions"].shape[2]
        assert {key: (array.shape, array.dtype) for key, array in batch.items()} == {
            key: ((parts, B, T if key == "tokens" else A), dtype) for key, dtype in KEYS.items()
        }
        assert T % multiple == 0 and A & (A - 1) == 0

    # Every row is an example, whole, or a row of zeros; the examples of each epoch are all of them.
    numbers = []
    for batch in batches:
        for row in rows_of(batch):
            if not row["weights"].any():
                assert not any(row[key].any() for key in KEYS)
                continue
            example = examples[row["tokens"][0] - 100]
            numbers.append(example.row)
            length = len(example.tokens)
            assert (row["tokens"][:length] == example.tokens).all() and not row["tokens"][length:].any()
            real = row["weights"] == 1
            mask = np.zeros(length, bool)
            mask[row["positions"][real] + 1] = True
            assert (mask == example.loss_mask).all() and real.sum() == mask.sum()
            assert (row["targets"][real] == row["tokens"][row["positions"][real] + 1]).all()
            assert not row["weights"][~real].any() and not row["targets"][~real].any()
    for epoch in range(epochs):
        assert sorted(numbers[epoch * len(examples) : (epoch + 1) * len(examples)]) == list(range(len(examples)))
    assert sum(batch["weights"].sum() for batch in batches) == epochs * sum(e.loss_mask.sum() for e in examples)

    # Accumulation cuts the same rows in the same order.
    for one, many in zip(make_pipeline(examples, accumulation=1, **settings_), batches, strict=True):
        assert all((one[key].reshape(many[key].shape) == many[key]).all() for key in KEYS)


def test_padding_is_only_in_the_last_batch():
    pipeline = make_pipeline(some_examples(7), seed=3, batch_size=4, epochs=3)  # 21 rows over 6 batches
    filled = [batch["weights"].any(axis=-1).sum() for batch in pipeline]
    assert filled == [4, 4, 4, 4, 4, 1]


def test_axes_are_the_least_that_fit():
    example = Example(np.arange(33, dtype=np.int32), np.arange(33) >= 28)
    assert batch_shape([example], 32) == (64, 8)
    batch = collate([example], batch_size=2)
    assert batch["tokens"].shape == (1, 2, 64) and batch["positions"].shape == (1, 2, 8)
    assert collate(some_examples(2), batch_size=2, pad_multiple=8)["tokens"].shape == (1, 2, 8)


def test_forced_axes_give_one_shape_for_all_batches():
    short, long = some_examples(2, 6), some_examples(2, 40)
    length, answers = batch_shape([*short, *long], 16)
    shapes = {
        batch["tokens"].shape + batch["targets"].shape
        for examples in (short, long)
        for batch in [collate(examples, batch_size=2, length=length, answers=answers)]
    }
    assert shapes == {(1, 2, 48, 1, 2, 2)}


def test_an_epoch_is_a_permutation_of_its_own_and_so_is_a_seed():
    examples = some_examples(50)
    orders = {}
    for seed in range(6):
        numbers = numbers_of(make_pipeline(examples, seed=seed, batch_size=10, epochs=3))
        for epoch in range(3):
            orders[seed, epoch] = tuple(numbers[50 * epoch : 50 * (epoch + 1)])
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    # All 18 differ: no epoch repeats another, and no seed's epoch is a neighbouring seed's.
    assert len(set(orders.values())) == len(orders)
    # First places are spread: over 200 seeds no example is first far more often than by chance (4 times).
    first = [make_pipeline(examples, seed=seed, batch_size=1).examples_at(0)[0].row for seed in range(200)]
    assert max(first.count(row) for row in set(first)) <= 15 and len(set(first)) > 35


def test_the_order_follows_from_the_seed_alone():
    def order(**changes):
        arguments = {"seed": 5, "batch_size": 4, "accumulation": 1, "epochs": 2, "pad_multiple": 8} | changes
        return numbers_of(make_pipeline(some_examples(11), **arguments))

    expected = order()
    assert order() == expected
    assert order(batch_size=6, accumulation=3, pad_multiple=32) == expected
    assert order(epochs=3)[:22] == expected
    assert order(seed=6) != expected


@pytest.mark.parametrize("after", (0, 1, 4, 5, 9))
def test_a_restored_iterator_goes_on_exactly(after):
    def fresh():
        return iter(make_pipeline(some_examples(13), seed=9, batch_size=4, accumulation=2, epochs=3))

    whole = [{key: value.copy() for key, value in batch.items()} for batch in fresh()]
    stopped = fresh()
    for _ in range(after):
        next(stopped)
    state = json.loads(json.dumps(stopped.get_state()))
    resumed = fresh()
    next(resumed)  # a used iterator is set back as well
    resumed.set_state(state)
    rest = list(resumed)
    assert len(rest) == len(whole) - after == 10 - after
    for expected, batch in zip(whole[after:], rest, strict=True):
        assert all((expected[key] == batch[key]).all() for key in KEYS)
    with pytest.raises(StopIteration):
        next(resumed)


def test_examples_at_is_what_a_step_is_made_of():
    pipeline = make_pipeline(some_examples(7), seed=1, batch_size=3, epochs=2)
    for step, batch in enumerate(pipeline):
        assert [example.row for example in pipeline.examples_at(step)] == numbers_of([batch])
    for step in (-1, 5):
        with pytest.raises(IndexError, match=rf"step {step} is outside 0\.\.4"):
            pipeline.examples_at(step)


WRONG = [
    (
        {"batch_size": 6, "accumulation": 4},
        r"train\.batch_size=6 must be a positive multiple of train\.accumulation=4",
    ),
    ({"batch_size": 0}, r"train\.batch_size=0 must be a positive multiple"),
    ({"accumulation": 0}, r"must be a positive multiple of train\.accumulation=0"),
    ({"epochs": 0}, r"epochs must be at least 1, got 0"),
    ({"pad_multiple": 0}, r"pad_multiple must be at least 1, got 0"),
    ({"seed": -1}, r"the seed must be in 0\.\.4294967295, got -1"),
    ({"seed": 2**32}, r"the seed must be in 0\.\.4294967295, got 4294967296"),
    ({"examples": []}, r"there are no examples to train on"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_a_wrong_value_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(**{"examples": some_examples(3), "seed": 0, "batch_size": 2, **arguments})


def test_collate_names_what_does_not_fit():
    with pytest.raises(ValueError, match=r"length=5 is shorter than the longest example, which has 6 tokens"):
        collate(some_examples(1), batch_size=1, length=5)
    with pytest.raises(ValueError, match=r"answers=1 is less than the 2 targets of an example"):
        collate(some_examples(1), batch_size=1, answers=1)
    with pytest.raises(ValueError, match=r"a batch of 2 rows takes 1 to 2 examples, got 3"):
        collate(some_examples(3), batch_size=2)


def tokens_by_example(batch, trial):
    """Number of the example in the step -> its tokens, of a packed batch."""
    numbers, tokens = batch["examples"][trial].reshape(-1), batch["tokens"][trial].reshape(-1)
    return {number: tokens[numbers == number].tolist() for number in set(numbers.tolist()) - {-1}}


@pytest.mark.parametrize("shards", [1, 2])
def test_trials_follow_their_own_seeds_in_one_shape(shards):
    examples = [make_example(3 + 5 * (number % 7), 1 + number % 3, row=number) for number in range(23)]
    options = {"batch_size": 4, "accumulation": 2, "epochs": 3}
    together = make_trials_pipeline(examples, seeds=(5, 9, 5), shape=RowShape((64, 48, 16)), shards=shards, **options)
    alone = {seed: make_pipeline(examples, seed=seed, **options) for seed in (5, 9)}
    assert together.steps == alone[5].steps == 18 and together.members == (0, 1, 0)
    shapes = set()
    for step, batch in enumerate(together):
        shapes.add(tuple((name, array.shape, array.dtype) for name, array in sorted(batch.items())))
        for trial, seed in enumerate((5, 9, 5)):
            own = alone[seed].examples_at(step)
            expected = {number: example.tokens.tolist() for number, example in enumerate(own)}
            assert tokens_by_example(batch, trial) == expected
            assert batch["weights"][trial].sum() == sum(example.loss_mask.sum() for example in own)
        five, nine = (sum(len(example.tokens) for example in alone[seed].examples_at(step)) for seed in (5, 9))
        assert batch["real_tokens"] == np.float32((2 * five + nine) / 3)
    assert len(shapes) == 1


def test_a_process_makes_only_its_shards():
    examples = [make_example(3 + number % 9, 1, row=number) for number in range(16)]
    options = dict(seeds=(1, 2), shape=RowShape((32,)), shards=4, batch_size=8)
    whole = make_trials_pipeline(examples, **options)
    for part, all_of_it in zip(make_trials_pipeline(examples, columns=(1, 3), **options), whole, strict=True):
        for name in ("tokens", "examples", "positions", "targets", "weights"):
            np.testing.assert_array_equal(part[name], all_of_it[name][:, 1:3])
        np.testing.assert_array_equal(part["passes"], all_of_it["passes"])


def test_trials_resume_where_they_were():
    examples = [make_example(3 + number % 9, 1, row=number) for number in range(11)]
    pipeline = make_trials_pipeline(examples, seeds=(1, 2), shape=RowShape((16,)), batch_size=2, epochs=2)
    first = iter(pipeline)
    for _ in range(4):
        next(first)
    second = iter(pipeline)
    second.set_state(json.loads(json.dumps(first.get_state())))
    left = list(second)
    assert len(left) == 11 - 4
    for one, other in zip(first, left, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)
