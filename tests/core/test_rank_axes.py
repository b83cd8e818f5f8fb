"""The table of rank axes: what its functions make of every leaf, and that no other file knows a leaf by name."""

import ast
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlora_jax
from mlora_jax.core import fold, squeeze, truncate
from mlora_jax.core.product import scale_ranks, without_gate
from mlora_jax.core.rank_axes import (
    ADAPTER_LEAVES,
    RANK_AXES,
    adapter_layers,
    adapter_rank,
    leading_axes,
    leaf_ranks,
    parameters_per_rank,
)
from mlora_jax.core.squeeze import map_gradients, squeeze_factors
from tests.oracles import numpy_reference as reference

L, D, F, R = 2, 6, 7, 4
SHAPES = {"a": (L, D, R), "b": (L, R, F), "gate": (L, R), "p": (L, R)}


def arrays(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    values = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    values["p"] = np.abs(values["p"]) + 0.5
    return {name: value.astype(dtype) for name, value in values.items()}


def trees(values):
    """(adapter, profile) of jax arrays."""
    leaves = {name: jnp.asarray(value) for name, value in values.items()}
    return {"up": {name: leaves[name] for name in ADAPTER_LEAVES}}, {"up": {"p": leaves["p"]}}


def product(a, b, gate, p):
    return (np.asarray(a, np.float64) * (p * gate)[:, None]) @ np.asarray(b, np.float64)


def test_every_leaf_is_cut_and_scaled_along_its_rank_axis():
    assert set(SHAPES) == set(RANK_AXES)
    values = arrays()
    adapter, _ = trees(values)
    assert leaf_ranks(adapter) == {f"up.{name}": R for name in ADAPTER_LEAVES} and adapter_rank(adapter) == R
    short, scaled = truncate(adapter, 3)["up"], scale_ranks(adapter, jnp.arange(4.0))["up"]
    factor = np.arange(4, dtype=np.float32)
    np.testing.assert_array_equal(short["a"], values["a"][:, :, :3])
    np.testing.assert_array_equal(short["b"], values["b"][:, :3])
    np.testing.assert_array_equal(short["gate"], values["gate"][:, :3])
    np.testing.assert_array_equal(scaled["a"], values["a"] * factor)
    np.testing.assert_array_equal(scaled["b"], values["b"] * factor[:, None])
    np.testing.assert_array_equal(scaled["gate"], values["gate"] * factor)
    np.testing.assert_array_equal(truncate({"up": {"p": jnp.asarray(values["p"])}}, 3)["up"]["p"], values["p"][:, :3])


def test_what_a_layer_consists_of():
    adapter, _ = trees(arrays())
    (leaves,) = adapter_layers(adapter).values()
    assert leading_axes(leaves) == (L,) and parameters_per_rank(leaves) == D + F + 1
    assert sum(leaf.size for leaf in leaves.values()) == L * R * parameters_per_rank(leaves)
    pair = without_gate(leaves)
    assert parameters_per_rank(pair) == D + F and list(pair) == ["a", "b"]
    np.testing.assert_array_equal(pair["b"], leaves["b"] * leaves["gate"][..., None])


def test_fold_adds_what_numpy_adds():
    values = arrays()
    kernel = np.random.default_rng(1).normal(size=(L, D, F)).astype(np.float32)
    folded = fold({"up": {"base": {"kernel": jnp.asarray(kernel)}}}, *trees(values))["up"]["base"]["kernel"]
    np.testing.assert_allclose(folded, kernel + product(**values), rtol=0, atol=1e-5)


def test_a_squeeze_takes_the_gate_into_the_factors():
    with jax.enable_x64(True):
        values = arrays(dtype=np.float64)
        new = jax.tree.map(np.asarray, squeeze(*trees(values))[0])["up"]
    np.testing.assert_array_equal(new["gate"], np.ones((L, R)))
    for layer in range(L):
        a, b, gate, p = (values[name][layer] for name in ("a", "b", "gate", "p"))
        for r in range(1, R + 1):
            best = reference.best_approximation(a, b, p * gate, r)
            np.testing.assert_allclose(new["a"][layer, :, :r] @ new["b"][layer, :r], best, rtol=0, atol=1e-10)


def test_gradients_of_factors_follow_a_squeeze_and_those_of_a_gate_become_zero():
    with jax.enable_x64(True):
        values = arrays(dtype=np.float64)
        adapter, profile = trees(values)
        new, maps = squeeze_factors(adapter, profile, key=jax.random.key(0))
        delta = np.random.default_rng(2).normal(size=(L, D, F))  # the gradient of the product

        def gradients(leaves, p):
            a, b, gate = (np.asarray(leaves[name]) for name in ("a", "b", "gate"))
            scales = (p * gate)[:, None]
            inner = np.swapaxes(a, -1, -2) @ delta @ np.swapaxes(b, -1, -2)
            by_gate = p * np.diagonal(inner, axis1=-2, axis2=-1)
            return {
                "a": delta @ np.swapaxes(b, -1, -2) * scales,
                "b": np.swapaxes(a * scales, -1, -2) @ delta,
                "gate": by_gate,
            }

        old = {"up": jax.tree.map(jnp.asarray, gradients(values, values["p"]))}
        mapped = map_gradients(old, maps)["up"]
        squares = map_gradients(jax.tree.map(jnp.square, old), maps, squared=True)["up"]
        mapped, squares = jax.tree.map(np.asarray, (mapped, squares))
        expected = gradients(new["up"], np.ones((L, R)))
    np.testing.assert_allclose(mapped["a"], expected["a"], rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(mapped["b"], expected["b"], rtol=1e-8, atol=1e-8)
    assert mapped["gate"].shape == squares["gate"].shape == (L, R)
    assert not np.any(mapped["gate"]) and not np.any(squares["gate"]) and np.all(squares["a"] > 0)


ONES = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
BAD = {
    "empty": ({}, "this tree is no adapter: it has no leaves"),
    "profile": ({"up": {"p": ONES["p"]}}, r"up\.p is none of a, b, gate"),
    "half": ({"up": {"a": ONES["a"]}}, "up lacks b"),
    "gate alone": ({"up": {"gate": ONES["gate"]}}, "up lacks a"),
    "other rank": (
        {"up": {"a": ONES["a"], "b": ONES["b"], "gate": jnp.ones((L, 3))}},
        r"the leaves of up do not fit together: .*gate \(2, 3\)",
    ),
    "other stack": ({"up": {"a": ONES["a"], "b": jnp.ones((3, R, F))}}, r"b \(3, 4, 7\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_tree_that_is_no_adapter_is_refused(name):
    tree, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        adapter_layers(tree)


def test_a_gate_of_another_shape_is_refused():
    adapter, profile = trees(arrays())
    adapter["up"]["gate"] = jnp.ones(R)
    with pytest.raises(ValueError, match=r"gate of up has shape \(4,\), but A \(2, 6, 4\) needs \(2, 4\)"):
        squeeze(adapter, profile)


PACKAGE = pathlib.Path(mlora_jax.__file__).parent
NAMES = {"a", "b", "gate", "ab"}
# The table itself; the product and its decompositions, which need the two factors apart; and a compiler's dimension
# labels, in which "b" is the batch.
MAY_NAME_LEAVES = {
    *("core/rank_axes.py", "core/product.py", "core/squeeze.py", "parallel/hlo_products.py"),
    "config/methods.py",  # the option of a method that is called as the leaf
}


def named_leaves(source):
    """Lines that hold the name of a leaf as a string which is not the mode of a file to open."""
    tree = ast.parse(source)
    modes = {
        id(argument)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "open"
        for argument in (*node.args, *(keyword.value for keyword in node.keywords))
    }
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in modes)
    return [node.lineno for node in found if isinstance(node.value, str) and node.value in NAMES]


def test_no_other_file_knows_a_leaf_by_name():
    files = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    found = {name: named_leaves(path.read_text(encoding="utf-8")) for name, path in files.items()}
    found = {name: lines for name, lines in found.items() if lines}
    assert set(found) == MAY_NAME_LEAVES, {name: found[name] for name in set(found) - MAY_NAME_LEAVES}


@pytest.mark.parametrize(
    "source",
    ["if path[-1] == 'a': pass", "pair['b']", "{'gate': 1}", "set(pair) != {'a', 'b'}", "'ab'.index(name)"],
)
def test_the_walk_finds_names_of_leaves(source):
    assert named_leaves(source) and not named_leaves("path.open('a', encoding='utf-8')\nopen(path, mode='a')")
