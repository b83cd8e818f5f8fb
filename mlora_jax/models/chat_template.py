"""Chat templates: where a checkpoint keeps them, and how transformers' `apply_chat_template` renders them."""

from __future__ import annotations

import datetime
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from mlora_jax.models.text_file import read_text

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"


def read_chat_template(folder: pathlib.Path, values: Mapping[str, Any]) -> str | None:
    """The template that renders a chat.

    Files go before the entry in `tokenizer_config.json`. Of several templates the one named "default" is taken.

    Args:
        folder: a Hugging Face folder.
        values: of its `tokenizer_config.json`.

    Returns:
        Jinja source, or None where the checkpoint has no template, or several and none named "default".

    Raises:
        ValueError: the entry in `tokenizer_config.json` is no template.
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


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant said; the text is its content."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """The template in a sandbox (it comes with the model) with the functions that transformers gives it."""

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
    return environment.from_string(source)
