"""Adapters that PEFT saves together with the embeddings or other modules, against the real PEFT."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from mlora_jax.adapters import split
from mlora_jax.interop import import_peft
from mlora_jax.models import load_decoder

pytestmark = [
    # PEFT 0.21 reads a property that transformers 5.23 deprecates, and says what it saves and what to beware of.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
]
V, D, LAYERS = 61, 16, 2
CLOSE = dict(rtol=0, atol=1e-5)
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 12)).astype(np.int32)
EMBEDDING, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
BASES = {"llama, untied": (LlamaConfig, LlamaForCausalLM, False), "llama, tied": (LlamaConfig, LlamaForCausalLM, True),
         "qwen2, tied": (Qwen2Config, Qwen2ForCausalLM, True)}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Name of a base -> its folder."""
    folders = {}
    for name, (config, model, tied) in BASES.items():
        folders[name] = tmp_path_factory.mktemp("base")
        torch.manual_seed(0)
        model(config(
            vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.1,
        )).save_pretrained(folders[name])  # fmt: skip
    return folders


def base_of(folder, size=None):
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    if size:
        model.resize_token_embeddings(size)
    return model


def save(base, folder, *, size=None, change=None, save_embedding_layers="auto", **options):
    """A random adapter as PEFT saves it, after `change` of PEFT's model."""
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], **options)
    model = peft.get_peft_model(base_of(base, size), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
        if change is not None:
            change(model)
    model.save_pretrained(str(folder), save_embedding_layers=save_embedding_layers)
    return folder


def by_peft(base, adapter, size=None):
    """Logits of PEFT itself."""
    model = peft.PeftModel.from_pretrained(base_of(base, size), str(adapter)).eval()
    with torch.no_grad():
        return model(torch.as_tensor(TOKENS).long()).logits.float().numpy()


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, *state):
    return nnx.merge(graphdef, *state)(jnp.asarray(TOKENS))


def by_us(base, adapter, dtype=jnp.float32):
    model, _ = import_peft(adapter, load_decoder(base, dtype=dtype), key=jax.random.key(0))
    return np.asarray(forward(*split(model)))


UNCHANGED = {
    "embeddings on request": dict(save_embedding_layers=True),
    "embedding and head as modules": dict(modules_to_save=["embed_tokens", "lm_head"]),
    "the head as a module": dict(modules_to_save=["lm_head"]),
    "every norm": dict(modules_to_save=["norm"]),
    "linear layers": dict(modules_to_save=["mlp.down_proj", "1.self_attn.k_proj"]),
    "rows of tokens": dict(trainable_token_indices=[1, 5]),
    "rows of tokens of both": dict(trainable_token_indices={"embed_tokens": [1, 5], "lm_head": [2]}),
    "rows of tokens and embeddings": dict(trainable_token_indices=[1, 5], save_embedding_layers=True),
    "tied on request": dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
}


# Every way of saving on one base every day, and on all of them.
DAILY = {(name, list(BASES)[at % len(BASES)]) for at, name in enumerate(UNCHANGED)}


@pytest.mark.parametrize(
    ("name", "base"),
    [
        (name, base) if (name, base) in DAILY else pytest.param(name, base, marks=pytest.mark.slow)
        for name in UNCHANGED
        for base in BASES
    ],
)
def test_copies_of_the_bases_own_tensors_are_no_obstacle(bases, tmp_path, base, name):
    adapter = save(bases[base], tmp_path / "adapter", **UNCHANGED[name])
    whole = {each for each in load_file(adapter / "adapter_model.safetensors") if "lora_" not in each}
    assert whole  # otherwise this tests nothing
    np.testing.assert_allclose(by_us(bases[base], adapter), by_peft(bases[base], adapter), **CLOSE)


def set_row(path, row, by):
    """Adds to a row of every weight whose name in PEFT's model ends so."""

    def change(model):
        found = [parameter for name, parameter in model.named_parameters() if name.endswith(path)]
        assert found
        for parameter in found:
            parameter[row] += by

    return change


