"""Small tokenizers, made here with the `tokenizers` library, and raw files in the published forms."""

import json
import pathlib

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from mlora_jax.models.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXT = [
    "Question: How far is it from Denver to Aspen ?\nType: number",
    "Review: one long string of cliches\nSentiment: negative positive",
    "### User:\nHello there\n\n### Assistant:\nGood day to you",
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72",
]


def write_tokenizer(folder: pathlib.Path, *, bos: bool, chat_template: str = "") -> pathlib.Path:
    """A byte-level BPE tokenizer in a folder of the Hugging Face layout."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": bos,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if chat_template:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """Adds BOS, has no chat template."""
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), bos=True))


@pytest.fixture
def make_tokenizer(tmp_path):
    """Makes a tokenizer with a chat template of the test's own."""
    return lambda template, bos=False: Tokenizer.load(
        write_tokenizer(tmp_path / "made", bos=bos, chat_template=template)
    )


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory) -> pathlib.Path:
    return write_tokenizer(tmp_path_factory.mktemp("chat"), bos=False, chat_template=CHATML)


@pytest.fixture(scope="session")
def chat_tokenizer(chat_folder) -> Tokenizer:
    """Adds no BOS, writes chats as ChatML."""
    return Tokenizer.load(chat_folder)


GSM8K_LINE = json.dumps({"question": "One and one?", "answer": "1+1=<<1+1=2>>2\n#### 2"})
LINES = {
    "gsm8k": {"train.jsonl": [GSM8K_LINE] * 3, "test.jsonl": [GSM8K_LINE]},
    "trec": {
        "train_5500.label": [
            "HUM:ind Who was Galileo ?",
            "NUM:date When did it begin ?",
            "LOC:city Where is Nice ?",
        ],
        "TREC_10.label": ["DESC:def What is an atom ?"],
    },
    "sst2": {
        "train.tsv": ["a joy to watch\t1", "dull\t0"],
        "dev.tsv": ["not good\t0"],
        "test.tsv": ["very good\t1"],
    },
}


@pytest.fixture
def raw(tmp_path):
    """Writes a task's raw files, with lines replaced by file name; returns the folder."""

    def write(task: str, encoding: str = "utf-8", **replaced: list[str]) -> str:
        folder = tmp_path / "raw" / task
        folder.mkdir(parents=True, exist_ok=True)
        for name, lines in LINES[task].items():
            lines = replaced.get(name.split(".")[0], lines)
            (folder / name).write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))
        return str(folder)

    return write


@pytest.fixture
def jsonl(tmp_path):
    """Writes a JSONL file; returns its path."""

    def write(rows: list, name: str = "own.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def cache(tmp_path) -> str:
    return str(tmp_path / "cache")
