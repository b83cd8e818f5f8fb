"""The peers of the training benchmark: this package's run, and PEFT. Each is loaded in a process of its own.

A pass trains on the batches of the first steps of a run, always the same ones, so that repeats do equal work. Making
the batches is part of a pass.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from typing import Any

from benchmarks.workers import Reply, peak_mib

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LEARNING_RATE = 1e-4
IGNORED = -100


class Ours:
    """Trains by the parts of a run: the experiment's own batches, draws, schedule and compiled step.

    Args:
      spec: "config" (a config's values), "steps" (the number of steps of a pass) and "examples" (the file to which the
        tokens of these steps are written, for the other peers).
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec

    def load(self) -> Reply:
        """Loads the experiment; returns the tokens of a pass without padding, its targets and sequences."""
        from mlora_jax.config import resolve
        from mlora_jax.run.experiment import Experiment
        from mlora_jax.run.starts import first_state, loop_phases
        from mlora_jax.trials import expand_trials

        config = resolve(self._spec["config"])
        self._trials = expand_trials(config)
        self._experiment = Experiment.load(config)
        self._state, keys = first_state(self._experiment, self._trials)
        self._phase = loop_phases(self._experiment, self._trials, keys)[0]
        self._done = 0
        steps = self._spec["steps"]
        if steps > self._experiment.steps:
            raise ValueError(f"the data make {self._experiment.steps} steps, fewer than the {steps} of a pass")
        pipelines = self._experiment.pipeline(self._trials).pipelines
        each = [[pipeline.examples_at(step) for step in range(steps)] for pipeline in pipelines]
        flat = [example for pipeline in each for step in pipeline for example in step]
        rows = [
            [{"tokens": example.tokens.tolist(), "targets": example.loss_mask.tolist()} for example in step]
            for step in each[0]
        ]
        pathlib.Path(self._spec["examples"]).write_text(json.dumps(rows), encoding="utf-8")
        return {
            "sequences": len(flat),
            "tokens": sum(len(example.tokens) for example in flat),
            "targets": sum(int(example.loss_mask.sum()) for example in flat),
            "loaded_mib": peak_mib(),
        }

    def run(self) -> Reply:
        """Trains on the steps once; returns the seconds and the loss of the first step."""
        import jax
        import numpy as np

        start, losses = time.perf_counter(), []
        batches = self._experiment.batches(self._trials)
        for _ in range(self._spec["steps"]):
            draw = self._phase.draw(self._done)
            self._state, metrics = self._phase.step(self._state, next(batches), draw, self._phase.schedule)
            if losses:
                jax.block_until_ready(losses[-1])  # the host stays at most one step ahead, as in a run
            losses.append(metrics["loss"])
            self._done += 1
        jax.block_until_ready((losses[-1], self._state))
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "first_loss": float(np.ravel(losses[0])[0])}

    def program(self) -> str:
        """Returns the text of the compiled training step."""
        (executable,) = self._experiment.adapted_for(self._trials[0]).step.executables
        return executable.as_text()

    def facts(self) -> Reply:
        """Returns the number of executables, the share of padding, and the peak memory of the device where it is known.

        On a CPU, also the seconds of the matrix products of a pass alone.
        """
        import itertools

        import jax

        from benchmarks.products import product_seconds, step_products
        from mlora_jax.training.trials_step import CHUNK

        peak_of_process = peak_mib()  # before products are timed
        experiment, steps = self._experiment, self._spec["steps"]
        shape = experiment.row_shape
        batches = list(itertools.islice(experiment.batches(self._trials), steps))
        computed = sum(shape.tokens(batch["passes"]) for batch in batches)
        more: Reply = {"padding": round(1.0 - sum(float(batch["real_tokens"]) for batch in batches) / computed, 4)}
        if jax.default_backend() == "cpu" and shape.rows == 1:
            options = dict(rank=self._trials[0].rank, chunk=min(experiment.config.train.loss_chunk, CHUNK))
            counted = step_products(experiment.model.config, batches, shape.widths, **options)
            more["products"] = product_seconds(*counted)
        device = jax.devices()[0]
        stats = device.memory_stats() or {}
        peak = stats.get("peak_bytes_in_use")
        return {
            **more,
            "process_mib": peak_of_process,
            "executables": self._experiment.compilations["train"],
            "device": device.device_kind,
            "device_peak_mib": None if peak is None else round(peak / 2**20, 1),
        }


