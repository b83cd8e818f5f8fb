"""PiSSA and OLoRA beside PEFT's: PEFT changes the base's weights; our export is a plain adapter on the old ones."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from mlora_jax.adapters import adapt, split
from mlora_jax.core import ACTIONS, ActionInput, RankHierarchy
from mlora_jax.core.actions import run_action
from mlora_jax.interop import export_peft
from mlora_jax.models import load_decoder
from tests.interop.models import PATHS, RANK, TOKENS, our_logits, pairs
from tests.oracles.peft_logits import plain, with_peft

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
TARGETS = ("q_proj", "v_proj", "down_proj", "lm_head")
HALF = RANK // 2


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_the_function_is_that_of_peft_before_and_after_training(base, tmp_path, name):
    """The trained half gets other values in both programs; the other half stays, as it does in training."""
    torch_model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    kernels = {}
    for path, module in PATHS.items():
        names = [module.format(layer) for layer in range(3)] if "{}" in module else [module]
        stacked = np.stack([torch_model.get_submodule(each).weight.detach().numpy().T for each in names])
        node = kernels
        for part in path.split("."):
            node = node.setdefault(part, {})
        node["kernel"] = jnp.asarray(stacked if "{}" in module else stacked[0])
    model = adapt(load_decoder(base, dtype=jnp.float32), RANK, TARGETS, key=jax.random.key(0))
    hierarchy = RankHierarchy((1, 2, 4, RANK))
    given = ActionInput(
        adapter=split(model)[2], trained_profile=hierarchy.lora(), key=jax.random.key(0), needed={"kernels": kernels}
    )
    adapter = run_action(ACTIONS[name], given).adapter
    np.testing.assert_allclose(our_logits(model, adapter, hierarchy.lora()), plain(base, TOKENS), atol=1e-4)
    keys = iter(jax.random.split(jax.random.key(1), 99))

    def trained(path, leaf):
        random = 0.2 * jax.random.normal(next(keys), leaf.shape)
        return leaf.at[..., :HALF].add(random[..., :HALF]) if "'a'" in str(path) else leaf.at[..., :HALF, :].add(
            random[..., :HALF, :]
        )  # fmt: skip

    adapter = jax.tree_util.tree_map_with_path(trained, adapter)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=HALF, lora_alpha=HALF, target_modules=list(TARGETS), init_lora_weights=name
    )
    theirs = peft.get_peft_model(torch_model, config)
    with torch.no_grad():
        for module, (a, b) in pairs(adapter).items():
            layer = theirs.base_model.model.get_submodule(module)
            # The start of both programs has the same product; signs of singular vectors may differ.
            start = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).numpy().T
            np.testing.assert_allclose(-a[:, HALF:] @ b[HALF:], start, atol=1e-4)
            layer.lora_A["default"].weight.copy_(torch.tensor(a[:, :HALF].T))
            layer.lora_B["default"].weight.copy_(torch.tensor(b[:HALF].T))
        expected = theirs.eval()(torch.as_tensor(TOKENS).long()).logits.numpy()
    np.testing.assert_allclose(our_logits(model, adapter, hierarchy.lora()), expected, atol=2e-4)
    folder = export_peft(tmp_path / "peft", adapter, hierarchy, RANK, base_model=str(base))
    logits, ranks = with_peft(base, folder, TOKENS)
    np.testing.assert_allclose(logits, expected, atol=2e-4)
    assert set(ranks.values()) == {RANK}  # twice the rank of PiSSA
    assert np.abs(expected - plain(base, TOKENS)).max() > 0.1
