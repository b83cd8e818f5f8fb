"""The cache of deployment: equal to a masked full one, as small as its ranks say, in generation with adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlora_jax.adapters import set_profile
from mlora_jax.core import RankHierarchy
from mlora_jax.evaluate import Generator, serving
from mlora_jax.evaluate.scoring import Request, Scorer
from mlora_jax.kv_cache import CutForm, Ranks, cache_bytes, cache_shape, project, uniform_ranks
from mlora_jax.models import Decoder
from mlora_jax.parallel.mesh import make_mesh
from tests.kv_cache.made import random_projections, random_ranks
from tests.models.test_decoder import MIXED, make, tokens_of
from tests.tiny import adapted_trees, random_like, tiny_config

ROWS, LENGTH, SLOTS = 2, 9, 16


def decoded(model, tokens, prompt):
    """Hidden states [B, T, D]: a prefill of the first tokens, then one token after the other; and the cache."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def begin(state, tokens):
        return nnx.merge(graphdef, state).prefill(tokens, SLOTS)

    @jax.jit
    def advance(state, token, position, cache):
        positions = jnp.full((ROWS, 1), position)
        return nnx.merge(graphdef, state).hidden(token, positions=positions, cache=cache)

    hidden, cache = begin(state, tokens[:, :prompt])
    parts = [hidden]
    for position in range(prompt, tokens.shape[1]):
        hidden, cache = advance(state, tokens[:, position : position + 1], position, cache)
        parts.append(hidden)
    return np.concatenate(parts, axis=1), cache


@pytest.fixture(scope="module")
def forms():
    """A decoder with grouped heads, norms and windows at random ranks: masked, and cut."""
    model = make(MIXED)
    shape = cache_shape(model)
    projections, ranks = random_projections(shape), random_ranks(shape)
    return project(model, projections, ranks), project(model, projections, ranks, cut=True), ranks


def test_a_cut_cache_equals_a_masked_full_one(forms):
    masked, cut, _ = forms
    tokens = jnp.asarray(tokens_of(MIXED, (ROWS, LENGTH)))
    expected, full_cache = decoded(masked, tokens, 4)
    found, cut_cache = decoded(cut, tokens, 4)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    for whole, small in zip(full_cache, cut_cache, strict=True):
        for heads, part in zip(small.heads, small.parts, strict=True):
            rank, value_rank = part.k.shape[2], part.v.shape[3]
            np.testing.assert_allclose(part.k, np.asarray(whole.k)[:, heads, :rank], rtol=0, atol=2e-5)
            np.testing.assert_allclose(part.v, np.asarray(whole.v)[:, heads, :, :value_rank], rtol=0, atol=2e-5)
            assert not np.asarray(whole.k)[:, heads, rank:].any()


