"""Parses a line of own data: a prompt with its completion, or a chat. A key that is not understood is an error.

Four forms are understood, and a file may mix them:

- `{"prompt": TEXT, "completion": TEXT}`;
- `{"messages": [{"role": ..., "content": ...}, ...]}`, the form of OpenAI's fine-tuning and of TRL;
- `{"prompt": [MESSAGE, ...], "completion": [MESSAGE, ...]}`, TRL's conversational form: one chat, of which only the
  assistant's messages in `completion` are trained;
- `{"conversations": [{"from": ..., "value": ...}, ...]}`, ShareGPT's form.

A key beside these is one of three kinds. Some keys affect the training: `CHAT_KEYS` of a row, and `weight`,
`tool_calls` and the like of a message. Some keys are refused, with advice on what to write instead: `REFUSED_ROW_KEYS`
and `REFUSED_MESSAGE_KEYS`. Some keys say where the row comes from and are not read: `chat.METADATA`. Any other key of a
row is an error unless `data.ignored_keys` names it, because it might say what is to be trained. Any other key of a
message is for the chat template, and `render_chat` refuses it if the template does not read it. A key whose value is
null counts as absent, as in transformers, because tables write null if a row has no value.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mlora_jax.data.builders.raw_files import text_field
from mlora_jax.data.chat import METADATA, check_turns

FORMS = (
    '{"prompt": ..., "completion": ...}, {"messages": [{"role": ..., "content": ...}, ...]} or '
    '{"conversations": [{"from": ..., "value": ...}, ...]}'
)
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
# Keys of a row that belong to its chat.
CHAT_KEYS = ("system", "tools", "documents", "chat_template_kwargs", "parallel_tool_calls")

_TOKENS = "tokens are made here from texts; a message of the assistant that is not to be trained has 'weight': 0"
_PREFERENCE = "no preferences are trained here; keep the better answer alone, as the completion or the last message"
_ALPACA = "write the text before the answer as 'prompt' and the answer as 'completion'"
_MEDIA = "the models here read text alone"
_REQUEST = "it belongs to a request and not to training data; leave it out"
_WEIGHT = "write 'weight': 0 for a message of the assistant that is not to be trained, and 1 for one that is"
REFUSED_ROW_KEYS = {
    "functions": 'it is OpenAI\'s older form of \'tools\'; write each as {"type": "function", "function": ...} there',
    "function_call": _REQUEST,
    "tool_choice": _REQUEST,
    "response_format": _REQUEST,
    "text": "no whole texts are trained here; split it into 'prompt' and 'completion'",
    **dict.fromkeys(("chosen", "rejected", "label"), _PREFERENCE),
    **dict.fromkeys(("preferred_output", "non_preferred_output"), _PREFERENCE),
    **dict.fromkeys(("instruction", "input", "output", "response"), _ALPACA),
    **dict.fromkeys(("input_ids", "labels", "attention_mask", "assistant_masks", "completion_mask"), _TOKENS),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), _MEDIA),
    "weight": "only messages of the assistant have one; leave the row out, or repeat it",
    "system_prompt": "write it as 'system', or as the first message with the role system",
}
REFUSED_MESSAGE_KEYS = {
    "function_call": (
        "it is OpenAI's older form of 'tool_calls'; write "
        '"tool_calls": [{"type": "function", "function": {"name": ..., "arguments": {...}}}]'
    ),
    "refusal": "write its text as the content",
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), _MEDIA),
    **dict.fromkeys(("train", "training", "loss", "loss_mask", "mask", "masked", "loss_weight"), _WEIGHT),
    "prefix": "no answers are begun here; write the whole answer as the content",
}
# Variables of a template that a row gives by other keys, or that a row must not set.
_TEMPLATE_OWN = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template")


def parse_row(row: Mapping[str, Any], ignored_keys: Collection[str] = ()) -> dict[str, str]:
    """Returns one line in the form in which it is stored.

    Args:
      row: the JSON object of the line.
      ignored_keys: the keys of rows and of messages that are removed before anything else.

    Returns:
      {"prompt": str, "completion": str, "chat": str}. For a pair of texts, prompt and completion are these texts and
      chat is "". For a chat, prompt and completion are "" and chat is the JSON text of an object with the keys messages
      (with all their keys, but `weight` only if it is 0), tools, documents and template_arguments.

    Raises:
      ValueError: the row has none of the forms or more than one, or holds something that is not understood. The message
        names the key and, in a chat, the number of the message. Messages count from 1; a key "system" counts as one.
    """
    row = {key: value for key, value in row.items() if value is not None and key not in ignored_keys}
    for key in row:
        if key in REFUSED_ROW_KEYS:
            raise ValueError(
                f"the key {key!r} is not understood: {REFUSED_ROW_KEYS[key]}; if it says nothing about the training, "
                "name it in data.ignored_keys"
            )
    pair = [key for key in ("prompt", "completion") if key in row]
    chats = [key for key in ("messages", "conversations") if key in row]
    if len(chats) + bool(pair) > 1:
        raise ValueError(
            f"the row holds {' and '.join(map(repr, [*pair, *chats]))}, which are two forms of one thing: leave one "
            "out, or name its keys in data.ignored_keys"
        )
    if not pair and not chats:
        raise ValueError(f"expected {FORMS}, found the keys {sorted(row)}")
    unknown = [key for key in row if key not in (*pair, *chats, *CHAT_KEYS) and key not in METADATA]
    if unknown:
        raise ValueError(
            f"the key{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown))} may say what is to be trained, and "
            f"nothing here reads {'them' if len(unknown) > 1 else 'it'}: leave it out, or name it in "
            f"data.ignored_keys (understood beside the chat are {', '.join(CHAT_KEYS)})"
        )
    if chats or any(isinstance(row[key], list) for key in pair):
        chat = json.dumps(_chat(row, pair, chats, ignored_keys), ensure_ascii=False)
        return {"prompt": "", "completion": "", "chat": text_field({"chat": chat}, "chat", "the chat")}
    texts = {key: text_field(row, key) for key in ("prompt", "completion")}
    beside = [key for key in CHAT_KEYS if key in row]
    if beside:
        raise ValueError(f"the key {beside[0]!r} belongs to a chat, and prompt and completion are texts")
    return texts | {"chat": ""}


def _chat(
    row: Mapping[str, Any], pair: Sequence[str], chats: Sequence[str], ignored_keys: Collection[str]
) -> dict[str, Any]:
    parts = chats or ("prompt", "completion")
    if not chats and len(pair) < 2:
        raise ValueError(f"the key {({*parts} - {*pair}).pop()!r} is missing (found {sorted(row)})")
    for key in parts:
        if not isinstance(row[key], list) or not row[key]:
            raise ValueError(f"{key!r} must be a list of messages that is not empty")
    given = [(message, key) for key in parts for message in row[key]]
    if "system" in row:
        text_field(row, "system")
        if isinstance(given[0][0], dict) and "system" in (given[0][0].get("role"), given[0][0].get("from")):
            raise ValueError("the key 'system' and the first message both are a system message: leave one out")
        given.insert(0, ({"role": "system", "content": row["system"]}, parts[0]))
    messages = [
        _message(message, number, trained=key != "prompt", ignored_keys=ignored_keys)
        for number, (message, key) in enumerate(given, start=1)
    ]
    check_turns(messages)
    if row.get("parallel_tool_calls", True) is not True:
        _check_single_calls(row["parallel_tool_calls"], messages)
    return {
        "messages": messages,
        "tools": _objects(row, "tools"),
        "documents": _objects(row, "documents"),
        "template_arguments": _template_arguments(row),
    }


def _message(message: Any, number: int, *, trained: bool, ignored_keys: Collection[str]) -> dict[str, Any]:
    name = f"message {number}"
    if not isinstance(message, dict):
        raise ValueError(f"{name} must be an object, got {type(message).__name__}")
    message = {key: value for key, value in message.items() if value is not None and key not in ignored_keys}
    for key in message:
        if key in REFUSED_MESSAGE_KEYS:
            raise ValueError(f"{name} holds {key!r}, which is not understood: {REFUSED_MESSAGE_KEYS[key]}")
    if "from" in message and "role" not in message:
        message = _from_sharegpt(message, name)
    role = text_field(message, "role", f"the role of {name}")
    if role == "function":
        raise ValueError(f"{name} has OpenAI's older role 'function': write 'tool'")
    if role not in ROLES:
        raise ValueError(f"{name} has the unknown role {role!r}, expected one of {', '.join(ROLES)}")
    checked = {**message, "role": role}
    if "tool_calls" in message:
        _check_calls(message["tool_calls"], role, name)
    if "content" in message or not message.get("tool_calls"):
        checked["content"] = _content(message, role, name)
    if _weight(message, role, name, trained=trained):
        checked.pop("weight", None)
    else:
        checked["weight"] = 0
    return checked


def _from_sharegpt(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    speaker = text_field(message, "from", f"the speaker of {name}")
    if speaker == "function_call":
        raise ValueError(f"{name} is from 'function_call': write it as a message of the assistant with 'tool_calls'")
    if speaker not in SHAREGPT_ROLES:
        known = ", ".join(SHAREGPT_ROLES)
        raise ValueError(f"{name} is from the unknown speaker {speaker!r}, expected one of {known}")
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": SHAREGPT_ROLES[speaker], **({"content": message["value"]} if "value" in message else {}), **rest}


def _content(message: Mapping[str, Any], role: str, name: str) -> str:
    """Returns the content as one text; the parts of a list are joined."""
    what = f"the content of {name}"
    content = message.get("content")
    if content is None and role == "assistant":
        raise ValueError(f"{name} has neither content nor tool_calls")
    if isinstance(content, list):
        texts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text":
                raise ValueError(f"{what} has a part of the type {kind!r}, and the models here read text alone")
            if not isinstance(part.get("text"), str):
                raise ValueError(f"{what} has a part of the type 'text' without a text")
            texts.append(part["text"])
        content = "".join(texts)
    # A tool may return nothing, and a message that calls tools needs no text.
    if content == "" and (role == "tool" or message.get("tool_calls")):
        return content
    return text_field({**message, "content": content} if content is not None else message, "content", what)


def _weight(message: Mapping[str, Any], role: str, name: str, *, trained: bool) -> bool:
    """Whether the message has the weight 1."""
    given = message.get("weight", int(trained))
    if isinstance(given, bool) or given not in (0, 1):
        raise ValueError(f"{name} has the weight {json.dumps(given)}, expected 0 (not trained) or 1 (trained)")
    if role != "assistant":
        if given and "weight" in message:
            raise ValueError(f"{name} has the role {role} and the weight 1: only the assistant's messages are trained")
        return True
    if given and not trained:
        raise ValueError(f"{name} has the weight 1 and is part of the prompt, which is not trained: move it")
    return bool(given)


def _check_calls(calls: Any, role: str, name: str) -> None:
    what = f"'tool_calls' of {name}"
    if role != "assistant":
        raise ValueError(f"{what}: only the assistant calls tools, and this message has the role {role}")
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"{what} must be a list of objects")
    for call in calls:
        function = call.get("function", call)
        if call.get("type", "function") != "function" or not isinstance(function, dict):
            raise ValueError(f"{what}: expected {{'type': 'function', 'function': ...}}, got {json.dumps(call)[:60]}")
        text_field(function, "name", f"the name of a function in {what}")
        if not isinstance(function.get("arguments", {}), (dict, str)):
            raise ValueError(f"{what}: the arguments must be an object or its JSON text")


def _check_single_calls(allowed: Any, messages: Sequence[Mapping[str, Any]]) -> None:
    if allowed is not False:
        raise ValueError(f"the key 'parallel_tool_calls' must be true or false, got {json.dumps(allowed)}")
    for number, message in enumerate(messages, start=1):
        if len(message.get("tool_calls", ())) > 1:
            raise ValueError(
                f"'parallel_tool_calls' is false, and message {number} makes {len(message['tool_calls'])} calls at once"
            )


def _objects(row: Mapping[str, Any], key: str) -> list[dict[str, Any]] | None:
    """Returns a list of objects from a row; the row may also hold it as JSON text, as tables do."""
    value = row.get(key)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"the key {key!r} is a text, and not JSON: {error.msg}") from None
    if value is not None and not (isinstance(value, list) and all(isinstance(element, dict) for element in value)):
        raise ValueError(f"the key {key!r} must be a list of objects, got {json.dumps(row[key])[:60]}")
    return value


def _template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    given = row.get("chat_template_kwargs", {})
    if not isinstance(given, dict):
        raise ValueError(f"the key 'chat_template_kwargs' must be an object, got {json.dumps(given)[:60]}")
    for key in given:
        if key in _TEMPLATE_OWN:
            raise ValueError(f"'chat_template_kwargs' holds {key!r}, which is not a row's to set: leave it out")
    return given
