"""The generated text and task, the shipped base, and the pretraining that makes it."""

import collections
import hashlib
import importlib.util
import json
import pathlib

import numpy as np
import pytest
import tokenizers

from mlora_jax.data import quickstart_text as text
from mlora_jax.training import pretrain

ROOT = pathlib.Path(__file__).parents[2]
ASSET = ROOT / "mlora_jax" / "assets" / "quickstart"
CONFIG = "configs/pretrain_quickstart.py"


@pytest.fixture(scope="module")
def rows():
    return {split: text.task_rows(split) for split in text.ROWS}


@pytest.fixture(scope="module")
def config():
    spec = importlib.util.spec_from_file_location("pretrain_quickstart", ROOT / CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config().to_dict()


@pytest.fixture(scope="module")
def record():
    return json.loads((ASSET / pretrain.RECORD_FILE).read_text(encoding="utf-8"))


def words(prompt):
    return prompt.replace(".", " ").replace(":", " ").split()


def animal_and_place(row):
    (animal,) = (word for word in words(row["prompt"]) if word in text.ANIMALS)
    (place,) = (word for word in words(row["prompt"]) if word in text.PLACES)
    return animal, place


def test_world_has_no_word_twice():
    groups = (text.ANIMALS, text.DWELLINGS, text.FOODS, text.PLACES, text.OBJECTS, text.VERBS, text.ADJECTIVES)
    everything = [word for group in groups for word in group]
    assert len(everything) == len(set(everything))


def test_documents_are_the_seed_s():
    first = list(text.documents(50, seed=3))
    assert first == list(text.documents(50, seed=3))
    assert first == list(text.documents(80, seed=3))[:50]
    assert not set(first) & set(text.documents(50, seed=4))


def test_documents_tell_homes_and_foods_as_they_are():
    asked = collections.Counter()
    for document in text.documents(400):
        story, answers = document.split(". ", 1)
        (animal,) = (word for word in words(story) if word in text.ANIMALS)
        pairs = dict(pair.split(": ") for pair in _pairs(answers))
        asked.update(pairs.keys())
        assert len(pairs) == text.QUESTIONS_PER_STORY
        assert pairs.get("home", text.HOMES[animal]) == text.HOMES[animal]
        assert pairs.get("food", text.DIET[animal]) == text.DIET[animal]
        assert all(pairs[question] in words(story) for question in pairs if question not in ("home", "food"))
    assert set(asked) == set(text.QUESTIONS)


def _pairs(answers):
    parts = answers.split()
    return [f"{question} {answer}" for question, answer in zip(parts[::2], parts[1::2], strict=True)]


def test_task_rows_are_the_seed_s(rows):
    assert rows["train"] == text.task_rows("train", seed=0)
    other = text.task_rows("train", seed=1)
    homes = [{animal_and_place(row)[0]: row["answer"] for row in some} for some in (rows["train"], other)]
    assert homes[0].keys() == homes[1].keys() and homes[0] != homes[1]


def test_task_rows_are_what_is_promised(rows):
    homes = {}
    for split, some in rows.items():
        assert len(some) == text.ROWS[split]
        for row in some:
            assert set(row) == {"prompt", "answer", "choices", "label"}
            assert row["answer"] == row["choices"][row["label"]]
            assert [choice.strip() for choice in row["choices"]] == list(text.DWELLINGS)
            assert not set(words(row["prompt"])) & set(text.DWELLINGS)  # the prompt does not tell
            assert homes.setdefault(animal_and_place(row)[0], row["label"]) == row["label"]
        animals = collections.Counter(animal_and_place(row)[0] for row in some)
        labels = collections.Counter(row["label"] for row in some)
        assert len(animals) == len(text.ANIMALS) and len(set(animals.values())) == 1
        assert len(labels) == len(text.DWELLINGS) and len(set(labels.values())) == 1


def test_new_homes_are_not_the_old_ones(rows):
    moved = [row["answer"].strip() != text.HOMES[animal_and_place(row)[0]] for row in rows["test"]]
    assert np.mean(moved) > 0.8


def test_no_animal_is_in_one_place_in_both_splits(rows):
    train, test = ({animal_and_place(row) for row in rows[split]} for split in ("train", "test"))
    assert not train & test
    prompts = [row["prompt"] for some in rows.values() for row in some]
    assert len(prompts) == len(set(prompts))


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="unknown split 'dev', expected one of 'train', 'test'"):
        text.task_rows("dev")


def test_asset_is_small_and_whole(record):
    files = sorted(file for file in ASSET.iterdir() if file.is_file())
    assert sum(file.stat().st_size for file in files) <= 2 * 2**20
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= {
        file.name for file in files
    }
    for name, digest in record["sha256"].items():
        assert hashlib.sha256((ASSET / name).read_bytes()).hexdigest() == digest


def test_asset_s_record_is_the_config(record, config):
    assert record["config"] == config
    assert record["command"] == f"python -m experiments.pretrain --config {CONFIG} --out DIR"
    card = (ASSET / "README.md").read_text(encoding="utf-8")
    for fact in (str(record["held_out_loss"]), f"{record['parameters']:,}", record["command"]):
        assert fact in card


