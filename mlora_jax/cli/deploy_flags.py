"""Defines the flags of the commands that take one adapter at some ranks, generate and export, and finds its files."""

import pathlib
from collections.abc import Mapping, Sequence

from absl import flags

from mlora_jax.cli.number_flags import integers

MODEL = flags.DEFINE_string("model", None, "Folder or hub id of the base model; by default the adapter names it.")
OUTPUT = flags.DEFINE_string("output", None, "JSONL file for the answers, or folder for the export.")
RANK = flags.DEFINE_list("rank", None, "Ranks in 0..R, separated by commas.")


def chosen_ranks(values: Sequence[str]) -> list[int]:
    """Returns the ranks of --rank in their order, each of them once.

    Args:
      values: the texts between the commas.

    Raises:
      ValueError: one of them is not an integer, or is outside the range of the flag.
    """
    return list(dict.fromkeys(int(rank) for rank in integers("rank", values or [""])))


def find_adapter(run: str, trial: str | None) -> pathlib.Path:
    """Returns the folder of a trial's adapter.

    Args:
      run: the folder of the run.
      trial: the name of the trial; None: the run's only trial.

    Raises:
      FileNotFoundError: the folder is not the folder of a run, or no trial of the run has been trained.
      ValueError: the run has no such trial, or `trial` is None and the run has several.
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
    """Returns the name of an adapter's base model: the value of --model, or the name that the adapter records.

    Args:
      folder: the folder of the adapter, for the message.
      description: the content of its adapter.json.

    Raises:
      ValueError: --model is not given and the adapter records no name.
    """
    path = MODEL.value or description.get("base_model")
    if not path:
        raise ValueError(f"the adapter in {folder} does not name its base model: give --model FOLDER")
    return path


def base_folder(folder: pathlib.Path, description: Mapping) -> pathlib.Path:
    """Returns the folder of an adapter's base model; a model of the hub is downloaded.

    Args:
      folder: the folder of the adapter, for messages.
      description: the content of its adapter.json.

    Raises:
      ValueError: --model is not given and the adapter records no name.
      FileNotFoundError: there is no such model.
    """
    from mlora_jax.run.inputs import model_folder

    path = base_name(folder, description)
    try:
        return model_folder(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no base model {path}: give its folder by --model ({error})") from None
