"""Where a model lies: its own folder, or the cache of the Hugging Face hub, filled on demand."""

from __future__ import annotations

import os
import pathlib
import re

from mlora_jax.models.config import CONFIG_FILE, read_config
from mlora_jax.models.weight_files import INDEX_FILE, WEIGHTS_FILE, shard_names

# What is read of a repository besides its weights; others (pickles, PyTorch's own layout, other frameworks) stay there.
SETTINGS = (
    CONFIG_FILE, "generation_config.json", INDEX_FILE, "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip

_PART = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_HUB_ID = re.compile(f"(?!.*(?:--|\\.\\.|\\.git$)){_PART}/{_PART}", re.ASCII)


def checkpoint_folder(path: str | os.PathLike, *, weights: bool = True) -> pathlib.Path:
    """The folder of a model; one on the hub is downloaded to huggingface_hub's cache unless it is there.

    Only a string of the form "OWNER/NAME" goes to the hub, and only where there is no such folder. The environment
    variables of huggingface_hub hold (HF_TOKEN, HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT).

    Args:
        path: a folder, where "~" may stand for the home, or a hub id.
        weights: whether the weights are needed too.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: neither a folder nor a hub id; a model that the hub does not have or does not show; one that
            the cache does not have whole while the hub cannot be reached. What is missing is named.
        ValueError: the model on the hub is not one that the decoder supports; its weights are not downloaded.
    """
    folder = pathlib.Path(path).expanduser()
    if folder.is_dir() and path != "":  # which pathlib takes for "."
        return folder
    if not isinstance(path, str) or not _HUB_ID.fullmatch(path):
        raise FileNotFoundError(
            f"{str(path)!r} is neither a folder nor a hub id like 'OWNER/NAME': check the path, or download a model by "
            f"`hf download OWNER/NAME --local-dir FOLDER` and give FOLDER"
        )
    folder = _fetch(path, SETTINGS, needed=(CONFIG_FILE,))
    read_config(folder)
    if weights:
        index = folder / INDEX_FILE
        files = tuple(shard_names(index)) if index.is_file() else (WEIGHTS_FILE,)
        folder = _fetch(path, files, needed=files)
    return folder


def _fetch(repository: str, files: tuple[str, ...], *, needed: tuple[str, ...]) -> pathlib.Path:
    """The cached snapshot of a repository with those of `files` that it has."""
    # Here, because a model in a folder of its own needs none of it: it imports for half a second.
    import huggingface_hub
    from huggingface_hub import constants, errors

    try:
        folder = pathlib.Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(files)))
    except errors.GatedRepoError:
        raise FileNotFoundError(
            f"{repository!r} is no folder, and on the hub it is gated: accept its terms at "
            f"https://huggingface.co/{repository}, then `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{repository!r} is neither a folder nor a model on the hub: check the name; if it is private, `hf auth "
            f"login` or set HF_TOKEN"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        partial = getattr(error, "snapshot_path", None)  # since huggingface_hub 2
        if partial is None:
            raise FileNotFoundError(
                f"{repository!r} is no folder, and the hub's cache {constants.HF_HUB_CACHE} has "
                f"nothing of it ({_cause(error)}): it lacks {_listed(needed)}. {_way_out(repository)}"
            ) from None
        folder = pathlib.Path(partial)
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{repository!r} is no folder, and as the hub's cache has it ({folder}) it lacks {_listed(missing)}: the "
            f"download was cut short, or the repository has none (only safetensors are read). {_way_out(repository)}"
        )
    return folder


def _cause(error: Exception) -> str:
    """Why the hub could not be asked, in the words of what failed first."""
    return str(error.__cause__ or error).splitlines()[0].rstrip(".")


def _way_out(repository: str) -> str:
    return f"With the network (and HF_HUB_OFFLINE unset) run again, or `hf download {repository}`"


def _listed(names) -> str:
    return ", ".join(repr(name) for name in names)
