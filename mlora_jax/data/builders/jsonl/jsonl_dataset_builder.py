"""Own data: a JSONL file of prompt/completion pairs or chats; `own_rows` says what a line may hold."""

import dataclasses
import pathlib
from typing import Any

import tensorflow_datasets as tfds

from mlora_jax.data.builders import raw_files
from mlora_jax.data.own_rows import FORMS, parse_row


@dataclasses.dataclass
class OwnDataConfig(raw_files.RawFilesConfig):
    """The files of a build, and the keys of their rows and messages that are not looked at."""

    ignored_keys: tuple[str, ...] = ()


class Builder(raw_files.RawFilesBuilder, skip_registration=True):
    """Own data: prompt and completion as they stand, a chat with what belongs to it in JSON."""

    VERSION = tfds.core.Version("1.2.0")  # whole chats, where 1.1.0 kept the messages alone and 1.0.0 their contents

    @classmethod
    def config_for(
        cls, *, file: str = "", evaluation_file: str = "", ignored_keys: tuple[str, ...] = (), **_: str
    ) -> OwnDataConfig:
        """The config of a build from `file` (split "train") and, if given, `evaluation_file` (split "test").

        Raises:
            ValueError: no file is given.
            FileNotFoundError: names the file that is missing and its folder.
        """
        if not file:
            raise ValueError("the task 'jsonl' needs a file: set data.file to a JSONL file of " + FORMS)
        files = {"train": file, "test": evaluation_file}
        paths = {split: pathlib.Path(name).expanduser() for split, name in files.items() if name}
        for path in paths.values():
            if not path.is_file():
                raise FileNotFoundError(f"no file {path.name} in the folder {path.absolute().parent}")
        config = raw_files.local_config(paths)
        # What is ignored decides which rows are refused and what their messages hold.
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

    def parse(self, line: str) -> dict[str, Any]:
        return parse_row(raw_files.json_object(line), self.builder_config.ignored_keys)
