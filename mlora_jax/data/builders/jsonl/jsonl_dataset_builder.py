"""Builds own data from a JSONL file of prompt/completion pairs or chats; `own_rows` describes the lines."""

import dataclasses
import pathlib
from typing import Any, cast

import tensorflow_datasets as tfds

from mlora_jax.data.builders import raw_files
from mlora_jax.data.own_rows import FORMS, parse_row


@dataclasses.dataclass
class OwnDataConfig(raw_files.RawFilesConfig):
    """The config of a build of own data.

    Attributes:
      ignored_keys: the keys of rows and messages that are ignored.
    """

    ignored_keys: tuple[str, ...] = ()


class Builder(raw_files.RawFilesBuilder, skip_registration=True):
    """Own data. Prompt and completion are stored as they are, and a chat is stored as JSON text."""

    VERSION = tfds.core.Version("1.2.0")  # whole chats; 1.1.0 stored only messages, 1.0.0 only contents

    @classmethod
    def config_for(
        cls, *, file: str = "", evaluation_file: str = "", ignored_keys: tuple[str, ...] = (), **_: Any
    ) -> OwnDataConfig:
        """Returns the config of a build from files.

        Args:
          file: the path of the split "train".
          evaluation_file: the path of the split "test"; empty: there is no such split.
          ignored_keys: the keys of rows and messages that are ignored.

        Raises:
          ValueError: no file is given.
          FileNotFoundError: a file is missing; the message names the file and its folder.
        """
        if not file:
            raise ValueError("the task 'jsonl' needs a file: set data.file to a JSONL file of " + FORMS)
        files = {"train": file, "test": evaluation_file}
        paths = {split: pathlib.Path(name).expanduser() for split, name in files.items() if name}
        for path in paths.values():
            if not path.is_file():
                raise FileNotFoundError(f"no file {path.name} in the folder {path.absolute().parent}")
        config = raw_files.local_config(paths)
        # The ignored keys are in the name, since they affect which rows are refused and what messages hold.
        ignored = "-" + raw_files.digest_of({key: "" for key in ignored_keys}) if ignored_keys else ""
        return OwnDataConfig(
            name=config.name + ignored,
            description=config.description,
            files=config.files,
            ignored_keys=tuple(ignored_keys),
        )

    @classmethod
    def features(cls) -> dict[str, Any]:
        return {key: tfds.features.Text() for key in ("prompt", "completion", "chat")}

    # The keys to ignore are those of the build, so this is a method of the builder and not of its class.
    def parse(self, line: str) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return parse_row(raw_files.json_object(line), cast(OwnDataConfig, self.builder_config).ignored_keys)
