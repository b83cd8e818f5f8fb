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
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "additional_chat_templates/*.jinja",
)  # fmt: skip

_PART = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_HUB_ID = re.compile(f"(?!.*(?:--|\\.\\.|\\.git(?:@|$))){_PART}/{_PART}(?:@\\w[\\w./-]*)?", re.ASCII)


def hub_id(path: str | os.PathLike) -> tuple[str, str | None] | None:
    """Repository and revision of a model on the hub; None for what can only be a folder.

    >>> hub_id("Qwen/Qwen3-0.6B"), hub_id("Qwen/Qwen3-0.6B@refs/pr/3"), hub_id("models/mine/base")
    (('Qwen/Qwen3-0.6B', None), ('Qwen/Qwen3-0.6B', 'refs/pr/3'), None)
    """
    if not isinstance(path, str) or not _HUB_ID.fullmatch(path) or pathlib.Path(path).is_dir():
        return None
    repository, _, revision = path.partition("@")
    return repository, revision or None


def checkpoint_folder(path: str | os.PathLike, *, weights: bool = True) -> pathlib.Path:
    """The folder of a model; one on the hub is downloaded to huggingface_hub's cache unless it is there.

    Only a string of the form "OWNER/NAME" goes to the hub, or "OWNER/NAME@REVISION" for a branch, a tag or a commit of
    it, and only where there is no such folder. The environment variables of huggingface_hub hold (HF_TOKEN, HF_HOME,
    HF_HUB_OFFLINE, HF_ENDPOINT).

    Args:
      path: a folder, where "~" may stand for the home, or a hub id.
      weights: whether the weights are needed too.

    Returns:
      The folder.

    Raises:
      FileNotFoundError: neither a folder nor a hub id; a model or revision that the hub does not have or does not
        show; one that the cache does not have whole while the hub cannot be reached. What is missing is named.
      ValueError: the model on the hub is not one that the decoder supports; its weights are not downloaded.
    """
    folder = pathlib.Path(path).expanduser()
    if folder.is_dir() and path != "":  # which pathlib takes for "."
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
    """The cached snapshot of a repository with those of `files` that it has."""
    # Here, because a model in a folder of its own needs none of it: it imports for half a second.
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
            f"{repository!r} is no folder, and as the hub's cache has it ({folder}) it lacks {_listed(missing)}: the "
            "download was cut short, or the repository has none (only safetensors are read). "
            f"{_way_out(repository, revision)}"
        )
    return folder


def _cause(error: Exception) -> str:
    """Why the hub could not be asked, in the words of what failed first."""
    return str(error.__cause__ or error).splitlines()[0].rstrip(".")


def _way_out(repository: str, revision: str | None) -> str:
    which = repository if revision is None else f"{repository} --revision {revision}"
    return f"With the network (and HF_HUB_OFFLINE unset) run again, or `hf download {which}`"


def _listed(names) -> str:
    return ", ".join(repr(name) for name in names)
