"""Chat templates with what those of Llama-3.1 and Mistral ask of the engine, rendered as transformers renders them.

The templates are written here; they have the constructs of the originals and their effects on white space and dates.
"""

import json
import re

import pytest
from transformers import AutoTokenizer

from mlora_jax.models.tokenizer import Tokenizer
from tests.data.conftest import write_tokenizer

LLAMA_31 = """{{- bos_token }}
{%- if functions is defined %}{%- set tools = functions %}{%- endif %}
{%- set day = strftime_now("%d %b %Y") if strftime_now is defined else "1 Jan 2000" %}
{%- if tools is not defined %}{%- set tools = none %}{%- endif %}

{#- What the system says has a place of its own. #}
{%- if messages[0].role == 'system' %}
    {%- set rules = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set rules = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none or code is defined %}
    {{- raise_exception('no tools here') }}
{%- endif %}
{{- 'Today Date: ' + day + '\\n\\n' + rules + '<|eot_id|>' }}

{%- for turn in messages %}
    {%- if 'tool_calls' not in turn and turn.role not in ('tool', 'ipython') %}
        {{- '<|start_header_id|>' ~ turn['role'] ~ '<|end_header_id|>\\n\\n' }}
        {%- if turn.content is string %}
            {{- turn.content | trim }}
        {%- else %}
            {%- set texts = turn.content | selectattr('type', 'equalto', 'text') | map(attribute='text') %}
            {{- texts | map('trim') | join('\\n') }}
        {%- endif %}
        {{- '<|eot_id|>' }}
    {%- elif turn.content is mapping %}
        {{- turn.content | tojson(indent=4) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{%- set first = messages[0] %}
{%- if first["role"] == "system" %}
    {%- set rules = first["content"] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- set asked = turns | selectattr("role", "equalto", "user") | list %}

{%- set seen = namespace(count=0) %}
{%- for turn in turns if turn.tool_calls is not defined or turn.tool_calls is none %}
    {%- if (turn["role"] == "user") != (seen.count % 2 == 0) %}
        {{- raise_exception("the roles must alternate") }}
    {%- endif %}
    {%- set seen.count = seen.count + 1 %}
{%- endfor %}

{{- bos_token }}
{%- for turn in turns %}
    {%- if turn["role"] == "user" %}
        {%- if turn == asked[-1] and tools is defined and tools is not none %}
            {{- raise_exception("no tools here") }}
        {%- endif %}
        {%- if loop.last and rules is defined %}
            {{- "[INST] " + rules + "\\n\\n" + turn["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + turn["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif turn["role"] == "assistant" %}
        {{- " " + turn["content"]|trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""

OLDER_MISTRAL = (
    "{{ bos_token }}{% for turn in messages %}{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('the roles must alternate') }}{% endif %}"
    "{% if turn['role'] == 'user' %}{{ '[INST] ' + turn['content'] + ' [/INST]' }}"
    "{% else %}{{ turn['content'] + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {"llama-3.1": LLAMA_31, "mistral": MISTRAL, "older mistral": OLDER_MISTRAL}
SYSTEM = {"role": "system", "content": " Be short.\n"}
TURNS = [
    {"role": "user", "content": "  Hello <b>& 'you'</b>\n"},
    {"role": "assistant", "content": " Good day \n"},
    {"role": "user", "content": 'naïve "漢字" {{ x }}'},
    {"role": "assistant", "content": "48"},
]
CHATS = {"one turn": TURNS[:1], "a pair": TURNS[:2], "all": TURNS, "system": [SYSTEM, *TURNS[:3]]}


@pytest.fixture(params=TEMPLATES)
def both(request, tmp_path):
    """(template's name, transformers' tokenizer, ours)"""
    folder = write_tokenizer(tmp_path, bos=True, chat_template=TEMPLATES[request.param])
    return request.param, AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)


@pytest.mark.parametrize("opens", [False, True])
@pytest.mark.parametrize("chat", CHATS)
def test_texts_and_refusals_are_those_of_transformers(both, chat, opens):
    name, theirs, ours = both
    refuses = name == "older mistral" and chat == "system"
    if refuses:
        with pytest.raises(Exception, match="roles must alternate"):
            theirs.apply_chat_template(CHATS[chat], tokenize=False, add_generation_prompt=opens)
        with pytest.raises(ValueError, match="does not render these messages: the roles must alternate"):
            ours.render_chat(CHATS[chat], add_generation_prompt=opens)
        return
    expected = theirs.apply_chat_template(CHATS[chat], tokenize=False, add_generation_prompt=opens)
    assert ours.render_chat(CHATS[chat], add_generation_prompt=opens) == expected
    assert expected.startswith("<s>") and (
        name != "llama-3.1" or re.search(r"Today Date: \d\d \w{3} 20\d\d\n", expected)
    )


def test_the_templates_are_read_from_either_place(tmp_path):
    """In tokenizer_config.json and, as transformers 5 saves it, in a file of its own."""
    folder = write_tokenizer(tmp_path, bos=True, chat_template="x")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(MISTRAL)
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(TURNS, tokenize=False)
    assert Tokenizer.load(folder).render_chat(TURNS, add_generation_prompt=False) == expected
