"""Scores of requests against transformers, which runs every request alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mlora_jax.adapters import adapt, set_profile, split
from mlora_jax.core import RankHierarchy, fold
from mlora_jax.evaluate import Request, Scorer
from mlora_jax.models import attention, load_decoder
from tests.tiny import adapted_trees

TARGETS = ("q_proj", "v_proj", "down_proj")


def plain(model, requests, max_length):
    """Log-likelihood and greediness as the harness's Hugging Face backend computes them: cut on the left, one each."""
    found = []
    for context, continuation in requests:
        tokens = [*context, *continuation][-(max_length + 1) :]
        with torch.no_grad():
            values = torch.log_softmax(model(torch.tensor([tokens[:-1]])).logits[0].double(), dim=-1)
        values = values[-len(continuation) :]
        wanted = torch.tensor(continuation)[:, None]
        found.append((values.gather(1, wanted).sum().item(), bool((values.argmax(-1) == wanted[:, 0]).all())))
    return np.array(found).T


def requests_of(vocabulary, *, contexts=9, longest=60, seed=0):
    """Contexts of several lengths; of each one's continuations some are one token, some begin another, some repeat."""
    rng = np.random.default_rng(seed)
    requests = []
    for _ in range(contexts):
        context = tuple(rng.integers(3, vocabulary, rng.integers(1, longest)).tolist())
        long = tuple(rng.integers(3, vocabulary, 9).tolist())
        others = [tuple(rng.integers(3, vocabulary, n).tolist()) for n in (1, 1, 2, 5)]
        requests += [Request(context, tokens) for tokens in (long, long[:4], long[:1], *others, others[-1])]
    return [requests[number] for number in rng.permutation(len(requests))]


@pytest.fixture(scope="module")
def adapted(checkpoint):
    graphdef, base, adapter, profile = adapted_trees(load_decoder(checkpoint), 6, TARGETS)
    return graphdef, base, jax.tree.map(lambda x: x + 0.1, adapter), profile


def scorer_of(adapted, **changes):
    graphdef, base, _, profile = adapted
    return Scorer(graphdef, base, profile, **({"max_length": 128, "batch_size": 4, "pad_multiple": 16} | changes))


@pytest.mark.parametrize(("max_length", "batch_size"), [(128, 4), (128, 64), (30, 5)])
def test_scores_equal_one_pass_per_request(checkpoint, adapted, max_length, batch_size):
    requests = requests_of(330)
    scorer = scorer_of(adapted, max_length=max_length, batch_size=batch_size, chunk=7)
    prepared = scorer.prepare(requests)
    values, greedy = plain(AutoModelForCausalLM.from_pretrained(checkpoint), requests, max_length)
    found = scorer.score(prepared, adapted[2], jnp.zeros(6))
    np.testing.assert_allclose(found.log_likelihoods, values, atol=1e-4)
    np.testing.assert_array_equal(found.greedy, greedy)
    cut = sum(len(context) + len(continuation) > max_length + 1 for context, continuation in requests)
    assert prepared.truncated == cut and (cut > 0) == (max_length == 30)


@pytest.mark.parametrize("model", ["stories-260k", "tinystories-656k", "stories-3m"])
def test_real_checkpoints(shared, model):
    """At a rank of an adapter, folded into the weights that transformers reads; some requests overflow the context."""
    decoder = load_decoder(shared / "models" / model)
    graphdef, base, adapter, profile = split(adapt(decoder, 6, TARGETS, key=jax.random.key(1)))
    adapter = jax.tree.map(lambda x: jnp.where(x == 0, 0.02 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), x), adapter)
    p = RankHierarchy((1, 3, 6), "sqrt").prefix(3)
    reference = AutoModelForCausalLM.from_pretrained(shared / "models" / model)
    _fold_into(reference, adapter, np.asarray(p))
    requests = requests_of(decoder.config.vocab_size, contexts=3, longest=200) + requests_of(500, contexts=1, longest=2)
    requests += [Request(tuple(range(3, 510)), tuple(range(9, 9 + n))) for n in (1, 6, 7, 40)]
    scorer = Scorer(graphdef, base, profile, max_length=512, batch_size=8, pad_multiple=256)
    prepared = scorer.prepare(requests)
    values, greedy = plain(reference, requests, 512)
    found = scorer.score(prepared, adapter, p)
    np.testing.assert_allclose(found.log_likelihoods, values, rtol=2e-6, atol=1e-4)
    np.testing.assert_array_equal(found.greedy, greedy)
    assert prepared.truncated == 2  # of the last four: those that need more than 512 tokens


def _fold_into(model, adapter, p):
    """Adds A diag(p) B to the torch weights, layer by layer."""
    for name in TARGETS:
        part = "mlp" if name == "down_proj" else "self_attn"
        factors = adapter["layers"][part][name]
        a, b = np.asarray(factors["a"][...]), np.asarray(factors["b"][...])
        for number, layer in enumerate(model.model.layers):
            weight = getattr(getattr(layer, part), name).weight
            weight.data += torch.from_numpy(np.array((a[number] * p) @ b[number]).T)


