"""Evaluates any number of adapters and ranks with lm-evaluation-harness, in one pass over its requests."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate

from mlora_jax.evaluate.kept_tasks import keeping
from mlora_jax.evaluate.language_model import MODEL_NAME, NestedLM, TokenRequest, Variant, options_key
from mlora_jax.evaluate.task_files import load_tasks

__all__ = ["MODEL_NAME", "NestedLM", "Variant", "evaluate_all", "item_verdicts"]

STRICT = "strict-match"  # the filter that counts if a task has several
METRICS = ("acc", "exact_match")


class AnswersFromMemory(NestedLM):
    """Computes the answers of all variants when a request comes for the first time, and keeps them.

    Args:
      lm: the model, whose own variant is not used.
      variants: name -> variant.

    Attributes:
      answering: the name of the variant whose answers the harness gets.
    """

    def __init__(self, lm: NestedLM, variants: Mapping[str, Variant]) -> None:
        first = next(iter(variants.values()))
        super().__init__(
            lm.scorer, lm.generator, lm.tokenizer, first, max_length=lm.max_length, name=lm.name, seed=lm.seed
        )
        self._variants = tuple(Variant(*variant) for variant in variants.values())
        self._index = {name: index for index, name in enumerate(variants)}
        self._memory: dict[tuple, tuple] = {}  # request -> the answer of every variant
        self.answering = next(iter(variants))

    def _loglikelihood_tokens(self, requests: Sequence[TokenRequest], **_: Any) -> list[tuple]:
        return [*zip(*self._score(requests), strict=True)]  # `TemplateLM.loglikelihood` returns them unchanged

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list:
        """The log-likelihoods of continuations and whether each is greedy, from memory."""
        return self._recall("loglikelihood", requests, lambda new: super(NestedLM, self).loglikelihood(new, True))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list:
        """The log-likelihoods of whole texts, from memory."""
        return self._recall("loglikelihood_rolling", requests, lambda new: [*zip(*self._roll(new), strict=True)])

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list:
        """The generated texts, from memory."""
        return self._recall("generate_until", requests, lambda new: [*zip(*self._generate(new), strict=True)])

    def _recall(self, kind: str, requests: Sequence[Instance], find: Callable[[list[Instance]], list[tuple]]) -> list:
        keys, seen = [], {}
        for request in requests:
            options = (options_key(request),) if kind == "generate_until" else request.args[1:]
            key = (kind, request.args[0], *options)
            seen[key] = seen.get(key, 0) + 1  # a repeated request is another draw
            keys.append((*key, seen[key]))
        new = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._memory}
        if new:
            self._memory |= zip(new, find([*new.values()]), strict=True)
        return [self._memory[key][self._index[self.answering]] for key in keys]


def evaluate_all(
    lm: NestedLM,
    variants: Mapping[str, Variant],
    tasks: Sequence[str] | Mapping[str, Any],
    *,
    raw_dir: str = "",
    cache_dir: str = "",
    num_fewshot: int | None = None,
    gen_kwargs: Mapping[str, Any] | None = None,
    limit: int | float | None = None,
    bootstrap_iters: int = 100_000,
    log_samples: bool = True,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    fewshot_as_multiturn: bool = False,
    keep: Callable[[dict[str, Any]], Any] = lambda results: results,
) -> dict[str, Any]:
    """The harness's results of many adapters and ranks on the same tasks, from one pass over the requests.

    When the harness asks for a request for the first time, it is computed for all variants: the requests are tokenized
    and prepared once, and profiles are data. The harness then scores each variant from memory.

    Args:
      lm: the model; its own adapter and rank are not used. Its count of truncated requests grows by those of this
        pass, each counted once.
      variants: name -> (adapter, p). All adapters have the model's rank R and its target modules.
      tasks: the names of the tasks, or the value that `load_tasks` returned, which is not changed.
      raw_dir, cache_dir: arguments of `load_tasks`.
      num_fewshot: the number of few-shot examples, except for tasks that set it to 0; None keeps the tasks' own.
      gen_kwargs: options of generation that replace those of the tasks.
      limit: the number of items of each task, or a fraction of them if it is below 1; None takes all items.
      bootstrap_iters, log_samples, apply_chat_template, system_instruction, fewshot_as_multiturn: arguments of
        `lm_eval.evaluator.evaluate`.
      keep: a function of each variant's results that returns the part to keep, so that the samples of many variants
        need not be in memory at once.

    Returns:
      name -> the results that `lm_eval.evaluator.evaluate` returns, or the part that is kept: "results", "samples" (if
      logged), "n-shot" and so on.

    Raises:
      ValueError: there are no variants, or the local data lack a task.
    """
    if not variants:
        raise ValueError("there is nothing to evaluate: variants is empty")
    answers = AnswersFromMemory(lm, variants)
    results = {}
    with _seeded():
        loaded = tasks if isinstance(tasks, Mapping) else load_tasks(tasks, raw_dir=raw_dir, cache_dir=cache_dir)
        kept = {name: keeping(task) for name, task in loaded["tasks"].items()}
        for task in kept.values():
            _configure(task, num_fewshot, gen_kwargs)
        for name in variants:
            answers.answering = name
            found = evaluate(
                answers,
                cast("Any", {**loaded, "tasks": kept}),
                limit=cast("Any", limit),  # the harness takes fractions, too, which its annotation leaves out
                bootstrap_iters=bootstrap_iters,
                log_samples=log_samples,
                apply_chat_template=apply_chat_template,
                system_instruction=system_instruction,
                fewshot_as_multiturn=fewshot_as_multiturn,
            )
            results[name] = keep(cast("dict[str, Any]", found))
    lm.truncated += answers.truncated
    return results


def item_verdicts(results: Mapping[str, Any]) -> tuple[np.ndarray, str]:
    """The verdict on every item of one task, or of one group such as MMLU, whose tasks follow one another.

    Args:
      results: the results of one variant from `evaluate_all`, with their samples.

    Returns:
      The verdicts [items] bool in the order of the tasks' names and of their documents, and the name of their metric:
      "acc" or "exact_match". If a task has several filters, the metric is that of "strict-match".

    Raises:
      ValueError: a task has neither metric, or a result that is not 0 or 1.
    """
    verdicts, names = [], set()
    for task, samples in sorted(results["samples"].items()):
        filters = list(dict.fromkeys(sample["filter"] for sample in samples))
        chosen = STRICT if STRICT in filters else filters[0]
        samples = sorted((sample for sample in samples if sample["filter"] == chosen), key=lambda s: s["doc_id"])
        metric = next((name for name in METRICS if name in samples[0]["metrics"]), None)
        if metric is None:
            raise ValueError(f"{task} has {', '.join(samples[0]['metrics'])}, but none of {', '.join(METRICS)}")
        values = [float(sample[metric]) for sample in samples]
        if not set(values) <= {0.0, 1.0}:
            raise ValueError(f"{metric} of {task} is not 0 or 1 for every item, so that no item is right or wrong")
        verdicts += values
        names.add(metric if chosen == "none" else f"{metric}, {chosen}")
    return np.asarray(verdicts, bool), "; ".join(sorted(names))


def _configure(task: Any, num_fewshot: int | None, gen_kwargs: Mapping[str, Any] | None) -> None:
    """Sets the options of a task that the harness's `simple_evaluate` sets before it evaluates."""
    if gen_kwargs and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value=dict(gen_kwargs), update=True)
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Seeds the global generators as `simple_evaluate` does, for tasks that use them, and restores them afterwards."""
    states = random.getstate(), np.random.get_state()
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
