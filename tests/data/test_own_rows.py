"""What a line of own data says besides its texts: weights, tools, other formats, and keys that nobody reads."""

import json
import logging

import numpy as np
import pytest
import transformers

from mlora_jax.data.chat import render_chat
from mlora_jax.data.load import load_task
from mlora_jax.data.own_rows import REFUSED_MESSAGE_KEYS, REFUSED_ROW_KEYS, parse_row
from mlora_jax.data.tasks import TASKS
from mlora_jax.data.tokenize import encode_row, prompt_tokens, tokenize
from mlora_jax.models.tokenizer import Tokenizer
from tests.data import tool_templates
from tests.data.conftest import CHATML, write_tokenizer

TEMPLATE = TASKS["jsonl"].styles["chat-template"]
FUNCTIONS = [
    {"name": "far", "description": "How far it is <&>", "parameters": {"type": "object", "properties": {"to": {}}}},
    {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
]
TOOLS = [{"type": "function", "function": function} for function in FUNCTIONS]


def call(name, arguments, id="call_1"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


USER = {"role": "user", "content": "How far is Aspen ?"}
ASKS = {"role": "assistant", "content": None, "tool_calls": [call("far", {"to": "Aspen", "via": ["é", 1.5]})]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "name": "far", "content": '{"miles": 48}'}
ANSWER = {"role": "assistant", "content": "48 miles"}
AGAIN = [{"role": "user", "content": "Thank you"}, {"role": "assistant", "content": "Good day"}]
CHAT = [USER, ASKS, RESULT, ANSWER]
SYSTEM = {"role": "system", "content": "Be short."}
TWICE = [call("far", {"to": "Aspen"}), call("far", {"to": "Nice"}, "call_2")]


@pytest.fixture
def pair(tmp_path):
    """Makes our tokenizer and transformers' of one folder, with a chat template (or several by name)."""

    def make(template, bos=False):
        folder = write_tokenizer(tmp_path / "tokenizer", bos=bos, chat_template=template)
        return Tokenizer.load(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)

    return make


def load_one(row, tokenizer, jsonl, cache, **options):
    """The row as `load_task` gives it from a file that holds it alone twice."""
    file = jsonl([row, row])
    return load_task("jsonl", file=file, cache_dir=cache, tokenizer=tokenizer, holdout=0.5, **options).train[0]


def check(row, tokenizer, oracle, jsonl, cache, *, weights=None, **given):
    """Compares tokens, mask and prompt with transformers'; `weights` are those of the assistant's messages in order."""
    example = encode_row(load_one(row, tokenizer, jsonl, cache), tokenizer, boundary="lossless")
    messages = [{key: value for key, value in m.items() if key != "weight"} for m in row["messages"]]
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    weights = weights or [1] * len(turns)
    last = max(turn for turn, weight in zip(turns, weights, strict=True) if weight)
    expected = oracle.apply_chat_template(
        messages[: last + 1], return_assistant_tokens_mask=True, return_dict=True, **given
    )
    mask = np.asarray(expected["assistant_masks"], bool)
    starts = np.flatnonzero(np.diff(mask, prepend=False) & mask)
    ends = np.flatnonzero(np.diff(mask, append=False) & mask) + 1
    for start, end, weight in zip(starts, ends, weights, strict=False):
        mask[start:end] = weight
    assert example.tokens.tolist() == expected["input_ids"]
    assert example.loss_mask.tolist() == mask.tolist()
    return example, starts, ends


@pytest.mark.parametrize(("style", "bos"), [("QWEN", False), ("LLAMA", True), ("MISTRAL", True)])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize(
    "messages",
    [CHAT, [SYSTEM, *CHAT], CHAT[:2], [USER, {**ASKS, "content": ""}, RESULT, ANSWER]],
    ids=["chat", "system", "call last", "empty content"],
)
def test_tools_and_calls_are_rendered_as_transformers_does(style, bos, tools, messages, pair, jsonl, cache):
    if style == "MISTRAL" and messages[0] is SYSTEM:
        messages = messages[1:]
    tokenizer, oracle = pair(getattr(tool_templates, style), bos)
    row = {"messages": messages, **({"tools": tools} if tools else {})}
    example, starts, ends = check(row, tokenizer, oracle, jsonl, cache, tools=tools)
    assert len(starts) == sum(message["role"] == "assistant" for message in messages)
    # Evaluation begins where the last turn does, and compares with what generation would give.
    rendered = load_one(row, tokenizer, jsonl, cache)
    assert prompt_tokens(rendered, tokenizer, boundary="lossless") == example.tokens[: starts[-1]].tolist()
    without = messages[: [m["role"] for m in messages].index("assistant")] if messages[-1] is ASKS else messages[:-1]
    prompt = oracle.apply_chat_template(without, tools=tools, add_generation_prompt=True, tokenize=False)
    assert rendered["prompt"] == prompt
    generated = oracle.decode(example.tokens[starts[-1] : ends[-1]], skip_special_tokens=True)
    assert rendered["answer"].strip() == generated.strip() != ""


def test_two_calls_at_once_and_two_results(pair, jsonl, cache):
    tokenizer, oracle = pair(tool_templates.QWEN)
    asks = {"role": "assistant", "content": "Wait", "tool_calls": TWICE}
    results = [{**RESULT, "tool_call_id": f"call_{n}"} for n in (1, 2)]
    row = {"messages": [USER, asks, *results, ANSWER, *AGAIN], "tools": TOOLS, "parallel_tool_calls": True}
    check(row, tokenizer, oracle, jsonl, cache, tools=TOOLS)
    with pytest.raises(ValueError, match="line 1: 'parallel_tool_calls' is false, and message 2 makes 2 calls at once"):
        load_one({**row, "parallel_tool_calls": False}, tokenizer, jsonl, cache)
    single = {"messages": CHAT, "tools": TOOLS, "parallel_tool_calls": False}
    check(single, tokenizer, oracle, jsonl, cache, tools=TOOLS)


WEIGHTS = [[0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("style", "bos"), [("QWEN", False), ("LLAMA", True)])
def test_a_turn_of_weight_0_is_written_and_not_learned(style, bos, weights, pair, jsonl, cache):
    tokenizer, oracle = pair(getattr(tool_templates, style), bos)
    messages = [USER, {**ASKS, "weight": weights[0]}, RESULT, {**ANSWER, "weight": weights[1]}]
    messages += [{**AGAIN[0], "weight": 0}, {**AGAIN[1], "weight": weights[2]}]
    check({"messages": messages, "tools": TOOLS}, tokenizer, oracle, jsonl, cache, weights=weights, tools=TOOLS)


def test_the_last_learned_turn_is_the_one_evaluated(pair, jsonl, cache):
    tokenizer, _ = pair(CHATML)
    row = load_one({"messages": [USER, ANSWER, AGAIN[0], {**AGAIN[1], "weight": 0.0}]}, tokenizer, jsonl, cache)
    assert row == load_one({"messages": [USER, ANSWER]}, tokenizer, jsonl, cache) and row["answer"] == "48 miles"


def test_weights_in_plain_chats_change_the_mask_alone(tokenizer, jsonl, cache):
    rows = []
    for weight in (0, 1):
        messages = [USER, {**ANSWER, "weight": weight}, *AGAIN]
        row = load_one({"messages": messages}, None, jsonl, cache, style="plain-chat")
        rows.append(encode_row(row, tokenizer, boundary="lossless"))
    assert rows[0].tokens.tolist() == rows[1].tokens.tolist()
    assert (rows[0].tokens == tokenizer.eos_id).sum() == 2
    learned = [tokenizer.decode(row.tokens[row.loss_mask], skip_special_tokens=False) for row in rows]
    assert learned == ["Good day</s>", "48 miles</s>Good day</s>"]


def test_a_turn_that_cannot_be_found_may_have_weight_0(pair, jsonl, cache):
    """Mistral's templates write the tools before the last message of the user, wherever the chat ends."""
    tokenizer, oracle = pair(tool_templates.MISTRAL, bos=True)
    with pytest.raises(ValueError, match=r'writes message 2 otherwise .* give that message "weight": 0, or'):
        load_one({"messages": [*CHAT, *AGAIN], "tools": TOOLS}, tokenizer, jsonl, cache)
    messages = [USER, {**ASKS, "weight": 0}, RESULT, {**ANSWER, "weight": 0}, *AGAIN]
    check({"messages": messages, "tools": TOOLS}, tokenizer, oracle, jsonl, cache, weights=[0, 0, 1], tools=TOOLS)


def test_arguments_as_json_text_are_given_as_they_stand(pair, jsonl, cache, caplog):
    tokenizer, oracle = pair(tool_templates.QWEN)
    asks = {"role": "assistant", "tool_calls": [call("far", '{"to": "Aspen"}')]}
    row = {"messages": [USER, asks, RESULT, ANSWER], "tools": TOOLS}
    check(row, tokenizer, oracle, jsonl, cache, tools=TOOLS)
    for chat, warnings in ((row, 1), ({"messages": CHAT, "tools": TOOLS}, 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="mlora_jax"):
            tokenize([load_one(chat, tokenizer, jsonl, cache)] * 3, tokenizer, boundary="lossless", max_length=999)
        assert len(caplog.records) == warnings
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="mlora_jax"):
        tokenize([load_one(row, tokenizer, jsonl, cache)] * 3, tokenizer, boundary="lossless", max_length=999)
    assert "3 rows of train hold tool calls whose arguments are JSON text" in caplog.text
    # Templates that write the text as it stands are told nothing.
    raw, _ = pair(
        "{% for m in messages %}[{{ m.role }}]{% for c in m.tool_calls %}{{ c.function.arguments }}{% endfor %}"
        "{{ m.content }}{% endfor %}{{ tools and '' }}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    written = load_one(row, raw, jsonl, cache)
    assert '[assistant]{"to": "Aspen"}' in written["prompt"] and not written["quotes_arguments"]
    # A template that wants an object says so of a text.
    wants, _ = pair("{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments | items | list }}"
                    "{% endfor %}{{ m.content }}{% endfor %}{{ tools }}")  # fmt: skip
    with pytest.raises(ValueError, match=r"line \d: the chat template does not render .*Can only get item pairs"):
        load_one(row, wants, jsonl, cache)


def test_several_templates_by_name(tmp_path, jsonl, cache):
    folder = write_tokenizer(tmp_path / "tokenizer", bos=False)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    templates = {"default": CHATML, "tool_use": tool_templates.QWEN}
    entries = [{"name": name, "template": template} for name, template in templates.items()]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": entries}))

    def compare():
        tokenizer = Tokenizer.load(folder)
        oracle = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        for messages, tools in ((CHAT, TOOLS), ([USER, ANSWER], None), ([USER, ANSWER], [])):
            row = {"messages": messages, "tools": tools}
            check(row, tokenizer, oracle, jsonl, cache, tools=tools)
        return tokenizer

    assert compare().tool_template == tool_templates.QWEN
    # Where the template of tools is the only one, it renders chats with tools and no others.
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": entries[1:]}))
    only, oracle = Tokenizer.load(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    check({"messages": CHAT, "tools": TOOLS}, only, oracle, jsonl, cache, tools=TOOLS)
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        load_one({"messages": [USER, ANSWER]}, only, jsonl, cache)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": entries}))
    (folder / "chat_template.jinja").write_text(tool_templates.QWEN)  # a file alone goes before all entries
    assert compare().tool_template is None
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("not asked for")
    assert compare().tool_template is None
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(tool_templates.QWEN + "\n")
    assert compare().tool_template == tool_templates.QWEN + "\n"


NULLS = [
    [{**USER, "tool_calls": None, "name": None}, {**ANSWER, "tool_calls": None}],
    [USER, {**ASKS, "name": None}],
    [USER, {**ANSWER, "reasoning": None, "thinking": "It is near."}],
    [USER, {**ANSWER, "reasoning": "It is near.", "reasoning_content": "No."}],
    [USER, {**ANSWER, "reasoning_content": None, "reasoning": "It is near."}],
]


@pytest.mark.parametrize("messages", NULLS)
def test_messages_are_given_to_a_template_as_transformers_gives_them(messages, pair):
    """This template writes every message whole, with its keys in their order."""
    tokenizer, oracle = pair("{% for m in messages %}{{ m | tojson }}{% endfor %}{{ tools | tojson }}{{ documents }}")
    for tools, documents in ((None, None), (TOOLS, None), ([], [{"title": "Map"}])):
        given = {"tools": tools, "documents": documents, "add_generation_prompt": False}
        expected = oracle.apply_chat_template(messages, tokenize=False, **given)
        assert tokenizer.render_chat(messages, **given) == expected


def test_documents_reasoning_and_template_arguments(pair, jsonl, cache):
    template = (
        "{% for d in documents %}({{ d.title }}: {{ d.text }}){% endfor %}{{ mood }}"
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}"
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content + eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer, oracle = pair(template)
    documents = [{"title": "Map", "text": "48 miles"}]
    row = {"messages": [USER, {**ANSWER, "reasoning": "It is near."}]}
    row |= {"documents": documents, "chat_template_kwargs": {"mood": "!"}}
    check(row, tokenizer, oracle, jsonl, cache, documents=documents, mood="!")
    assert load_one(row, tokenizer, jsonl, cache)["answer"] == "<think>It is near.</think>48 miles"
    plain, _ = pair(CHATML)
    unread = [
        ({**row, "chat_template_kwargs": {}}, "holds 'documents', which the model's chat template does not read"),
        ({**row, "documents": None}, "holds 'mood', which the model's chat template does not read"),
        ({"messages": row["messages"]}, "message 2 holds 'reasoning', which the model's chat template does not read"),
        ({"messages": [USER, ANSWER], "tools": TOOLS}, "holds 'tools', which the model's chat template does not"),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": ASKS["tool_calls"]}]},
            "message 2 holds 'tool_calls', which the model's chat template does not read",
        ),
        ({"messages": CHAT}, r"the chat template does not render these messages: .* \(message 2 has no content: where"),
        ({"messages": [USER, {**ANSWER, "learn": False}]}, "message 2 holds 'learn', .* does not read"),
        ({"messages": [{**USER, "mood": "!"}, ANSWER]}, "message 1 holds 'mood', .* name it in data.ignored_keys"),
    ]
    for row, message in unread:
        with pytest.raises(ValueError, match=rf"own\.jsonl, line \d:? {message}"):
            load_one(row, plain, jsonl, cache)
    assert load_one(unread[-1][0], plain, jsonl, cache, ignored_keys=("mood",))["answer"] == "48 miles"
    with pytest.raises(ValueError, match=r"line \d holds 'tools', which this style would lose"):
        load_one({"messages": [USER, ANSWER], "tools": TOOLS}, None, jsonl, cache, style="plain-chat")


SAME = [
    {"conversations": [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": "48 miles"}]},
    {"conversations": [{"role": "user", "content": USER["content"]}, ANSWER], "id": 7, "source": "x", "tools": None},
    {"prompt": [USER], "completion": [ANSWER]},
    {"messages": [{**USER, "content": [{"type": "text", "text": "How far "}, {"type": "text", "text": "is Aspen ?"}]},
                  {**ANSWER, "tool_calls": None, "refusal": None, "weight": 1}]},
    {"messages": [{**USER, "timestamp": 3}, ANSWER], "metadata": {"a": 1}, "category": "maps", "functions": None},
]  # fmt: skip


@pytest.mark.parametrize("row", SAME)
def test_formats_that_say_the_same(row, pair, jsonl, cache):
    tokenizer, oracle = pair(CHATML)
    found = load_one(row, tokenizer, jsonl, cache)
    assert found == load_one({"messages": [USER, ANSWER]}, tokenizer, jsonl, cache)
    expected = oracle.apply_chat_template([USER, ANSWER], return_dict=True)["input_ids"]
    assert encode_row(found, tokenizer, boundary="lossless").tokens.tolist() == expected


def test_a_conversational_prompt_is_not_learned(pair, jsonl, cache):
    """TRL's form: the completion alone is trained, and of that the assistant's messages."""
    tokenizer, oracle = pair(tool_templates.QWEN)
    row = {"prompt": [USER, ASKS, RESULT, ANSWER, AGAIN[0]], "completion": [ASKS, RESULT, ANSWER], "tools": TOOLS}
    messages = [*row["prompt"], *row["completion"]]
    for message in messages:
        assert "weight" not in message
    expected = oracle.apply_chat_template(messages, tools=TOOLS, return_assistant_tokens_mask=True, return_dict=True)
    prompt = oracle.apply_chat_template(row["prompt"], tools=TOOLS, add_generation_prompt=True, return_dict=True)
    mask = np.asarray(expected["assistant_masks"], bool)
    mask[: len(prompt["input_ids"])] = False
    example = encode_row(load_one(row, tokenizer, jsonl, cache), tokenizer, boundary="lossless")
    assert example.tokens.tolist() == expected["input_ids"] and example.loss_mask.tolist() == mask.tolist()


def test_a_system_text_and_sharegpt_roles(pair, jsonl, cache):
    tokenizer, oracle = pair(tool_templates.QWEN)
    shared = [
        {"from": "human", "value": USER["content"]},
        {"from": "gpt", "tool_calls": ASKS["tool_calls"], "weight": 0},
        {"from": "observation", "value": RESULT["content"]},
        {"from": "gpt", "value": "48 miles"},
    ]
    row = {"conversations": shared, "system": "Be short.", "tools": json.dumps(TOOLS)}
    example = encode_row(load_one(row, tokenizer, jsonl, cache), tokenizer, boundary="lossless")
    expected = oracle.apply_chat_template([SYSTEM, *CHAT], tools=TOOLS, return_dict=True)["input_ids"]
    assert example.tokens.tolist() == expected
    assert tokenizer.decode(example.tokens[example.loss_mask]) == "48 miles\n"


def chat(*messages, **row):
    return {"messages": list(messages), **row}


REFUSED = [
    *(({"messages": [USER, ANSWER], key: "x"}, f"the key '{key}' is not understood: ") for key in REFUSED_ROW_KEYS),
    *((chat(USER, {**ANSWER, key: 1}), f"message 2 holds '{key}', which is not un") for key in REFUSED_MESSAGE_KEYS),
    (chat(USER, ANSWER, functions=FUNCTIONS), "'functions' is not understood: it is OpenAI's older form of 'tools'"),
    (chat(USER, {**ASKS, "function_call": {}}), "message 2 holds 'function_call', .* write \"tool_calls\": "),
    (chat(USER, ANSWER, mood="!"), r"the key 'mood' may say what is to be tr.* or name it in data\.ignored_keys"),
    ({"prompt": "a", "completion": "b", "mood": "!", "tone": 1}, "the keys 'mood', 'tone' may say what is to be"),
    ({"prompt": "a", "completion": "b", "tools": TOOLS}, "the key 'tools' belongs to a chat, and prompt and comp"),
    (chat(USER, ANSWER, prompt="a"), "the row holds 'prompt' and 'messages', which are two forms of one thing"),
    ({"prompt": [USER], "completion": "b"}, "'completion' must be a list of messages that is not empty"),
    ({"prompt": [USER]}, r"the key 'completion' is missing \(found \['prompt'\]\)"),
    ({"prompt": [USER], "completion": [AGAIN[0]]}, "the chat has no message from the assistant"),
    ({"prompt": [USER, {**ANSWER, "weight": 1}], "completion": [ANSWER]}, "message 2 has the weight 1 and is part of"),
    (chat(USER, {**ANSWER, "weight": 0.5}), r"message 2 has the weight 0\.5, expected 0 \(not trained\) or 1"),
    (chat(USER, {**ANSWER, "weight": True}), "message 2 has the weight true, expected 0"),
    (chat(USER, {**ANSWER, "weight": "0"}), 'message 2 has the weight "0", expected 0'),
    (chat(USER, {**ANSWER, "weight": [0]}), r"message 2 has the weight \[0\], expected 0"),
    (chat({**USER, "weight": 1}, ANSWER), "message 1 has the role user and the weight 1: only the assistant's"),
    (chat(USER, {**ANSWER, "weight": 0}), "every message of the assistant has the weight 0, so there is nothing"),
    (chat(USER, {"role": "assistant"}), "message 2 has neither content nor tool_calls"),
    (chat(USER, {"role": "assistant", "content": None, "tool_calls": []}), "message 2 has neither content nor"),
    (chat({**USER, "tool_calls": []}, ANSWER), "'tool_calls' of message 1: only the assistant calls tools"),
    (chat(USER, {**ASKS, "tool_calls": {"name": "far"}}), "'tool_calls' of message 2 must be a list of objects"),
    (chat(USER, {**ASKS, "tool_calls": [{"type": "code"}]}), "'tool_calls' of message 2: expected {'type': 'function'"),
    (chat(USER, {**ASKS, "tool_calls": [call("", {})]}), "the name of a function in 'tool_calls' of message 2 is"),
    (chat(USER, {**ASKS, "tool_calls": [call("far", 3)]}), "'tool_calls' of message 2: the arguments must be an obj"),
    (chat({"role": "function", "name": "f", "content": "1"}, ANSWER), "message 1 has OpenAI's older role 'function'"),
    (chat(USER, {**RESULT, "content": {"miles": 48}}, ANSWER), "the content of message 2 must be text, got dict"),
    (
        chat({**USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER),
        "the content of message 1 has a part of the type 'image_url', and the models here read text alone",
    ),
    (chat({**USER, "content": [{"type": "text"}]}, ANSWER), "the content of message 1 has a part of the type 'text' w"),
    (chat({**USER, "content": []}, ANSWER), "the content of message 1 is empty"),
    (chat(USER, ANSWER, tools={"type": "function"}), "the key 'tools' must be a list of objects, got"),
    (chat(USER, ANSWER, tools="far"), "the key 'tools' is a text, and not JSON"),
    (chat(USER, ANSWER, parallel_tool_calls="no"), "the key 'parallel_tool_calls' must be true or false, got"),
    (chat(USER, ANSWER, chat_template_kwargs=["a"]), "the key 'chat_template_kwargs' must be an object"),
    (chat(USER, ANSWER, chat_template_kwargs={"tools": 1}), "'chat_template_kwargs' holds 'tools', which is not a"),
    (chat(SYSTEM, USER, ANSWER, system="Be kind."), "the key 'system' and the first message both are a system message"),
    ({"conversations": [{"from": "cat", "value": "a"}]}, "message 1 is from the unknown speaker 'cat', expected one"),
    ({"conversations": [{"from": "function_call", "value": "a"}]}, "message 1 is from 'function_call': write it as a"),
    ({"conversations": [{"from": "human"}]}, r"the content of message 1 is missing \(found \['role'\]\)"),
    ({"conversations": "hi"}, "'conversations' must be a list of messages that is not empty"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), REFUSED)
def test_what_is_not_understood_is_refused_by_name(row, message):
    with pytest.raises(ValueError, match=message):
        parse_row(row)


def test_a_refused_key_is_named_with_file_and_line_until_it_is_ignored(tokenizer, jsonl, cache):
    good = {"prompt": "a", "completion": " b"}
    file = jsonl([good, {**good, "mood": "x", "label": True}, good])
    options = dict(file=file, cache_dir=cache, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"own\.jsonl, line 2: the key 'label' is not understood: no preferences"):
        load_task("jsonl", **options)
    with pytest.raises(ValueError, match=r"own\.jsonl, line 2: the key 'mood' may say"):
        load_task("jsonl", **options, ignored_keys=("label",))
    ignored = load_task("jsonl", **options, ignored_keys=("label", "mood"))
    assert len(ignored.train) + len(ignored.test) == 3
    with pytest.raises(ValueError, match=r"line 2: the key 'label'"):  # another build, and not the one that ignored it
        load_task("jsonl", **options)


def test_line_separators_and_nul_are_letters(tokenizer, jsonl, cache):
    """What `str.splitlines` takes for line ends, and NUL, raw or escaped, stay in the text."""
    texts = [f"a\u2028b{n}\u2029c\x85d\x0ce\x00f" for n in range(4)]
    rows = [json.dumps({"prompt": "Say:", "completion": text}, ensure_ascii=n % 2 == 0) for n, text in enumerate(texts)]
    data = load_task("jsonl", file=jsonl(rows), cache_dir=cache, tokenizer=tokenizer)
    found = {row["row"]: row["answer"] for row in (*data.train, *data.test)}
    assert [found[n] for n in range(4)] == texts
    chats = [json.dumps({"messages": [USER, {**ANSWER, "content": text}]}, ensure_ascii=False) for text in texts]
    chats = load_task("jsonl", file=jsonl(chats), cache_dir=cache, style="plain-chat")
    assert sorted(row["answer"] for row in (*chats.train, *chats.test)) == texts


def test_eos_at_the_end_of_an_answer_is_the_only_one(tokenizer, chat_tokenizer, jsonl, cache):
    """As in TRL, which appends its eos_token to completions that do not end in it."""
    ended = {**ANSWER, "content": "48 miles</s>"}
    for style, row, other in (
        ("", {"prompt": "Hello", "completion": " there</s>"}, {"prompt": "Hello", "completion": " there"}),
        ("plain-chat", {"messages": [USER, ended]}, {"messages": [USER, ANSWER]}),
    ):
        found, expected = (load_one(some, tokenizer, jsonl, cache, style=style) for some in (row, other))
        assert found == expected and "</s>" not in found["answer"]  # evaluation compares with text before the end
        tokens = encode_row(found, tokenizer, boundary="lossless").tokens
        assert (tokens == tokenizer.eos_id).sum() == 1 and tokens[-1] == tokenizer.eos_id
    inside = load_one({"prompt": "Hello", "completion": " the</s>re"}, tokenizer, jsonl, cache)
    assert inside["answer"] == " the</s>re"
    # A chat template decides on its own ends, as in transformers.
    twice = load_one({"messages": [USER, {**ANSWER, "content": "48<|im_end|>"}]}, chat_tokenizer, jsonl, cache)
    assert twice["pieces"][-1].text == "48<|im_end|><|im_end|>\n"


@pytest.mark.parametrize("template", [tool_templates.LLAMA, tool_templates.MISTRAL])
def test_bos_that_a_template_writes_is_the_only_one(template, pair, jsonl, cache):
    tokenizer, oracle = pair(template, bos=True)
    example, _, _ = check({"messages": [USER, ANSWER, *AGAIN]}, tokenizer, oracle, jsonl, cache)
    assert np.flatnonzero(example.tokens == tokenizer.bos_id).tolist() == [0]


def test_nothing_learned_is_an_error_of_the_chat(chat_tokenizer):
    with pytest.raises(ValueError, match="it: every message of the assistant has the weight 0"):
        render_chat([USER, {**ANSWER, "weight": 0}], TEMPLATE, chat_tokenizer, "it")