class Peft:
    """Trains by PEFT and torch on the same examples in the same order.

    Rows are padded on the right to the longest of the batch, with an attention mask and labels of -100 outside the
    answers. Attention is torch's scaled dot product attention, the optimizer the fused AdamW.

    Args:
      spec: "model" (a Hugging Face folder), "examples" (the file that `Ours` wrote), "rank", "compiled" (whether
        `torch.compile` compiles the model), "dynamic" (whether it does so for rows of any length), "device" ("cpu" or
        "cuda"), "dtype" (that of the base; with "bfloat16" the adapter stays in float32 under autocast) and "threads".
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec

    def load(self) -> Reply:
        """Loads the model and adds the adapters; returns the tokens and targets of a pass."""
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        spec = self._spec
        torch.set_num_threads(spec["threads"])
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(
            spec["model"], dtype=getattr(torch, spec["dtype"]), attn_implementation="sdpa"
        )
        base.config.use_cache = False
        lora = LoraConfig(
            r=spec["rank"],
            lora_alpha=spec["rank"],  # so that the scale is 1
            lora_dropout=0.0,
            target_modules=list(TARGETS),
            task_type="CAUSAL_LM",
        )
        self._model: Any = get_peft_model(base.to(spec["device"]), lora)
        self._model.train()
        self._forward = torch.compile(self._model, dynamic=spec["dynamic"]) if spec["compiled"] else self._model
        self._parameters = [each for each in self._model.parameters() if each.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        self._steps = json.loads(pathlib.Path(spec["examples"]).read_text(encoding="utf-8"))
        rows = [row for step in self._steps for row in step]
        return {
            "tokens": sum(len(row["tokens"]) for row in rows),
            "targets": sum(sum(row["targets"]) for row in rows),
            "loaded_mib": peak_mib(),
        }

    def run(self) -> Reply:
        """Trains on the steps once; returns the seconds and the loss of the first step."""
        import torch

        spec, losses = self._spec, []
        lower = torch.autocast(spec["device"], torch.bfloat16) if spec["dtype"] == "bfloat16" else None
        start = time.perf_counter()
        for rows in self._steps:
            batch = {name: each.to(spec["device"]) for name, each in pad_right(rows).items()}
            with lower or contextlib.nullcontext():
                loss = self._forward(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        if spec["device"] == "cuda":
            torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - start, "first_loss": float(losses[0])}

    def facts(self) -> Reply:
        """Returns the number of graphs that were compiled and of breaks between them, and the device's peak memory."""
        import torch

        found: Reply = {"executables": 0, "device_peak_mib": None}
        if self._spec["compiled"]:
            from torch._dynamo.utils import counters

            found |= {
                "executables": counters["stats"].get("unique_graphs", 0),
                "graph_breaks": sum(counters["graph_break"].values()),
            }
        if self._spec["device"] == "cuda":
            found["device"] = torch.cuda.get_device_name()
            found["device_peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
        return found


def pad_right(rows: list[dict[str, list]]) -> dict[str, Any]:
    """Makes a batch of examples as Hugging Face models take it.

    Args:
      rows: the examples of a step, each with "tokens" and "targets" (whether a token is learned).

    Returns:
      "input_ids" and "labels" (-100 outside the targets), [B, T] int64, and, unless all rows are equally long,
      "attention_mask" [B, T] int64; T is the length of the longest row.
    """
    import torch

    length = max(len(row["tokens"]) for row in rows)
    tokens, labels, mask = (torch.full((len(rows), length), value, dtype=torch.int64) for value in (0, IGNORED, 0))
    for row, example in enumerate(rows):
        end = len(example["tokens"])
        found = torch.tensor(example["tokens"])
        tokens[row, :end], mask[row, :end] = found, 1
        labels[row, :end] = torch.where(torch.tensor(example["targets"]), found, IGNORED)
    batch = {"input_ids": tokens, "labels": labels, "attention_mask": mask}
    if all(len(row["tokens"]) == length for row in rows):
        del batch["attention_mask"]  # attention is then causal only, for which torch has a faster kernel
    return batch


def make(name: str, spec: dict[str, Any]) -> Ours | Peft:
    """Makes a peer by its name, which begins with "ours" or "peft".

    Args:
      name: the name of the peer.
      spec: the values of `Ours` or `Peft`.
    """
    return Ours(spec) if name.startswith("ours") else Peft(spec)
