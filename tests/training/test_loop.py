"""Trials that train together: the same adapters in any company, and what the loop remembers."""

import copy
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlora_jax.adapters import adapt, split
from mlora_jax.core import RankHierarchy, draw_step, get_policy
from mlora_jax.data import Example, make_trials_pipeline
from mlora_jax.data.packing import RowShape
from mlora_jax.models import Decoder
from mlora_jax.training.draws import DrawnBy, compile_draws
from mlora_jax.training.loop import BatchState, Cadence, Interrupted, LoopPhase, LoopState, train_trials
from mlora_jax.training.step import Schedule, TrialState, init_state, make_optimizer
from mlora_jax.training.trial_trees import select_trials, stack_trees, take_trial, trial_keys
from mlora_jax.training.trials_step import TrialsStep
from tests.tiny import tiny_config
from tests.training.observers import observer

STEPS = 20
HIERARCHY = RankHierarchy((1, 2, 4, 6), "sqrt")
OPTIMIZER = make_optimizer(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0, clip=1.0)
ONE_PROFILE = ["lora", "dylora", "dylora_frozen", "matryoshka"]


SHAPE = RowShape((64, 32))


def examples(count):
    generator = np.random.default_rng(0)
    made = []
    for _ in range(count):
        length = int(generator.integers(4, 30))  # other shapes for other seeds
        tokens = generator.integers(1, 330, length).astype(np.int32)
        made.append(Example(tokens, np.arange(length) >= length - int(generator.integers(1, 4))))
    return made


def untouched(*arguments):
    raise AssertionError(arguments)


@functools.cache
def parts(dtype, dropout):
    """A frozen model, and the step of its adapters, whose executables the tests share."""
    model = Decoder(tiny_config(), dtype=dtype, rngs=nnx.Rngs(0))
    make = functools.partial(adapt, model, 6, ("q_proj", "up_proj"), dropout=dropout)
    graphdef, base, _, profile = split(make(key=jax.random.key(0)))
    return make, base, profile, TrialsStep(graphdef, OPTIMIZER, chunk=5, widths=SHAPE.widths, micro_batch=3)


def train_together(trials, dtype, *, dropout=0.0, rate=1e-3, stop_at=None, saved=None):
    """Trains (method, seed) pairs at once; returns the stacked adapters."""
    make, base, profile, step = parts(dtype, dropout)
    keys = stack_trees(trial_keys(seed) for _, seed in trials)
    state = stack_trees(init_state(split(make(key=trial_keys(seed).adapter))[2], OPTIMIZER) for _, seed in trials)
    pipeline = make_trials_pipeline(
        examples(30), seeds=[seed for _, seed in trials], shape=SHAPE, batch_size=6, accumulation=2, epochs=4
    )
    assert pipeline.steps == STEPS
    count = len(trials)
    schedule = Schedule(jnp.full(count, rate, float), jnp.zeros(count), jnp.full(count, STEPS, float))
    drawn_by = [DrawnBy(get_policy(method), HIERARCHY) for method, _ in trials]
    loop, batches = LoopState.of(count), iter(pipeline)
    state = BatchState(state, None)
    if saved:
        state, loop = saved["state"], LoopState(**saved["memory"])
        batches.set_state(saved["data"])
    kept, logged = {}, []

    def save(state, loop):
        kept.update(
            state=jax.tree.map(jnp.copy, state),
            memory=copy.deepcopy(dataclasses.asdict(loop)),
            data=batches.get_state(),
        )

    try:
        draws = compile_draws(drawn_by, keys.draws, accumulation=2, examples=2)
        take = lambda at, batch, draw, rates: step(base, profile, at, batch, draw, rates, keys.dropout)  # noqa: E731
        state = train_trials(
            [LoopPhase(0, untouched, draws, schedule, take)],
            batches,
            state,
            loop,
            steps=STEPS,
            cadence=Cadence(log=3, validate=0, save=0, patience=0),
            observer=observer(
                log=lambda at, trial, values: logged.append((at, trial, values["loss"])),
                validate=untouched,
                save=save,
                interrupted=lambda: 15 if loop.step == stop_at else 0,
            ),
        )
    except Interrupted as error:
        assert error.code == 128 + 15
    return state, kept, logged


