"""Folders of runs with known numbers."""

import json
import pathlib

from mlora_jax.training.records import JsonLines
from mlora_jax.trials import Trial

RANKS = (1, 2, 4)


def write_run(
    path,
    curves,
    *,
    failed=(),
    base=(("test", 0.25),),
    task="trec",
    model="some/folder/base",
    scaling="none",
    weights=(),
    truncated=0,
    **config,
):
    """Writes a run's folder.

    Args:
      path: of the folder.
      curves: (method, read-out, learning rate) -> split -> seed -> accuracies at the ranks 1, 2, 4; those of fewer
        ranks than others have are half written.
      failed: (method, learning rate, seed) of the trials that failed.
      base: (split, accuracy) of the base.
      task, model: of the config.
      scaling, weights: of every trial.
      truncated: how many of the 12 items of every split were cut.
      **config: more groups of the config.
    """
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    values = {"data": {"task": task}, "model": {"path": model}} | config
    (path / "config.json").write_text(json.dumps(values))
    with JsonLines(path / "curves.jsonl") as records:
        for split, accuracy in base:
            records.write(
                dict(
                    trial="base",
                    split=split,
                    readout="base",
                    at_rank=0,
                    of_ranks=1,
                    accuracy=accuracy,
                    items=12,
                    truncated=truncated,
                )
            )
        each = (accuracies for splits in curves.values() for seeds in splits.values() for accuracies in seeds.values())
        whole = max(map(len, each), default=0)
        for (method, readout, rate), splits in curves.items():
            for split, seeds in splits.items():
                for seed, accuracies in seeds.items():
                    for rank, accuracy in zip(RANKS, accuracies, strict=False):
                        where = {"split": split, "readout": readout, "at_rank": rank, "of_ranks": whole}
                        where["accuracy"] = accuracy
                        records.write(dict(**_trial(method, rate, seed, scaling, weights), **where))
        for method, rate, seed in failed:
            records.write(dict(**_trial(method, rate, seed, scaling, weights), failed=True))
    return path


def _trial(method, rate, seed, scaling, weights):
    trial = Trial(method, rate, seed, scaling, 4, tuple(weights))
    return {"trial": trial.name, **trial.to_json(), "task": "trec"}
