"""Every place where transformers 5 reads tokens and flags of a tokenizer, against `AutoTokenizer` on the same files."""

import functools
import json
import shutil

import pytest
from transformers import AutoTokenizer

from mlora_jax.models.tokenizer import Tokenizer
from mlora_jax.models.tokenizer_classes import CLASSES
from tests.models.token_layouts import LISTED, POST_PROCESSORS, REFUSED, TEXTS, pipeline, typed, write_layout

pipeline = functools.cache(pipeline)
# (pipeline of tokenizer.json, tokenizer_class, model_type), with the class that transformers takes
CLASS_CASES = {
    ("bytes", "PreTrainedTokenizerFast", "llama"): "TokenizersBackend",
    ("pieces", "PreTrainedTokenizerFast", "llama"): "TokenizersBackend",
    ("words", "PreTrainedTokenizer", "llama"): "TokenizersBackend",
    ("bytes", None, "llama"): "TokenizersBackend",
    ("pieces", None, None): "TokenizersBackend",
    ("pieces", "LlamaTokenizer", "llama"): "LlamaTokenizer",
    ("pieces", "LlamaTokenizerFast", None): "LlamaTokenizer",
    ("bytes", "LlamaTokenizerFast", "llama"): "TokenizersBackend",
    ("pieces", "LlamaTokenizer", "mistral"): "TokenizersBackend",
    ("pieces", "LlamaTokenizer", "qwen2"): "Qwen2Tokenizer",
    ("pieces", "LlamaTokenizer", "qwen3"): "LlamaTokenizer",
    ("digits", "Qwen2Tokenizer", "qwen2"): "Qwen2Tokenizer",
    ("bytes", "Qwen2TokenizerFast", "llama"): "Qwen2Tokenizer",
    ("bytes", None, "qwen3"): "Qwen2Tokenizer",
    ("bytes", "PreTrainedTokenizerFast", "qwen2"): "Qwen2Tokenizer",
    ("bytes", "PreTrainedTokenizerFast", "qwen3"): "TokenizersBackend",
    ("digits", "GPT2Tokenizer", "llama"): "GPT2Tokenizer",
    ("bytes", "GPT2TokenizerFast", "smollm3"): "GPT2Tokenizer",
}
# The classes of which every listing is tried.
LISTED_CASES = [
    ("bytes", "PreTrainedTokenizerFast", "llama"),
    ("pieces", "LlamaTokenizer", "llama"),
    ("bytes", "Qwen2Tokenizer", "qwen2"),
    ("bytes", "GPT2Tokenizer", "llama"),
]


def check_equal(folder) -> tuple:
    """All that the two tokenizers of a folder say."""
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    pad = theirs.eos_token_id if theirs.pad_token_id is None else theirs.pad_token_id
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, pad)
    assert ours.vocab_size == len(theirs)
    assert ours._special_tokens == theirs.special_tokens_map
    for text in TEXTS:
        plain, whole = theirs(text, add_special_tokens=False).input_ids, theirs(text).input_ids
        assert ours.encode(text, bos=False) == plain, text
        assert [*ours.opening, *plain] == whole, text
        for skip in (False, True):
            assert ours.decode(whole, skip_special_tokens=skip) == theirs.decode(whole, skip_special_tokens=skip)
    return theirs, ours


@pytest.mark.parametrize("case", CLASS_CASES, ids=lambda case: " ".join(map(str, case)))
def test_the_class_that_reads_text(tmp_path, case):
    kind, name, model_type = case
    write_layout(tmp_path, pipeline(kind), listed={}, name=name, model_type=model_type)
    theirs, _ = check_equal(tmp_path)
    assert type(theirs).__name__ == CLASS_CASES[case]


@pytest.mark.parametrize("case", LISTED_CASES, ids=lambda case: case[1])
@pytest.mark.parametrize("listed", LISTED)
def test_where_a_token_is_listed(tmp_path, listed, case):
    kind, name, model_type = case
    check_equal(write_layout(tmp_path, pipeline(kind), listed=LISTED[listed], name=name, model_type=model_type))


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", *CLASSES])
@pytest.mark.parametrize("post", POST_PROCESSORS)
@pytest.mark.parametrize("flags", ["plain", "add both", "add none"])
def test_the_post_processor_goes_before_the_flags(tmp_path, name, post, flags):
    options = {"listed": LISTED[flags], "post": post, "name": name}
    write_layout(tmp_path, pipeline("words" if name.startswith("Pre") else "pieces"), model_type=None, **options)
    _, ours = check_equal(tmp_path)
    assert ours.opening == {"none": (), "offsets": (), "bos": (1,), "two": (1, 2), "sequence": (1,)}[post]


