"""Rows that end are refilled: few rows decode padding, and no answer depends on what shares the cache with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlora_jax.core import RankHierarchy
from mlora_jax.evaluate import Generator, serving
from mlora_jax.models import Decoder, load_decoder
from mlora_jax.models.generation_config import GenerationSettings
from mlora_jax.parallel.mesh import make_mesh
from tests.evaluate.test_generation import Table, adapted, generator, prompts_of
from tests.tiny import adapted_trees, tiny_config, write_checkpoint

HIERARCHY = RankHierarchy((1, 2, 4, 6), "sqrt")
RANKS = (0, 1, 4, 6)
NEW = 20


class Counted:
    """A jitted function that counts its steps: the columns of its second result that hold a token."""

    def __init__(self, function):
        self.function, self.steps = function, 0

    def __call__(self, *arguments):
        state, shown = self.function(*arguments)
        self.steps += int(np.any(np.asarray(shown) != -1, axis=0).sum())
        return state, shown

    def __getattr__(self, name):
        return getattr(self.function, name)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("model"))
    return adapted(load_decoder(folder), 6, ("q_proj", "down_proj"), scale=0.4)


@pytest.fixture(scope="module")
def asked():
    """More prompts than rows, of many lengths, at ranks of their own."""
    return prompts_of(*(3 + 5 * i % 17 for i in range(13))), [HIERARCHY.prefix(RANKS[i % 4]) for i in range(13)]


@pytest.fixture(scope="module")
def whole(tiny):
    """(prompt, answer, p) -> the likeliest token after the prompt, and after each token of the answer but the last."""
    graphdef, base, adapter, profile = tiny

    @jax.jit
    def likeliest(tokens, p):
        values = jax.tree.map(lambda leaf: jnp.broadcast_to(p, leaf.shape), profile)
        return jnp.argmax(nnx.merge(graphdef, base, adapter, values)(tokens), axis=-1)

    def run(prompt, answer, p):
        tokens = np.zeros((1, 64), np.int32)
        tokens[0, : len(prompt) + len(answer)] = [*prompt, *answer]
        return likeliest(jnp.asarray(tokens), p)[0, len(prompt) - 1 : len(prompt) + len(answer) - 1].tolist()

    return run


def test_few_rows_decode_padding():
    """Each token is one less than the one before, and 0 ends an answer: the last token of a prompt is its length."""
    table = -np.square(np.arange(64.0) - np.arange(64.0)[:, None] + 1).astype(np.float32)
    trees = adapted(Table(table), 1, ("unused",), scale=0.1)
    lengths = np.random.default_rng(0).integers(1, 60, 200)
    run = generator(trees, eos=(0,), batch_size=16)
    run.programs.decode = Counted(run.programs.decode)
    answers = run.generate(trees[2], [[int(length)] for length in lengths], jnp.ones(1), max_new_tokens=63)
    assert answers == [[*range(length - 1, 0, -1)] for length in lengths]
    assert lengths.sum() <= 16 * run.programs.decode.steps < 1.25 * lengths.sum()
    by_batches = 16 * sum(max(lengths[start : start + 16]) for start in range(0, 200, 16))
    assert by_batches > 1.6 * lengths.sum()


@pytest.mark.parametrize("ends", [False, True])
def test_refilled_rows_make_the_likeliest_tokens(tiny, asked, whole, ends):
    prompts, p = asked
    free = generator(tiny).generate(tiny[2], prompts, p, max_new_tokens=NEW)
    eos = {answer[at] for answer, at in zip(free, (2, 9, 15), strict=False)} if ends else ()
    run = generator(tiny, eos=sorted(eos))
    answers = run.generate(tiny[2], prompts, p, max_new_tokens=NEW)
    for prompt, answer, each in zip(prompts, answers, p, strict=True):
        expected = whole(prompt, [*answer, *eos][: len(answer) + bool(eos)], each)
        assert expected[: len(answer)] == answer and not eos.intersection(answer) if eos else expected == answer
        assert len(answer) == NEW or expected[len(answer)] in eos
    assert len({len(answer) for answer in answers}) > (3 if ends else 0)
    assert run.programs.decode._cache_size() == 1


def test_draws_rules_and_stops_do_not_depend_on_the_number_of_rows(tiny, asked):
    prompts, p = asked
    options = dict(max_new_tokens=NEW, temperature=1.5, top_p=0.9, seed=3, stop=lambda made: sum(made) > 1500)
    answers = [generator(tiny, batch_size=size).generate(tiny[2], prompts, p, **options) for size in (1, 4, 13)]
    assert answers[0] == answers[1] == answers[2]
    assert len({len(answer) for answer in answers[0]}) > 2


def test_a_row_whose_logits_were_not_finite_is_refilled_whole(tiny):
    prompts = prompts_of(30, 5, 4)
    p = np.stack([np.full(6, np.nan), np.ones(6), np.zeros(6)])
    run = generator(tiny, batch_size=1)
    broken, *others = run.generate(tiny[2], prompts, p, max_new_tokens=9)
    assert broken == [] and others == run.generate(tiny[2], prompts[1:], p[1:], max_new_tokens=9)
    assert all(len(answer) == 9 for answer in others)


def test_rows_on_a_mesh_are_refilled(tiny, asked):
    """Rows lie on two parts of the mesh, and the heads of a row on two devices."""
    prompts, p = asked
    mesh = make_mesh({"trial": 1, "data": 2, "fsdp": 1, "tensor": 2}, jax.devices()[:4])
    free = generator(tiny).generate(tiny[2], prompts, p, max_new_tokens=NEW)
    run = generator(tiny, eos=(free[0][3], free[2][9]), mesh=mesh)
    answers = run.generate(tiny[2], prompts, p, max_new_tokens=NEW)
    assert answers == generator(tiny, eos=(free[0][3], free[2][9])).generate(tiny[2], prompts, p, max_new_tokens=NEW)
    assert run.programs.decode._cache_size() == 1


@pytest.mark.parametrize(("rules", "backend"), [(False, "cpu"), (True, "gpu")])
def test_a_shared_prefix_is_prefilled_once_per_rank(tiny, monkeypatch, rules, backend):
    """Also in the form of the program that an accelerator runs."""
    begin, *ends = prompts_of(30, 4, 1, 6, 2, 3)
    prompts, ranks = [begin + end for end in ends] * 2, [0] * 5 + [4] * 5
    p = [HIERARCHY.prefix(rank) for rank in ranks]
    options = dict(pad_multiple=8, settings=GenerationSettings(no_repeat_ngram_size=2) if rules else None)
    apart = generator(tiny, **options)
    expected = apart.generate(tiny[2], prompts, p, max_new_tokens=NEW)
    assert apart.programs.share._cache_size() == 0
    monkeypatch.setattr(serving, "SHARED", 200)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: backend)
        run, lengths = generator(tiny, **options), []
    prefill = run.programs.prefill
    run.programs.prefill = lambda *arguments: lengths.append(arguments[5].shape) or prefill(*arguments)
    assert run.generate(tiny[2], prompts, p, max_new_tokens=NEW) == expected
    assert run.programs.share._cache_size() == 1 and {length for _, length in lengths} == {8}
    monkeypatch.setattr(serving, "SHARED", 300)  # the two ranks save 2 * 4 * 30 tokens
    lengths.clear()
    assert run.generate(tiny[2], prompts, p, max_new_tokens=NEW) == expected and max(lengths)[1] == 40


def test_what_is_compiled_for_an_accelerator_does_not_grow_with_depth(monkeypatch):
    """Here a CPU runs it, with the same tokens."""
    texts, answers = {}, {}
    for backend, layers in (("cpu", 3), ("gpu", 3), ("gpu", 6)):
        model = Decoder(tiny_config(num_layers=layers), rngs=nnx.Rngs(0))
        trees = adapted_trees(model, 2, ("q_proj",))
        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda backend=backend: backend)
            graphdef, base, adapter, profile = trees
            run = Generator(graphdef, base, profile, max_length=64, batch_size=2, pad_multiple=32, eos=())
        state = run.programs.begin(2, 64, base, adapter)
        rows = serving.PromptRows(*(jnp.zeros(2, jnp.int32),) * 3)
        lowered = run.programs.decode.lower(False, base, adapter, jnp.ones(2), state, rows, jnp.asarray(2), None)
        texts[backend, layers] = len(lowered.as_text().splitlines())
        if layers == 3:
            answers[backend] = run.generate(adapter, prompts_of(5, 9, 3), jnp.ones(2), max_new_tokens=9)
    assert answers["gpu"] == answers["cpu"]
    assert texts["gpu", 6] == texts["gpu", 3] < texts["cpu", 3]
