"""Flags and look-ups of the commands that take one adapter at some ranks: generate and export."""

import pathlib
from collections.abc import Mapping, Sequence

from absl import flags

from mlora_jax.cli.number_flags import integers

MODEL = flags.DEFINE_string("model", None, "Folder or hub id of the base model, if not where the adapter says.")
OUTPUT = flags.DEFINE_string("output", None, "What to write: JSONL file of answers, or folder of an export.")
RANK = flags.DEFINE_list("rank", None, "Ranks in 0..R, with commas between them.")


def chosen_ranks(values: Sequence[str]) -> list[int]:
    """The ranks of --rank, each once."""
    return list(dict.fromkeys(int(rank) for rank in integers("rank", values or [""])))


def find_adapter(run: str, trial: str | None) -> pathlib.Path:
    """The folder of a trial's adapter.

    Raises:
      FileNotFoundError: the folder is no run's, or no trial of it has been trained.
      ValueError: a trial that is not there, or none named where there are several.
    """
    there = sorted(file.parent.name for file in pathlib.Path(run).glob("adapters/*/adapter.json"))
    if not there:
        raise FileNotFoundError(f"{run} holds no adapters: it is not the folder of a run, or nothing is trained yet")
    if trial is None and len(there) > 1:
        raise ValueError(f"{run} has several trials, name one by --trial: {', '.join(there)}")
    if trial is not None and trial not in there:
        raise ValueError(f"{run} has no trial {trial!r}; trials there: {', '.join(there)}")
    return pathlib.Path(run) / "adapters" / (trial or there[0])


def base_name(folder: pathlib.Path, description: Mapping) -> str:
    """The name of an adapter's base: the value of --model, or the name that the adapter records.

    Raises:
      ValueError: neither does.
    """
    path = MODEL.value or description.get("base_model")
    if not path:
        raise ValueError(f"the adapter in {folder} does not name its base model: give --model FOLDER")
    return path


def base_folder(folder: pathlib.Path, description: Mapping) -> pathlib.Path:
    """The folder of an adapter's base.

    Raises:
      ValueError: nothing names it.
      FileNotFoundError: it is not there.
    """
    from mlora_jax.run.inputs import model_folder

    path = base_name(folder, description)
    try:
        return model_folder(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no base model {path}: give its folder by --model ({error})") from None
