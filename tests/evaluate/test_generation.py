"""Prefill and decode: greedy against `transformers.generate`, mixed ranks, draws, early stop and compilations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlora_jax.core import RankHierarchy
from mlora_jax.evaluate import Generator, StopStrings
from mlora_jax.evaluate.programs import STEPS
from mlora_jax.evaluate.sampling import NOT_FINITE
from mlora_jax.models import Tokenizer, load_decoder
from tests.data.conftest import write_tokenizer
from tests.oracles.torch_generate import greedy
from tests.tiny import adapted_trees, random_like, write_checkpoint

PATHS = {"q_proj": "self_attn.q_proj", "v_proj": "self_attn.v_proj", "down_proj": "mlp.down_proj"}
HIERARCHY = RankHierarchy((1, 2, 4, 6), "sqrt")
RANKS = (0, 1, 4, 6)


def adapted(model, rank, targets, *, scale):
    """Trees of a model with an adapter none of whose factors is zero."""
    graphdef, base, adapter, profile = adapted_trees(model, rank, targets)
    return graphdef, base, random_like(adapter, seed=3, scale=scale), profile


def generator(trees, **changes):
    graphdef, base, _, profile = trees
    options = {"max_length": 64, "batch_size": 4, "pad_multiple": 32, "eos": ()} | changes
    return Generator(graphdef, base, profile, **options)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The output head is adapted too: it sees hidden states without a time axis."""
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), tie_word_embeddings=False)
    return adapted(load_decoder(folder), 6, ("q_proj", "down_proj", "lm_head"), scale=0.4)


@pytest.fixture(scope="module")
def shared_run(tiny):
    """One generator for many tests: three prompts at a time are one shape, however many tokens are made."""
    return generator(tiny)


def prompts_of(*lengths):
    draw = np.random.default_rng(1)
    return [draw.integers(3, 330, length).tolist() for length in lengths]


@pytest.mark.parametrize(
    ("name", "begin", "scale"),
    [
        ("stories-260k", "", 0.12),
        pytest.param("tinystories-656k", "<|start_story|>", 0.12, marks=pytest.mark.slow),
        pytest.param("stories-3m", "", 0.04, marks=pytest.mark.slow),
    ],
)
def test_greedy_answers_of_real_checkpoints_equal_those_of_transformers(shared, name, begin, scale):
    """Token for token; these prompts leave no step at which the two largest logits are a rounding error apart."""
    folder = shared / "models" / name
    tokenizer = Tokenizer.load(folder)
    texts = (
        "Tom and his mom went to the park. Tom saw a big red ball,",
        "One day a cat",
        "Once upon a time, there was",
    )
    prompts = [tokenizer.encode(begin + text, bos=True) for text in texts]
    trees = adapted(load_decoder(folder, dtype=jnp.float32), 6, tuple(PATHS), scale=scale)
    factors = {}
    for module, path in PATHS.items():
        pair = trees[2]["layers"][path.split(".")[0]][module]
        factors[path] = np.asarray(pair["a"][...]), np.asarray(pair["b"][...])
    ranks = (0, 2, 6)
    mixed = generator(trees, max_length=512, batch_size=9, pad_multiple=32, eos=(2,)).generate(
        trees[2], prompts * len(ranks), [HIERARCHY.prefix(r) for r in ranks for _ in prompts], max_new_tokens=20
    )
    theirs = []
    for rank in ranks:
        p = [rank**-0.5 if i < rank else 0.0 for i in range(6)]
        answers, gaps = greedy(folder, factors, p, prompts, max_new_tokens=20, eos=[2])
        assert min(gaps) > 1e-3
        theirs += answers
    assert mixed == theirs
    assert len({tuple(answer) for answer in mixed}) > len(prompts)  # ranks differ


def test_ranks_mixed_in_a_batch_are_as_one_rank_at_a_time(tiny, shared_run):
    prompts, run = prompts_of(3, 9, 5), shared_run
    alone = {rank: run.generate(tiny[2], prompts, HIERARCHY.prefix(rank), max_new_tokens=9) for rank in RANKS}
    asked = [(i, rank) for rank in RANKS for i in range(3)]
    mixed = run.generate(
        tiny[2], [prompts[i] for i, _ in asked], [HIERARCHY.prefix(r) for _, r in asked], max_new_tokens=9
    )
    assert mixed == [alone[rank][i] for i, rank in asked]
    assert len({tuple(answer) for answer in mixed}) > len(asked) - 2
    by_pattern = run.generate(tiny[2], prompts, {".*": HIERARCHY.prefix(4)}, max_new_tokens=9)
    assert by_pattern == alone[4]


def test_one_executable_decodes_whatever_lengths_ranks_adapters_and_answers(tiny):
    """And one prefills each padded length."""
    prompts = prompts_of(2, 8, 9, 14)
    run = generator(tiny, batch_size=2, pad_multiple=8)
    answers = {}
    for rank in RANKS:
        answers[rank] = run.generate(tiny[2], prompts, HIERARCHY.prefix(rank), max_new_tokens=20)
    run.generate(jax.tree.map(lambda x: -x, tiny[2]), prompts, HIERARCHY.prefix(2), max_new_tokens=23)
    assert (run.programs.prefill._cache_size(), run.programs.decode._cache_size(), run.compilations) == (2, 1, 3)
    wide = generator(tiny)
    assert wide.generate(tiny[2], prompts, HIERARCHY.prefix(4), max_new_tokens=20) == answers[4]
    assert wide.compilations == 2 and all(len(answer) == 20 for answer in answers[4])


