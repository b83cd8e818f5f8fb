"""How much memory loading takes beyond the model itself, on a checkpoint of more than a gigabyte made on the spot."""

import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from mlora_jax.models.config import DecoderConfig
from tests.conftest import DEVICES

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = DecoderConfig(
    vocab_size=16000, hidden_size=1536, intermediate_size=4096, num_layers=20, num_heads=12, num_kv_heads=4,
    model_type="qwen3", qk_norm=True,
)  # fmt: skip
SHARDS = 6

# Loads, while a thread reads how much memory the process has of its own; files that are mapped are not in it.
LOAD = """
import json, re, sys, threading, time
import jax, jax.numpy as jnp
import numpy as np
from flax import nnx
from mlora_jax.models import load_decoder

def own():
    status = open("/proc/self/status").read()
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+) kB", status)[1])

def watch():
    while not done.is_set():
        peaks.append(own())
        time.sleep(0.001)

mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"))
P = jax.sharding.PartitionSpec

def sharding(path, shape):
    axes = P(None, "fsdp", "tensor") if path.startswith("layers") and path.endswith("kernel") else P()
    return jax.sharding.NamedSharding(mesh, axes)

folder, placement, dtype = sys.argv[1:]
jnp.zeros(3).block_until_ready()
done, before, peaks = threading.Event(), own(), []
thread = threading.Thread(target=watch, daemon=True)
thread.start()
start = time.time()
model = load_decoder(folder, dtype=dtype or None, sharding=sharding if placement == "mesh" else None)
seconds = time.time() - start
done.set()
thread.join()
arrays = jax.tree.leaves(nnx.state(model))
total = float(np.asarray(model.layers.mlp.down_proj.kernel[...])[-1, :3].astype(np.float32).sum())
print(json.dumps({"peak": max(peaks) - before, "samples": len(peaks), "parameters": sum(x.nbytes for x in arrays),
                  "largest": max(x.nbytes for x in arrays), "seconds": seconds, "sum": total}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """bfloat16 in shards whose tensors lie as transformers would put them, layer after layer."""
    folder = tmp_path_factory.mktemp("large")
    D, inner, groups = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.num_kv_heads * CONFIG.head_dim
    shapes = {"model.embed_tokens.weight": (CONFIG.vocab_size, D)}
    for layer in range(CONFIG.num_layers):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (D,), "self_attn.q_proj": (D, D), "self_attn.k_proj": (groups, D),
                "self_attn.v_proj": (groups, D), "self_attn.q_norm": (CONFIG.head_dim,),
                "self_attn.k_norm": (CONFIG.head_dim,), "self_attn.o_proj": (D, D), "post_attention_layernorm": (D,),
                "mlp.gate_proj": (inner, D), "mlp.up_proj": (inner, D), "mlp.down_proj": (D, inner),
            }.items()
        }  # fmt: skip
    shapes |= {"model.norm.weight": (D,), "lm_head.weight": (CONFIG.vocab_size, D)}
    random, names, index = np.random.default_rng(0), list(shapes), {}
    for number in range(SHARDS):
        file = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        mine = names[number * len(names) // SHARDS : (number + 1) * len(names) // SHARDS]
        tensors = {name: random.standard_normal(shapes[name], np.float32).astype(jnp.bfloat16) for name in mine}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(mine, file)
        if names[-3] in tensors:
            last = float(tensors[names[-3]][:, :3].astype(np.float32).sum())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hugging_face()))
    return folder, last


@pytest.mark.slow
@pytest.mark.parametrize(("placement", "dtype"), [("one", ""), ("one", "float32"), ("mesh", "")])
def test_loading_holds_little_beyond_the_model(checkpoint, placement, dtype):
    folder, last = checkpoint
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    assert sum(sizes) > 1e9 and len(sizes) == SHARDS
    command = [sys.executable, "-c", LOAD, str(folder), placement, dtype]
    environment = os.environ | {"XLA_FLAGS": f"{DEVICES} {os.environ['XLA_FLAGS']}"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=900, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["samples"] > 50
    assert abs(found["parameters"] - sum(sizes) * (2 if dtype else 1)) < 1e5  # headers
    np.testing.assert_allclose(found["sum"], last, rtol=1e-3)
    beyond = found["peak"] - found["parameters"]
    print(f"{placement} {dtype}: {beyond / 1e6:.0f} MB beyond {found['parameters'] / 1e6:.0f} MB in "
          f"{found['seconds']:.1f} s; largest shard {max(sizes) / 1e6:.0f} MB, largest array "
          f"{found['largest'] / 1e6:.0f} MB")  # fmt: skip
    assert beyond < 1.2 * max(*sizes, found["largest"])
