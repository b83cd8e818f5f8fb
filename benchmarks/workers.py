"""Runs programs side by side in processes of their own that take turns, so that only one computes at a time.

A worker is a process that answers JSON lines on its standard input with JSON lines on its standard output. What its
libraries print goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from benchmarks.records import ROOT, without_paths

Reply = dict[str, Any]
# The variables that name the folders of compiled programs, of jax and of torch's compilers.
CACHES = ("JAX_COMPILATION_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


class Peer(Protocol):
    """The part of a benchmark that runs in a worker."""

    def load(self) -> Reply:
        """Loads model and data; returns facts about them."""
        ...

    def run(self) -> Reply:
        """Does the work of one repeat; returns its "seconds" and other results."""
        ...

    def facts(self) -> Reply:
        """Returns what is known in the end, such as the number of executables."""
        ...


class WorkerError(RuntimeError):
    """A worker raised an error or ended; the message has no path of the machine."""


class Worker:
    """A process that runs one peer.

    Args:
      module: the module that runs as the worker; it calls `serve` when it gets `--peer`.
      peer: the name of the peer.
      spec: the JSON values from which the peer is made.
      threads: the number of threads, and of cores to which the process is bound.
      cold: the folder in which compilers keep what they compiled; None leaves the caches of the user as they are. With
        an empty folder every program is compiled anew.
    """

    def __init__(
        self, module: str, peer: str, spec: Mapping[str, Any], *, threads: int, cold: pathlib.Path | None = None
    ) -> None:
        self.peer = peer
        count = str(threads)
        # NPROC sets the threads of XLA, the others those of torch and of BLAS libraries.
        limits = {"NPROC": count, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "TOKENIZERS_PARALLELISM": "false"}
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        caches = {} if cold is None else {name: str(cold / peer / name) for name in CACHES}
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, "--peer", peer, "--threads", count],
            cwd=ROOT,
            env={**os.environ, **limits, **offline, **caches},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._send(spec)

    def _send(self, values: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer tells
            self._process.stdin.write(json.dumps(values) + "\n")
            self._process.stdin.flush()

    def ask(self, method: str) -> Reply:
        """Calls a method of the peer, and returns its result with "peak_mib" (see `peak_mib`).

        Raises:
          WorkerError: the method raised an error, or the process ended.
        """
        assert self._process.stdout is not None
        self._send({"method": method})
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"the process ended with status {self._process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def kill(self) -> None:
        """Ends the process at once; a method that it is asked for raises a WorkerError."""
        self._process.kill()

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(make: Callable[[dict[str, Any]], Peer], *, threads: int) -> None:
    """Runs a peer in this process until standard input ends.

    Args:
      make: makes the peer from the spec of its worker.
      threads: the number of cores that the process may use.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # so that prints of libraries do not mix with the replies
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    spec, peer = json.loads(sys.stdin.readline()), None
    for line in sys.stdin:
        try:
            peer = make(spec) if peer is None else peer
            reply = getattr(peer, json.loads(line)["method"])() | {"peak_mib": peak_mib()}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {without_paths(str(error))}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def peak_mib() -> float:
    """Returns the largest resident memory of this process so far, in MiB, its libraries and compilers included.

    Linux passes `ru_maxrss` on to the programs that a process starts; the peak in its `/proc` belongs to the program.
    """
    status = pathlib.Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return round(int(found[1]) / 2**10, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10), 1)


def in_turns(names: Sequence[str], repeats: int) -> Iterator[str]:
    """Yields every name once per repeat. Each repeat begins with another name, so that no peer is always first.

    >>> list(in_turns(["a", "b", "c"], 2))
    ['a', 'b', 'c', 'b', 'c', 'a']
    """
    for repeat in range(repeats):
        first = repeat % len(names) if names else 0
        yield from (*names[first:], *names[:first])


def compare(workers: Mapping[str, Worker], *, repeats: int, say: Callable[[str], None]) -> dict[str, Reply]:
    """Loads every peer, lets it run once to compile, and then lets the peers take turns.

    A peer that raises an error is left out from then on; the others go on.

    Args:
      workers: name -> worker. They are loaded in this order, one after the other.
      repeats: the number of timed runs of each.
      say: is called with a line about what happens.

    Returns:
      name -> "loaded" (the reply of `load`), "first" and "runs" (the replies of `run`) and "facts"; or "error".
    """
    found: dict[str, Reply] = {name: {"runs": []} for name in workers}

    def ask(name: str, method: str) -> Reply | None:
        if "error" in found[name]:
            return None
        try:
            return workers[name].ask(method)
        except WorkerError as error:
            found[name] = {"error": str(error)}
            say(f"{name}: {error}")
            return None

    for name in workers:
        found[name]["loaded"] = ask(name, "load") or {}
        if first := ask(name, "run"):
            found[name]["first"] = first
            say(f"{name}: first pass {first['seconds']:.1f} s")
    for name in in_turns([*workers], repeats):
        if reply := ask(name, "run"):
            found[name]["runs"].append(reply)
            say(f"{name}: {reply['seconds']:.2f} s")
    for name in workers:
        if (facts := ask(name, "facts")) is not None:
            found[name]["facts"] = facts
    return found