def test_more_tokens_than_one_call_of_decode_makes_are_those_of_whole_runs(tiny, shared_run):
    """Every token is the likeliest after all tokens before it, run without a cache."""
    graphdef, base, adapter, profile = tiny
    prompt, *others = prompts_of(5, 3, 4)
    made, *_ = shared_run.generate(adapter, [prompt, *others], jnp.ones(6), max_new_tokens=2 * STEPS + 5)
    assert len(made) == 2 * STEPS + 5
    logits = nnx.merge(graphdef, base, adapter, profile)(jnp.array([prompt + made[:-1]]))[0, len(prompt) - 1 :]
    assert np.argmax(logits, -1).tolist() == made


class Recorded:
    """A jitted function that counts its calls and keeps the state of the last one."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        state, shown = self.function(*arguments)
        self.made = int(state.made.max())
        return state, shown


def test_decoding_ends_early_when_every_row_is_done(tiny, shared_run):
    prompts = prompts_of(4, 6, 5)
    free = shared_run.generate(tiny[2], prompts, jnp.ones(6), max_new_tokens=50)
    ends = {answer[at] for answer, at in zip(free, (3, 1, 6), strict=True)}
    lengths = [next(i for i, token in enumerate(answer) if token in ends) for answer in free]
    run = generator(tiny, eos=sorted(ends))
    run.programs.decode = Recorded(run.programs.decode)
    answers = run.generate(tiny[2], prompts, jnp.ones(6), max_new_tokens=50)
    assert answers == [answer[:length] for answer, length in zip(free, lengths, strict=True)]
    assert run.programs.decode.calls == 1 and run.programs.decode.made == max(lengths) + 1 < STEPS
    run.generate(tiny[2], prompts, jnp.ones(6), max_new_tokens=1)
    assert run.programs.decode.calls == 1  # the first token is prefill's
    # All but the longest stop at once, and the callback stops that one after its last allowed token.
    asked = []
    run = generator(tiny)
    run.programs.decode = Recorded(run.programs.decode)
    cut = run.generate(tiny[2], prompts, jnp.ones(6), max_new_tokens=50, stop=lambda made: asked.append(made) or True)
    assert cut == [answer[:1] for answer in free] and run.programs.decode.calls == 0 and asked


@pytest.mark.parametrize("length", [1, 2, STEPS, STEPS + 1, STEPS + 2, 30])
def test_a_stop_cuts_after_the_token_that_makes_it_true(tiny, shared_run, length):
    prompts, run = prompts_of(4, 6, 3), shared_run
    free = run.generate(tiny[2], prompts, jnp.ones(6), max_new_tokens=40)
    cut = run.generate(
        tiny[2], prompts, jnp.ones(6), max_new_tokens=40, stop=lambda made: made[:length] == free[1][:length]
    )
    assert cut == [free[0], free[1][:length], free[2]]
    assert len({answer[0] for answer in free}) == 3
    every = run.generate(tiny[2], prompts, jnp.ones(6), max_new_tokens=40, stop=lambda made: len(made) >= length)
    assert every == [answer[:length] for answer in free]


def test_an_answer_ends_where_the_context_is_full(tiny, shared_run):
    prompts = prompts_of(27, 20, 31)
    free = shared_run.generate(tiny[2], prompts, jnp.ones(6), max_new_tokens=20)
    short = generator(tiny, max_length=32).generate(tiny[2], prompts, jnp.ones(6), max_new_tokens=20)
    assert short == [free[0][:5], free[1][:12], free[2][:1]]


class Table(nnx.Module):
    """A decoder whose logits are a table's row for the token before; `unused` is there to be adapted."""

    def __init__(self, table):
        self.table, self.unused = nnx.Param(jnp.asarray(table)), nnx.Linear(1, 1, rngs=nnx.Rngs(0))

    def init_cache(self, batch, length, *, stacked):
        return ()

    def prefill(self, tokens, slots, *, stacked):
        return tokens[..., None], ()

    def single_layers(self):
        return ()

    def hidden(self, tokens, *, positions, cache, layers):
        return tokens[..., None], cache

    def head(self, hidden):
        return self.table[...][hidden[..., 0]]


def test_draws_of_two_steps_are_independent_and_follow_the_models_probabilities():
    table = np.array([[0.0, 1.0, -1.0], [0.5, -0.5, 0.2], [-1.0, 0.0, 2.0]], np.float32)
    trees = adapted(Table(table), 1, ("unused",), scale=0.1)
    many = 8000
    run = generator(trees, batch_size=many)
    answers = run.generate(trees[2], [[0]] * many, jnp.ones(1), max_new_tokens=3, temperature=1.0, seed=5)
    found = np.zeros((3, 3, 3))
    np.add.at(found, tuple(np.array(answers).T), 1 / many)
    chance = np.exp(table) / np.exp(table).sum(-1, keepdims=True)
    for path in itertools.product(range(3), repeat=3):
        expected = np.prod([chance[a, b] for a, b in itertools.pairwise((0, *path))])
        assert abs(found[path] - expected) < 4 * np.sqrt(expected / many)


