"""Tokenizers made with the `tokenizers` library, and the ways in which a checkpoint's files name their tokens."""

import json
import pathlib

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = (
    "<|im_start|>Once upon a time<|im_end|>",
    "<s>Hello 123 it's</s> x",
    "the answer  is <mark> 12 \n\n",
    " <|im_start|> the <tool> a",
    "a <pad> <|endoftext|> <new> <mark>b <extra>the",
    "naïve 漢字 🙂 e\u0301 it 's ok .",
    "",
    " ",
)
CORPUS = ["the answer is the answer Once upon a time it 's ok . Yes ? 123 123", "Answer: 12 the tool"] * 20
CONTROLS = ["<unk>", "<s>", "</s>"]


def _bytes(*before):
    made = tokenizers.Tokenizer(models.BPE())
    steps = [*before, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(steps) if before else steps[0]
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    return made, trainers.BpeTrainer(
        vocab_size=300, special_tokens=CONTROLS, initial_alphabet=letters, show_progress=False
    )


def _pieces():
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    return made, trainers.BpeTrainer(vocab_size=330, special_tokens=CONTROLS + fallback, show_progress=False)


def _words():
    made = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made, trainers.WordLevelTrainer(vocab_size=100, special_tokens=CONTROLS, show_progress=False)


PIPELINES = {
    "bytes": _bytes,
    "digits": lambda: _bytes(pre_tokenizers.Digits(individual_digits=True)),
    "pieces": _pieces,
    "words": _words,
}


def pipeline(name: str) -> dict:
    """The content of a `tokenizer.json` whose vocabulary has <unk>, <s> and </s> as 0, 1 and 2."""
    made, trainer = PIPELINES[name]()
    made.train_from_iterator(CORPUS, trainer)
    return json.loads(made.to_str())


def template(*pieces: str) -> dict:
    """A post-processor; "A" stands for the text."""
    ids = {"<s>": 1, "</s>": 2}
    one = lambda piece: (  # noqa: E731
        {"Sequence": {"id": "A", "type_id": 0}} if piece == "A" else {"SpecialToken": {"id": piece, "type_id": 0}}
    )
    pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    special = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in pieces if name != "A"}
    single = [one(piece) for piece in pieces]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


OFFSETS = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
POST_PROCESSORS = {
    "none": None,
    "offsets": OFFSETS,
    "bos": template("<s>", "A"),
    "two": template("<s>", "</s>", "A"),
    "sequence": {"type": "Sequence", "processors": [OFFSETS, template("<s>", "A")]},
}
ENDING = {
    "eos": template("<s>", "A", "</s>"),
    "roberta": {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1], "trim_offsets": True,
                "add_prefix_space": False},
}  # fmt: skip


def token(content: str, **options) -> dict:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"content": content} | plain | options


def typed(content: str, **options) -> dict:
    return {"__type": "AddedToken"} | token(content, **options)


PADDING = {
    "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
    "pad_token": "[PAD]",
}  # fmt: skip
TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}