def relative(one, other):
    norm = lambda tree: np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(tree)))  # noqa: E731
    return norm(jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), one, other)) / norm(other)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), pytest.param("float64", 1e-9, marks=pytest.mark.slow)])
def test_company_and_order_change_nothing(dtype, limit):
    """Every method of one profile, each with data of its own: alone, with others, and in another order."""
    with jax.enable_x64(dtype == "float64"):
        dtype = jnp.dtype(dtype)
        trials = [(method, seed) for seed, method in enumerate(ONE_PROFILE)]
        together = train_together(trials, dtype)[0].trials.adapter
        backwards = train_together(trials[::-1], dtype)[0].trials.adapter
        for number, trial in enumerate(trials):
            alone = take_trial(train_together([trial], dtype)[0].trials.adapter, 0)
            assert relative(take_trial(together, number), alone) < limit, trial
            assert relative(take_trial(backwards, len(trials) - 1 - number), alone) < limit, trial
            assert relative(take_trial(together, number - 1), alone) > 1e-2  # another trial is another adapter


def test_a_trial_that_fails_leaves_the_others_alone():
    trials = [("lora", 1), ("dylora", 2)]
    fine = train_together(trials, jnp.float32)[0].trials
    broken, kept, logged = train_together(trials, jnp.float32, rate=jnp.array([1e38, 1e-3]))
    assert broken.trials.finite.tolist() == [False, True]
    assert relative(take_trial(broken.trials.adapter, 1), take_trial(fine.adapter, 1)) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(broken.trials.adapter))
    steps = [[at for at, trial, _ in logged if trial == number] for number in (0, 1)]
    assert steps[1] == [3, 6, 9, 12, 15, 18, 20] and len(steps[0]) < 3 and kept["memory"]["ended"]


@pytest.mark.parametrize("stop_at", [1, 12, 19])
def test_an_interrupted_loop_goes_on_in_the_same_bits(stop_at):
    trials = [("dylora", 1), ("dylora_frozen", 2)]
    whole, _, logs = train_together(trials, jnp.float32, dropout=0.2)
    _, saved, first = train_together(trials, jnp.float32, dropout=0.2, stop_at=stop_at)
    assert saved["memory"]["step"] == stop_at and len(saved["memory"]["losses"]) == stop_at % 3
    ended, _, second = train_together(trials, jnp.float32, dropout=0.2, saved=saved)
    assert first + second == logs
    assert jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.all(x == y)), ended.trials, whole.trials))


def test_draws_are_those_of_each_trial_alone():
    kinds = [("lora", 3), ("dylora", 4), ("lora", 5), ("dylora_frozen", 6), ("dylora", 7)]
    hierarchies = [HIERARCHY, HIERARCHY, RankHierarchy((2, 6), "rank"), HIERARCHY, HIERARCHY]
    keys = jnp.stack([trial_keys(seed).draws for _, seed in kinds])
    drawn_by = [
        DrawnBy(get_policy(method), hierarchy) for (method, _), hierarchy in zip(kinds, hierarchies, strict=True)
    ]
    draw = compile_draws(drawn_by, keys, accumulation=3, examples=2)
    for step in (0, 5):
        together = draw(step)
        assert together.profiles.shape == (5, 3, 1, 1, 6)
        for number, ((policy, hierarchy, _), key) in enumerate(zip(drawn_by, keys, strict=True)):
            alone = draw_step(policy, hierarchy, key, step, accumulation=3)
            assert np.array_equal(together.profiles[number], alone.profiles)
            assert np.array_equal(together.update_mask[number], alone.update_mask)


def test_the_loop_knows_the_best_validation():
    loop = LoopState(8, [], [True, True], [[0.2, -1.0], [0.5, None], [0.5, -3.0]])
    assert loop.best(0) == (1, 0.5) and loop.best(1) == (0, -1.0)
    assert LoopState.of(3).best(2) == (-1, -np.inf)


