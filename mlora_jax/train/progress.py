"""What a person sees while a run trains."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunProgress:
    """A bar over all steps of the run in a terminal; a line every so often elsewhere.

    Args:
      steps: optimizer steps of the whole run.
      console: where to print; None is standard output.
      seconds: between lines when the console is no terminal.
    """

    def __init__(self, steps: int, *, console: Console | None = None, seconds: float = 15.0):
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
        self._task = self._bar.add_task("", total=steps)
        self._steps, self._done = steps, 0
        self._seconds, self._start, self._printed = seconds, time.monotonic(), time.monotonic()

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *exception):
        self._bar.stop()

    def say(self, text: str) -> None:
        """Prints one line."""
        self.console.print(text, highlight=False, markup=False)

    def advance(self, steps: int, *, trial: str, step: int, loss: float, tokens_per_second: float) -> None:
        """Counts `steps` more optimizer steps of a trial."""
        self._done += steps
        text = f"{trial}  step {step}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        self._bar.update(self._task, advance=steps, description=text)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._printed >= self._seconds:
            self._printed = now
            left = (now - self._start) / self._done * (self._steps - self._done)
            self.say(f"{text}  [{self._done}/{self._steps} steps, about {left:.0f} s of training left]")

    def skip(self, steps: int) -> None:
        """Takes steps that will not be run off the total."""
        self._steps -= steps
        self._bar.update(self._task, total=self._steps)