# What is listed where: file -> entries over the ones that every folder has; "tokenizer" is tokenizer.json.
LISTED = {
    "plain": {},
    "additional": {"tokenizer_config": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<new>"]}},
    "extra before additional": {
        "tokenizer_config": {"extra_special_tokens": ["<mark>"], "additional_special_tokens": ["<|im_start|>"]}
    },
    "empty extra": {"tokenizer_config": {"extra_special_tokens": [], "additional_special_tokens": ["<|im_start|>"]}},
    "extra by role": {
        "tokenizer_config": {"extra_special_tokens": {"image_token": "<mark>", "a_token": typed("<tool>", rstrip=True)}}
    },
    "own roles": {"tokenizer_config": {"image_token": "<mark>", "tool_token": typed("<tool>", lstrip=True)}},
    "specific": {"tokenizer_config": {"model_specific_special_tokens": {"image_token": "<mark>"}}},
    "typed additional": {
        "tokenizer_config": {
            "additional_special_tokens": [
                typed("<|im_start|>", lstrip=True),
                typed("<new>", special=True, normalized=True),
            ]
        }
    },
    "typed BOS": {"tokenizer_config": {"bos_token": typed("<mark>", rstrip=True), "pad_token": "<pad>"}},
    "decoder": {
        "tokenizer_config": {
            "added_tokens_decoder": {
                "1": token("<s>", special=True),
                "2": token("</s>", special=True),
                "900": token("<mark>", special=True),
                "500": token("<tool>", special=False, normalized=True),
                "9": token("<new>", special=True, lstrip=True, single_word=True),
            }
        },
        "special_tokens_map": {"eos_token": "<s>", "additional_special_tokens": ["<|im_start|>"]},
        "added_tokens": {"<extra>": 777},
    },
    "empty decoder": {"tokenizer_config": {"added_tokens_decoder": {}}, "special_tokens_map": {"eos_token": "<s>"}},
    "map and added": {
        "special_tokens_map": {
            "eos_token": "<s>",
            "bos_token": token("</s>", lstrip=True),
            "additional_special_tokens": ["<|im_start|>", "<tool>"],
        },
        "added_tokens": {"<tool>": 901, "<mark>": 900, "<extra>": 950},
    },
    "map over config": {
        "special_tokens_map": {"extra_special_tokens": ["<mark>", token("<tool>", rstrip=True)]},
        "tokenizer_config": {"extra_special_tokens": ["<new>"]},
    },
    "map by role": {"special_tokens_map": {"extra_special_tokens": {"image_token": "<mark>"}, "my_token": "<tool>"}},
    "two additional": {
        "special_tokens_map": {"additional_special_tokens": ["<mark>"]},
        "tokenizer_config": {"additional_special_tokens": ["<tool>"]},
    },
    "null extra": {
        "special_tokens_map": {"additional_special_tokens": ["<mark>"]},
        "tokenizer_config": {"extra_special_tokens": None},
    },
    "added ordinary": {
        "special_tokens_map": {"pad_token": "<pad>", "mask_token": "<mark>"},
        "added_tokens": {"<pad>": 999, "Once": 4},
    },
    "split special": {"tokenizer_config": {"bos_token": None, "split_special_tokens": True}},
    "no prefix space": {"tokenizer_config": {"add_prefix_space": False}},
    "prefix space, legacy": {"tokenizer_config": {"add_prefix_space": True, "legacy": True}},
    "legacy": {"tokenizer_config": {"legacy": True}},
    "clean up": {"tokenizer_config": {"clean_up_tokenization_spaces": True}},
    "forced clean up": {
        "tokenizer_config": {
            "clean_up_tokenization_spaces": True,
            "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
        }
    },
    "add both": {"tokenizer_config": {"add_bos_token": True, "add_eos_token": True}},
    "add none": {"tokenizer_config": {"add_bos_token": False}},
    "padding": {"tokenizer": {"padding": PADDING, "truncation": TRUNCATION}},
    "missing": {"tokenizer_config": {"bos_token": None, "eos_token": "<missing>"}},
    "without effect": {
        "tokenizer_config": {
            "errors": "ignore",
            "model_max_length": 5,
            "padding_side": "left",
            "sp_model_kwargs": {},
            "use_default_system_prompt": True,
        }
    },
}
# What transformers refuses too, and what the error here says.
REFUSED = {
    "untyped BOS": (
        {"tokenizer_config": {"bos_token": token("<s>")}},
        r"tokenizer_config\.json: bos_token is .*refuses too",
    ),
    "untyped additional": (
        {"tokenizer_config": {"additional_special_tokens": [token("<mark>")]}},
        r"tokenizer_config\.json: extra_special_tokens is .*refuses too",
    ),
    "number as token": ({"tokenizer_config": {"pad_token": 3}}, r"tokenizer_config\.json: pad_token is 3"),
    "list as decoder": (
        {"tokenizer_config": {"added_tokens_decoder": {"3": "<mark>"}}},
        r"tokenizer_config\.json: added_tokens_decoder 3 is '<mark>'",
    ),
    "text as extra": (
        {"tokenizer_config": {"extra_special_tokens": "<mark>"}},
        r"tokenizer_config\.json: extra_special_tokens is '<mark>', not a list",
    ),
}


def write_layout(
    folder: pathlib.Path, layout: dict, *, listed: dict, post: str = "bos", name: str | None, model_type: str | None
) -> pathlib.Path:
    """Writes the files of a tokenizer of the class `name`."""
    folder.mkdir(parents=True, exist_ok=True)
    processor = (POST_PROCESSORS | ENDING)[post]
    settings = {"bos_token": "<s>", "eos_token": "</s>"} | ({"tokenizer_class": name} if name else {})
    files = {
        "tokenizer": layout | {"post_processor": processor} | listed.get("tokenizer", {}),
        "tokenizer_config": settings | listed.get("tokenizer_config", {}),
        **{file: listed[file] for file in ("special_tokens_map", "added_tokens") if file in listed},
        **({"config": {"model_type": model_type, "vocab_size": 2000}} if model_type else {}),
    }
    for file, values in files.items():
        (folder / f"{file}.json").write_text(json.dumps(values), encoding="utf-8")
    return folder
