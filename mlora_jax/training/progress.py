"""The progress that a run prints while it trains."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunProgress:
    """Shows a bar over all steps of the run in a terminal, and prints a line from time to time elsewhere.

    Args:
      console: the console to print to; None is standard output.
      seconds: the time between two lines when the console is not a terminal.
    """

    def __init__(self, *, console: Console | None = None, seconds: float = 15.0) -> None:
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
        self._left: dict[str, int] = {}  # the steps that each trial has left
        self._steps = self._done = 0
        self._seconds, self._start, self._printed = seconds, time.monotonic(), time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Prints one line."""
        self.console.print(text, highlight=False, markup=False)

    def expect(self, steps: dict[str, int]) -> None:
        """Sets how many steps each trial has left, without the steps that are already finished."""
        self._left |= steps
        self._steps = self._done + sum(self._left.values())
        self._bar.update(self._task, total=self._steps, completed=self._done)

    def advance(self, trial: str, left: int, *, step: int, loss: float, tokens_per_second: float) -> None:
        """Advances the bar to the number of steps that a trial has left.

        Args:
          trial: the name of the trial.
          left: the number of steps that it has left.
          step: the number of finished steps.
          loss: the loss in nats per answer token.
          tokens_per_second: the speed of this trial.
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
