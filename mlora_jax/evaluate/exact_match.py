"""Exact match of greedy answers, for any adapter under any profile."""

from __future__ import annotations

import re
from collections.abc import Sequence

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
    """The group of the first match of `pattern`, without commas and a final full stop; "" if nothing matches.

    That is the harness's strict match of GSM8K. An empty pattern takes the whole text without surrounding space.

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
      graphdef: of the adapted decoder in evaluation mode.
      base: frozen tree.
      profile: profile tree; its values are replaced by the p of each call.
      rows: dicts with prompt and answer (str).
      tokenizer: of the model.
      boundary: how prompt and answer meet, see `Tokenizer.encode_pair`.
      task: says how the answer is found in a text (`answer_pattern`) and which strings end one (`stop`).
      max_length: a longer prompt loses tokens on its left.
      max_new_tokens: N.
      batch_size: the largest B; batches are cut evenly.
      pad_multiple: prompt lengths are padded to a multiple of this.
      stop: token ids that end an answer.
      settings: of the checkpoint, as in `Generator`; what cannot be applied of them is refused at once.
      mesh: as in `Generator`.

    Attributes:
      generator: what answers.
      truncated: items whose prompt was cut on the left to fit.
    """

    def __init__(
        self,
        graphdef,
        base,
        profile,
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
    ):
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
        self._batches = self.generator.batches([prompt[-max_length:] for prompt in prompts])

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._batches)

    @property
    def compilations(self) -> int:
        """Executables so far."""
        return self.generator.compilations

    def run_batch(self, number: int, adapter, p) -> np.ndarray:
        """The greedy tokens [B, N] that answer one batch of prompts, as `Generator.answer` gives them.

        Args:
          number: of the batch.
          adapter: tree of factors.
          p: as `set_profile` takes it.
        """
        options = dict(max_new_tokens=self._max_new_tokens, stop=self._ends)
        return self.generator.answer(adapter, self._batches[number], p, **options)

    def texts(self, adapter, p) -> list[str]:
        """The greedy answer to every prompt, up to the first stop string."""
        return self._generate(adapter, p)[0]

    def _generate(self, adapter, p) -> tuple[list[str], np.ndarray]:
        """The texts, and whether all logits behind each were finite [items]."""
        texts, finite = [""] * len(self._answers), np.ones(len(self._answers), bool)
        adapter = self.generator.place(adapter)
        for number, batch in enumerate(self._batches):
            made = self.run_batch(number, adapter, p)
            for row, member in zip(made, batch.members, strict=False):
                finite[member] = not np.any(row == NOT_FINITE)
                texts[member] = self._ends.text(row[row >= 0].tolist())
        return texts, finite

    def __call__(self, adapter, p) -> np.ndarray:
        """Verdicts [items] bool of an adapter under the profile p [R].

        An item with logits that are not finite is wrong, and a logged warning has the count of such items.
        """
        texts, finite = self._generate(adapter, p)
        warn_of_not_finite(finite)
        found = [extract_answer(text, self._task.answer_pattern) for text in texts]
        return np.asarray([text == answer for text, answer in zip(found, self._answers, strict=True)], bool) & finite
