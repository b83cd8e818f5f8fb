"""Times a rank-accuracy curve by this package and by lm-evaluation-harness's Hugging Face backend.

Both evaluate the base and every rank of one adapter on the same items of one task. This package runs all ranks in one
pass. The backend runs one rank after the other; it gets the base's weights with the adapter folded in at that rank, so
that it has no adapter to compute. Both use the same number of threads. The program prints one JSON line: the seconds
that each takes, and how many verdicts are equal.

    NPROC=1 XLA_FLAGS=--xla_cpu_multi_thread_eigen=false OMP_NUM_THREADS=1 taskset -c 0 \
        python benchmarks/evaluation.py --checkpoint MODEL_FOLDER --adapter ADAPTER_FOLDER --raw_dir DATA_FOLDER \
        --task arc_challenge --shots 2 [--limit N] [--harness_ranks 0,32] [--gen_tokens N]

ADAPTER_FOLDER is the folder of an adapter of a run. `--harness_ranks` names the ranks that the backend runs; it does
the same work for each, so that a few ranks tell the time of all. The program needs the extra `test`.
"""

import argparse
import json
import logging
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mlora_jax.core import readout_profile
from mlora_jax.core.product import path_names
from mlora_jax.evaluate.harness import NestedLM, Variant, evaluate_all, item_verdicts
from mlora_jax.evaluate.loading import load_adapted
from mlora_jax.evaluate.task_files import load_tasks

FEWSHOT_SEED = 1234  # The harness uses this seed by default.


def folded(checkpoint: str, adapter: Any, p: np.ndarray) -> LlamaForCausalLM:
    """Returns the base with A diag(p) B added to its weights.

    Args:
      checkpoint: the Hugging Face folder of the base.
      adapter: the tree of factors.
      p: [R], the rank profile.
    """
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    factors: dict[tuple, dict[str, np.ndarray]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapter):
        *layer, name = path_names(path)
        factors.setdefault(tuple(layer), {})[name] = np.asarray(leaf)
    for (_, *module), pair in factors.items():
        for number, layer in enumerate(model.model.layers):
            weight = layer.get_parameter(".".join([*module, "weight"]))
            weight.data += torch.from_numpy(np.array((pair["a"][number] * p) @ pair["b"][number]).T)
    return model


def main() -> None:
    """Reads the command line and prints the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "adapter", "raw_dir", "task"):
        parser.add_argument(f"--{name}", required=True)
    for name, default in (("shots", 2), ("limit", 0), ("batch_size", 16), ("pad_multiple", 16), ("gen_tokens", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--harness_ranks", default="")
    options = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    threads = int(os.environ.get("NPROC", os.cpu_count() or 1))
    torch.set_num_threads(threads)
    limit = options.limit or None
    generation = {"max_gen_toks": options.gen_tokens, "do_sample": False} if options.gen_tokens else None
    loaded = load_adapted(
        checkpoint=options.checkpoint,
        adapter=options.adapter,
        batch_size=options.batch_size,
        pad_multiple=options.pad_multiple,
    )
    hierarchy = loaded.hierarchy
    if hierarchy is None:
        raise ValueError(f"{options.adapter} holds no adapter")
    variants: dict[Any, Variant] = {0: Variant(loaded.adapter, jnp.zeros(hierarchy.max_rank))}
    variants |= {rank: Variant(loaded.adapter, readout_profile(hierarchy, "prefix", rank)) for rank in hierarchy.ranks}
    tasks = load_tasks([options.task], raw_dir=options.raw_dir)

    start = time.perf_counter()
    make_model: Any = NestedLM  # The harness's decorator hides the class from type checkers.
    lm = make_model.of(loaded)
    ours: Any = evaluate_all(lm, variants, tasks, num_fewshot=options.shots, gen_kwargs=generation, limit=limit)
    seconds = time.perf_counter() - start

    (task,) = tasks["tasks"].values()
    task.set_config(key="num_fewshot", value=options.shots)
    if generation:
        task.set_config(key="generation_kwargs", value=generation, update=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.checkpoint)
    ranks = [int(rank) for rank in options.harness_ranks.split(",") if rank] or list(variants)
    theirs, equal = {}, {}
    for rank in ranks:
        model = folded(options.checkpoint, loaded.adapter, np.asarray(variants[rank].p))
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        start = time.perf_counter()
        # The harness's decorator hides the arguments of the class.
        make_backend: Any = HFLM
        backend = make_backend(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size, device="cpu")
        result: Any = evaluate(backend, tasks, limit=limit)
        theirs[rank] = time.perf_counter() - start
        equal[rank] = int(np.sum(item_verdicts(result)[0] == item_verdicts(ours[rank])[0]))
    items = len(item_verdicts(ours[0])[0])
    projected = sum(theirs.values()) * len(variants) / len(ranks)
    record = {
        "task": options.task,
        "shots": options.shots,
        "items": items,
        "truncated_requests": lm.truncated,
        "threads": threads,
        "batch_size": options.batch_size,
        "accuracies": {rank: float(item_verdicts(result)[0].mean()) for rank, result in ours.items()},
        "seconds_ours_all_ranks": round(seconds, 1),
        "seconds_backend_by_rank": {rank: round(value, 1) for rank, value in theirs.items()},
        "seconds_backend_all_ranks_projected": round(projected, 1),
        "times_faster_projected": round(projected / seconds, 2),
        "equal_verdicts": equal,
        "compilations": {"scoring": lm.scorer.compiled._cache_size(), "generation": lm.generator.compilations},
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
