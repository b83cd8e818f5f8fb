"""Logits of transformers' model: with matrices added to its weights, or with an adapter that PEFT loads."""

import pathlib

import numpy as np
import peft
import torch
from transformers import AutoModelForCausalLM


def _run(model, tokens):
    with torch.no_grad():
        return model.eval()(torch.as_tensor(np.asarray(tokens)).long()).logits.float().numpy()


def plain(folder, tokens, dtype=torch.float32):
    """Logits [B, T, V] of a model's folder."""
    return _run(AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype), tokens)


def with_deltas(folder, deltas, tokens):
    """Logits with {module such as "model.layers.0.mlp.up_proj": [D, F]} added, transposed, to the weights."""
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    with torch.no_grad():
        for name, delta in deltas.items():
            weight = model.get_submodule(name).weight
            weight += torch.tensor(np.asarray(delta, np.float32).T)
    return _run(model, tokens)


def with_peft(folder, adapter, tokens):
    """Logits with a PEFT adapter's folder, and {module: rank} of what PEFT has adapted."""
    base = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(adapter))
    layers = {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    return _run(model, tokens), layers


def save_random_peft(folder, adapter, *, seed=0, size=0.3, **config):
    """Writes an adapter that PEFT has made, with random factors."""
    base = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(size * torch.randn(parameter.shape))
    model.save_pretrained(str(adapter))
    return pathlib.Path(adapter)
