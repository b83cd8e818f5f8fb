"""Tokenizers against transformers and the tokenizers library; chats against apply_chat_template."""

import json

import pytest
import tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mlora_jax.models.tokenizer import Tokenizer
from mlora_jax.run.inputs import model_folder

NAMES = ["stories-260k", "tinystories-656k", "stories-3m"]
TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "She didn't see it. Where was Tom? He ran away, and the dog ran too!",
    "a",
]
# White space at the edges, digits, other alphabets, bytes, nothing at all, names of special tokens.
HARD_TEXTS = [
    'She said: "Oh!"',
    "Question: How many?\nAnswer: 48/2 = 24",
    "",
    " ",
    "  two  spaces ",
    "\n\tx\r\n",
    "naïve 漢字 🙂",
    "Once <s> upon</s> <|end_story|>",
]

LLAMA_3_TEMPLATE = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{% for message in messages %}
    {%- if message['role'] not in ('user', 'assistant') %}
        {{- raise_exception('Unknown role: ' + message['role']) }}
    {%- endif %}
    {%- if message['content'] == 'skip' %}
        {%- continue %}
    {%- endif %}
    {% generation %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
        + message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}

    {% if message.extra is defined %}
 {{ message.extra | tojson }} {{ message.extra | tojson(indent=2) }}
    {% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CHATS = [
    [{"role": "user", "content": " Hello <b>& 'you'</b>\n"}],
    [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": "Hi", "extra": {"ä": ["<", 1.5, None], "b": "'"}},
        {"role": "assistant", "content": "skip"},
        {"role": "assistant", "content": "Ho\n"},
    ],
]


def write(folder, name, values):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")


@pytest.fixture
def llama_3_like(tmp_path):
    """A byte-level tokenizer whose BOS comes from its post-processor, with two end tokens, as Llama 3's."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["the answer is the answer", "Answer: 12 the"] * 20, trainer)
    backend.add_special_tokens(special)
    bos = backend.token_to_id(special[0])
    template = tokenizers.processors.TemplateProcessing(
        single=f"{special[0]} $A", pair=f"{special[0]} $A {special[0]} $B", special_tokens=[(special[0], bos)]
    )
    byte_level = tokenizers.processors.ByteLevel(trim_offsets=False)
    backend.post_processor = tokenizers.processors.Sequence([byte_level, template])
    backend.enable_padding(length=64)  # Settings left behind by whoever saved it.
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": special[0], "eos_token": "<|eot_id|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    write(tmp_path, "tokenizer_config.json", config | {"chat_template": LLAMA_3_TEMPLATE})
    ids = [backend.token_to_id(token) for token in special[1:3]]
    write(tmp_path, "generation_config.json", {"bos_token_id": bos, "eos_token_id": ids})
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_plain_text_agrees_with_auto_tokenizer(shared, name):
    theirs, ours = AutoTokenizer.from_pretrained(shared / "models" / name), Tokenizer.load(shared / "models" / name)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (theirs.bos_token_id, theirs.eos_token_id, len(theirs))
    assert ours.pad_id == (theirs.eos_token_id if theirs.pad_token_id is None else theirs.pad_token_id)
    assert ours.opening == (ours.bos_id,) and ours.chat_template is None
    for text in TEXTS:
        with_bos, without = theirs(text).input_ids, theirs(text, add_special_tokens=False).input_ids
        assert with_bos == [theirs.bos_token_id, *without]
        assert ours.encode(text, bos=True) == with_bos
        assert ours.encode(text, bos=False) == without
        assert ours.decode(with_bos) == theirs.decode(with_bos, skip_special_tokens=True) == text
        assert ours.decode([*with_bos, ours.eos_id]) == text


@pytest.mark.parametrize("name", NAMES)
def test_any_text_agrees_with_auto_tokenizer(shared, name):
    theirs, ours = AutoTokenizer.from_pretrained(shared / "models" / name), Tokenizer.load(shared / "models" / name)
    for text in TEXTS + HARD_TEXTS:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, bos=False) == ids
        assert [*ours.opening, *ids] == theirs(text).input_ids
        assert ours.encode(text, bos=True) == theirs(text).input_ids
        for skip in (False, True):
            expected = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == expected


def test_a_byte_level_tokenizer_adds_bos_by_its_post_processor(llama_3_like):
    theirs, ours = AutoTokenizer.from_pretrained(llama_3_like), Tokenizer.load(llama_3_like)
    assert ours.opening == (ours.bos_id,) == (theirs.bos_token_id,)
    end_of_text, eot = (theirs.convert_tokens_to_ids(token) for token in ("<|end_of_text|>", "<|eot_id|>"))
    assert (ours.eos_id, ours.eos_ids) == (eot, (eot, end_of_text))
    assert ours.pad_id == theirs.pad_token_id == theirs.convert_tokens_to_ids("[PAD]")  # of the padding left behind
    theirs.backend_tokenizer.no_padding()
    theirs.backend_tokenizer.no_truncation()
    for text in TEXTS + HARD_TEXTS:
        assert ours.encode(text, bos=True) == [ours.bos_id, *theirs(text, add_special_tokens=False).input_ids]
        assert ours.decode(ours.encode(text, bos=True)) == text


def test_a_text_that_begins_with_bos_gets_no_second_one(llama_3_like):
    ours = Tokenizer.load(llama_3_like)
    text = ours.render_chat(CHATS[0], add_generation_prompt=True)
    ids = ours.encode(text, bos=True)
    assert ids == ours.encode(text, bos=False)
    assert ids.count(ours.bos_id) == 1 and ids[0] == ours.bos_id


ROLES = {
    # generation_config.json, config.json -> stops beside EOS, which is 272
    "both": ({"bos_token_id": 3, "eos_token_id": [271, 5]}, {"bos_token_id": 9, "eos_token_id": 7}, (271, 5)),
    "generation alone": ({"eos_token_id": 272}, {}, ()),
    "none in generation": ({"bos_token_id": 3}, {"eos_token_id": 7, "pad_token_id": 6}, ()),
    "null in generation": ({"eos_token_id": None}, {"eos_token_id": 7}, ()),
    "config alone": (None, {"eos_token_id": [7, 272], "bos_token_id": 9, "pad_token_id": 6}, (7,)),
    "neither": (None, {"bos_token_id": 9}, ()),
    "old way of none": (None, {"pad_token_id": -1, "eos_token_id": -1}, ()),
}


@pytest.mark.parametrize("case", ROLES)
def test_stops_are_those_of_transformers_and_the_rest_is_the_tokenizers(llama_3_like, case):
    """A model with these files, written by transformers' own classes."""
    generation, config, stops = ROLES[case]
    sizes = {"num_hidden_layers": 0, "hidden_size": 4, "num_attention_heads": 1, "intermediate_size": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=400, **sizes)).save_pretrained(llama_3_like)
    write(llama_3_like, "config.json", {"model_type": "llama", "vocab_size": 400, **sizes, **config})
    (llama_3_like / "generation_config.json").unlink()
    if generation is not None:
        write(llama_3_like, "generation_config.json", generation)
    ours, theirs = Tokenizer.load(llama_3_like), AutoTokenizer.from_pretrained(llama_3_like)
    told = LlamaForCausalLM.from_pretrained(llama_3_like).generation_config.eos_token_id
    told = [] if told is None else told if isinstance(told, list) else [told]
    assert {*ours.eos_ids} == {theirs.eos_token_id, *(id for id in told if id >= 0)}
    assert ours.eos_ids == (272, *stops)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)


