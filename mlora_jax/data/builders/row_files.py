"""Builders of data sets that are published as files of rows: JSON, JSON lines, Parquet and archives of them.

`mlora_jax.data.published` reads these forms. Builds are named as `raw_files` describes.
"""

import abc
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import tensorflow_datasets as tfds

from mlora_jax.data.builders import raw_files
from mlora_jax.data.published import (
    ENDINGS,
    SCHEMAS,
    Row,
    Schema,
    archive_rows,
    converted,
    find_split,
    json_rows,
    read_split,
)


class RowFilesBuilder(raw_files.QuietBuilder, skip_registration=True):
    """A builder that turns each row of its raw files into one stored row, in the file's order.

    A subclass states which splits there are (`SPLITS`), which of them a folder may lack (`OPTIONAL`), where they are
    published (`URLS`, and `MEMBERS` for files in archives), what a row holds (`features`) and how a published row is
    stored (`stored`).
    """

    VERSION = tfds.core.Version("1.0.0")
    SCHEMA: ClassVar[Schema]
    SPLITS: ClassVar[Mapping[str, str]] = {}  # our name of a split -> its name in the files
    OPTIONAL: ClassVar[Sequence[str]] = ()
    URLS: ClassVar[Mapping[str, str]] = {}
    MEMBERS: ClassVar[Mapping[str, str]] = {}

    @classmethod
    @abc.abstractmethod
    def features(cls) -> dict[str, Any]:
        """The TFDS features of a row."""

    @classmethod
    @abc.abstractmethod
    def stored(cls, row: Row) -> dict[str, Any]:
        """Converts a row of the published schema to the row that is stored.

        Raises:
          ValueError: the row is malformed; the message says how.
        """

    @classmethod
    def config_for(cls, *, raw_dir: str = "", **_: Any) -> tfds.core.BuilderConfig:
        """Returns the config of a build from `raw_dir`, or from the published download if it is empty."""
        return cls.local(raw_dir) if raw_dir else cls.BUILDER_CONFIGS[0]

    @classmethod
    def local(cls, folder: str) -> raw_files.RawFilesConfig:
        """Returns the config of a build from `folder`, or from the folder in it that has the name of this data set.

        Raises:
          FileNotFoundError: a split is missing; the message names the folder and all missing splits.
        """
        root = pathlib.Path(folder).expanduser()
        nested = root / cls.name
        root = nested if nested.is_dir() else root
        found = {split: find_split(root, theirs, cls.SCHEMA) for split, theirs in cls.SPLITS.items()}
        missing = [cls.SPLITS[split] for split, path in found.items() if path is None and split not in cls.OPTIONAL]
        if missing:
            raise FileNotFoundError(
                f"{cls.name}: no file of the split {' and none of '.join(missing)} in the folder {root}; raw_dir must "
                f"hold SPLIT.{', SPLIT.'.join(ENDINGS)} for each, itself or in a folder {cls.name!r}"
            )
        return raw_files.local_config({split: path for split, path in found.items() if path})

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(self.features()),
            disable_shuffling=True,  # row i is row i of the file
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        files = cast(raw_files.RawFilesConfig, self.builder_config).files
        if files:
            return {split: self._local_rows(split, file) for split, file in files.items()}
        paths = dl_manager.download({url: url for url in self.URLS.values()})
        return {split: self._published_rows(split, pathlib.Path(paths[url])) for split, url in self.URLS.items()}

    def _local_rows(self, split: str, file: raw_files.RawFile) -> Iterator[tuple[int, dict[str, Any]]]:
        rows = read_split(file.path, self.SPLITS[split], self.SCHEMA)
        if hashlib.sha256(file.path.read_bytes()).hexdigest() != file.sha256:
            raise RuntimeError(f"{file.path} changed while it was read: run again")
        return self._generate_examples(rows, file.path)

    def _published_rows(self, split: str, path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
        member = self.MEMBERS.get(split, "")
        rows = archive_rows(path, member) if member else json_rows(path)
        return self._generate_examples(converted(rows, self.SCHEMA.convert, path), path)

    def _generate_examples(self, rows: Iterable[Row], path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
        number = -1
        for number, row in enumerate(converted(rows, lambda row, _: self.stored(row), path)):
            yield number, row
        if number < 0:
            raise ValueError(f"{path} holds no rows")


class ChoiceBuilder(RowFilesBuilder, skip_registration=True):
    """Questions with several choices: {"question", "options", "choices", "label"}.

    The split "test" is the one that the harness scores. If the labels of the test rows are secret, it is the validation
    split of the data set. `options` lists the choices by letters, one per line.
    """

    ITEM: ClassVar[Callable[[Row], tuple[str, Sequence[str], int]]]

    @classmethod
    def features(cls) -> dict[str, Any]:
        return {
            "question": tfds.features.Text(),
            "options": tfds.features.Text(),
            "choices": tfds.features.Sequence(tfds.features.Text()),
            "label": tfds.features.Scalar(np.int64),
        }

    @classmethod
    def stored(cls, row: Row) -> dict[str, Any]:
        try:
            question, choices, label = cls.ITEM(row)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not in the published schema: {error!r} (found {sorted(row)})") from None
        choices = [raw_files.text_field({"choice": choice}, "choice", "a choice") for choice in choices]
        if not 0 <= label < len(choices):
            raise ValueError(f"the label {label} is none of {len(choices)} choices")
        return {
            "question": raw_files.text_field({"question": question}, "question", "the question"),
            "options": "\n".join(f"{chr(ord('A') + index)}. {choice}" for index, choice in enumerate(choices)),
            "choices": choices,
            "label": label,
        }


def choice_splits(name: str) -> dict[str, str]:
    """Returns our names of the splits of one of `SCHEMAS` -> their names in the schema.

    >>> choice_splits("hellaswag"), choice_splits("arc_easy")["validation"]
    ({'train': 'train', 'test': 'validation'}, 'validation')
    """
    schema = SCHEMAS[name]
    splits = {"train": schema.training, "validation": schema.validation, "test": schema.evaluated}
    return {split: theirs for split, theirs in splits.items() if theirs}
