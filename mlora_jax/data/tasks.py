"""The table of tasks: where the rows come from, how a row is worded for the model, and how an answer is scored.

A new task is a builder package and a row of `TASKS`. A new wording is a row of the task's `styles`. Styles apply when
rows are read, so a new wording does not need a new build.
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
      prompt: the template of the prompt; `{field}` is a field of the stored row.
      without: field -> the template of the prompt for rows in which that field is blank.
      answer: the template of the answer; it is not used if there are choices.
      choices: all answers of a classification, in the order of the labels; empty: each row has its own choices or none.
      choice: the template of one of the row's own choices.
      boundary: how the boundary between prompt and answer is tokenised, "separate", "joint" or "lossless" (see
        `Tokenizer.encode_pair`).
    """

    prompt: str
    without: Mapping[str, str] = dataclasses.field(default_factory=dict)
    answer: str = ""
    choices: tuple[str, ...] = ()
    choice: str = "{choice}"
    boundary: str = "joint"

    def render(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Renders a stored row.

        Args:
          row: the stored row.

        Returns:
          {"prompt": str, "answer": str, "choices": list of str, "label": int}; without choices, the label is -1.

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
      headers: role -> the text before a message; None: the chat template of the model's tokenizer writes the chat.
      footer: the text after a message.
      boundary: how the boundary between prompt and answer of a prompt/completion line is tokenised.
    """

    headers: Mapping[str, str] | None
    footer: str = ""
    boundary: str = "lossless"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A row of the table of tasks.

    Attributes:
      name: the name of the task and of its builder package.
      styles: the wordings by name; the first one is the default.
      metric: "choice" (whether the most likely choice is the one of the label), "exact_match" (whether greedy
        generation gives the answer) or "tokens" (the fraction of the answers' tokens that are the most likely ones
        after the true text before them).
      answer_pattern: a regular expression whose first group is the answer to compare; empty: the whole text.
      stop: the strings at which greedy generation ends; it also ends at the end-of-sequence token.
    """

    name: str
    styles: Mapping[str, Style | ChatStyle]
    metric: str
    answer_pattern: str = ""
    stop: tuple[str, ...] = ()

    @property
    def builder(self) -> type[Any]:
        """The TFDS builder class; the first use imports TFDS."""
        return importlib.import_module(f"{BUILDERS}.{self.name}.{self.name}_dataset_builder").Builder

    def style(self, name: str = "") -> Style | ChatStyle:
        """Returns a style of the task.

        Args:
          name: the name of the style; empty: the default style.

        Raises:
          ValueError: the name is unknown; the message lists the known names.
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
        # The answers are long and free, so generation never matches one word for word.
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
        # The harness compares the rest of the sentence after each word, which is not one prompt with two answers.
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
    """Returns the task of that name.

    Raises:
      ValueError: the name is unknown; the message has the nearest known name and all known names.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown task {name!r} (data.task): {hint}expected one of {', '.join(map(repr, TASKS))}")
    return TASKS[name]
