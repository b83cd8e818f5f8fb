"""Exact match of greedy answers, for any adapter under any profile."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mlora_jax.data.tasks import Task
from mlora_jax.data.tokenize import prompt_tokens
from mlora_jax.evaluate.generation import Generator
from mlora_jax.evaluate.requests import warn_of_not_finite
from mlora_jax.evaluate.sampling import NOT_FINITE
from mlora_jax.evaluate.stop_strings import StopStrings
from mlora_jax.models.generation_config import GenerationSettings
from mlora_jax.models.tokenizer import Tokenizer


def extract_answer(text: str, pattern: str) -> str:
    """Returns the group of the first match of `pattern`, without commas and a final full stop; "" if nothing matches.

    This is the harness's strict match of GSM8K. An empty pattern takes the whole text without surrounding space.

    >>> extract_answer("so 1,000 in all.\\n#### 1,000", r"#### (-?[0-9.,]+)")
    '1000'
    """
    if not pattern:
        return text.strip()
    found = re.search(pattern, text)
    return found.group(1).replace(",", "").removesuffix(".") if found else ""


class GenerationEvaluator:
    """Greedy answers compared with the right ones: `evaluator(adapter, p)` gives one verdict per item.

    Args:
      graphdef: the graph definition of the adapted decoder in evaluation mode.
      base: the frozen tree.
      profile: the profile tree; its values are replaced by the p of each call.
      rows: dicts with prompt and answer (str).
      tokenizer: the model's tokenizer.
      boundary: how prompt and answer are joined, see `Tokenizer.encode_pair`.
      task: says how the answer is found in a text (`answer_pattern`) and which strings end an answer (`stop`).
      max_length: the largest number of tokens of a prompt; a longer prompt loses tokens on its left.
      max_new_tokens: N, the largest number of tokens of an answer.
      batch_size: the largest number of rows that are decoded together.
      pad_multiple: prompt lengths are padded to a multiple of this.
      stop: the token ids that end an answer.
      settings: the checkpoint's generation settings, as in `Generator`; settings that cannot be applied raise an error
        at once.
      mesh: the mesh, as in `Generator`.

    Attributes:
      generator: the `Generator` that answers the prompts.
      truncated: the number of items whose prompt was cut on the left to fit.

    Raises:
      ValueError: an answer has no match of the task's pattern, or a setting of the checkpoint cannot be applied.
    """

    def __init__(
        self,
        graphdef: Any,
        base: Any,
        profile: Any,
        rows: Sequence[dict],
        tokenizer: Tokenizer,
        *,
        boundary: str,
        task: Task,
        max_length: int,
        max_new_tokens: int,
        batch_size: int,
        pad_multiple: int,
        stop: Sequence[int],
        settings: GenerationSettings | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        self.generator = Generator(
            graphdef,
            base,
            profile,
            max_length=max_length + max_new_tokens,
            batch_size=batch_size,
            pad_multiple=pad_multiple,
            eos=stop,
            settings=settings,
            mesh=mesh,
        )
        self.generator.settings.check()
        self._ends = StopStrings(tokenizer, task.stop)
        self._task, self._max_new_tokens = task, max_new_tokens
        self._answers = [extract_answer(row["answer"], task.answer_pattern) for row in rows]
        for number, (row, answer) in enumerate(zip(rows, self._answers, strict=True)):
            if task.answer_pattern and not answer:
                raise ValueError(
                    f"answer {row['answer']!r} of row {number} has nothing that matches {task.answer_pattern}"
                )
        prompts = [
            prompt_tokens(row, tokenizer, boundary=boundary, name=f"row {row.get('row', number)} to evaluate on")
            for number, row in enumerate(rows)
        ]
        self.truncated = sum(len(prompt) > max_length for prompt in prompts)
        self._prompts = [prompt[-max_length:] for prompt in prompts]
        self._batches = self.generator.batches(self._prompts)

    def __len__(self) -> int:
        """The number of batches that `run_batch` takes."""
        return len(self._batches)

    @property
    def compilations(self) -> int:
        """The number of executables that have been compiled so far."""
        return self.generator.compilations

    def run_batch(self, number: int, adapter: Any, p: Any) -> np.ndarray:
        """The greedy tokens [B, N] that answer one batch of prompts, as `Generator.answer` returns them.

        The verdicts do not come from batches, because rows that end are refilled. A batch serves to time answers.

        Args:
          number: the index of the batch.
          adapter: the tree of factors.
          p: the profile, in a form that `set_profile` takes.
        """
        batch = self._batches[number]
        return self.generator.answer(adapter, batch, p, max_new_tokens=self._max_new_tokens, stop=self._ends)

    def texts(self, adapter: Any, p: Any) -> list[str]:
        """The greedy answer to every prompt, up to the first stop string."""
        return self._generate(adapter, p)[0]

    def _generate(self, adapter: Any, p: Any) -> tuple[list[str], np.ndarray]:
        """The texts, and [items] bool: whether all logits of each text were finite."""
        limit, ends = self._max_new_tokens, self._ends
        made = self.generator.raw_answers(adapter, self._prompts, p, max_new_tokens=limit, stop=ends)
        texts = [ends.text(answer[answer >= 0].tolist()) for answer in made]
        return texts, np.array([not np.any(answer == NOT_FINITE) for answer in made], bool)

    def __call__(self, adapter: Any, p: Any) -> np.ndarray:
        """The verdicts [items] bool on an adapter under the profile p: [R], or what `set_profile` takes.

        An item with logits that are not finite is wrong, and a logged warning counts such items.
        """
        texts, finite = self._generate(adapter, p)
        warn_of_not_finite(finite)
        found = [extract_answer(text, self._task.answer_pattern) for text in texts]
        return np.asarray([text == answer for text, answer in zip(found, self._answers, strict=True)], bool) & finite
