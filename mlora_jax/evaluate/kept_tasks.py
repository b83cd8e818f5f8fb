"""Tasks of lm-evaluation-harness that keep the requests and texts that they make from their documents.

The harness builds a task's requests again in every evaluation, and compiles a template for every text that it makes
from a document. With many adapters and ranks on one task, this takes longer than scoring. The classes here inherit from
the harness's own tasks and keep requests and texts from one evaluation to the next.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any, cast

from lm_eval.api.task import ConfigurableTask, Task

__all__ = ["keeping"]


class KeepsRequests(Task):
    """A task that builds its requests once."""

    requests_are_built: bool

    def build_all_requests(self, **options: Any) -> None:
        """Builds the requests the first time, and afterwards only clears the answers to them.

        Args:
          **options: the harness's options, which must be the same every time.
        """
        if not self.requests_are_built:
            super().build_all_requests(**options)
            self.requests_are_built = True
        for instance in self.instances:
            # New containers, since the samples that were logged before hold the old ones.
            instance.resps, instance.filtered_resps = [], {}


class KeepsTexts(KeepsRequests, ConfigurableTask):
    """A task that is defined by a file of the harness and that makes the texts of each document once."""

    texts: dict[tuple, Any]

    def doc_to_text(self, doc: Any, doc_to_text: Any = None) -> Any:
        """The document's question; see `ConfigurableTask`."""
        return self._kept("doc_to_text", doc, doc_to_text)

    def doc_to_target(self, doc: Any, doc_to_target: Any = None) -> Any:
        """The document's answer; see `ConfigurableTask`."""
        return self._kept("doc_to_target", doc, doc_to_target)

    def doc_to_choice(self, doc: Any, doc_to_choice: Any = None) -> Any:
        """The document's choices; see `ConfigurableTask`."""
        return self._kept("doc_to_choice", doc, doc_to_choice)

    def _kept(self, name: str, doc: Any, given: Any) -> Any:
        make = getattr(super(), name)
        template = getattr(self.config, name) if given is None else given
        # A function may draw at random, and a column of the data needs no template.
        if self.prompt is not None or not isinstance(template, str) or template in self.features:
            return make(doc, given)
        key = name, template, pickle.dumps(doc)
        if key not in self.texts:
            self.texts[key] = make(doc, given)
        return copy.copy(self.texts[key])  # a copy, since the caller may change a list


def keeping(task: Task) -> Task:
    """Returns a copy of a task that keeps its requests, and also its texts if a file defines the task.

    The copy has its own configuration and sampler, so that the given task does not change.

    Args:
      task: a loaded task.
    """
    kind = type(task)
    base = KeepsTexts if kind is ConfigurableTask else type(f"Keeps{kind.__name__}", (KeepsRequests, kind), {})
    kept = cast("KeepsRequests", object.__new__(base))
    vars(kept).update(vars(task))
    kept._config = copy.deepcopy(task.config)
    sampler = getattr(task, "sampler", None)
    if sampler is not None:
        vars(kept)["sampler"] = copy.copy(sampler)
    vars(kept).update(requests_are_built=False, texts={})
    return kept
