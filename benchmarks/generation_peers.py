"""The peers of the generation benchmark: this package, lm-evaluation-harness's own backend, and `transformers`.

A run of a peer is the whole curve: the base and every rank of one adapter, on the same items of one task.
"""

from __future__ import annotations

import json
import logging
import pathlib
import time
from typing import Any, cast

import numpy as np

from benchmarks.workers import Reply, peak_mib

FEWSHOT_SEED = 1234  # The harness uses this seed by default.
PAD_MULTIPLE = 16


class Ours:
    """Evaluates all ranks in one pass.

    Args:
      spec: "checkpoint" (a Hugging Face folder), "adapter" (an adapter's folder; empty makes random factors),
        "max_rank" (R of random factors), "ranks" (0 is the base), "task", "raw_dir", "shots", "limit", "gen_tokens" (0
        keeps the task's own), "batch_size" and "shared" (the folder to which profiles, factors and prompts are written
        for the other peers).
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec, self._shared = spec, pathlib.Path(spec["shared"])

    def load(self) -> Reply:
        """Loads model, adapter and task; writes what the other peers need."""
        import jax
        import jax.numpy as jnp

        from mlora_jax.core import readout_profile
        from mlora_jax.core.product import path_names
        from mlora_jax.evaluate.harness import NestedLM, Variant
        from mlora_jax.evaluate.loading import load_adapted
        from mlora_jax.evaluate.task_files import load_tasks

        spec = self._spec
        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        loaded = load_adapted(
            checkpoint=spec["checkpoint"],
            adapter=spec["adapter"] or str(random_adapter(self._shared / "adapter", spec)),
            dtype="float32",
            batch_size=spec["batch_size"],
            pad_multiple=PAD_MULTIPLE,
        )
        hierarchy = loaded.hierarchy
        if hierarchy is None:
            raise ValueError(f"{spec['adapter']} holds no adapter")
        profiles = {
            rank: readout_profile(hierarchy, "prefix", rank) if rank else jnp.zeros(hierarchy.max_rank)
            for rank in spec["ranks"]
        }
        self._variants = {rank: Variant(loaded.adapter, p) for rank, p in profiles.items()}
        self._tasks = load_tasks([spec["task"]], raw_dir=spec["raw_dir"])
        make_model: Any = NestedLM  # The harness's decorator hides the class from type checkers.
        self._lm = make_model.of(loaded)
        arrays: dict[str, Any] = {f"p/{rank}": np.asarray(p) for rank, p in profiles.items()}
        for path, leaf in jax.tree_util.tree_leaves_with_path(loaded.adapter):
            arrays["/".join(path_names(path))] = np.asarray(leaf)
        np.savez(self._shared / "adapter.npz", **arrays)
        return {"loaded_mib": peak_mib()}

    def run(self) -> Reply:
        """Evaluates the curve; returns the seconds, the verdicts by rank, and the texts by rank if texts are made."""
        from mlora_jax.evaluate.harness import evaluate_all, item_verdicts

        spec = self._spec
        start = time.perf_counter()
        found = evaluate_all(
            self._lm,
            cast("dict[str, Any]", self._variants),
            self._tasks,
            num_fewshot=spec["shots"],
            gen_kwargs=generation_options(spec),
            limit=spec["limit"],
        )
        seconds = time.perf_counter() - start
        self._write_prompts(found[spec["ranks"][0]])
        verdicts = {rank: item_verdicts(result)[0].astype(float).tolist() for rank, result in found.items()}
        return {
            "seconds": seconds,
            "verdicts": verdicts,
            "texts": {rank: texts(result) for rank, result in found.items()},
        }

    def _write_prompts(self, result: Any) -> None:
        """Writes the token ids of the prompts, cut on the left as the harness cuts them, and the stop strings."""
        (samples,) = result["samples"].values()
        requests = {sample["doc_id"]: sample["arguments"] for sample in samples}
        prompts = []
        for arguments in requests.values():
            context, options = request_of(arguments)
            if not isinstance(options, dict):
                return  # the task scores choices
            opens = None if self._lm.tokenizer.bos_id is not None else True
            ids = self._lm.tok_encode(context, opens)
            count = options.get("max_gen_toks", self._spec["gen_tokens"] or 256)
            prompts.append({"ids": ids[-(self._lm.max_length - count) :], "until": options["until"], "count": count})
        (self._shared / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")

    def facts(self) -> Reply:
        """Returns the number of executables for scoring and for generation."""
        made = self._lm.generator.compilations
        return {"executables": self._lm.scorer.compiled._cache_size() + made, "truncated": self._lm.truncated}


class Harness:
    """Evaluates one rank after the other by the harness's Hugging Face backend.

    Args:
      spec: as for `Ours`, and "threads".
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec

    def load(self) -> Reply:
        """Loads model and task."""
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoTokenizer

        from mlora_jax.evaluate.task_files import load_tasks

        spec = self._spec
        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        self._folded = FoldedModel(spec)
        self._tasks = load_tasks([spec["task"]], raw_dir=spec["raw_dir"])
        (self._task,) = self._tasks["tasks"].values()
        self._task.set_config(key="num_fewshot", value=spec["shots"])
        if options := generation_options(spec):
            self._task.set_config(key="generation_kwargs", value=options, update=True)
        tokenizer = AutoTokenizer.from_pretrained(spec["checkpoint"])
        make_backend: Any = HFLM  # The harness's decorator hides the arguments of the class.
        self._backend = make_backend(
            pretrained=self._folded.model, tokenizer=tokenizer, batch_size=spec["batch_size"], device="cpu"
        )
        return {"loaded_mib": peak_mib()}

    def run(self) -> Reply:
        """Evaluates the curve; returns the seconds without folding, verdicts and texts by rank."""
        from lm_eval.evaluator import evaluate

        from mlora_jax.evaluate.harness import item_verdicts

        seconds, verdicts, made = 0.0, {}, {}
        for rank in self._spec["ranks"]:
            self._folded.fold(rank)
            self._task.set_fewshot_seed(seed=FEWSHOT_SEED)
            start = time.perf_counter()
            result: Any = evaluate(self._backend, self._tasks, limit=self._spec["limit"])
            seconds += time.perf_counter() - start
            verdicts[rank] = item_verdicts(result)[0].astype(float).tolist()
            made[rank] = texts(result)
        return {"seconds": seconds, "verdicts": verdicts, "texts": made}

    def facts(self) -> Reply:
        """Returns that nothing is compiled."""
        return {"executables": 0}


