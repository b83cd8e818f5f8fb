"""Finds the folder of a model: a local one, or one in the cache of the Hugging Face hub, which is filled on demand."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterable

from mlora_jax.models.config import CONFIG_FILE, read_config
from mlora_jax.models.weight_files import INDEX_FILE, WEIGHTS_FILE, shard_names

# The files of a repository that are read besides its weights. Others, such as pickles, are not downloaded.
SETTINGS = (
    CONFIG_FILE, "generation_config.json", INDEX_FILE, "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "additional_chat_templates/*.jinja",
)  # fmt: skip

_PART = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_HUB_ID = re.compile(f"(?!.*(?:--|\\.\\.|\\.git(?:@|$))){_PART}/{_PART}(?:@\\w[\\w./-]*)?", re.ASCII)


def hub_id(path: str | os.PathLike) -> tuple[str, str | None] | None:
    """Returns the repository and the revision of a model on the hub, or None if the path can only be a folder.

    >>> hub_id("Qwen/Qwen3-0.6B"), hub_id("Qwen/Qwen3-0.6B@refs/pr/3"), hub_id("models/mine/base")
    (('Qwen/Qwen3-0.6B', None), ('Qwen/Qwen3-0.6B', 'refs/pr/3'), None)
    """
    if not isinstance(path, str) or not _HUB_ID.fullmatch(path) or pathlib.Path(path).is_dir():
        return None
    repository, _, revision = path.partition("@")
    return repository, revision or None


def checkpoint_folder(path: str | os.PathLike, *, weights: bool = True) -> pathlib.Path:
    """Returns the folder of a model. A model on the hub is downloaded to huggingface_hub's cache if it is not there.

    A string "OWNER/NAME" names a model on the hub unless there is such a folder. In "OWNER/NAME@REVISION" the revision
    is a branch, a tag or a commit. The environment variables of huggingface_hub apply (HF_TOKEN, HF_HOME,
    HF_HUB_OFFLINE, HF_ENDPOINT).

    Args:
      path: a folder, where "~" may stand for the home directory, or a hub id.
      weights: whether to download the weights too.

    Returns:
      The folder.

    Raises:
      FileNotFoundError: the path is neither a folder nor a hub id; the hub does not have the model or the revision, or
        does not show it; or the hub cannot be reached and the cache lacks a file. The message names what is missing.
      ValueError: the decoder does not support the model on the hub, whose weights are then not downloaded.
    """
    folder = pathlib.Path(path).expanduser()
    if folder.is_dir() and path != "":  # pathlib takes "" for "."
        return folder
    model = hub_id(path)
    if model is None:
        raise FileNotFoundError(
            f"{str(path)!r} is neither a folder nor a hub id like 'OWNER/NAME': check the path, or download a model by "
            f"`hf download OWNER/NAME --local-dir FOLDER` and give FOLDER"
        )
    folder = _fetch(*model, SETTINGS, needed=(CONFIG_FILE,))
    read_config(folder)
    if weights:
        index = folder / INDEX_FILE
        files = tuple(shard_names(index)) if index.is_file() else (WEIGHTS_FILE,)
        folder = _fetch(*model, files, needed=files)
    return folder


def _fetch(repository: str, revision: str | None, files: tuple[str, ...], *, needed: tuple[str, ...]) -> pathlib.Path:
    """Returns the cached snapshot of a repository, with those of `files` that the repository has."""
    # These imports stand here because they take half a second, and a local folder needs none of them.
    import huggingface_hub
    from huggingface_hub import constants, errors

    try:
        options = {"revision": revision, "allow_patterns": list(files)}
        folder = pathlib.Path(huggingface_hub.snapshot_download(repository, **options))
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
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(
            f"{repository!r} has no branch, tag or commit {revision!r} on the hub: check what stands behind the @"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        partial = getattr(error, "snapshot_path", None)  # since huggingface_hub 2
        if partial is None:
            what = "it" if revision is None else f"its revision {revision!r}"
            raise FileNotFoundError(
                f"{repository!r} is no folder, and the hub's cache {constants.HF_HUB_CACHE} has nothing of {what} "
                f"({_cause(error)}): it lacks {_listed(needed)}. {_way_out(repository, revision)}"
            ) from None
        folder = pathlib.Path(partial)
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{repository!r} is no folder, and its copy in the hub's cache ({folder}) lacks {_listed(missing)}: the "
            "download was cut short, or the repository does not have them (only safetensors are read). "
            f"{_way_out(repository, revision)}"
        )
    return folder


def _cause(error: Exception) -> str:
    """Returns the reason why the hub could not be reached, in the words of the first error."""
    return str(error.__cause__ or error).splitlines()[0].rstrip(".")


def _way_out(repository: str, revision: str | None) -> str:
    which = repository if revision is None else f"{repository} --revision {revision}"
    return f"Run again with network access and without HF_HUB_OFFLINE, or run `hf download {which}`"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