def test_decoding_equals_a_forward_pass_without_a_cache(forms):
    _, cut, _ = forms
    tokens = jnp.asarray(tokens_of(MIXED, (ROWS, LENGTH)))
    graphdef, state = nnx.split(cut)
    whole = jax.jit(lambda state: nnx.merge(graphdef, state).hidden(tokens))(state)
    np.testing.assert_allclose(decoded(cut, tokens, 3)[0], whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_bytes_are_those_of_the_ranks(dtype):
    model = Decoder(tiny_config(), dtype=dtype, rngs=nnx.Rngs(0))
    shape = cache_shape(model)
    ranks = random_ranks(shape, seed=1)
    assert len(set(map(tuple, ranks.k.tolist()))) > 1
    cut = project(model, random_projections(shape), ranks, cut=True)
    for stacked in (False, True):  # the arrays of layers differ, so they are never stacked
        assert cache_bytes(cut.init_cache(3, 16, stacked=stacked)) == 3 * 16 * ranks.entries * dtype.dtype.itemsize
    made = jax.eval_shape(lambda: cut.prefill(jnp.zeros((3, 5), jnp.int32), 16)[1])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(
        lambda x: (x.shape, x.dtype), cut.init_cache(3, 16)
    )
    assert cache_bytes(model.init_cache(3, 16)) == 3 * 16 * Ranks.full(*shape).entries * dtype.dtype.itemsize


def test_one_rank_for_all_heads_is_one_pair_of_arrays():
    form = CutForm.of(uniform_ranks(0.5, 2, 3, 8))
    (cache, _) = form.empty(2, 16, jnp.float32)
    assert [(part.k.shape, part.v.shape) for part in cache.parts] == [((2, 3, 4, 16), (2, 3, 16, 4))]


def greedy(model, prompt, count):
    """The likeliest tokens by forward passes without a cache, and the smallest gap between the two best logits."""
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
    tokens, gap = [*prompt], np.inf
    for _ in range(count):
        padded = np.zeros((1, SLOTS), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(run(state, padded))[0, len(tokens) - 1]
        best = np.argsort(logits)[::-1]
        gap = min(gap, logits[best[0]] - logits[best[1]])
        tokens.append(int(best[0]))
    return tokens[len(prompt) :], gap


@pytest.mark.parametrize(
    ("accelerator", "shares"),
    [(False, False), (True, False), (False, True)],
    ids=["arrays for each layer", "as on an accelerator", "a prefix that prompts share"],
)
def test_generation_with_an_adapter_at_several_ranks_in_one_batch(accelerator, shares, monkeypatch):
    """Nested in weights and in cache at once. More prompts than rows, so rows are refilled."""
    if shares:
        monkeypatch.setattr(serving, "SHARED", 1)
    model = Decoder(tiny_config(), rngs=nnx.Rngs(3))
    shape = cache_shape(model)
    cut = project(model, random_projections(shape), random_ranks(shape, seed=2), cut=True)
    graphdef, base, adapter, profile = adapted_trees(cut, 6, ("q_proj", "v_proj", "o_proj", "down_proj"))
    adapter = random_like(adapter, seed=0, scale=0.3)
    hierarchy = RankHierarchy((1, 3, 6), "sqrt")
    prompts, ranks = [[5, 6, 7], [9, 8], [4, 4, 4, 4], [20, 21], [7]], [0, 3, 6, 1, 3]
    if shares:
        prompts, ranks = [[5, 6, 7], [5, 6, 9], [4, 4, 4, 4], [5, 6, 8, 8]], [3, 3, 6, 3]
    p = np.stack([hierarchy.prefix(rank) for rank in ranks])
    with monkeypatch.context() as patch:
        if accelerator:  # the programs of which ask for stacked arrays
            patch.setattr(jax, "default_backend", lambda: "gpu")
        generator = Generator(graphdef, base, profile, max_length=SLOTS, batch_size=2, pad_multiple=4, eos=())
    assert generator.programs.on_cpu is not accelerator
    made = generator.generate(adapter, prompts, p, max_new_tokens=5)
    assert len(set(map(tuple, made))) > 2
    for prompt, each, answer in zip(prompts, p, made, strict=True):
        alone = nnx.merge(graphdef, base, adapter, set_profile(profile, jnp.asarray(each)))
        expected, gap = greedy(alone, prompt, 5)
        assert gap > 1e-4 and answer == expected
    assert generator.programs.share._cache_size() == shares


@pytest.mark.slow
def test_a_mesh_answers_and_scores_as_one_device_does():
    model = Decoder(tiny_config(), rngs=nnx.Rngs(3))
    shape = cache_shape(model)
    cut = project(model, random_projections(shape), random_ranks(shape, seed=2), cut=True)
    graphdef, base, adapter, profile = adapted_trees(cut, 6, ("q_proj", "v_proj"))
    adapter, p = random_like(adapter, seed=0, scale=0.3), RankHierarchy((1, 3, 6)).prefix(3)
    prompts = [[5, 6, 7], [9, 8], [4, 4, 4, 4], [20, 21], [7]]
    requests = [Request((5, 6), (7, 8)), Request((5,), (9,))]
    found = []
    for mesh in (None, make_mesh({"trial": 1, "data": 2, "fsdp": 1, "tensor": 2})):
        sizes = {"max_length": SLOTS, "batch_size": 4, "pad_multiple": 4, "mesh": mesh}
        scorer = Scorer(graphdef, base, profile, **sizes)
        scores = scorer.score(scorer.prepare(requests), adapter, p).log_likelihoods
        generator = Generator(graphdef, base, profile, eos=(), **sizes)
        found.append((generator.generate(adapter, prompts, p, max_new_tokens=5), scores))
    assert found[0][0] == found[1][0]
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=0, atol=1e-5)