# How it is saved, what is trained of the base -> the message.
CHANGED = {
    "an embedding's row": (
        "llama, untied",
        dict(save_embedding_layers=True, change=set_row("embed_tokens.weight", 7, 0.5)),
        rf"{EMBEDDING}: of its 61 rows, 1 differs from the base model's \(7\), by 0\.5 at most",
    ),
    "a tied embedding": (
        "qwen2, tied",
        dict(save_embedding_layers=True, change=set_row("embed_tokens.weight", slice(3, 9), -2.0)),
        rf"{EMBEDDING}: of its 61 rows, 6 differ from the base model's \(3, 4, 5, 6, \.\.\.\), by 2 at most",
    ),
    "a trained head": (
        "llama, untied",
        dict(modules_to_save=["lm_head"], change=set_row("lm_head.modules_to_save.default.weight", 60, 0.25)),
        rf"{HEAD}: of its 61 rows, 1 differs from the base model's \(60\), by 0\.25 at most",
    ),
    "a head that was tied": (
        "llama, tied",
        dict(modules_to_save=["lm_head"], change=set_row("lm_head.modules_to_save.default.weight", 0, 0.25)),
        rf"{HEAD}: of its 61 rows, 1 differs.*(.|\n)*base\.config\.tie_word_embeddings = False",
    ),
    "a norm": (
        "qwen2, tied",
        dict(modules_to_save=["model.norm"], change=set_row("norm.modules_to_save.default.weight", 2, 1.0)),
        r"base_model.model.model.norm.weight: of its 16 rows, 1 differs from the base model's \(2\), by 1 at most",
    ),
    "more tokens": (
        "llama, untied",
        dict(size=64),
        rf"{EMBEDDING}: it has 64 rows, and the base model 61: the vocabulary was enlarged; "
        r"of the rows that both have, none differs\n(.|\n)*model: base\.resize_token_embeddings\(64\); PeftModel",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_differs_is_named_and_the_way_out_leads_there(bases, tmp_path, name):
    base, options, message = CHANGED[name]
    adapter, size = save(bases[base], tmp_path / "adapter", **options), options.get("size")
    with pytest.raises(ValueError, match=message) as caught:
        by_us(bases[base], adapter)
    assert "unload().save_pretrained(NEW_BASE)" in str(caught.value)
    model = base_of(bases[base], size)
    if "tie_word_embeddings = False" in str(caught.value):
        model.config.tie_word_embeddings = False
    new = peft.PeftModel.from_pretrained(model, str(adapter)).unload()
    new.save_pretrained(tmp_path / "new")
    np.testing.assert_allclose(by_us(tmp_path / "new", adapter), by_peft(bases[base], adapter, size), **CLOSE)


@pytest.mark.parametrize("tokens", [[1, 5], {"embed_tokens": [5, 1]}])
def test_trained_rows_of_tokens_are_named(bases, tmp_path, tokens):
    change = set_row("embed_tokens.token_adapter.trainable_tokens_delta.default", 1, 0.125)
    adapter = save(bases["llama, untied"], tmp_path / "adapter", trainable_token_indices=tokens, change=change)
    token = 5 if isinstance(tokens, list) else 1
    with pytest.raises(
        ValueError, match=rf"_delta: of its 2 rows, 1 differs .*\({token}\), by 0\.125 at most"
    ) as caught:
        by_us(bases["llama, untied"], adapter)
    assert "merge_and_unload().save_pretrained(NEW_MODEL)" in str(caught.value)
    model = peft.PeftModel.from_pretrained(base_of(bases["llama, untied"]), str(adapter)).merge_and_unload()
    model.save_pretrained(tmp_path / "new")
    ours = np.asarray(forward(*nnx.split(load_decoder(tmp_path / "new"))))
    np.testing.assert_allclose(ours, by_peft(bases["llama, untied"], adapter), **CLOSE)


def test_the_padding_of_a_vocabulary_stays_with_a_warning(bases, tmp_path, caplog):
    base = bases["llama, untied"]
    adapter = save(base, tmp_path / "adapter", size=50)
    ours = by_us(base, adapter)
    np.testing.assert_allclose(ours[..., :50], by_peft(base, adapter, 50), **CLOSE)
    assert f"{EMBEDDING} has 50 rows, and the base model 61: the tokens from 50 on keep" in caplog.text


@pytest.mark.parametrize(("stored", "loaded"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_copies_in_another_dtype_are_copies(bases, tmp_path, stored, loaded):
    base = bases["qwen2, tied"]
    adapter = save(base, tmp_path / "adapter", save_embedding_layers=True)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in (EMBEDDING, HEAD):
        tensors[name] = tensors[name].astype(jnp.dtype(stored))
    save_file(tensors, file)
    by_us(base, adapter, jnp.dtype(loaded))
    tensors[EMBEDDING][4, 2] *= 1.02
    save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"{EMBEDDING}: of its 61 rows, 1 differs from the base model's \(4\)"):
        by_us(base, adapter, jnp.dtype(loaded))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (dict(modules_to_save=["lm_head"]), HEAD),
        (dict(trainable_token_indices=[1, 5]), "embed_tokens.token_adapter.trainable_tokens_delta"),
    ],
)
def test_a_tensor_that_the_config_asks_for_must_be_there(bases, tmp_path, options, name):
    adapter = save(bases["llama, tied"], tmp_path / "adapter", **options)
    file = adapter / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if name not in key}, file)
    with pytest.raises(ValueError, match=rf"{name}: expected.*, found no such tensor"):
        by_us(bases["llama, tied"], adapter)