def test_asset_s_tokenizer_is_made_from_the_config(config):
    made = pretrain.train_tokenizer(
        text.documents(config["text"]["documents"], seed=config["seed"]), config["tokenizer"]["vocab_size"]
    )
    assert json.loads(made.to_str()) == json.loads((ASSET / "tokenizer.json").read_text(encoding="utf-8"))


def test_every_word_of_the_world_is_one_token():
    tokenizer = tokenizers.Tokenizer.from_file(str(ASSET / "tokenizer.json"))
    groups = (text.ANIMALS, text.DWELLINGS, text.FOODS, text.PLACES, text.OBJECTS, text.VERBS, text.ADJECTIVES)
    for word in (word for group in groups for word in group):
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False).ids) == 1, word
    assert tokenizer.decode(tokenizer.encode("Ünknown\n words\t7").ids) == "Ünknown\n words\t7"


def test_rows_fit_sixteen_tokens(rows):
    tokenizer = tokenizers.Tokenizer.from_file(str(ASSET / "tokenizer.json"))
    lengths = {len(tokenizer.encode(row["prompt"] + row["answer"]).ids) for some in rows.values() for row in some}
    assert max(lengths) + 1 <= 16  # with the end token
    assert max(lengths) - min(lengths) <= 2


def test_transformers_loads_the_asset_and_it_knows_the_old_homes(rows):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(ASSET)
    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSET)
    tokenizer.padding_side = "right"
    labels = [tokenizer.encode(choice, add_special_tokens=False) for choice in rows["test"][0]["choices"]]
    batch = tokenizer([row["prompt"] for row in rows["test"]], return_tensors="pt", padding=True)
    assert (batch.input_ids[:, 0] == tokenizer.bos_token_id).all()
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logits = logits[torch.arange(len(logits)), batch.attention_mask.sum(1) - 1].numpy()
    said = [tokenizer.decode(token).strip() for token in logits.argmax(-1)]
    old = [text.HOMES[animal_and_place(row)[0]] for row in rows["test"]]
    assert np.mean(np.array(said) == np.array(old)) > 0.99
    chosen = logits[:, np.ravel(labels)].argmax(-1)
    assert np.mean(chosen == [row["label"] for row in rows["test"]]) < 0.3


def test_pack_keeps_documents_whole():
    random = np.random.default_rng(0)
    documents = [random.integers(2, 9, random.integers(1, 8)).tolist() for _ in range(40)]
    tokens, segments = pretrain.pack(documents, 10)
    unpacked = [
        row[ids == segment].tolist()
        for row, ids in zip(tokens, segments, strict=True)
        for segment in range(1, ids.max() + 1)
    ]
    assert unpacked == documents
    with pytest.raises(ValueError, match="a document of 11 tokens does not fit a row"):
        pretrain.pack([[2] * 11], 10)


SMALL = {
    "seed": 5,
    "text": {"documents": 200, "held_out": 20},
    "tokenizer": {"vocab_size": 700},
    "model": {"hidden_size": 16, "intermediate_size": 32, "num_layers": 2, "num_heads": 2, "tie_word_embeddings": True},
    "train": {
        "steps": 20, "batch_size": 8, "length": 64, "learning_rate": 1e-2, "warmup_steps": 2,
        "beta1": 0.9, "beta2": 0.98, "weight_decay": 0.01, "clip": 1.0,
    },
}  # fmt: skip


def test_pretraining_lowers_the_loss_and_repeats_itself(tmp_path):
    records = [pretrain.pretrain(SMALL, tmp_path / name) for name in ("one", "two")]
    assert records[0] == records[1]
    vocabulary = tokenizers.Tokenizer.from_file(str(tmp_path / "one" / "tokenizer.json")).get_vocab_size()
    assert records[0]["held_out_loss"] < np.log(vocabulary) - 1  # a fresh model is at the logarithm or above


def test_loss_counts_no_padding_and_no_border():
    """Against NumPy, on a row of two documents and padding."""
    from flax import nnx

    from mlora_jax.models.config import DecoderConfig
    from mlora_jax.models.decoder import Decoder

    shape = DecoderConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2)
    model = Decoder(shape, rngs=nnx.Rngs(0))
    documents = [[3, 4, 5], [6, 7, 8, 9]]
    tokens, segments = pretrain.pack(documents, 9)
    loss = pretrain.next_token_loss(*nnx.split(model), tokens, segments)
    expected = []
    for document in documents:  # each on its own, so that nothing can leak
        logits = np.asarray(model(np.array([document], np.int32)), np.float64)[0]
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected += [-log_probabilities[i, token] for i, token in enumerate(document[1:])]
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": SMALL["train"] | {"warmup_steps": 20}}, "train.steps = 20 must be above train.warmup_steps = 20"),
        ({"train": SMALL["train"] | {"batch_size": 999}}, "less than train.batch_size = 999"),
        ({"train": SMALL["train"] | {"length": 8}}, "does not fit a row of train.length = 8"),
        ({"model": SMALL["model"] | {"num_heads": 3}}, "num_heads 3"),
    ],
)
def test_impossible_configs_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        pretrain.pretrain(SMALL | change, tmp_path)
    assert not list(tmp_path.iterdir())