def test_a_draw_does_not_depend_on_its_batch(tiny, shared_run):
    prompts = prompts_of(5, 12, 9)
    options = dict(max_new_tokens=10, temperature=1.5, top_p=0.9)
    one = generator(tiny, batch_size=1)
    whole = shared_run.generate(tiny[2], prompts, HIERARCHY.prefix(4), seed=1, **options)
    assert one.generate(tiny[2], prompts, HIERARCHY.prefix(4), seed=1, **options) == whole
    some = one.generate(tiny[2], [prompts[2], prompts[1]], HIERARCHY.prefix(4), seed=1, numbers=[2, 1], **options)
    assert some == [whole[2], whole[1]]
    assert one.generate(tiny[2], prompts, HIERARCHY.prefix(4), seed=2, **options) != whole
    twice = one.generate(tiny[2], prompts[:1] * 2, HIERARCHY.prefix(4), seed=1, **options)
    assert twice[0] == whole[0] != twice[1]


@pytest.mark.parametrize("options", [{"temperature": 1e-5}, {"temperature": 1.5, "top_p": 1e-6}])
def test_cold_draws_are_greedy(tiny, shared_run, options):
    prompts, run = prompts_of(5, 12, 3), shared_run
    plain = run.generate(tiny[2], prompts, jnp.ones(6), max_new_tokens=12)
    assert run.generate(tiny[2], prompts, jnp.ones(6), max_new_tokens=12, seed=4, **options) == plain
    warm = run.generate(tiny[2], prompts, jnp.ones(6), max_new_tokens=12, seed=4, temperature=1.5)
    assert warm != plain


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_logits_that_are_not_finite_end_an_answer_and_are_told(temperature, caplog):
    """Every token is one less than the one before; after 0 there are no finite logits."""
    table = -np.square(np.arange(8.0) - np.arange(8.0)[:, None] + 1)
    table[0] = np.nan
    trees = adapted(Table(table.astype(np.float32)), 1, ("unused",), scale=0.1)
    run = generator(trees, eos=(4,), batch_size=3)
    prompts = [[7, 2], [7, 7, 7], [0]]
    options = dict(max_new_tokens=5, temperature=temperature)
    assert run.generate(trees[2], prompts, jnp.ones(1), **options) == [[1, 0], [6, 5], []]
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 3 answers end early: the model's logits for them are not finite"
    ]
    (batch,) = run.batches(prompts)
    made = run.answer(trees[2], batch, jnp.ones(1), max_new_tokens=5)
    assert batch.members == [2, 0, 1]
    assert made.tolist() == [[NOT_FINITE, -1, -1, -1, -1], [1, 0, NOT_FINITE, -1, -1], [6, 5, -1, -1, -1]]
    caplog.clear()
    stopped = run.generate(trees[2], prompts[:1], jnp.ones(1), stop=lambda made: 0 in made, **options)
    assert stopped == [[1, 0]] and not caplog.records  # it had ended before


def test_stop_strings(tmp_path):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, bos=True))
    ids = tokenizer.encode("How far is it from Denver", bos=False)
    ends = StopStrings(tokenizer, ("far is", "it", "never"))
    cuts = [ends(ids[:count]) for count in range(len(ids) + 1)]
    assert cuts == sorted(cuts) and not cuts[0] and cuts[-1]
    assert ends.text(ids) == "How " and StopStrings(tokenizer, ("nowhere",)).text(ids) == "How far is it from Denver"
    assert not StopStrings(tokenizer, ())(ids) and StopStrings(tokenizer, ()).text(ids) == tokenizer.decode(ids)
    with pytest.raises(ValueError, match="a stop string must not be empty"):
        StopStrings(tokenizer, ("x", ""))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [[3], []]}, "prompt 1 has 0 tokens"),
        ({"prompts": [[3] * 64]}, "prompt 0 has 64 tokens: it must have .* fewer than the 64"),
        ({"p": np.ones((3, 6))}, r"p must have shape \[R\], or \[2, R\] for 2 prompts, got \[3, 6\]"),
        ({"p": np.ones((2, 1, 6))}, r"got \[2, 1, 6\]"),
        ({"p": np.ones((2, 5))}, "must have shape "),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be finite"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be above 0"),
    ],
)
def test_bad_input(tiny, shared_run, changes, message):
    given = {"prompts": [[3], [4, 5]], "p": np.ones(6), "max_new_tokens": 2} | changes
    prompts, p = given.pop("prompts"), given.pop("p")
    with pytest.raises(ValueError, match=message):
        shared_run.generate(tiny[2], prompts, p, **given)


def test_no_prompts_no_answers(tiny, shared_run):
    assert shared_run.generate(tiny[2], [], np.ones(6), max_new_tokens=2) == []
