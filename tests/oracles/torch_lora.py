"""Training with a rank profile in plain PyTorch on transformers' LlamaForCausalLM.

    y = W x + bias + ((x A) * p) B

Factors are a dict {module path such as "model.layers.0.self_attn.q_proj": (A [D, R], B [R, F])} of NumPy
arrays in and out. One letter per axis: M micro-batches, B rows, T time, N profiles, R rank.

transformers computes norm, softmax and rotary angles in float32 whatever the dtype of the model. For float64
that would leave errors of 1e-7, so a float64 base gets its norms, rotary tables and attention replaced by the
same formulas in float64, inverse frequencies included; in float32 the model is transformers' own, untouched.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import repeat_kv

from .numpy_reference import profile_dylora, profile_lora, profile_matryoshka, readouts

__all__ = [
    "logits",
    "loss_and_gradients",
    "profile_dylora",
    "profile_lora",
    "profile_matryoshka",
    "readouts",
    "train",
]


class _Norm(nn.Module):
    """RMSNorm in the dtype of its input."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon))


class _Rotary(nn.Module):
    """Rotary tables in float64, with the Llama-3 rule for the frequencies where the config asks for it."""

    def __init__(self, config):
        super().__init__()
        rope = config.rope_parameters
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        frequencies = [rope["rope_theta"] ** (-2.0 * i / size) for i in range(size // 2)]
        if rope["rope_type"] == "llama3":
            frequencies = [self._llama3(frequency, rope) for frequency in frequencies]
        elif rope["rope_type"] != "default":
            raise ValueError(f"no float64 rendering of rope type {rope['rope_type']!r}; there are default and llama3")
        self.frequencies = torch.tensor(frequencies, dtype=torch.float64)

    @staticmethod
    def _llama3(frequency, rope):
        context = rope["original_max_position_embeddings"]
        turns = context * frequency / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if turns < low:
            return frequency / rope["factor"]
        if turns > high:
            return frequency
        smooth = (turns - low) / (high - low)
        return (1 - smooth) * frequency / rope["factor"] + smooth * frequency

    def forward(self, x, position_ids):
        angles = position_ids[..., None].to(torch.float64) * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def _attention(module, query, key, value, attention_mask, scaling, **_):
    """Softmax attention in the dtype of its input, causal by its own mask."""
    key, value = repeat_kv(key, module.num_key_value_groups), repeat_kv(value, module.num_key_value_groups)
    scores = query @ key.transpose(2, 3) * scaling
    length = scores.shape[-1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("oracle_float64", _attention)
AttentionMaskInterface.register("oracle_float64", eager_mask)


def _load(model_folder, dtype):
    """transformers' model from a folder, frozen, in evaluation mode; truly float64 if that is the dtype."""
    model = LlamaForCausalLM.from_pretrained(str(model_folder), dtype=dtype, attn_implementation="eager")
    model.eval().requires_grad_(False)
    if dtype == torch.float64:
        model.config._attn_implementation = "oracle_float64"
        model.model.rotary_emb = _Rotary(model.config)
        model.model.norm = _Norm(model.model.norm)
        for layer in model.model.layers:
            layer.input_layernorm = _Norm(layer.input_layernorm)
            layer.post_attention_layernorm = _Norm(layer.post_attention_layernorm)
    return model


class _Adapted(nn.Module):
    """An nn.Linear with its factors; the profile is an attribute that the loop sets."""

    def __init__(self, linear, a, b):
        super().__init__()
        self.linear, self.a, self.b, self.profile = linear, nn.Parameter(a), nn.Parameter(b), None

    def forward(self, x):
        return self.linear(x) + ((x @ self.a) * self.profile) @ self.b


def _adapt(model, factors, dtype):
    """Wraps the linears at the paths of `factors`. Returns {path: _Adapted}."""
    adapted = {}
    for path, (a, b) in factors.items():
        parent, _, name = path.rpartition(".")
        linear = model.get_submodule(path)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{path} is a {type(linear).__name__}, not an nn.Linear")
        adapted[path] = _Adapted(
            linear, torch.tensor(np.asarray(a), dtype=dtype), torch.tensor(np.asarray(b), dtype=dtype)
        )
        setattr(model.get_submodule(parent), name, adapted[path])
    return adapted


def _set_profile(adapted, profile):
    profile = np.asarray(profile)
    if profile.ndim == 2:  # [E, R]: one for all examples, or one for each
        profile = profile[:, None]
    for module in adapted.values():
        module.profile = torch.tensor(profile, dtype=module.a.dtype)


def logits(model_folder, factors, profile, tokens, dtype=torch.float32):
    """Logits of the adapted model. profile [R], tokens [B, T] int -> [B, T, V] NumPy."""
    model = _load(model_folder, dtype)
    _set_profile(_adapt(model, factors, dtype), profile)
    with torch.no_grad():
        return model(torch.as_tensor(np.asarray(tokens)).long(), use_cache=False).logits.numpy()


def _accumulate(model, adapted, batch, profiles, loss_weights=None):
    """The loss of one step, its gradients added to `.grad` one micro-batch at a time.

    profiles [M, N, R] or [M, N, E, R] with E one or B; loss_weights [N], the share of each profile, or None for equal
    ones.
    """
    count = len(profiles[0])
    shares = np.full(count, 1 / count) if loss_weights is None else np.asarray(loss_weights, np.float64)
    tokens = torch.as_tensor(np.asarray(batch["tokens"])).long()  # [M, B, T]
    is_target = torch.as_tensor(np.asarray(batch["loss_mask"])).bool()  # [M, B, T]
    if is_target[:, :, 0].any():
        raise ValueError("the first token of a row has nothing before it and cannot be a target")
    targets, step_loss = is_target.sum(), 0.0
    for micro_tokens, micro_mask, micro_profiles in zip(tokens, is_target, profiles, strict=True):
        for profile, share in zip(micro_profiles, shares, strict=True):
            _set_profile(adapted, profile)
            predictions = model(micro_tokens, use_cache=False).logits[:, :-1]  # [B, T - 1, V]
            entropy = functional.cross_entropy(
                predictions.flatten(0, 1), micro_tokens[:, 1:].flatten(), reduction="none"
            )
            loss = (entropy * micro_mask[:, 1:].flatten()).sum() / targets * float(share)
            loss.backward()
            step_loss += loss.item()
    return step_loss


def loss_and_gradients(model_folder, factors, batch, profiles, dtype=torch.float32):
    """The loss of one step and its gradients, unclipped.

    Args:
      batch: dict(tokens [M, B, T] int, loss_mask [M, B, T] bool, True where a token is a target).
      profiles: [M, N, R] or [M, N, E, R].

    Returns:
      (loss, {path: (dA [D, R], dB [R, F])}).
    """
    model = _load(model_folder, dtype)
    adapted = _adapt(model, factors, dtype)
    loss = _accumulate(model, adapted, batch, profiles)
    return loss, {path: (module.a.grad.numpy(), module.b.grad.numpy()) for path, module in adapted.items()}


def train(
    model_folder,
    *,
    dtype,
    factors,
    batches,
    profiles,
    learning_rates,
    clip=1.0,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    update_masks=None,
    loss_weights=None,
):
    """AdamW steps on the factors; the base is frozen.

    The loss of a step is the cross-entropy summed over all targets of all micro-batches, over the
    number of targets of the step; with N profiles it is the (weighted) mean of the N losses. Gradients are clipped to
    g * min(1, clip / norm).

    Args:
      model_folder: a Hugging Face folder of a Llama model.
      dtype: torch.float32 or torch.float64, of base, factors and optimizer.
      factors: {path: (A [D, R], B [R, F])}.
      batches: per step dict(tokens [M, B, T] int, loss_mask [M, B, T] bool); rows are right-padded.
      profiles: [steps, M, N, R] or [steps, M, N, E, R].
      learning_rates: [steps].
      clip: largest global norm, or None.
      update_masks: None or [steps, R] of 0 and 1: multiplies column i of A and row i of B in the gradients
        before clipping and again in the update (decay included); the moments are not masked.
      loss_weights: None or [N], summing to 1: the weights of the mean over profiles.

    Returns:
      The trained factors, {path: (A, B)} in `dtype`.
    """
    model = _load(model_folder, dtype)
    adapted = _adapt(model, factors, dtype)
    # Every parameter with the shape that lays a vector [R] along its rank axis.
    parameters = [pair for module in adapted.values() for pair in ((module.a, (1, -1)), (module.b, (-1, 1)))]
    first = [torch.zeros_like(parameter) for parameter, _ in parameters]
    second = [torch.zeros_like(parameter) for parameter, _ in parameters]
    for step, (batch, step_profiles, learning_rate) in enumerate(zip(batches, profiles, learning_rates, strict=True)):
        for parameter, _ in parameters:
            parameter.grad = None
        _accumulate(model, adapted, batch, step_profiles, loss_weights)
        rank = parameters[0][0].shape[1]
        mask = np.ones(rank) if update_masks is None else update_masks[step]
        mask = torch.tensor(np.asarray(mask), dtype=dtype)
        gradients = [parameter.grad * mask.reshape(shape) for parameter, shape in parameters]
        norm = torch.sqrt(sum((gradient**2).sum() for gradient in gradients))
        if clip is not None and norm > clip:
            gradients = [gradient * (clip / norm) for gradient in gradients]
        with torch.no_grad():
            for index, (parameter, shape) in enumerate(parameters):
                first[index] = betas[0] * first[index] + (1 - betas[0]) * gradients[index]
                second[index] = betas[1] * second[index] + (1 - betas[1]) * gradients[index] ** 2
                mean = first[index] / (1 - betas[0] ** (step + 1))
                variance = second[index] / (1 - betas[1] ** (step + 1))
                update = mean / (torch.sqrt(variance) + eps) + weight_decay * parameter
                parameter -= float(learning_rate) * update * mask.reshape(shape)
    return {
        path: (module.a.detach().numpy().copy(), module.b.detach().numpy().copy()) for path, module in adapted.items()
    }