def test_what_is_no_score_is_never_the_best():
    """A trial that failed before its first validation, and losses that are not finite."""
    assert LoopState(4, [], [False], [[None]]).best(0) == (-1, -np.inf)
    assert LoopState(4, [], [True], [[-np.inf]]).best(0) == (-1, -np.inf)
    assert LoopState(12, [], [True], [[np.nan], [0.5], [np.nan]]).best(0) == (1, 0.5)


def stand_in_state(count):
    """The state of trials of one number each."""
    no = jnp.zeros(count, bool)
    return TrialState({"a": jnp.zeros((count, 1))}, (), jnp.zeros(count, jnp.int32), ~no, no)


def count_up(trials, batch, draw, schedule):
    """A step that adds 1 to a trial's number, which is its loss too."""
    going = trials.finite & ~trials.stopped
    adapter = {"a": trials.adapter["a"] + going[:, None]}
    return trials._replace(adapter=adapter, step=trials.step + going), {
        "loss": adapter["a"][:, 0],
        "finite": trials.finite,
    }


def count_with(state, loop, cadence, *, steps=20, **calls):
    """Trains by `count_up`; returns the state, and what was logged as (step, trial, loss)."""
    logged = []
    calls = {"validate": untouched} | calls
    batches = itertools.repeat({"real_tokens": np.float32(1)})
    log = lambda at, trial, values: logged.append((at, trial, values["loss"]))  # noqa: E731
    phase = LoopPhase(0, untouched, lambda at: None, None, count_up)
    watching = observer(log=log, **calls)
    ended = train_trials([phase], batches, state, loop, steps=steps, cadence=cadence, observer=watching)
    return ended, logged


def test_an_earlier_best_adapter_is_not_kept_alive():
    trials = stand_in_state(2)
    first = jnp.full((2, 1), -1.0)
    scores = iter([[1.0, 2.0], [3.0, 1.0]])
    ended, _ = count_with(
        BatchState(trials, {"a": first}),
        LoopState.of(2),
        Cadence(log=0, validate=2, save=0, patience=0),
        steps=4,
        validate=lambda *arguments: next(scores),
    )
    assert ended.best["a"][:, 0].tolist() == [4, 2]
    assert first.is_deleted() and not ended.trials.adapter["a"].is_deleted()


def test_a_signal_during_a_validation_is_seen_after_it():
    came, saved = [0], []

    def validate(*arguments):
        came[0] = 15
        return [1.0]

    loop = LoopState.of(1)
    with pytest.raises(Interrupted):
        count_with(
            BatchState(stand_in_state(1), None),
            loop,
            Cadence(log=0, validate=2, save=0, patience=0),
            validate=validate,
            save=lambda state, loop: saved.append(loop.step),
            interrupted=lambda: came[0],
        )
    assert loop.step == 2 and saved == [2]


def test_a_trial_that_stops_early_logs_its_last_losses():
    """Trial 0 stops at step 4, between two logs; the other one's means are over the same steps as ever."""
    scores = iter([[1.0, 1.0], [0.0, 2.0], [None, 3.0], [None, 4.0], [None, 5.0]])
    _, logged = count_with(
        BatchState(stand_in_state(2), None),
        LoopState.of(2),
        Cadence(log=3, validate=2, save=0, patience=1),
        steps=9,
        validate=lambda *arguments: next(scores),
    )
    assert logged == [(3, 0, 2.0), (3, 1, 2.0), (4, 0, 4.0), (6, 1, 5.0), (9, 1, 8.0)]
    scores = iter([[1.0], [0.0]])
    cadence = Cadence(log=2, validate=2, save=0, patience=1)
    _, logged = count_with(
        BatchState(stand_in_state(1), None), LoopState.of(1), cadence, validate=lambda *_: next(scores)
    )
    assert logged == [(2, 0, 1.5), (4, 0, 3.5)]  # it has been logged by then


def test_selecting_trials():
    these, those = {"a": jnp.ones((3, 2, 2))}, {"a": jnp.zeros((3, 2, 2))}
    found = select_trials(np.array([True, False, True]), these, those)["a"]
    assert found[:, 0, 0].tolist() == [1, 0, 1]
