"""Chat templates: where a checkpoint keeps them, and how transformers' `apply_chat_template` renders them."""

from __future__ import annotations

import datetime
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from mlora_jax.models.text_file import read_text

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
TOOL_TEMPLATE = "tool_use"  # the name of the template that renders chats with tools, where there are several
# Names under which a message may hold its reasoning; transformers gives it to templates under the first two.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


def read_chat_template(folder: pathlib.Path, values: Mapping[str, Any]) -> str | None:
    """Reads the template that renders a chat.

    Template files take precedence over the entry in `tokenizer_config.json`. Where there are several templates, the one
    named "default" is read.

    Args:
      folder: a Hugging Face folder.
      values: the values of its `tokenizer_config.json`.

    Returns:
      Jinja source, or None where the checkpoint has no template, or has several of which none is named "default".

    Raises:
      ValueError: the entry in `tokenizer_config.json` is not a template.
    """
    file = folder / TEMPLATE_FILE
    templates = {"default": file} if file.is_file() else {}
    templates |= {file.stem: file for file in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    if "default" in templates:
        return read_text(templates["default"])
    if templates:
        return None
    template = values.get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{folder}: chat_template in tokenizer_config.json is {template!r}, not Jinja source")
    return template


def read_tool_template(folder: pathlib.Path, values: Mapping[str, Any]) -> str | None:
    """Reads the template that renders a chat with tools, where the checkpoint has one besides the default template.

    Args:
      folder: a Hugging Face folder.
      values: the values of its `tokenizer_config.json`.

    Returns:
      Jinja source, or None where the default template also renders chats with tools.
    """
    file = folder / TEMPLATE_FOLDER / f"{TOOL_TEMPLATE}.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = values.get("chat_template")
    files = (folder / TEMPLATE_FILE).is_file() or any((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    if files or not isinstance(template, (list, dict)):  # template files of any name replace the entry
        return None
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    return template.get(TOOL_TEMPLATE)


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the messages in the form in which transformers passes them to a template.

    Keys whose value is null are left out, and reasoning is stored under the names that templates read.

    >>> template_messages([{"role": "assistant", "content": None, "reasoning": "So."}])
    [{'thinking': 'So.', 'role': 'assistant', 'reasoning': 'So.', 'reasoning_content': 'So.'}]

    Source: `_normalize_chat_messages` and `_alias_reasoning_fields` of transformers 5.
    """
    given = []
    for message in messages:
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next((message[key] for key in REASONING_KEYS if key in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        given.append(message)
    return given


@functools.lru_cache(maxsize=8)
def names_in(source: str) -> frozenset[str]:
    """Returns every name that a template may read: variables, attributes, and strings, which may be keys.

    >>> sorted(names_in("{{ messages[0].content }}{% if 'name' in messages[0] %}{{ tools }}{% endif %}"))
    ['content', 'messages', 'name', 'tools']
    """
    tree = _environment().parse(source)
    names = {node.name for node in tree.find_all(jinja2.nodes.Name)}
    names |= {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    return frozenset(names | {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)})


class _Generation(jinja2.ext.Extension):
    """The tag `{% generation %}`, which marks the words of an assistant. It renders as its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares an instance variable

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """Compiles a template, with the functions that transformers provides.

    The template runs in a sandbox, because it comes with the checkpoint and may be hostile.
    """
    return _environment().from_string(source)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own filter escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
