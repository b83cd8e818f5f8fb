"""Every kind of layer that adapt takes: its product, its trees' functions, its profiles and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx

from mlora_jax import (
    adapt,
    fold,
    load_adapter,
    save_adapter,
    set_dropout_key,
    set_profile,
    split,
    squeeze,
    truncate,
)
from mlora_jax.adapters import LAYERS, AdaptedLayer, AdapterParam
from mlora_jax.core.product import scale_ranks
from tests.adapters.layer_cases import (
    CASES,
    HIERARCHY,
    KEY,
    B,
    P,
    R,
    T,
    adapted,
    close,
    conv,
    each_case,
    einsum,
    forward,
    frozen,
    frozen_of,
    some_cases,
)


def test_every_kind_of_the_table_has_a_case():
    assert {type(case.build()) for case in CASES.values()} == set(LAYERS)


@each_case
def test_the_product_is_the_base_layer_with_the_summed_kernel(name):
    case = CASES[name]
    layer, x = case.build(), case.x()
    model = adapted(layer)
    run, base, adapter, profile = forward(model)
    profile = set_profile(profile, P)
    p = np.broadcast_to(P, model.p.shape)
    expected = case.kernel(frozen(layer), adapter["a"], adapter["b"], p)
    folded = fold(base, adapter, profile)
    close(frozen_of(folded), expected, 1e-6)
    got = run(base, adapter, profile, x)
    frozen(layer)[...] = jnp.asarray(expected, jnp.float32)
    close(got, layer(x))
    assert got.dtype == layer(x).dtype
    zero = set_profile(profile, jnp.zeros(R))
    close(run(folded, adapter, zero, x), got)
    close(run(base, truncate(adapter, 3), truncate(profile, 3), x), got)
    if name in ("interleaved", "grouped conv"):  # with and without groups; it knows no more of the layers
        squeezed, hierarchy = squeeze(adapter, profile)
        close(run(base, squeezed, set_profile(profile, hierarchy.prefix(R)), x), got, 2e-5)
    keep = jnp.array([1.0, 1.0, 0.0, 0.0])
    close(
        run(base, scale_ranks(adapter, keep), profile, x),
        run(base, adapter, set_profile(profile, P * keep), x),
    )


@each_case
@pytest.mark.parametrize("init", ["fan_rank", "fan_in"])
def test_a_fresh_adapter_is_the_base_layer_and_its_fan_is_what_the_kernel_contracts(name, init):
    case = CASES[name]
    layer = case.build()
    model = adapt(layer, R, ("model",), key=KEY, init=init)
    np.testing.assert_array_equal(model(case.x()), layer(case.x()))
    assert model.a.shape[-2:] == (case.fan_in, R) and model.a.size == np.prod(case.a) * R
    if (name, init) == ("embed", "fan_in"):  # PEFT's: the table of rows is zero, what they are multiplied by is normal
        assert not np.any(model.a[...]) and 0.5 < np.std(model.b[...]) < 1.5
        return
    bound = (R if init == "fan_rank" else case.fan_in) ** -0.5
    assert 0.6 * bound < np.max(np.abs(model.a[...])) <= bound and not np.any(model.b[...])


@some_cases
def test_only_the_adapter_has_gradients_and_columns_without_weight_have_none(name):
    case = CASES[name]
    run, base, adapter, profile = forward(adapted(case.build()))
    profile = set_profile(profile, HIERARCHY.prefix(2))
    gradient = jax.jit(jax.grad(lambda adapter: jnp.sum(run(base, adapter, profile, case.x()) ** 2)))(adapter)
    assert jax.tree.structure(gradient) == jax.tree.structure(adapter)
    a, b = (np.asarray(gradient[role][...]).reshape(-1, *gradient[role].shape[-2:]) for role in "ab")
    assert np.all(np.any(a[..., :2] != 0, axis=1)) and np.all(np.any(b[:, :2] != 0, axis=2))
    assert not np.any(a[..., 2:]) and not np.any(b[:, 2:])


@some_cases
def test_every_example_and_every_token_at_its_own_rank(name):
    case = CASES[name]
    run, base, adapter, profile = forward(adapted(case.build()))
    x, axis = case.x(), int(name == "batch axis")  # the first axis of x that is no group
    alone = [np.asarray(run(base, adapter, set_profile(profile, HIERARCHY.prefix(r)), x)) for r in range(R + 1)]
    rows = jnp.stack([HIERARCHY.prefix(r) for r in (4, 0, 1)])
    got = np.asarray(run(base, adapter, set_profile(profile, rows, per_example=True), x))
    for row, r in enumerate((4, 0, 1)):
        close(np.moveaxis(got, axis, 0)[row], np.moveaxis(alone[r], axis, 0)[row])
    ranks = np.arange(B * T).reshape(B, T) % (R + 1)
    tokens = jnp.stack([jnp.stack([HIERARCHY.prefix(int(r)) for r in row]) for row in ranks])
    if not case.tokens:
        with pytest.raises(ValueError, match=r"does not fit: its axes before R must be .*the first axes of x"):
            run(base, adapter, set_profile(profile, tokens, per_example=True), x)
        return
    got = np.asarray(run(base, adapter, set_profile(profile, tokens, per_example=True), x))
    at = {"batch axis": (1, 2), "interleaved": (0, 2)}.get(name, (0, 1))  # where the output has B and T
    got, alone = np.moveaxis(got, at, (0, 1)), [np.moveaxis(y, at, (0, 1)) for y in alone]
    for r in range(R + 1):
        close(got[ranks == r], alone[r][ranks == r])
    with pytest.raises(ValueError, match="does not fit"):
        run(base, adapter, set_profile(profile, rows[:2], per_example=True), x)


@some_cases
def test_a_stack_of_layers_in_a_scan_equals_its_layers_one_by_one(name, tmp_path):
    case, count = CASES[name], 2
    stack = nnx.vmap(case.make, in_axes=0, out_axes=0)(nnx.Rngs(0).split(count))
    model = adapted(stack, dropout=0.5)
    model.eval()
    assert model.a.shape[0] == count and model.dropout_key.shape == (count,)
    graphdef, base, adapter, profile = split(model)
    by_layer = jnp.stack([P, HIERARCHY.prefix(1)])
    profile = set_profile(profile, by_layer)
    np.testing.assert_array_equal(profile["p"][...].reshape(count, -1, R)[:, -1], by_layer)

    @jax.jit
    def scanned(base, adapter, profile, x):
        layer = lambda _, trees: (None, nnx.merge(graphdef, *trees)(x))  # noqa: E731
        return jax.lax.scan(layer, None, (base, adapter, profile))[1]

    got = scanned(base, adapter, profile, case.x())
    folded = frozen_of(fold(base, adapter, profile))
    for number in range(count):
        one = case.build()
        for path, leaf in nnx.to_flat_state(nnx.state(stack)):
            getattr(one, path[-1])[...] = leaf[...][number]
        p = np.broadcast_to(by_layer[number], model.p.shape[1:])
        kernel = case.kernel(frozen(one), model.a[...][number], model.b[...][number], p)
        close(folded[number], kernel, 1e-6)
        frozen(one)[...] = jnp.asarray(kernel, jnp.float32)
        close(got[number], one(case.x()))
    save_adapter(tmp_path, adapter, HIERARCHY, {})
    loaded, *_ = load_adapter(tmp_path, jax.tree.map(jnp.zeros_like, adapter))
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
    close(frozen_of(fold(base, loaded, profile)), folded, 0)


@pytest.mark.parametrize("name", ["heads", "interleaved", "conv", "grouped conv", "embed"])
def test_dtypes_and_precision_of_the_wrapped_layer_are_kept(name):
    case = CASES[name]
    layer = case.build()
    layer.dtype, layer.precision = jnp.bfloat16, "highest"
    model = adapted(layer)
    assert model(case.x()).dtype == layer(case.x()).dtype == jnp.bfloat16
    assert model.a.dtype == model.b.dtype == jnp.float32
    if name == "embed":
        return
    found = str(jax.make_jaxpr(model)(case.x()))
    products = found.count("dot_general[") + found.count("conv_general_dilated[")
    assert products == 3 and found.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products
    layer = case.build()
    layer.dtype, layer.preferred_element_type = jnp.bfloat16, jnp.float32
    assert adapted(layer)(case.x()).dtype == layer(case.x()).dtype == jnp.float32


def test_an_embedding_attends_with_the_summed_table_and_ids_are_not_dropped():
    layer = nnx.Embed(11, 6, rngs=nnx.Rngs(0))
    model = adapted(layer, dropout=0.5)
    graphdef, base, adapter, profile = split(model)
    profile = set_dropout_key(set_profile(profile, P), KEY)
    query = jax.random.normal(KEY, (B, T, 6))
    table = CASES["embed"].kernel(layer.embedding, model.a, model.b, P)
    merged = nnx.merge(graphdef, base, adapter, profile)
    ids = CASES["embed"].x()
    close(merged(ids), table[ids])
    assert np.max(np.abs(merged.attend(query) - query @ table.T)) > 0.1
    merged.eval()
    close(merged.attend(query), query @ table.T)
    assert np.all(np.isnan(merged(jnp.array([11])))) and (merged.num_embeddings, merged.features) == (11, 6)
    with pytest.raises(AttributeError, match=r"layer\.base\.embedding, or get the sum from fold"):
        _ = merged.embedding
    lone = adapted(nnx.Embed(1, 6, rngs=nnx.Rngs(0)))  # Flax does not index a vocabulary of one
    np.testing.assert_array_equal(lone(jnp.array([0, 3])), lone(jnp.array([0, 0])))
    assert np.all(np.isfinite(lone(jnp.array([3]))))


def test_dropout_is_on_the_input_of_the_factors():
    case = CASES["conv"]
    model = adapted(case.build(), dropout=0.4)
    graphdef, base, adapter, profile = split(model)
    key = jax.random.key(11)
    merged = nnx.merge(graphdef, base, adapter, set_dropout_key(set_profile(profile, P), key))
    x = case.x()
    keep = jax.random.bernoulli(merged.dropout_key[...], 0.6, x.shape)
    alone = nnx.merge(graphdef, base, adapter, set_profile(profile, P))
    alone.eval()
    dropped = jnp.where(keep, x / 0.6, 0.0)
    close(merged(x) - model.base(x), alone(dropped) - model.base(dropped), 1e-5)


def test_an_einsum_may_be_called_by_another_that_uses_the_kernel_alike():
    layer = CASES["interleaved"].build()
    model = adapted(layer)
    x = CASES["interleaved"].x()
    close(model(x[0], "td,ndh->tnh"), jnp.moveaxis(model(x)[0], 0, 1))
    square = adapted(nnx.Einsum("td,df->tf", (6, 6), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="'td,fd->tf' uses the kernel otherwise than 'td,df->tf'"):
        square(x[0], "td,fd->tf")


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            einsum("btd,d->btd", (6,), kernel_init=nnx.initializers.ones),
            "'btd,d->btd' has no adapter: no letter of its kernel is contracted with x",
        ),
        (einsum("btd,dfk->btf", (6, 5, 2)), "only its kernel has the letter k"),
        (einsum("b...d,...df->b...f", (2, 6, 5)), "its kernel has an ellipsis; give every axis of the kernel a letter"),
        (einsum("bdd,df->bf", (6, 5)), "the letter d stands twice in one operand"),
        (conv(3, 4, 2, mask=jnp.ones((2, 3, 4))), "a masked convolution has no adapter"),
    ],
)
def test_layers_that_leave_no_room_for_an_adapter_are_refused_by_path(layer, message):
    model = nnx.Dict(first=nnx.Linear(3, 3, rngs=nnx.Rngs(0)), odd=layer(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=f"^odd: .*{message}"):
        adapt(model, R, (".*",), key=KEY)
    assert isinstance(adapt(model, R, ("first",), key=KEY).first, AdaptedLayer)


class Attends(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.out = nnx.LoRA(6, 2, 6, rngs=rngs)
        self.deconvolution = nnx.ConvTranspose(6, 6, 3, rngs=rngs)

    def __call__(self, x):
        return self.attention(x)


@pytest.mark.parametrize(
    ("target", "kind"),
    [("attention", "MultiHeadAttention"), ("norm", "BatchNorm"), ("out|norm", "BatchNorm, LoRA"),
     ("deconvolution", "ConvTranspose")],
)  # fmt: skip
def test_modules_without_such_a_kernel_are_refused_with_what_is_supported(target, kind):
    model = Attends(nnx.Rngs(0))
    if target == "out|norm":
        target = "norm|out"
        model.attention = nnx.data(None)
    supported = ", ".join(f"nnx.{kind.__name__}" for kind in (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv))
    with pytest.raises(ValueError, match=f"{kind} has no kernel that an adapter fits, as {supported}, nnx.Embed have"):
        adapt(model, R, (target,), key=KEY)


def test_the_projections_of_flax_attention_are_adapted_and_sharded_outputs_stay_so():
    model = Attends(nnx.Rngs(0))
    new = adapted(model.attention)
    assert {name for name in ("query", "key", "value", "out") if isinstance(getattr(new, name), AdaptedLayer)} == {
        "query", "key", "value", "out"
    }  # fmt: skip
    x = jax.random.normal(KEY, (4, T, 6))
    new.eval()
    graphdef, base, adapter, profile = split(new)
    run = lambda base, p: nnx.merge(graphdef, base, adapter, set_profile(profile, p))(x)  # noqa: E731
    close(run(base, P), run(fold(base, adapter, set_profile(profile, P)), jnp.zeros(R)))
    close(run(base, jnp.zeros(R)), model.attention(x))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        spec = jax.sharding.PartitionSpec("data", None, None, None)
        split_x = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None, None)))
        got = new.query(split_x, out_sharding=spec)
        assert got.sharding.spec == spec
    close(got, new.query(x))


class Torch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(11, 3)
        self.conv = torch.nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(1, 0))

    def forward(self, ids):
        return self.conv(self.table(ids).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def test_convolution_and_embedding_agree_with_peft():
    """The same factors in PEFT's Conv2d and Embedding, at its scaling lora_alpha / r."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=R, lora_alpha=6, target_modules=["table", "conv"])
    oracle = peft.get_peft_model(Torch(), config)
    tensors = {name.rsplit("base_model.model.", 1)[-1]: value for name, value in oracle.named_parameters()}
    with torch.no_grad():
        for name, value in tensors.items():
            if "lora" in name:
                value.normal_()
    of = lambda name: jnp.asarray(tensors[name].detach().numpy())  # noqa: E731
    rngs = nnx.Rngs(0)
    model = nnx.Dict(
        table=nnx.Embed(11, 3, rngs=rngs),
        conv=nnx.Conv(3, 8, (3, 2), strides=(2, 1), padding=((1, 1), (0, 0)), rngs=rngs),
    )
    model = adapt(model, R, ("table", "conv"), key=KEY)
    model.table.base.embedding[...] = of("table.base_layer.weight")
    model.table.a[...], model.table.b[...] = (of(f"table.lora_embedding_{f}.default").T for f in "AB")
    model.conv.base.kernel[...] = of("conv.base_layer.weight").transpose(2, 3, 1, 0)
    model.conv.base.bias[...] = of("conv.base_layer.bias")
    model.conv.a[...] = of("conv.lora_A.default.weight").transpose(2, 3, 1, 0).reshape(18, R)
    model.conv.b[...] = of("conv.lora_B.default.weight")[:, :, 0, 0].T
    for layer in (model.table, model.conv):
        layer.p[...] = jnp.full(R, 6 / R)
    ids = np.random.default_rng(0).integers(0, 11, (2, 5, 6))
    close(model.conv(model.table(jnp.asarray(ids))), oracle(torch.tensor(ids)).detach().numpy(), 1e-5)
    assert {type(leaf) for _, leaf in nnx.to_flat_state(split(model)[2])} == {AdapterParam}
