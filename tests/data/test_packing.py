"""Packing: every example is in one row, whole; rows are full; and the arrays say where the answers are."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlora_jax.data import Example
from mlora_jax.data.packing import (
    RowShape,
    choose_row_shape,
    choose_widths,
    fill,
    pack,
    pack_members,
    packed_arrays,
    share_out,
)

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=12)
widths = st.sets(st.integers(1, 100), max_size=3).map(lambda some: tuple(sorted(some | {100}, reverse=True)))


@given(st.lists(st.integers(1, 20), max_size=8), st.integers(0, 60))
def test_fill_finds_the_largest_sum(numbers, room):
    chosen = fill(numbers, room)
    assert len(set(chosen)) == len(chosen)
    sums = (sum(some) for size in range(len(numbers) + 1) for some in itertools.combinations(numbers, size))
    assert sum(numbers[at] for at in chosen) == max(total for total in sums if total <= room)


@given(lengths, widths)
def test_every_example_is_in_one_row(sizes, some_widths):
    rows = pack(sizes, some_widths)
    assert sorted(index for _, inside in rows for index in inside) == list(range(len(sizes)))
    for width, inside in rows:
        assert width in some_widths and inside and sum(sizes[at] for at in inside) <= width


@given(st.lists(lengths, min_size=1, max_size=4), widths, st.integers(1, 3))
def test_members_share_rows_of_the_same_widths(members, some_widths, at_once):
    shape = RowShape(some_widths, at_once)
    packed = pack_members(members, shape)
    assert list(packed.widths) == sorted(packed.widths, reverse=True)
    for sizes, rows in zip(members, packed.rows, strict=True):
        assert sorted(itertools.chain(*rows)) == list(range(len(sizes)))
        assert all(sum(sizes[at] for at in row) <= width for row, width in zip(rows, packed.widths, strict=True))
    assert sum(shape.counts(packed.widths)) <= shape.passes(max(map(len, members)))


@given(lengths, st.integers(1, 5))
def test_shards_have_about_as_many_tokens(sizes, shards):
    parts = share_out(sizes, shards)
    assert sorted(itertools.chain(*parts)) == list(range(len(sizes)))
    assert max(map(len, parts)) <= -(-len(sizes) // shards)


def make_example(length, answers, seed):
    generator = np.random.default_rng(seed)
    return Example(generator.integers(1, 99, length).astype(np.int32), np.arange(length) >= length - answers)


@settings(deadline=None)
@given(st.lists(st.integers(2, 14), min_size=1, max_size=7), st.integers(1, 3), st.integers(0, 99))
def test_arrays_hold_tokens_and_answers(sizes, at_once, seed):
    """Read back as the training step reads them, pass by pass at the width of the pass."""
    examples = [make_example(size, 1 + at % (size - 1), seed + at) for at, size in enumerate(sizes)]
    shape = RowShape((24, 14), at_once)
    passes = shape.passes(len(examples))
    arrays, plan = packed_arrays([examples], [range(len(examples))], shape, passes)
    assert {name: array.shape for name, array in arrays.items()} == {
        "tokens": (1, passes, at_once, 24),
        "examples": (1, passes, at_once, 24),
        "positions": (1, passes, at_once * 24),
        "targets": (1, passes, at_once * 24),
        "weights": (1, passes, at_once * 24),
    }
    read = {number: [] for number in range(len(examples))}
    widths = [width for width, count in zip(shape.widths, plan["passes"], strict=True) for _ in range(count)]
    for number, width in enumerate(widths):
        tokens, owners = (arrays[name][0, number, :, :width].reshape(-1) for name in ("tokens", "examples"))
        few = plan["answers"][number]
        assert arrays["weights"][0, number, :few].all() and not arrays["weights"][0, number, few:].any()
        for at, target in zip(arrays["positions"][0, number, :few], arrays["targets"][0, number, :few], strict=True):
            assert tokens[at + 1] == target and owners[at] == owners[at + 1]
            read[owners[at]].append(target)
        for owner in set(owners.tolist()) - {-1}:
            places = np.flatnonzero(owners == owner)
            assert np.array_equal(places, np.arange(places[0], places[-1] + 1))
            assert np.array_equal(tokens[places], examples[owner].tokens)
    for number, example in enumerate(examples):
        assert read[number] == example.tokens[example.loss_mask].tolist()
    assert (arrays["examples"][0, len(widths) :] == -1).all()


@pytest.mark.parametrize(("low", "high", "batch"), [(90, 510, 8), (90, 510, 32), (19, 85, 32), (40, 2000, 16)])
def test_little_of_a_step_is_padding(low, high, batch):
    """Lengths as those of GSM8K, TREC and Platypus; other steps than those that the widths were chosen by."""
    generator = np.random.default_rng(7)
    sizes = np.minimum(low + generator.gamma(3.0, (high - low) / 12, 4000).astype(int), high)
    chosen = choose_widths(sizes.tolist(), batch)
    assert chosen[0] >= sizes.max() and len(chosen) <= 5
    steps = [sizes[at : at + batch].tolist() for at in range(0, 200 * batch, batch) if at + batch <= len(sizes)]
    computed = sum(width for step in steps for width, _ in pack(step, chosen))
    assert 1 - sum(map(sum, steps)) / computed < 0.06


def test_an_accelerator_gets_large_rows_of_one_width():
    shape = choose_row_shape([100, 300, 200] * 10, 32, accumulation=2, accelerator=True)
    assert shape.widths == (512,) and shape.rows == round(200 * 16 / 512)


def test_an_example_that_no_row_holds_is_named():
    with pytest.raises(ValueError, match="no row holds an example of 9 tokens"):
        pack([9], [8, 4])