def test_without_named_tokens_the_models_ids_end_texts_and_nothing_begins_them(llama_3_like):
    for file in ("tokenizer_config.json", "generation_config.json"):
        (llama_3_like / file).unlink()
    tokenizer = json.loads((llama_3_like / "tokenizer.json").read_text()) | {"post_processor": None, "padding": None}
    write(llama_3_like, "tokenizer.json", tokenizer)
    write(llama_3_like, "config.json", {"pad_token_id": 5, "eos_token_id": [8, 7], "bos_token_id": 9})
    ours = Tokenizer.load(llama_3_like)
    assert (ours.bos_id, ours.eos_ids, ours.pad_id, ours.prefix_id, ours.opening) == (None, (8, 7), 8, 8, ())
    assert ours.chat_template is None


def test_boundaries(shared, llama_3_like):
    for folder in (*(shared / "models" / name for name in NAMES), llama_3_like):
        ours = Tokenizer.load(folder)
        for prompt, answer in (
            ("Question: 1\nAnswer: ", "48"),
            ("Answer:", " the answer"),
            ("x \n ", "yes"),
            (" ", "a"),
        ):
            separate = ours.encode_pair(prompt, answer, boundary="separate")
            assert separate == (ours.encode(prompt, bos=True), ours.encode(answer, bos=False))
            # lm-evaluation-harness: context and continuation after trailing white space has moved over.
            spaces = len(prompt) - len(prompt.rstrip())
            context, continuation = prompt[: len(prompt) - spaces], prompt[len(prompt) - spaces :] + answer
            context_ids, whole = ours.encode(context, bos=True), ours.encode(context + continuation, bos=True)
            assert ours.encode_pair(prompt, answer, boundary="joint") == (context_ids, whole[len(context_ids) :])
    prompt_ids, answer_ids = ours.encode_pair("Answer: ", "the", boundary="joint")
    assert ours.decode(prompt_ids) == "Answer:" and ours.decode(answer_ids) == " the"
    assert ours.encode_pair("Answer: ", "the", boundary="separate")[1] == ours.encode("the", bos=False) != answer_ids
    with pytest.raises(ValueError, match="boundary 'glued' is not one of 'separate', 'joint', 'lossless'"):
        ours.encode_pair("a", "b", boundary="glued")


