"""Own data: a JSONL file of prompt/completion pairs or chats."""

import json
import pathlib
from typing import Any

import tensorflow_datasets as tfds

from mlora_jax.data.builders import raw_files

ROLES = ("system", "developer", "user", "assistant", "tool")
FORMS = '{"prompt": ..., "completion": ...} or {"messages": [{"role": ..., "content": ...}, ...]}'


def parse_messages(messages: Any) -> list[dict[str, Any]]:
    """A chat's messages, checked: known roles, contents that are not blank, one from the assistant at least.

    What else a message holds is kept as it is, for the chat template to read.

    Raises:
        ValueError: names the message (counted from 1) and what is wrong with it.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' must be a list of messages that is not empty")
    checked = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} must be an object, got {type(message).__name__}")
        role = raw_files.text_field(message, "role", f"the role of message {number}")
        if role not in ROLES:
            known = ", ".join(ROLES)
            raise ValueError(f"message {number} has the unknown role {role!r}, expected one of {known}")
        content = raw_files.text_field(message, "content", f"the content of message {number}")
        checked.append({**message, "role": role, "content": content})
    if all(message["role"] != "assistant" for message in checked):
        raise ValueError("the chat has no message from the assistant, so nothing to learn")
    if checked[0]["role"] == "assistant":
        raise ValueError("the chat begins with the assistant: there is nothing it answers")
    return checked


class Builder(raw_files.RawFilesBuilder, skip_registration=True):
    """Own data: prompt and completion as they stand, a chat as its messages in JSON."""

    VERSION = tfds.core.Version("1.1.0")  # messages whole, where 1.0.0 kept role and content only

    @classmethod
    def config_for(cls, *, file: str = "", evaluation_file: str = "", **_: str) -> raw_files.RawFilesConfig:
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
        return raw_files.local_config(paths)

    @classmethod
    def features(cls) -> dict[str, Any]:
        return {key: tfds.features.Text() for key in ("prompt", "completion", "messages")}

    @classmethod
    def parse(cls, line: str) -> dict[str, Any]:
        row = raw_files.json_object(line)
        if "messages" in row:
            messages = json.dumps(parse_messages(row["messages"]), ensure_ascii=False)
            return {
                "prompt": "",
                "completion": "",
                "messages": raw_files.text_field({"chat": messages}, "chat", "the chat"),
            }
        if "prompt" not in row and "completion" not in row:
            raise ValueError(f"expected {FORMS}, found the keys {sorted(row)}")
        return {key: raw_files.text_field(row, key) for key in ("prompt", "completion")} | {"messages": ""}
