"""The Llama decoder as its papers write it, in NumPy: RMSNorm, rotary positions, grouped queries, windows, SwiGLU."""

import numpy as np


def logits(weights, config, tokens, compress=None):
    """Logits of a Llama decoder, one row, one layer, one head and one query at a time.

    Args:
        weights: dotted path -> float64 array; what lies under `layers` has a leading layer axis.
        config: any object with the sizes and constants as attributes.
        tokens: integers [B, T].
        compress: (layer, rotated keys [T, KV, Hd], values [T, KV, Hd]) -> the keys and values to attend to instead.

    Returns:
        float64 [B, T, V].
    """

    def norm(x, weight):
        return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps)

    def linear(x, module, layer):
        y = x @ weights[f"{module}.kernel"][layer]
        return y + weights[f"{module}.bias"][layer] if f"{module}.bias" in weights else y

    def turn(x, position):
        half = config.head_dim // 2
        turned = np.empty_like(x)
        for i in range(half):
            frequency = config.rope_theta ** (-2 * i / config.head_dim)
            if config.rope_scaling is not None:
                scaling = config.rope_scaling
                length, old = 2 * np.pi / frequency, scaling.original_max_position_embeddings
                if length > old / scaling.low_freq_factor:
                    frequency = frequency / scaling.factor
                elif length >= old / scaling.high_freq_factor:
                    smooth = (old / length - scaling.low_freq_factor) / (
                        scaling.high_freq_factor - scaling.low_freq_factor
                    )
                    frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
            c, s = np.cos(position * frequency), np.sin(position * frequency)
            turned[i] = x[i] * c - x[i + half] * s
            turned[i + half] = x[i + half] * c + x[i] * s
        return turned

    rows = []
    for row in tokens:
        x = weights["embed_tokens.embedding"][row]
        time, hd = len(row), config.head_dim
        for layer in range(config.num_layers):
            y = norm(x, weights["layers.input_layernorm.weight"][layer])
            q, k, v = (linear(y, f"layers.self_attn.{name}_proj", layer).reshape(time, -1, hd) for name in "qkv")
            mixed = np.zeros((time, config.num_heads, hd))
            if config.qk_norm:
                q = norm(q, weights["layers.self_attn.q_norm.weight"][layer])
                k = norm(k, weights["layers.self_attn.k_norm.weight"][layer])
            turned = turn if config.rotary_layers is None or config.rotary_layers[layer] else lambda x, position: x
            slides = config.sliding_window is not None and config.sliding_layers[layer]
            keys = np.array([[turned(k[s, group], s) for group in range(config.num_kv_heads)] for s in range(time)])
            if compress is not None:
                keys, v = compress(layer, keys, v)
            for head in range(config.num_heads):
                group = head // (config.num_heads // config.num_kv_heads)
                for t in range(time):
                    first = max(0, t + 1 - config.sliding_window) if slides else 0
                    scores = keys[first : t + 1, group] @ turned(q[t, head], t) / np.sqrt(hd)
                    shares = np.exp(scores - np.max(scores))
                    mixed[t, head] = (shares / shares.sum()) @ v[first : t + 1, group]
            x = x + linear(mixed.reshape(time, -1), "layers.self_attn.o_proj", layer)
            y = norm(x, weights["layers.post_attention_layernorm.weight"][layer])
            gate = linear(y, "layers.mlp.gate_proj", layer)
            inner = gate / (1 + np.exp(-gate)) * linear(y, "layers.mlp.up_proj", layer)
            x = x + linear(inner, "layers.mlp.down_proj", layer)
        x = norm(x, weights["norm.weight"])
        head = weights["lm_head.kernel"] if "lm_head.kernel" in weights else weights["embed_tokens.embedding"].T
        rows.append(x @ head)
    return np.stack(rows)