SPLIT_TEXTS = (
    *("Once upon a time", "Say: works fine", "label=cat", "The cat sat", "1234", "Answer:yes", "Hello\n\nWorld"),
    *("Question: 1\nAnswer: the answer", "naïve 日本 🎉 x", "a  b   c", "Q: is it?\nA:\nno"),
)


def check_lossless(folder, *, lossy=False):
    """Every text cut at every place; `lossy`: whether the vocabulary lacks some of the characters."""
    ours = Tokenizer.load(folder)
    merged = 0
    for text in SPLIT_TEXTS:
        spelled = ours.decode(ours.encode(text, bos=True))
        assert spelled == text or lossy
        for border in range(1, len(text)):
            prompt, answer = text[:border], text[border:]
            prompt_ids, answer_ids = ours.encode_pair(prompt, answer, boundary="lossless")
            assert prompt_ids == ours.encode(prompt.rstrip(), bos=True) and answer_ids
            assert ours.decode([*prompt_ids, *answer_ids]) == spelled
            joint = ours.encode_pair(prompt, answer, boundary="joint")
            if ours.encode(text, bos=True)[: len(prompt_ids)] == prompt_ids:
                assert (prompt_ids, answer_ids) == joint
            else:
                merged += ours.decode([*joint[0], *joint[1]]) != spelled
    assert merged > 5


def test_the_lossless_boundary_spells_prompt_and_answer():
    check_lossless(model_folder("quickstart"))


@pytest.mark.parametrize("name", NAMES)
def test_the_lossless_boundary_with_real_tokenizers(shared, name):
    check_lossless(shared / "models" / name, lossy=name == "tinystories-656k")