def test_the_listings_make_a_difference(tmp_path):
    """A listing that changes nothing would test nothing."""
    said = {}
    for listed in LISTED:
        folder = tmp_path / listed
        for kind, name, model_type in (LISTED_CASES[1], ("words", "PreTrainedTokenizerFast", "llama")):
            write_layout(folder, pipeline(kind), listed=LISTED[listed], name=name, model_type=model_type)
            ours = Tokenizer.load(folder)
            ids = [ours.encode(text, bos=True) for text in TEXTS]
            texts = [ours.decode(each, skip_special_tokens=False) for each in ids]
            said.setdefault(listed, []).append((ids, texts, ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size))
    same = {listed for listed, values in said.items() if values == said["plain"]} - {"plain"}
    # The map does not count beside added_tokens_decoder, nor its additional tokens beside extra_special_tokens.
    assert same == {"add both", "add none", "without effect", "empty decoder", "null extra"}


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_refuses_is_refused(tmp_path, case):
    listed, message = REFUSED[case]
    write_layout(tmp_path, pipeline("bytes"), listed=listed, name="PreTrainedTokenizerFast", model_type="llama")
    with pytest.raises(TypeError):
        AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "listed, message, options",
    [
        ({"special_tokens_map": {"add_bos_token": True}}, r"special_tokens_map\.json: 'add_bos_token' is True", {}),
        ({"added_tokens": {"<mark>": "9"}}, r"added_tokens\.json: the id of '<mark>' is '9', not an integer", {}),
        (
            {"tokenizer_config": {"auto_map": {"AutoTokenizer": ["a.B", None]}}},
            r"auto_map names a tokenizer that is Python",
            {},
        ),
        (
            {"tokenizer_config": {"fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.0.0.json"]}},
            r"fast_tokenizer_files names 'tokenizer\.4\.0\.0\.json'",
            {},
        ),
        ({"tokenizer_config": {"init_inputs": ["x"]}}, r"tokenizer_config\.json: init_inputs \['x'\]", {}),
        ({}, r"tokenizer\.json: post_processor puts the ids \[2\] behind every text", {"post": "eos"}),
        ({}, r"tokenizer\.json: post_processor puts the ids \[2\] behind every text", {"post": "roberta"}),
        ({}, r"tokenizer_class 'BertTokenizer' of .* is not known here .*Qwen2Tokenizer", {"name": "BertTokenizer"}),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, listed, message, options):
    options = {"name": "PreTrainedTokenizerFast", "model_type": "llama"} | options
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(write_layout(tmp_path, pipeline("bytes"), listed=listed, **options))


def test_a_class_that_does_not_fit_the_file_is_refused(tmp_path):
    write_layout(tmp_path, pipeline("words"), listed={}, name="GPT2Tokenizer", model_type="llama")
    with pytest.raises(ValueError, match=r"'GPT2Tokenizer' is built on .*type BPE, but .*'WordLevel': write"):
        Tokenizer.load(tmp_path)


def test_a_class_that_ignores_a_step_of_the_file_says_so(tmp_path, caplog):
    """As of SmolLM2: the class GPT2Tokenizer does not split digits, whatever tokenizer.json says."""
    layout = pipeline("bytes") | {"pre_tokenizer": pipeline("digits")["pre_tokenizer"]}
    counts = {}
    for name in ("PreTrainedTokenizerFast", "GPT2Tokenizer"):
        assert "tokenizer_class" not in caplog.text
        _, ours = check_equal(write_layout(tmp_path, layout, listed={}, name=name, model_type="llama"))
        counts[name] = len(ours.encode("123", bos=False))
    assert counts == {"PreTrainedTokenizerFast": 3, "GPT2Tokenizer": 2}
    assert "tokenizer_class 'GPT2Tokenizer' takes ByteLevel(add_prefix_space=False" in caplog.text


def test_a_class_that_leaves_out_characters_says_so(tmp_path, caplog):
    layout = pipeline("pieces")
    write_layout(tmp_path, layout, listed={}, name="LlamaTokenizer", model_type="llama")
    check_equal(tmp_path)
    assert "tokenizer_class" not in caplog.text
    for byte in range(128, 256):
        layout = json.loads(json.dumps(layout).replace(f"<0x{byte:02X}>", f"<byte {byte}>"))
    write_layout(tmp_path, layout, listed={}, name="LlamaTokenizer", model_type="llama")
    _, ours = check_equal(tmp_path)
    assert ours.encode("the 漢", bos=False) == ours.encode("the ", bos=False)
    assert "leaves out characters that the vocabulary lacks, and does not write <unk> for them" in caplog.text


