"""The start of EVA beside PEFT's on the same inputs: directions, ranks per layer, and step 0."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from transformers import AutoModelForCausalLM

from mlora_jax.adapters import adapt, split
from mlora_jax.core import ACTIONS, ActionInput, RankHierarchy
from mlora_jax.core.actions import run_action
from mlora_jax.core.importance import used_ranks
from mlora_jax.core.rank_axes import by_parent
from mlora_jax.interop import export_peft
from mlora_jax.models import load_decoder
from tests.interop.models import LAYERS, PATHS, TOKENS, our_logits
from tests.oracles.peft_logits import plain, with_peft

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False:UserWarning"),
]
TARGETS = ("q_proj", "down_proj", "lm_head")  # layers whose inputs differ: PEFT swaps ranks where they do not
RANK = 8  # 2 rho, so a mean rank of 4
TOKENS_OF_EVA = np.random.default_rng(7).integers(0, 61, (8, 24))


def names_of(path):
    return [PATHS[path].format(layer) for layer in range(LAYERS)] if "{}" in PATHS[path] else [PATHS[path]]


@pytest.fixture(scope="module")
def ours(base):
    """(adapted model, the adapter that the action makes) from the inputs that torch's hooks see."""
    torch_model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32).eval()
    seen = {}
    for path in PATHS:
        for name in names_of(path):
            torch_model.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, name=name: seen.__setitem__(name, inputs[0].numpy().astype(np.float64))
            )
    with torch.no_grad():
        torch_model(torch.as_tensor(TOKENS_OF_EVA))
    statistics = {}
    for path in PATHS:
        if path.rsplit(".", 1)[-1] not in TARGETS:
            continue
        grams = []
        for name in names_of(path):
            x = seen[name].reshape(-1, seen[name].shape[-1])
            x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
            grams.append(x.T @ x)
        node = statistics
        for part in path.split("."):
            node = node.setdefault(part, {})
        node["gram"] = jnp.asarray(np.stack(grams) if "{}" in PATHS[path] else grams[0], jnp.float32)
    model = adapt(load_decoder(base, dtype=jnp.float32), RANK, TARGETS, key=jax.random.key(0))
    needed = {"input_statistics": statistics}
    given = ActionInput(adapter=split(model)[2], trained_profile=jnp.ones(RANK), key=jax.random.key(0), needed=needed)
    return model, run_action(ACTIONS["eva"], given).adapter


def test_directions_and_ranks_are_those_of_peft(base, ours):
    _, adapter = ours
    torch_model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK // 2, target_modules=list(TARGETS), init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0, use_label_mask=False),
    )  # fmt: skip
    theirs = peft.get_peft_model(torch_model, config)
    batch = {"input_ids": torch.as_tensor(TOKENS_OF_EVA), "attention_mask": torch.ones(TOKENS_OF_EVA.shape).long()}
    peft.initialize_lora_eva_weights(theirs, dataloader=[batch], show_progress_bar=False)
    expected = {}
    for path in PATHS:
        for name in names_of(path):
            layer = theirs.base_model.model.get_submodule(name)
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                expected[name] = layer.lora_A["default"].weight.detach().numpy()
    total = 0
    for parent, leaves in by_parent(adapter).items():
        columns = np.asarray(leaves["a"]).reshape(-1, *leaves["a"].shape[-2:])
        for a, name in zip(columns, names_of(".".join(parent)), strict=True):
            found = expected.get(name, np.zeros((0, len(a))))
            rank = len(found)
            assert np.flatnonzero(np.any(a != 0, axis=0)).tolist() == list(range(rank)), name
            np.testing.assert_allclose(np.abs(np.sum(a[:, :rank].T * found, axis=1)), 1.0, atol=1e-3)
            total += rank
    assert total == RANK // 2 * (2 * LAYERS + 1)
    assert len({len(each) for each in expected.values()}) > 1


def test_step_zero_is_the_base_and_training_keeps_the_ranks(base, ours, tmp_path):
    """Two steps along the gradient: the columns of a layer beyond its rank stay zero, all others move."""
    model, adapter = ours
    np.testing.assert_array_equal(our_logits(model, adapter, np.ones(RANK)), our_logits(model, adapter, np.zeros(RANK)))
    np.testing.assert_allclose(our_logits(model, adapter, np.ones(RANK)), plain(base, TOKENS), atol=1e-4)
    graphdef, frozen, _, profile = split(model)

    @jax.jit
    def step(adapter):
        loss = lambda each: jnp.mean(nnx.merge(graphdef, frozen, each, profile)(jnp.asarray(TOKENS)) ** 2)  # noqa: E731
        return jax.tree.map(lambda leaf, gradient: leaf - 0.3 * gradient, adapter, jax.grad(loss)(adapter))

    trained = step(step(adapter))
    for parent, leaves in by_parent(trained).items():
        alive = np.any(np.asarray(by_parent(adapter)[parent]["a"]) != 0, axis=-2)
        np.testing.assert_array_equal(np.any(np.asarray(leaves["a"]) != 0, axis=-2), alive)
        np.testing.assert_array_equal(np.any(np.asarray(leaves["b"]) != 0, axis=-1), alive)
    ranks = used_ranks(trained)
    assert sum(map(sum, ranks.values())) == RANK // 2 * (2 * LAYERS + 1) and len(set(sum(ranks.values(), ()))) > 1
    folder = export_peft(tmp_path / "eva", trained, RankHierarchy((RANK,)), ranks, base_model=str(base))
    logits, found = with_peft(base, folder, TOKENS)
    np.testing.assert_allclose(logits, our_logits(model, trained, np.ones(RANK)), atol=2e-4)
    assert sorted(found.values()) == sorted(rank for rank in sum(ranks.values(), ()) if rank)
