"""Base and adapter as one Hugging Face folder, and as a smaller adapter of our own."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from mlora_jax.core import RankHierarchy
from mlora_jax.interop import export_adapter, export_merged
from mlora_jax.models import load_decoder
from mlora_jax.training.adapter_file import load_adapted
from tests.data.conftest import write_tokenizer
from tests.interop.models import (
    RANK,
    TOKENS,
    decoder_logits,
    logits_as_is,
    our_logits,
    pairs,
    random_adapter,
    save_base,
)
from tests.oracles.numpy_reference import profile_matryoshka, readouts
from tests.oracles.peft_logits import plain, with_deltas

S = (1, 2, 4, RANK)
CLOSE = dict(rtol=0, atol=1e-4)
HIERARCHY = RankHierarchy(S, "sqrt")


@pytest.fixture(scope="module")
def full_base(tmp_path_factory):
    """With a tokenizer, generation settings, and things that must not be copied."""
    folder = write_tokenizer(save_base(tmp_path_factory.mktemp("base")), bos=True)
    GenerationConfig(temperature=0.3, do_sample=True).save_pretrained(str(folder))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE.txt").write_text("terms")
    for name in ("README.md", "pytorch_model.bin", "tf_model.h5", ".gitattributes", "optimizer.pt"):
        (folder / name).write_text("x")
    return folder


def tensors(folder):
    """{name: array} of all files, and {name: file}."""
    found, places = {}, {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        found |= part
        places |= dict.fromkeys(part, file.name)
    return found, places


def added(adapter, p):
    return {f"{name}.weight": ((a * p) @ b).T for name, (a, b) in pairs(adapter).items()}


def check_sums(base, folder, deltas, dtype):
    """Every adapted matrix is the rounded sum; every other tensor has the bits that it had."""
    before, after = tensors(base)[0], tensors(folder)[0]
    assert set(before) == set(after)
    for name, value in before.items():
        assert after[name].dtype == value.dtype == dtype
        if name not in deltas:
            assert after[name].tobytes() == value.tobytes(), name
            continue
        expected = value.astype(np.float64) + deltas[name].astype(np.float64)
        # Half a unit in the last place, and what float32 has rounded before.
        bound = np.abs(expected) * float(ml_dtypes.finfo(dtype).eps) * 0.5 + 1e-6
        assert (np.abs(after[name].astype(np.float64) - expected) <= bound).all(), name
        assert (after[name] != value).any()


@pytest.mark.parametrize("readout", ["prefix", "nested", "masked", "squeeze"])
def test_transformers_computes_what_the_adapted_model_computes(full_base, adapted, tmp_path, readout):
    model, adapter = adapted
    trained_profile = profile_matryoshka(S, "sqrt")
    options = dict(readout=readout, trained_profile=trained_profile, base_model=full_base)
    for rank in (2, RANK):
        folder = export_merged(tmp_path / str(rank), adapter, HIERARCHY, rank, **options)
        logits = plain(folder, TOKENS)
        if readout != "squeeze" or rank == RANK:  # at full rank it is the trained function
            p = trained_profile if readout == "squeeze" else readouts(S, rank, "sqrt")[readout]
            check_sums(full_base, folder, added(adapter, p), np.float32)
            deltas = {name.removesuffix(".weight"): delta.T for name, delta in added(adapter, p).items()}
            np.testing.assert_allclose(logits, with_deltas(full_base, deltas, TOKENS), **CLOSE)
            np.testing.assert_allclose(logits, our_logits(model, adapter, p), **CLOSE)
        np.testing.assert_allclose(decoder_logits(folder), logits, **CLOSE)


def test_what_lies_beside_the_weights_comes_along(full_base, adapted, tmp_path):
    folder = export_merged(tmp_path / "out", adapted[1], HIERARCHY, 2, base_model=full_base)
    names = {file.name for file in folder.iterdir()}
    assert names == {file.name for file in full_base.iterdir()} - {
        "README.md", "pytorch_model.bin", "tf_model.h5", ".gitattributes", "optimizer.pt"
    } | {"mlora_jax.json"}  # fmt: skip
    for name in names - {"mlora_jax.json", "model.safetensors"}:
        assert (folder / name).read_bytes() == (full_base / name).read_bytes()
    texts = [AutoTokenizer.from_pretrained(str(each))("How far ?")["input_ids"] for each in (full_base, folder)]
    assert texts[0] == texts[1] and len(texts[0]) > 2
    assert GenerationConfig.from_pretrained(str(folder)).temperature == 0.3
    with safe_open(folder / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_shards_and_dtype_are_kept(tmp_path, dtype):
    """The base's own shards, or new ones of a size; bits of what is not adapted stay, whatever they are."""
    base = save_base(tmp_path / "base", dtype=getattr(torch, dtype), max_shard_size="4KB")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.arange(3, dtype=np.float32)}
    kept, places = tensors(base)
    assert len(set(places.values())) > 3
    _, adapter = random_adapter(base, ("v_proj", "down_proj", "q_proj", "lm_head"))
    rank = {"layers.self_attn.v_proj": (0, 3, 1), "layers.mlp.down_proj": (2, 2, 2),
            "layers.self_attn.q_proj": (0, 0, 0), "lm_head": (0,)}  # fmt: skip
    deltas = {
        f"model.{path.replace('layers', f'layers.{layer}')}.weight": readouts(S, r, "sqrt")["prefix"]
        for path, ranks in rank.items()
        for layer, r in enumerate(ranks)
        if r
    }
    everything = {f"{name}.weight": pair for name, pair in pairs(adapter).items()}
    deltas = {name: ((everything[name][0] * p) @ everything[name][1]).T for name, p in deltas.items()}
    same = export_merged(tmp_path / "same", adapter, HIERARCHY, rank, base_model=base)
    check_sums(base, same, deltas, kept["lm_head.weight"].dtype)
    assert tensors(same)[1] == places
    indices = [json.loads((each / "model.safetensors.index.json").read_text()) for each in (base, same)]
    assert indices[0] == indices[1]
    # A tensor of odd length and another width in a shard of its own name: everything must stay aligned.
    first = base / sorted(set(places.values()))[0]
    save_file(load_file(first) | extra, first, metadata={"format": "pt"})
    fresh = export_merged(tmp_path / "new", adapter, HIERARCHY, rank, base_model=base, max_shard_size="9KB")
    again, places = tensors(fresh)
    assert again.pop(*extra).tobytes() == extra.popitem()[1].tobytes()
    for name, value in tensors(same)[0].items():
        assert again[name].tobytes() == value.tobytes(), name
    count = len(set(places.values()))
    assert count > 1 and f"model-00001-of-{count:05d}.safetensors" in places.values()
    index = json.loads((fresh / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == places
    large = {
        file: sum(again[n].nbytes for n, f in places.items() if f == file and n in again)
        for file in set(places.values())
    }
    assert all(size <= 9000 or list(places.values()).count(file) == 1 for file, size in large.items())
    np.testing.assert_array_equal(plain(fresh, TOKENS), plain(same, TOKENS))
    one = export_merged(tmp_path / "one", adapter, HIERARCHY, rank, base_model=base, max_shard_size=10**9)
    assert [file.name for file in one.glob("model*")] == ["model.safetensors"]


def test_rank_0_is_the_base(full_base, adapted, tmp_path):
    folder = export_merged(tmp_path / "out", adapted[1], HIERARCHY, 0, base_model=full_base)
    check_sums(full_base, folder, {}, np.float32)


def remove(name):
    return lambda values: values.pop(name)


UP = "model.layers.2.self_attn.v_proj.weight"
BAD = {
    "missing": (remove(UP), f"factors for {UP}, which the weights in .* lack"),
    "misshapen": (
        lambda t: t.update({UP: t[UP][:3].copy()}),
        rf"{UP} in .* has shape \[3, 16\]; the adapter needs \[8",
    ),
    "quantised": (lambda t: t.update({UP: t[UP].astype(np.int8)}), f"{UP} in .* is stored as I8: an adapter can be"),
    "too large": (
        lambda t: t.update({UP: np.full((8, 16), 65500, np.float16) * np.sign(t[UP]).astype(np.float16)}),
        f"{UP} with its adapter has values that float16 cannot hold",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_base_that_does_not_fit_is_named(full_base, adapted, tmp_path, name):
    change, message = BAD[name]
    bad = tmp_path / "bad"
    shutil.copytree(full_base, bad)
    values = load_file(full_base / "model.safetensors")
    change(values)
    save_file(values, bad / "model.safetensors")
    large = jax.tree.map(lambda x: 30 * x, adapted[1])
    with pytest.raises(ValueError, match=message):
        export_merged(tmp_path / "out", large, HIERARCHY, 6, base_model=bad)
    assert [each.name for each in tmp_path.iterdir()] == ["bad"]


def test_bad_folders_and_sizes(full_base, adapted, tmp_path):
    export = lambda out, **options: export_merged(out, adapted[1], HIERARCHY, 2, **options)  # noqa: E731
    bad = tmp_path / "bad"
    shutil.copytree(full_base, bad)
    (bad / "model.safetensors").write_bytes((full_base / "model.safetensors").read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"bad/model\.safetensors is not a complete safetensors file"):
        export(tmp_path / "out", base_model=bad)
    (bad / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="which are pickles and are never opened"):
        export(tmp_path / "out", base_model=bad)
    with pytest.raises(FileNotFoundError, match=r"nowhere has no config\.json"):
        export(tmp_path / "out", base_model=tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="holds other files"):
        export(full_base, base_model=full_base)
    for size in ("5 apples", "0GB", 0, -1, True):
        with pytest.raises(ValueError, match="max_shard_size must be bytes, or like"):
            export(tmp_path / "out", base_model=full_base, max_shard_size=size)
    assert [each.name for each in tmp_path.iterdir()] == ["bad"]
    merged = export(tmp_path / "merged", base_model=full_base)
    with pytest.raises(FileExistsError, match="is the base model itself"):
        export(merged, base_model=merged)


@pytest.mark.parametrize("readout", ["prefix", "nested", "masked", "squeeze"])
def test_a_smaller_adapter_of_our_own(full_base, adapted, tmp_path, readout):
    model, adapter = adapted
    trained_profile = profile_matryoshka(S, "sqrt")
    options = dict(readout=readout, trained_profile=trained_profile)
    folder = export_adapter(tmp_path / "out", adapter, HIERARCHY, 4, **options, base_model=str(full_base))
    small = load_adapted(folder, load_decoder(full_base))
    assert small.hierarchy.max_rank == 4 and small.hierarchy.ranks == (1, 2, 4)
    assert small.hierarchy.scaling == ("sqrt" if readout == "prefix" else "none")
    merged = export_merged(tmp_path / "merged", adapter, HIERARCHY, 4, **options, base_model=full_base)
    read = nnx.merge(small.graphdef, small.base, small.adapter, small.profile)
    np.testing.assert_allclose(
        our_logits(read, small.adapter, small.hierarchy.prefix(4)), plain(merged, TOKENS), **CLOSE
    )
    if readout == "prefix":
        for rank in (1, 2, 3):
            p = readouts(S, rank, "sqrt")["prefix"]
            ours = our_logits(read, small.adapter, small.hierarchy.prefix(rank))
            np.testing.assert_allclose(ours, our_logits(model, adapter, p), **CLOSE)


def test_a_smaller_adapter_of_a_rank_per_layer(full_base, adapted, tmp_path):
    ranks = {"layers.self_attn.q_proj": (0, 2, 3), "layers.self_attn.v_proj": (1, 1, 1),
             "layers.mlp.down_proj": (0, 0, 0), "lm_head": (2,)}  # fmt: skip
    folder = export_adapter(tmp_path / "out", adapted[1], HIERARCHY, ranks, base_model=str(full_base))
    merged = export_merged(tmp_path / "merged", adapted[1], HIERARCHY, ranks, base_model=full_base)
    small = load_adapted(folder, load_decoder(full_base))
    assert (small.hierarchy.max_rank, small.hierarchy.scaling) == (3, "none")
    read = nnx.merge(small.graphdef, small.base, small.adapter, small.profile)
    np.testing.assert_allclose(logits_as_is(read), plain(merged, TOKENS), **CLOSE)
    with pytest.raises(ValueError, match="every layer has rank 0"):
        export_adapter(tmp_path / "none", adapted[1], HIERARCHY, 0, base_model=str(full_base))
