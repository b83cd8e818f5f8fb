"""AdaLoRA beside PEFT's allocator of ranks: importances, the budget and the gates that stay."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from mlora_jax.core import METHODS
from mlora_jax.core.adalora import Sensitivity, budget_at, importances, keep_budget, sensitivities
from mlora_jax.core.transforms import AfterUpdate, Numbers

SIZES = {"up": (7, 9), "down": (9, 5)}
R, TARGET, STEPS = 6, 4, 40  # the target is 2/3 of R
NUMBERS = Numbers(0.9, 0.999, 1e-8, 0.0)


def leaves(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    found = {}
    for path, (d, f) in SIZES.items():
        shapes = {"a": (d, R), "b": (R, f), "gate": (R,)}
        found[path] = {name: scale * rng.normal(size=shape) for name, shape in shapes.items()}
    return found


@pytest.fixture
def theirs():
    """PEFT's model and its allocator, with a schedule of 4 steps before and 20 after the budget falls."""
    module = torch.nn.ModuleDict({path: torch.nn.Linear(d, f).double() for path, (d, f) in SIZES.items()})
    config = peft.AdaLoraConfig(
        init_r=R, target_r=TARGET, tinit=4, tfinal=20, total_step=STEPS, beta1=0.85, beta2=0.85,
        target_modules=list(SIZES),
    )  # fmt: skip
    model = peft.get_peft_model(module, config, autocast_adapter_dtype=False)
    return model.base_model


def put(model, values, *, gradients=False):
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for path, parts in values.items():
            for name, kind in (("a", "lora_A"), ("b", "lora_B"), ("gate", "lora_E")):
                parameter = parameters[f"model.{path}.{kind}.default"]
                value = torch.tensor(parts[name].T.reshape(parameter.shape).copy())
                if gradients:
                    parameter.grad = value
                else:
                    parameter.copy_(value)


def gates(model):
    parameters = dict(model.named_parameters())
    return {path: parameters[f"model.{path}.lora_E.default"].detach().numpy().ravel() for path in SIZES}


def test_the_gates_that_stay_are_those_of_peft(theirs):
    """Every few steps of a run, with the same weights and gradients in both programs."""
    allocator = theirs.rankallocator
    with jax.enable_x64(True):
        transform = sensitivities(NUMBERS, orthogonal=0.0)
        state = transform.init(jax.tree.map(jnp.asarray, leaves(0)))
        seen = []
        for step in range(1, STEPS + 1):
            weights, gradient = leaves(step), leaves(1000 + step)
            put(theirs, weights)
            put(theirs, gradient, gradients=True)
            allocator.update_ipt(theirs)
            budget, masks = allocator.budget_schedule(step)
            if masks:
                allocator.mask_to_budget(theirs, budget)
            adapter = jax.tree.map(jnp.asarray, weights)
            whole, state = transform.update(jax.tree.map(jnp.asarray, gradient), state, adapter)
            jax.tree.map(np.testing.assert_array_equal, whole, gradient)
            # A share of the steps: 4 of 40 before, 20 of 40 after.
            made = keep_budget(adapter, AfterUpdate(0.0, jnp.asarray(step / STEPS), 1e-3, (state,)))
            for path, expected in gates(theirs).items():
                np.testing.assert_allclose(made[path]["gate"], expected, rtol=1e-12, err_msg=f"{step} {path}")
                np.testing.assert_array_equal(made[path]["a"], weights[path]["a"])
            seen.append(sum(int(np.count_nonzero(leaf["gate"])) for leaf in made.values()))
    assert seen[0] == 2 * R and seen[-1] == 2 * TARGET and len(set(seen)) > 2
    assert all(later <= earlier for earlier, later in itertools.pairwise(seen))


def test_the_budget_falls_monotonically_to_its_target_and_is_that_of_peft(theirs):
    many = [int(budget_at(step / STEPS, 2 * R, 2 * TARGET)) for step in range(STEPS + 1)]
    assert many == [theirs.rankallocator.budget_schedule(step)[0] for step in range(STEPS + 1)]
    assert many[0] == 2 * R and many[-1] == 2 * TARGET and many == sorted(many, reverse=True)


def test_the_regulariser_is_that_of_peft():
    """By torch's gradient of the mean distance of the Gram matrices from the identity."""
    adapter = leaves(3)
    tensors = {
        (path, name): torch.tensor(adapter[path][name], requires_grad=True) for path in SIZES for name in ("a", "b")
    }
    total = sum(
        torch.norm((each.T @ each if name == "a" else each @ each.T) - torch.eye(R))
        for (_, name), each in tensors.items()
    )
    (0.1 * total / len(tensors)).backward()
    with jax.enable_x64(True):
        zeros = jax.tree.map(jnp.zeros_like, jax.tree.map(jnp.asarray, adapter))
        transform = sensitivities(NUMBERS)
        found, _ = transform.update(zeros, transform.init(zeros), jax.tree.map(jnp.asarray, adapter))
    for (path, name), tensor in tensors.items():
        np.testing.assert_allclose(found[path][name], tensor.grad.numpy(), rtol=1e-9)
    assert not np.any(found["up"]["gate"])


def test_an_orthogonal_factor_has_a_finite_gradient():
    adapter = {"up": {"a": jnp.eye(7)[:, :R], "b": jnp.eye(9)[:R], "gate": jnp.zeros(R)}}
    transform = sensitivities(NUMBERS)
    found, state = transform.update(jax.tree.map(jnp.zeros_like, adapter), transform.init(adapter), adapter)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((found, state)))


def test_importances_of_stacked_layers_and_of_trials():
    rng = np.random.default_rng(0)
    shapes = {"a": (2, 7, R), "b": (2, R, 9), "gate": (2, R)}
    smoothed, away = ({"up": {name: rng.random(shape) for name, shape in shapes.items()}} for _ in range(2))
    found = importances(Sensitivity(smoothed, away))[("up",)]
    score = {name: smoothed["up"][name] * away["up"][name] for name in shapes}
    np.testing.assert_allclose(found, score["gate"] + score["a"].mean(axis=1) + score["b"].mean(axis=2), rtol=1e-5)
    adapter = {"up": {name: jnp.ones(shape) for name, shape in shapes.items()}}
    states = Sensitivity(*(jax.tree.map(lambda *x: jnp.stack(x), each, other) for each, other in
                           ((smoothed, away), (away, smoothed))))  # fmt: skip
    both = jax.vmap(lambda state: keep_budget(adapter, AfterUpdate(0.0, 1.0, 1e-3, (state,))))(states)
    assert np.count_nonzero(both["up"]["gate"], axis=(1, 2)).tolist() == [8, 8]


def test_the_method_starts_as_the_base():
    method = METHODS["adalora"]
    assert method.gate_start == "zeros" and method.phases[0].start == "small_normal" and method.optimizer == "adalora"