def test_a_class_that_does_as_the_file_says_is_silent(tmp_path, caplog):
    """In the layout of Qwen2: AutoTokenizer's own pipeline is saved, and offsets, which make no ids, are set apart."""
    write_layout(tmp_path, pipeline("bytes"), listed={}, name="Qwen2Tokenizer", model_type="qwen2")
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    layout = (tmp_path / "tokenizer.json").read_text()
    assert '"trim_offsets": true' in layout
    (tmp_path / "tokenizer.json").write_text(layout.replace('"trim_offsets": true', '"trim_offsets": false'))
    check_equal(tmp_path)
    assert "tokenizer_class" not in caplog.text
    write_layout(tmp_path, pipeline("bytes"), listed={}, name="GPT2Tokenizer", model_type="llama")
    check_equal(tmp_path)
    assert "tokenizer_class" not in caplog.text


def test_chats_with_tokens_from_several_files(tmp_path):
    source = (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.content }}{{ image_token }}{% endfor %}{{ my_token }}"
    )
    config = {"bos_token": typed("<s>"), "image_token": "<mark>", "chat_template": source}
    listed = {"tokenizer_config": config, "special_tokens_map": {"my_token": "<tool>", "bos_token": "</s>"}}
    write_layout(tmp_path, pipeline("bytes"), listed=listed, name="PreTrainedTokenizerFast", model_type="llama")
    theirs, ours = check_equal(tmp_path)
    chat = [{"role": "user", "content": "the"}]
    text = ours.render_chat(chat, add_generation_prompt=True)
    assert text == theirs.apply_chat_template(chat, tokenize=False) == "</s><|im_start|>the<mark><tool>"
    assert ours.encode(text, bos=True) == theirs.apply_chat_template(chat, tokenize=True, return_dict=False)


def test_templates_in_files_of_their_own(tmp_path):
    listed = {"tokenizer_config": {"chat_template": "in the config"}}
    write_layout(tmp_path, pipeline("bytes"), listed=listed, name="PreTrainedTokenizerFast", model_type="llama")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    with pytest.raises(ValueError, match="no chat template, or several and none named default"):
        Tokenizer.load(tmp_path).render_chat([], add_generation_prompt=False)
    with pytest.raises(ValueError, match="no default specified"):
        AutoTokenizer.from_pretrained(tmp_path).apply_chat_template([], tokenize=False)
    for file in ("additional_chat_templates/default.jinja", "chat_template.jinja"):
        (tmp_path / file).write_text(f"from {file}")
        theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
        chat = [{"role": "user", "content": "the"}]
        assert ours.render_chat(chat, add_generation_prompt=False) == theirs.apply_chat_template(chat, tokenize=False)


@pytest.fixture
def stories(shared, tmp_path):
    """stories-260k with its entry 511 renamed; `change` edits one of its files."""
    for file in (shared / "models/stories-260k").glob("*.json"):
        shutil.copy(file, tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    old = next(text for text, id in vocab.items() if id == 511)
    vocab["<|im_start|>"] = vocab.pop(old)
    tokenizer["model"]["merges"] = [
        merge for merge in tokenizer["model"]["merges"] if old not in (merge, "".join(merge))
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))

    def change(file, **values):
        path = tmp_path / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return tmp_path, change


def test_a_chat_marker_in_a_real_tokenizer(stories):
    folder, change = stories
    change("tokenizer_config.json", additional_special_tokens=["<|im_start|>"])
    _, ours = check_equal(folder)
    assert ours.encode("<|im_start|>Once upon a time", bos=True)[:3] == [1, 511, 403]


def test_flags_against_the_post_processor_of_a_real_tokenizer(stories):
    folder, change = stories
    change("tokenizer_config.json", add_bos_token=False)
    _, ours = check_equal(folder)
    assert ours.encode("Once", bos=True)[0] == 1
    change("tokenizer_config.json", add_bos_token=True)
    change("tokenizer.json", post_processor=None)
    _, ours = check_equal(folder)
    assert ours.encode("Once", bos=True)[0] != 1


@pytest.mark.parametrize("name", ["LlamaTokenizer", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("model", ["stories-260k", "tinystories-656k", "stories-3m"])
def test_real_tokenizers_under_other_classes(shared, tmp_path, model, name):
    for file in (shared / "models" / model).glob("*.json"):
        shutil.copy(file, tmp_path)
    values = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": name}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    check_equal(tmp_path)
