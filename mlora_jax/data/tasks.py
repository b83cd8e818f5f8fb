"""The tasks: where the rows come from, how a row is put to the model, how an answer is scored.

Adding a task is adding a builder package and a row to `TASKS`; adding a wording is adding a row to its
`styles`. Styles apply when rows are read, so another wording never needs another build.
"""

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from typing import Any

BUILDERS = "mlora_jax.data.builders"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
    """A wording of a task.

    Attributes:
        prompt: template of the prompt; `{field}` is a field of the stored row.
        without: field -> template of the prompt of rows in which that field is blank.
        answer: template of the answer; unused where there are choices.
        choices: every answer of a classification, in the order of the labels; empty: the row's own, if any.
        choice: template of one of the row's own choices.
        boundary: how the border between prompt and answer is tokenised, "separate", "joint" or "lossless" (see
            `Tokenizer.encode_pair`).
    """

    prompt: str
    without: Mapping[str, str] = dataclasses.field(default_factory=dict)
    answer: str = ""
    choices: tuple[str, ...] = ()
    choice: str = "{choice}"
    boundary: str = "joint"

    def render(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A stored row as {"prompt": str, "answer": str, "choices": list of str, "label": int (-1: none)}.

        Example:
            >>> Style(prompt="{text} =>", choices=(" no", " yes")).render({"text": "So?", "label": 1})
            {'prompt': 'So? =>', 'answer': ' yes', 'choices': [' no', ' yes'], 'label': 1}
        """
        choices = list(self.choices) or [self.choice.format(choice=choice) for choice in row.get("choices", ())]
        label = int(row["label"]) if choices else -1
        answer = choices[label] if choices else self.answer.format_map(row)
        prompt = next((other for field, other in self.without.items() if not row[field].strip()), self.prompt)
        return {"prompt": prompt.format_map(row), "answer": answer, "choices": choices, "label": label}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatStyle:
    """A way to write a chat as text.

    Attributes:
        headers: what stands before a message, by role; None: the chat template of the model's tokenizer
            decides everything.
        footer: what stands after a message.
        boundary: how the border between prompt and answer of a prompt/completion line is tokenised.
    """

    headers: Mapping[str, str] | None
    footer: str = ""
    boundary: str = "lossless"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A row of the table of tasks.

    Attributes:
        name: the task's name, also that of its builder package.
        styles: its wordings by name, the first being the default.
        metric: "choice" (the most likely of the choices is the label's), "exact_match" (of greedy generation) or
            "tokens" (the share of the answers' tokens that are the most likely ones behind the true text before them).
        answer_pattern: regular expression whose first group is the answer to compare; empty: all text.
        stop: strings at which greedy generation ends, besides the end-of-sequence token.
    """

    name: str
    styles: Mapping[str, Style | ChatStyle]
    metric: str
    answer_pattern: str = ""
    stop: tuple[str, ...] = ()

    @property
    def builder(self) -> type:
        """The TFDS builder class; importing it imports TFDS."""
        return importlib.import_module(f"{BUILDERS}.{self.name}.{self.name}_dataset_builder").Builder

    def style(self, name: str = "") -> Style | ChatStyle:
        """The style of that name, or the default one.

        Raises:
            ValueError: an unknown name; the message has the known ones.
        """
        chosen = name or next(iter(self.styles))
        if chosen not in self.styles:
            raise ValueError(
                f"unknown style {name!r} of the task {self.name!r} (data.style), "
                f"expected one of {', '.join(map(repr, self.styles))}"
            )
        return self.styles[chosen]


_TASKS = (
    Task(
        name="gsm8k",
        styles={
            "reference": Style(prompt="Question: {question}\nAnswer: ", answer="{answer}", boundary="separate"),
            "harness": Style(prompt="Question: {question}\nAnswer:", answer=" {answer}", boundary="lossless"),
        },
        metric="exact_match",
        answer_pattern=r"#### (\-?[0-9\.\,]+)",
        stop=("Question:",),
    ),
    Task(
        name="trec",
        styles={
            "default": Style(
                prompt="Question: {text}\nType:",
                choices=(" abbreviation", " entity", " description", " person", " place", " number"),
            ),
        },
        metric="choice",
    ),
    Task(
        name="sst2",
        styles={"default": Style(prompt="Review: {text}\nSentiment:", choices=(" negative", " positive"))},
        metric="choice",
    ),
    Task(
        name="platypus",
        styles={
            "reference": Style(
                prompt="### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
                without={"input": "### Instruction:\n{instruction}\n\n### Response:\n"},
                answer="{output}",
                boundary="separate",
            ),
        },
        # Long free answers: none is ever met word for word.
        metric="tokens",
    ),
    *(
        Task(
            name=name,
            styles={"harness": Style(prompt="Question: {question}\nAnswer:", choice=" {choice}")},
            metric="choice",
        )
        for name in ("arc_challenge", "arc_easy")
    ),
    Task(
        name="hellaswag",
        styles={"harness": Style(prompt="{question}", choice=" {choice}")},
        metric="choice",
    ),
    Task(
        name="mmlu",
        styles={"harness": Style(prompt="{question}\n{options}\nAnswer:", choices=(" A", " B", " C", " D"))},
        metric="choice",
    ),
    Task(
        name="winogrande",
        # The harness compares the rest of the sentence behind either word, which is not one prompt with two answers.
        styles={"default": Style(prompt="{question}\nThe blank is:", choice=" {choice}")},
        metric="choice",
    ),
    Task(
        name="quickstart",
        styles={"default": Style(prompt="{prompt}", answer="{answer}")},
        metric="choice",
    ),
    Task(
        name="jsonl",
        styles={
            "chat-template": ChatStyle(headers=None),
            "plain-chat": ChatStyle(
                headers={
                    "system": "### System:\n",
                    "developer": "### Developer:\n",
                    "user": "### User:\n",
                    "assistant": "### Assistant:\n",
                    "tool": "### Tool:\n",
                },
                footer="\n\n",
            ),
        },
        metric="exact_match",
    ),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _TASKS}


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: an unknown name; the message has the nearest and all known ones.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown task {name!r} (data.task): {hint}expected one of {', '.join(map(repr, TASKS))}")
    return TASKS[name]
