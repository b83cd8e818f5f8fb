"""Tasks of lm-evaluation-harness that keep what they have made of their documents.

The harness writes a task's requests anew in every evaluation, and compiles a template for every text that it makes of a
document. With many adapters and ranks on one task that takes longer than scoring. The classes here are the harness's
own tasks, by inheritance, and keep requests and texts from one evaluation to the next.
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
        """Builds the requests the first time, and afterwards gives them out without the answers to them.

        Args:
          **options: the harness's. They must be the same every time.
        """
        if not self.requests_are_built:
            super().build_all_requests(**options)
            self.requests_are_built = True
        for instance in self.instances:
            # New containers, since the samples that were logged before hold the old ones.
            instance.resps, instance.filtered_resps = [], {}


class KeepsTexts(KeepsRequests, ConfigurableTask):
    """A task of the harness's files that makes the texts of each document once."""

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
        # A function may draw at random, and a column of the data is at hand.
        if self.prompt is not None or not isinstance(template, str) or template in self.features:
            return make(doc, given)
        key = name, template, pickle.dumps(doc)
        if key not in self.texts:
            self.texts[key] = make(doc, given)
        return copy.copy(self.texts[key])  # it may be a list, which the caller may change


def keeping(task: Task) -> Task:
    """A copy of a task that keeps its requests, and its texts if it is defined by a file.

    The copy has a configuration and a sampler of its own, so that the given task stays as it is.

    Args:
      task: loaded.
    """
    kind = type(task)
    base = KeepsTexts if kind is ConfigurableTask else type(f"Keeps{kind.__name__}", (KeepsRequests, kind), {})
    kept = cast("KeepsRequests", object.__new__(base))
    vars(kept).update(vars(task))
    kept._config = copy.deepcopy(task.config)
    if hasattr(task, "sampler"):
        vars(kept)["sampler"] = copy.copy(task.sampler)
    vars(kept).update(requests_are_built=False, texts={})
    return kept