class Generate:
    """Answers the prompts of a task by `transformers.generate`, one rank after the other.

    Prompts are sorted by length, the longest first, and padded on the left to the longest of a batch.

    Args:
      spec: as for `Harness`.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec

    def load(self) -> Reply:
        """Loads the model, and the prompts that `Ours` wrote.

        Raises:
          ValueError: the task makes no texts.
        """
        from transformers import AutoTokenizer

        file = pathlib.Path(self._spec["shared"]) / "prompts.json"
        if not file.is_file():
            raise ValueError(f"the task {self._spec['task']} scores choices and generates nothing")
        self._prompts = json.loads(file.read_text(encoding="utf-8"))
        self._tokenizer: Any = AutoTokenizer.from_pretrained(self._spec["checkpoint"], padding_side="left")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._folded = FoldedModel(self._spec)
        return {"loaded_mib": peak_mib()}

    def run(self) -> Reply:
        """Answers all prompts at every rank; returns the seconds without folding, and the texts by rank."""
        seconds, made = 0.0, {}
        for rank in self._spec["ranks"]:
            self._folded.fold(rank)
            start = time.perf_counter()
            made[rank] = self._answer()
            seconds += time.perf_counter() - start
        return {"seconds": seconds, "texts": made}

    def _answer(self) -> list[str]:
        import torch

        order = sorted(range(len(self._prompts)), key=lambda at: -len(self._prompts[at]["ids"]))
        answers = [""] * len(order)
        size = self._spec["batch_size"]
        for members in (order[first : first + size] for first in range(0, len(order), size)):
            rows = [self._prompts[at] for at in members]
            batch = self._tokenizer.pad({"input_ids": [row["ids"] for row in rows]}, return_tensors="pt")
            with torch.inference_mode():
                made = self._folded.model.generate(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    max_new_tokens=rows[0]["count"],
                    do_sample=False,
                    stop_strings=rows[0]["until"],
                    tokenizer=self._tokenizer,
                    pad_token_id=self._tokenizer.pad_token_id,
                )
            for at, row, ids in zip(members, rows, made[:, batch["input_ids"].shape[1] :], strict=True):
                text = self._tokenizer.decode(ids, skip_special_tokens=True)
                for stop in row["until"]:
                    text = text.split(stop)[0]
                answers[at] = text
        return answers

    def facts(self) -> Reply:
        """Returns that nothing is compiled."""
        return {"executables": 0}


class FoldedModel:
    """The base as a model of transformers, with the adapter folded into its weights at a rank.

    Args:
      spec: as for `Harness`; the factors are those that `Ours` wrote.

    Attributes:
      model: the model in float32.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(spec["threads"])
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            spec["checkpoint"], dtype=torch.float32, attn_implementation="sdpa"
        )
        self.model.eval()
        arrays = dict(np.load(pathlib.Path(spec["shared"]) / "adapter.npz"))
        self._profiles = {name.removeprefix("p/"): arrays.pop(name) for name in [*arrays] if name.startswith("p/")}
        self._pairs: dict[str, dict[str, np.ndarray]] = {}
        for name, array in arrays.items():
            module, _, factor = name.rpartition("/")
            self._pairs.setdefault(module, {})[factor] = array
        self._base: dict[str, Any] = {}

    def fold(self, rank: int) -> None:
        """Adds A diag(p) B of a rank to the base's weights, in the place of any other rank's.

        Args:
          rank: one of the ranks of the curve.
        """
        import torch

        p = self._profiles[str(rank)]
        for path, pair in self._pairs.items():
            _, *module = path.split("/")  # the first part is the stack of layers
            for number, layer in enumerate(self.model.model.layers):
                weight = layer.get_parameter(".".join([*module, "weight"]))
                base = self._base.setdefault(f"{path}/{number}", weight.detach().clone())
                product = torch.from_numpy(np.array((pair["a"][number] * p) @ pair["b"][number]).T)
                weight.data.copy_(base + product)