def test_a_context_is_run_once(adapted):
    """One text per context, in which a continuation's own tokens come once, and single tokens not at all."""
    context = (5, 6, 7, 8)
    continuations = [(9,), (10,), (11, 12, 13), (11, 12, 14), (15, 16)]
    prepared = scorer_of(adapted).prepare([Request(context, tokens) for tokens in continuations])
    (batch,) = prepared.batches
    assert prepared.texts == 1 and batch["tokens"].shape == (1, 16)
    assert np.asarray(batch["tokens"])[0, :8].tolist() == [5, 6, 7, 8, 11, 12, 15, 0]
    single = scorer_of(adapted).prepare([Request(context, (token,)) for token in range(20, 60)])
    assert single.texts == 1 and "layout" not in single.batches[0]
    assert np.count_nonzero(single.batches[0]["tokens"]) == len(context)


def test_shared_and_plain_computation_agree(adapted):
    requests = requests_of(330, seed=3, contexts=4)
    scorer = scorer_of(adapted, pad_multiple=128)
    shared = scorer.score(scorer.prepare(requests), adapted[2], jnp.ones(6))
    alone = [scorer.score(scorer.prepare([request]), adapted[2], jnp.ones(6)) for request in requests]
    np.testing.assert_allclose(shared.log_likelihoods, [s.log_likelihoods[0] for s in alone], atol=1e-5)
    np.testing.assert_array_equal(shared.greedy, [s.greedy[0] for s in alone])


def test_very_many_continuations_are_several_texts(adapted):
    requests = [Request((5, 6), tuple(range(10 + n, 50 + n))) for n in range(20)]
    scorer = scorer_of(adapted)
    prepared = scorer.prepare(requests)
    assert 1 < prepared.texts < 6
    found = scorer.score(prepared, adapted[2], jnp.ones(6)).log_likelihoods
    alone = [scorer.score(scorer.prepare([r]), adapted[2], jnp.ones(6)).log_likelihoods[0] for r in requests]
    np.testing.assert_allclose(found, alone, atol=1e-4)


def test_one_executable_for_every_rank_and_adapter(adapted):
    scorer = scorer_of(adapted, pad_multiple=32, batch_size=2)
    prepared = scorer.prepare(requests_of(330))
    assert len(prepared.batches) > 2
    seen = set()
    for scaling in ("none", "rank"):
        hierarchy = RankHierarchy((1, 2, 4, 6), scaling)
        for rank in range(7):
            for readout in (hierarchy.prefix, hierarchy.nested, hierarchy.masked):
                seen.add(float(scorer.score(prepared, adapted[2], readout(rank)).log_likelihoods.sum()))
    scorer.score(prepared, jax.tree.map(jnp.negative, adapted[2]), jnp.ones(6))
    assert scorer.compiled._cache_size() == 1
    assert len(seen) > 15


@pytest.mark.parametrize("little", [0, 2**30], ids=["text by text", "masked"])
def test_texts_of_one_row_see_nothing_of_each_other(adapted, monkeypatch, little):
    """Texts of several widths in rows of several texts, against a row for each."""
    monkeypatch.setattr(attention, "LITTLE", little)
    requests = requests_of(330, contexts=14, longest=90)
    scorer = scorer_of(adapted, pad_multiple=8, batch_size=5)
    prepared = scorer.prepare(requests)
    spans = [batch["layout"]["spans"] for batch in prepared.batches]
    texts = [[np.sum(starts >= 0) for starts in each.starts] for each in spans]  # by row and width
    assert len(spans) > 1 and np.sum(texts) == prepared.texts and max(np.count_nonzero(row) for row in texts) > 1
    assert max(map(sum, texts)) > 3
    found = scorer.score(prepared, adapted[2], jnp.ones(6))
    contexts = dict.fromkeys(request.context for request in requests)
    for context in contexts:
        own = [number for number, request in enumerate(requests) if request.context == context]
        alone = scorer_of(adapted, pad_multiple=64)
        alone = alone.score(alone.prepare([requests[number] for number in own]), adapted[2], jnp.ones(6))
        np.testing.assert_allclose(found.log_likelihoods[own], alone.log_likelihoods, atol=2e-5)
        np.testing.assert_array_equal(found.greedy[own], alone.greedy)


def test_profiles_per_layer(adapted):
    """A rank for every layer and module: what a folded model of those ranks gives."""
    graphdef, base, adapter, profile = adapted
    p = {
        name: jnp.stack([jnp.arange(6) < low, jnp.arange(6) < high]) * 1.0
        for name, (low, high) in {
            "layers.self_attn.q_proj": (1, 4),
            "layers.self_attn.v_proj": (0, 6),
            "layers.mlp.down_proj": (3, 2),
        }.items()
    }
    scorer = scorer_of(adapted)
    prepared = scorer.prepare(requests_of(330, contexts=2))
    found = scorer.score(prepared, adapter, p)
    folded = fold(base, adapter, set_profile(profile, p))
    expected = Scorer(graphdef, folded, profile, max_length=128, batch_size=4, pad_multiple=16)
    expected = expected.score(prepared, adapter, jnp.zeros(6))
    np.testing.assert_allclose(found.log_likelihoods, expected.log_likelihoods, atol=1e-4)


def test_unusable_requests(adapted):
    scorer = scorer_of(adapted, max_length=4)
    for request in (Request((), (1,)), Request((1,), ())):
        with pytest.raises(ValueError, match=r"request 1 has \d tokens of context and \d after it"):
            scorer.prepare([Request((1,), (2,)), request])
    with pytest.raises(ValueError, match="request 0 alone is longer than 4 tokens"):
        scorer.prepare([Request((1,), (2, 3, 4, 5, 6))])
    assert scorer.prepare([]).requests == 0 and len(scorer.score(scorer.prepare([]), None, None).greedy) == 0
