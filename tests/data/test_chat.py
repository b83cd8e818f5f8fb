"""Chats: the loss is on the assistant's turns and on nothing else."""

import numpy as np
import pytest
import transformers

from mlora_jax.data.chat import render_chat
from mlora_jax.data.load import load_task
from mlora_jax.data.tasks import TASKS
from mlora_jax.data.tokenize import encode_row, prompt_tokens, tokenize

TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Good day to you"},
    {"role": "user", "content": "How far is Denver ?"},
    {"role": "assistant", "content": "  48 <em> miles\n"},
]
TOOLS = (
    "{% for m in messages %}[{{ m.role }}{% if m.calls %} calls {{ m.calls | tojson }}{% endif %}] {{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant{% endif %}"
)
TAIL = [*TURNS, {"role": "user", "content": "Thanks"}]
TEMPLATE, PLAIN = (TASKS["jsonl"].styles[name] for name in ("chat-template", "plain-chat"))


def learned(example, tokenizer):
    """The texts of the runs of targets, special tokens by name."""
    runs, last = [], None
    for token, target in zip(example.tokens, example.loss_mask, strict=True):
        if target:
            runs = [*runs[:-1], [*runs[-1], token]] if last else [*runs, [token]]
        last = target
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def test_every_assistant_turn_with_its_end_is_learned(chat_tokenizer):
    example = encode_row(render_chat(TURNS, TEMPLATE, chat_tokenizer, "it"), chat_tokenizer, boundary="joint")
    assert learned(example, chat_tokenizer) == [
        "Good day to you<|im_end|>\n",
        "  48 <em> miles\n<|im_end|>\n",
    ]


@pytest.mark.parametrize("messages", [TURNS, TURNS[:3], TURNS[1:3], [*TURNS, *TURNS[1:]]])
def test_tokens_and_mask_are_those_of_transformers(messages, chat_tokenizer, chat_folder):
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(chat_folder)
    expected = oracle.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    example = encode_row(render_chat(messages, TEMPLATE, chat_tokenizer, "it"), chat_tokenizer, boundary="joint")
    assert example.tokens.tolist() == expected["input_ids"]
    assert example.loss_mask.astype(int).tolist() == expected["assistant_masks"]


def test_what_else_a_message_holds_is_for_the_template(make_tokenizer, jsonl, cache):
    chat = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": "How far ?"},
        {"role": "assistant", "content": "Wait", "calls": [{"name": "map", "to": "Nice"}]},
        {"role": "tool", "content": "48"},
        {"role": "assistant", "content": "48 miles"},
    ]
    tokenizer, own = make_tokenizer(TOOLS), jsonl([{"messages": chat}] * 2)
    row = load_task("jsonl", file=own, cache_dir=cache, tokenizer=tokenizer, holdout=0.5).train[0]
    assert "".join(piece.text for piece in row["pieces"]) == (
        "[developer] Be short.\n[user] How far ?\n"
        '[assistant calls [{"name": "map", "to": "Nice"}]] Wait\n[tool] 48\n[assistant] 48 miles\n'
    )
    plain = load_task("jsonl", file=own, cache_dir=cache, style="plain-chat", holdout=0.5)
    with pytest.raises(ValueError, match=r"own\.jsonl, line \d: message 3 holds 'calls', which this style would lose"):
        plain.train[0]
    del chat[2]["calls"]
    plain = load_task("jsonl", file=jsonl([{"messages": chat}] * 2), cache_dir=cache, style="plain-chat", holdout=0.5)
    assert plain.train[0]["prompt"].startswith("### Developer:\nBe short.\n\n### User:\nHow far ?\n\n")