def random_adapter(folder: pathlib.Path, spec: dict[str, Any]) -> pathlib.Path:
    """Writes an adapter of random factors on all linear projections, small enough that the model still writes text.

    Args:
      folder: the folder to write.
      spec: as for `Ours`.

    Returns:
      The folder.
    """
    import jax

    from benchmarks.training_peers import TARGETS
    from mlora_jax.adapters import adapt, split
    from mlora_jax.core import RankHierarchy
    from mlora_jax.core.product import path_names
    from mlora_jax.models import load_decoder
    from mlora_jax.training.adapter_file import save_adapter

    rank, key = spec["max_rank"], jax.random.key(0)
    _, _, adapter, _ = split(adapt(load_decoder(spec["checkpoint"]), rank, TARGETS, key=key))

    def factor(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf if path_names(path)[-1] == "a" else 1e-2 * jax.random.normal(key, leaf.shape, leaf.dtype)

    ranks = tuple(2**power for power in range(rank.bit_length()) if 2**power <= rank)
    hierarchy = RankHierarchy(ranks, scaling="none", max_rank=rank)
    return save_adapter(folder, jax.tree_util.tree_map_with_path(factor, adapter), hierarchy, {})


def generation_options(spec: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the options of generation that replace the task's, or None."""
    return {"max_gen_toks": spec["gen_tokens"], "do_sample": False} if spec["gen_tokens"] else None


def texts(result: Any) -> list[str]:
    """Returns the text that was generated for each item, in the order of the items; none if the task scores choices.

    Args:
      result: what the harness's `evaluate` returns for one task.
    """
    (samples,) = result["samples"].values()
    made = {sample["doc_id"]: sample["resps"][0][0] for sample in samples}
    return [made[item] for item in sorted(made)] if all(isinstance(text, str) for text in made.values()) else []


def request_of(arguments: Any) -> tuple[Any, ...]:
    """Returns the arguments of a sample's first request; some versions of the harness log them as a mapping."""
    first = next(iter(arguments.values())) if isinstance(arguments, dict) else arguments[0]
    return tuple(first.values()) if isinstance(first, dict) else tuple(first)


PEERS = {"ours": Ours, "harness": Harness, "generate": Generate}
