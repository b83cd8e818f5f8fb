"""Greedy generation by transformers, with an adapter added to the weights in NumPy."""

import contextlib
import functools

import numpy as np
import torch
from transformers import AutoModelForCausalLM


@contextlib.contextmanager
def one_thread():
    """Steps of small models: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def frozen(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def greedy(folder, factors, p, prompts, *, max_new_tokens, eos):
    """`model.generate` on one prompt at a time.

    Args:
      folder: of the checkpoint.
      factors: {dotted path of a module in a layer: (A [L, D, R], B [L, R, F])}.
      p: [R].
      prompts: lists of token ids.
      max_new_tokens: N.
      eos: list of ids that end an answer.

    Returns:
      The answers without such an id, and for each the smallest gap between the two largest logits of a step.
    """
    model = frozen(folder)
    before = {}
    with torch.no_grad():
        for path, (a, b) in factors.items():
            for index, layer in enumerate(model.model.layers):
                weight = layer.get_submodule(path).weight
                before[index, path] = weight.clone()
                delta = (np.asarray(a[index], np.float64) * np.asarray(p, np.float64)) @ np.asarray(b[index])
                weight += torch.tensor(delta.T, dtype=torch.float32)
    answers, gaps = [], []
    with one_thread():
        for prompt in prompts:
            found = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=list(eos),
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
            made = found.sequences[0, len(prompt) :].tolist()
            answers.append(made[:-1] if made[-1] in eos else made)
            top = torch.stack(found.logits)[:, 0].topk(2).values
            gaps.append(float((top[:, 0] - top[:, 1]).min()))
    with torch.no_grad():
        for (index, path), weight in before.items():
            model.model.layers[index].get_submodule(path).weight.copy_(weight)
    return answers, gaps