def test_evaluation_asks_for_the_last_turn(chat_tokenizer):
    for style in (TEMPLATE, PLAIN):
        row = render_chat(TAIL, style, chat_tokenizer, "it")
        assert row == render_chat(TURNS, style, chat_tokenizer, "it")
        assert row["answer"] == TURNS[-1]["content"] and (row["choices"], row["label"]) == ([], -1)
        assert "Good day to you" in row["prompt"] and "48" not in row["prompt"]
        example = encode_row(row, chat_tokenizer, boundary="joint")
        begin = prompt_tokens(row, chat_tokenizer, boundary="joint")
        assert example.tokens[: len(begin)].tolist() == begin
        assert example.loss_mask[len(begin) :].all() and not example.loss_mask[len(begin) - 1]
    template = render_chat(TAIL, TEMPLATE, chat_tokenizer, "it")
    assert template["prompt"].endswith("How far is Denver ?<|im_end|>\n<|im_start|>assistant\n")
    assert chat_tokenizer.encode(template["prompt"], bos=True) == prompt_tokens(
        template, chat_tokenizer, boundary="joint"
    )


def test_plain_chat_needs_no_template_and_ends_every_turn(tokenizer):
    row = render_chat(TURNS, PLAIN, None, "it")
    assert row["prompt"] == (
        "### System:\nBe short.\n\n### User:\nHello there\n\n### Assistant:\nGood day to you"
        "\n\n### User:\nHow far is Denver ?\n\n### Assistant:\n"
    )
    example = encode_row(row, tokenizer, boundary="joint")
    assert learned(example, tokenizer) == ["Good day to you</s>", "  48 <em> miles\n</s>"]
    assert example.tokens[0] == tokenizer.bos_id and (example.tokens == tokenizer.bos_id).sum() == 1
    text = tokenizer.decode(example.tokens)
    assert text == row["prompt"] + row["answer"]


def test_a_template_that_writes_bos_gives_one_bos(make_tokenizer):
    template = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    tokenizer = make_tokenizer(template, bos=True)
    example = encode_row(render_chat(TURNS, TEMPLATE, tokenizer, "it"), tokenizer, boundary="joint")
    assert np.flatnonzero(example.tokens == tokenizer.bos_id).tolist() == [0]
    assert learned(example, tokenizer) == ["Good day to you</s>", "  48 <em> miles\n</s>"]


def test_own_chats_end_to_end(jsonl, cache, chat_tokenizer):
    rows = [{"messages": TURNS, "id": i} for i in range(4)] + [{"prompt": "Hello", "completion": " there"}]
    data = load_task("jsonl", file=jsonl(rows), cache_dir=cache, tokenizer=chat_tokenizer, holdout=0.4)
    done = tokenize(data.train, chat_tokenizer, boundary=data.boundary, max_length=200)
    assert done.kept == 3
    for example in done.examples:
        turns = 2 if example.row < 4 else 1
        assert len(learned(example, chat_tokenizer)) == turns


def test_no_template_is_an_error_that_names_the_way_out(jsonl, cache, tokenizer):
    file = jsonl([{"messages": TURNS}] * 4)
    data = load_task("jsonl", file=file, cache_dir=cache, tokenizer=tokenizer)
    with pytest.raises(
        ValueError,
        match=r"own\.jsonl, line \d is a chat, .* no chat template: set data\.style='plain-chat', or add",
    ):
        list(data.train)
    data = load_task("jsonl", file=file, cache_dir=cache)
    with pytest.raises(ValueError, match=r"own\.jsonl, line \d is a chat: load_task needs the model's tokenizer"):
        list(data.train)
    data = load_task("jsonl", file=file, cache_dir=cache, style="plain-chat")
    assert len(list(data.train)) == 3


BROKEN = [
    # Thoughts of all but the last turn are left out, as some reasoning models' templates do.
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}"
    "{{ m['content'] if loop.last or m['role'] == 'user' else 'removed' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    # The generation prompt is not how a turn begins.
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}",
]


@pytest.mark.parametrize("template", BROKEN)
def test_turns_that_cannot_be_found_are_an_error_naming_the_example(template, make_tokenizer):
    tokenizer = make_tokenizer(template)
    with pytest.raises(ValueError, match=r"own row 7: .* writes message 3 otherwise .* set data\.style='plain-chat'"):
        render_chat(TURNS, TEMPLATE, tokenizer, "own row 7")


def test_a_template_that_refuses_is_an_error_naming_the_example(make_tokenizer):
    template = "{{ raise_exception('no system role') }}"
    tokenizer = make_tokenizer(template)
    with pytest.raises(ValueError, match=r"own row 7: .*no system role"):
        render_chat(TURNS, TEMPLATE, tokenizer, "own row 7")