def test_an_answer_that_no_tokens_spell_is_refused(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1, "upon": 2}, unk_token="<unk>"))
    backend.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", {"eos_token": "</s>"})
    with pytest.raises(ValueError, match="merges the end of the prompt 'up' with the beginning of the answer 'on'"):
        Tokenizer.load(tmp_path).encode_pair("up", "on", boundary="lossless")


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("chat", CHATS, ids=["one turn", "four messages"])
def test_chats_are_rendered_as_transformers_does(llama_3_like, chat, add_generation_prompt):
    theirs, ours = AutoTokenizer.from_pretrained(llama_3_like), Tokenizer.load(llama_3_like)
    expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert ours.render_chat(chat, add_generation_prompt=add_generation_prompt) == expected
    assert expected.startswith("<|begin_of_text|><|start_header_id|>system")
    assert expected.endswith("assistant<|end_header_id|>\n\n") == add_generation_prompt


def test_where_the_template_comes_from(llama_3_like):
    values = json.loads((llama_3_like / "tokenizer_config.json").read_text())
    several = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": "by name"}]
    write(llama_3_like, "tokenizer_config.json", values | {"chat_template": several})
    assert Tokenizer.load(llama_3_like).render_chat(CHATS[0], add_generation_prompt=True) == "by name"
    write(llama_3_like, "chat_template.jinja", "from a file: {{ messages[0].content | trim }}{{ eos_token }}")
    text = Tokenizer.load(llama_3_like).render_chat(CHATS[0], add_generation_prompt=True)
    assert text == "from a file: Hello <b>& 'you'</b><|eot_id|>"
    assert text == AutoTokenizer.from_pretrained(llama_3_like).apply_chat_template(CHATS[0], tokenize=False)


@pytest.mark.parametrize(
    "template, message",
    [
        (LLAMA_3_TEMPLATE, "does not render these messages: Unknown role: judge"),
        ("{% for x in %}", "does not render these messages"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "does not render these messages.*unsafe"),
        ("{{ messages.append(1) }}", "does not render these messages.*unsafe"),
    ],
)  # fmt: skip
def test_a_template_that_fails_says_so(llama_3_like, template, message):
    write(llama_3_like, "chat_template.jinja", template)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(llama_3_like).render_chat([{"role": "judge", "content": "x"}], add_generation_prompt=False)


def test_without_a_template_the_way_out_is_named(shared):
    ours = Tokenizer.load(shared / "models" / NAMES[0])
    with pytest.raises(ValueError, match=r"no chat template, or several .*: put one into chat_template\.jinja"):
        ours.render_chat(CHATS[0], add_generation_prompt=True)


def test_bad_folders(llama_3_like, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere' is neither a folder nor a hub id"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has no tokenizer\.json.*save_pretrained"):
        Tokenizer.load(tmp_path / "empty")
    values = json.loads((llama_3_like / "tokenizer_config.json").read_text())
    write(llama_3_like, "tokenizer_config.json", values | {"eos_token": "</end>"})
    write(llama_3_like, "config.json", {"vocab_size": 275})
    with pytest.raises(ValueError, match=r"the eos_token of the tokenizer has the id 275, and the model knows .* 275"):
        Tokenizer.load(llama_3_like)
    write(llama_3_like, "config.json", {"eos_token_id": "2"})
    (llama_3_like / "generation_config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id holds '2', not the id of a token"):
        Tokenizer.load(llama_3_like)
    (llama_3_like / "config.json").unlink()
    write(llama_3_like, "tokenizer_config.json", "{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.load(llama_3_like)
    (llama_3_like / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="no token ends a text: name it as eos_token"):
        Tokenizer.load(llama_3_like)
    write(llama_3_like, "tokenizer.json", '{"version": "1.0"}')
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read .*download it again"):
        Tokenizer.load(llama_3_like)


def test_a_token_that_the_model_lacks_is_named(llama_3_like):
    write(llama_3_like, "config.json", {"vocab_size": 274, "model_type": "llama"})
    ours = Tokenizer.load(llama_3_like)
    ours.check_known(ours.encode("the<|eot_id|>", bos=True), name="a text")
    ids = ours.encode("the<|end_header_id|>", bos=True)
    with pytest.raises(ValueError, match=r"a text holds the token '<\|end_header_id\|>' of id 274, .* ids below 274"):
        ours.check_known(ids, name="a text")
