"""What a person sees while a run trains."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunProgress:
    """A bar over all steps of the run in a terminal; a line every so often elsewhere.

    Args:
      console: where to print; None is standard output.
      seconds: between lines when the console is no terminal.
    """

    def __init__(self, *, console: Console | None = None, seconds: float = 15.0):
        self.console = console or Console(soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)
        self._left: dict[str, int] = {}  # steps that each trial has to go
        self._steps = self._done = 0
        self._seconds, self._start, self._printed = seconds, time.monotonic(), time.monotonic()

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *exception):
        self._bar.stop()

    def say(self, text: str) -> None:
        """Prints one line."""
        self.console.print(text, highlight=False, markup=False)

    def expect(self, steps: dict[str, int]) -> None:
        """Sets how many steps every trial has to go; what it went already is not counted."""
        self._left |= steps
        self._steps = self._done + sum(self._left.values())
        self._bar.update(self._task, total=self._steps, completed=self._done)

    def advance(self, trial: str, left: int, *, step: int, loss: float, tokens_per_second: float) -> None:
        """Counts the steps of a trial down to what it has left.

        Args:
          trial: its name.
          left: steps that it has to go.
          step: finished steps.
          loss: nats per answer token.
          tokens_per_second: of this trial.
        """
        self._done += self._left.get(trial, left) - left
        self._left[trial] = left
        text = f"{trial}  step {step}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        self._bar.update(self._task, completed=self._done, description=text)
        now = time.monotonic()
        if not self.console.is_terminal and self._done and now - self._printed >= self._seconds:
            self._printed = now
            seconds = (now - self._start) / self._done * (self._steps - self._done)
            self.say(f"{text}  [{self._done}/{self._steps} steps, about {seconds:.0f} s of training left]")
