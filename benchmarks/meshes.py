"""Compares the training step on meshes of eight devices with one device: `python -m benchmarks.meshes [--float64]`.

The eight devices are forced on a CPU. For every mesh the program prints one JSON line: the relative L2 distance of the
losses and adapters from those of one device after some steps, the bytes of the base and of the trials' state on one
device, and the bytes that the compiled step moves between devices.
"""

import argparse
import json
import math
import os
import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

MESHES = (
    {},
    {"data": 8},
    {"data": 8, "engine": "pmap"},
    {"fsdp": 8},
    {"tensor": 8},
    {"trial": 4, "data": 2},
    {"data": 4, "fsdp": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"trial": 2, "fsdp": 2, "tensor": 2},
)
TRIALS, EXAMPLES, ACCUMULATION = 4, 16, 2
RANKS, WIDTHS = (1, 2, 4, 6), (32, 16)


def main(arguments: list[str]) -> None:
    """Reads the command line and prints one JSON line per mesh."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--float64", action="store_true")
    parser.add_argument("--method", default="matryoshka")
    parser.add_argument("--meshes", type=json.loads, default=MESHES)
    options = parser.parse_args(arguments)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_X64"] = str(int(options.float64))
    import numpy as np

    single = None
    for mesh in options.meshes:
        losses, adapter, facts = run(mesh, options.method, options.steps)
        single = single or (losses, adapter)
        distance = lambda new, old: float(np.linalg.norm(new - old) / np.linalg.norm(old))  # noqa: E731
        record = {"mesh": mesh, "method": options.method, "dtype": "float64" if options.float64 else "float32"}
        record |= {"losses": distance(losses, single[0]), "adapter": distance(adapter, single[1]), **facts}
        print(json.dumps(record), flush=True)


def run(mesh_options: dict, method: str, steps: int) -> tuple["np.ndarray", "np.ndarray", dict[str, Any]]:
    """Trains some steps on a mesh.

    Args:
      mesh_options: axis -> its size, and optionally "engine"; {} is a single device.
      method: a key of `mlora_jax.core.METHODS`.
      steps: the number of optimizer steps.

    Returns:
      The losses [steps, K], the adapters as one vector, and the bytes in memory and moved.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from mlora_jax.adapters import adapt, split
    from mlora_jax.core import RankHierarchy, get_method
    from mlora_jax.models import Decoder, DecoderConfig
    from mlora_jax.parallel.arrays import put_weights
    from mlora_jax.parallel.mesh import make_mesh, shards_of
    from mlora_jax.parallel.rules import Placement
    from mlora_jax.training.draws import DrawnBy, compile_draws
    from mlora_jax.training.grid import bytes_on_device
    from mlora_jax.training.step import Schedule, init_state, make_optimizer
    from mlora_jax.training.trial_trees import stack_trees, trial_keys
    from mlora_jax.training.trials_step import TrialsStep

    sizes = {"trial": 1, "data": 1, "fsdp": 1, "tensor": 1} | {k: v for k, v in mesh_options.items() if k != "engine"}
    mesh = make_mesh(sizes) if mesh_options else None
    shape = dict(hidden_size=64, intermediate_size=96, num_layers=3, num_heads=8, num_kv_heads=8, head_dim=8)
    config = DecoderConfig(vocab_size=128, tie_word_embeddings=False, **shape)
    enabled = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue] - jax sets it at run time
    dtype = jnp.float64 if enabled else jnp.float32
    model = Decoder(config, dtype=dtype, rngs=nnx.Rngs(0))
    engine = mesh_options.get("engine", "jit")
    model.placement = Placement(mesh) if mesh is not None and engine == "jit" else None
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
    graphdef, base, adapter, profile = split(adapt(model, RANKS[-1], targets, key=jax.random.key(1)))
    base, profile = put_weights(base, mesh), put_weights(profile, mesh)
    optimizer = make_optimizer(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0, clip=1.0)
    layout: dict[str, Any] = dict(widths=WIDTHS, micro_batch=EXAMPLES // ACCUMULATION)
    step = TrialsStep(graphdef, optimizer, chunk=8, **layout, mesh=mesh, engine=engine)
    keys = stack_trees([trial_keys(seed) for seed in range(TRIALS)])
    state = put_weights(stack_trees(init_state(adapter, optimizer) for _ in range(TRIALS)), mesh, trials=True)
    drawn_by = [DrawnBy(get_method(method).policies[0], RankHierarchy(RANKS, "sqrt", max_rank=RANKS[-1]))] * TRIALS
    draw = compile_draws(drawn_by, keys.draws, accumulation=ACCUMULATION, examples=EXAMPLES // ACCUMULATION)
    schedule = Schedule(jnp.full(TRIALS, 1e-3), jnp.zeros(TRIALS), jnp.full(TRIALS, float(steps)))
    random, losses = np.random.default_rng(0), []
    facts = {"base_bytes": bytes_on_device(base), "state_bytes": bytes_on_device(state)}
    for number in range(steps):
        state, metrics = step(
            base, profile, state, _batch(random, shards_of(mesh)), draw(number), schedule, keys.dropout
        )
        losses.append(np.asarray(metrics["loss"], np.float64))
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(state.adapter)]
    if mesh is not None:
        text = step.executables[0].as_text() or ""
        facts |= {"moved": moved(text), "largest_gather": largest_gather(text)}
    return np.array(losses), np.concatenate(leaves), facts


def _batch(random: "np.random.Generator", shards: int) -> dict[str, "np.ndarray"]:
    """Returns the packed examples of one step, the same ones for every number of shards."""
    import numpy as np

    from mlora_jax.data import Example
    from mlora_jax.data.packing import RowShape, packed_arrays, share_out

    members, numbers = [], []
    for _ in range(TRIALS):
        lengths = random.integers(5, 17, EXAMPLES)
        examples = [
            Example(random.integers(0, 128, length).astype(np.int32), np.arange(length) >= length - 4)
            for length in lengths
        ]
        for own in share_out(lengths.tolist(), shards):
            members.append([examples[index] for index in own])
            numbers.append(own)
    shape = RowShape(WIDTHS)
    arrays, plan = packed_arrays(members, numbers, shape, shape.passes(EXAMPLES // shards))
    return plan | {name: array.reshape(TRIALS, shards, *array.shape[1:]) for name, array in arrays.items()}


def moved(text: str) -> dict[str, dict[str, float]]:
    """Returns the collectives of a compiled program on one device.

    Args:
      text: the program's HLO.

    Returns:
      Kind -> how often it runs ("count"), and the bytes that it carries ("bytes").
    """
    from mlora_jax.parallel.hlo import program_costs

    found: dict[str, dict[str, float]] = {}
    for traffic in program_costs(text).traffic:
        kind = found.setdefault(traffic.kind, {"count": 0, "bytes": 0})
        kind["count"], kind["bytes"] = kind["count"] + traffic.count, kind["bytes"] + traffic.payload
    return found


def largest_gather(text: str) -> int:
    """Returns the number of elements in the largest array that a compiled program gathers."""
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", text)
    return max((math.prod(map(int, shape.split(","))) for shape in shapes), default=0)


if __name__ == "__main__":
    main(sys.argv[1:])
