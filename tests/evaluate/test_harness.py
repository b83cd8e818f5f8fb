"""The harness's results on our model, against those on its own Hugging Face backend."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import lm_eval.utils
import numpy as np
import pytest
import torch
from flax import nnx
from lm_eval.api.registry import get_model
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, LlamaForCausalLM

from mlora_jax.adapters import adapt, set_profile, split
from mlora_jax.core import RankHierarchy, fold
from mlora_jax.evaluate.harness import AnswersFromMemory, NestedLM, Variant, evaluate_all
from mlora_jax.evaluate.kept_tasks import keeping
from mlora_jax.evaluate.loading import load_adapted
from mlora_jax.evaluate.task_files import load_tasks
from mlora_jax.models import load_decoder, save_decoder
from mlora_jax.training.adapter_file import save_adapter
from tests.data.conftest import write_tokenizer
from tests.evaluate import raw_data
from tests.evaluate.requests import instances
from tests.oracles.torch_generate import one_thread
from tests.tiny import random_like, write_checkpoint

ROOT = pathlib.Path(__file__).parents[2]
NAMES = ("arc_challenge", "trec", "gsm8k")
RANKS = (1, 2, 4)
TARGETS = ("q_proj", "down_proj")


def hugging_face(folder, batch_size=4, tokenizer_folder=None) -> HFLM:
    """The harness's backend."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder or folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A context of 128 tokens: some requests of two shots do not fit."""
    return write_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=128)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return raw_data.write_raw(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tasks(raw, cache):
    return load_tasks(NAMES, raw_dir=str(raw), cache_dir=cache)


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    """Two adapters of rank 4 on disk, whose every rank answers differently."""
    made = []
    for seed in (0, 1):
        adapter = split(adapt(load_decoder(folder), 4, TARGETS, key=jax.random.key(seed)))[2]
        adapter = random_like(adapter, seed=seed, scale=0.4)
        path = tmp_path_factory.mktemp("adapter")
        made.append(save_adapter(path, adapter, RankHierarchy(RANKS, "sqrt"), {"trial": {"method": "matryoshka"}}))
    return made


@pytest.fixture(scope="module")
def lm(folder, adapters):
    return NestedLM.load(checkpoint=str(folder), adapter=str(adapters[0]), batch_size=8)


@pytest.fixture(scope="module")
def base(folder):
    return NestedLM.load(checkpoint=str(folder), batch_size=8)


@pytest.fixture(scope="module")
def variants(lm, folder, adapters):
    hierarchy = RankHierarchy(RANKS, "sqrt")
    second = load_adapted(checkpoint=str(folder), adapter=str(adapters[1])).adapter
    first = lm.variant.adapter
    ranks = {"base": Variant(first, jnp.zeros(4))} | {f"{r}": Variant(first, hierarchy.prefix(r)) for r in RANKS}
    return ranks | {"other 4": Variant(second, hierarchy.prefix(4))}


def prepared(loaded, shots, **options):
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=1234)
        if task.get_config("output_type") == "generate_until" and options:
            task.set_config(key="generation_kwargs", value=options, update=True)
    return loaded


def check_equal(ours, theirs, tolerance=2e-4):
    """The same requests, answers and verdicts item by item, hence the same scores; returns the number of items."""
    count = 0
    for name, samples in theirs["samples"].items():
        for mine, other in zip(ours["samples"][name], samples, strict=True):
            assert mine["arguments"] == other["arguments"] and mine["doc_hash"] == other["doc_hash"]
            assert mine["metrics"] == other["metrics"]
            assert all(mine[metric] == other[metric] for metric in mine["metrics"]), (name, mine, other)
            if isinstance(other["filtered_resps"][0], str):
                assert mine["resps"] == other["resps"]
            else:
                for (value, greedy), (expected, likeliest) in zip(
                    mine["filtered_resps"], other["filtered_resps"], strict=True
                ):
                    assert value == pytest.approx(expected, abs=tolerance, rel=1e-5) and greedy == likeliest
            count += 1
        assert ours["results"][name] == theirs["results"][name]
    return count


def test_scores_equal_those_of_the_hugging_face_backend(folder, base, tasks):
    options = {"max_gen_toks": 20}
    ours = evaluate(base, prepared(tasks, 2, **options), limit=5, bootstrap_iters=0)
    requests = tasks["tasks"]["arc_challenge"].instances
    lengths = [len(base.tok_encode("".join(request.args))) for request in requests]
    assert min(lengths) < base.max_length + 1 < max(lengths)
    with one_thread():
        theirs = evaluate(hugging_face(folder), prepared(tasks, 2, **options), limit=5, bootstrap_iters=0)
    assert check_equal(ours, theirs) == 4 + 5 + 2 * 5  # gsm8k has two filters


@pytest.mark.parametrize("name", ["stories-260k", "tinystories-656k", "stories-3m"])
def test_token_ids_are_those_of_the_hugging_face_backend(shared, name):
    """With contexts that end in space, are empty, begin with BOS, and borders that the tokenizer merges."""
    path = shared / "models" / name
    tokenizer = AutoTokenizer.from_pretrained(path)
    config = LlamaForCausalLM.config_class(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
    )
    theirs = HFLM(pretrained=LlamaForCausalLM(config), tokenizer=tokenizer, device="cpu")
    ours = NestedLM.load(checkpoint=str(path))
    assert (ours.eot_token_id, ours.prefix_token_id) == (theirs.eot_token_id, theirs.prefix_token_id)
    bos = tokenizer.bos_token
    texts = (
        "",
        " ",
        "Once up",
        "Once upon a time, ",
        "Question: naïve?\nAnswer:\n",
        f"{bos}Once",
        f"{bos} Once",
        "a\n\n",
    )
    for text in texts:
        for special in (None, False, True):
            assert ours.tok_encode(text, add_special_tokens=special) == theirs.tok_encode(text, special), text
        for continuation in (" yes", "on", "\n", " 漢字", "</s>"):
            if text:
                assert ours._encode_pair(text, continuation) == theirs._encode_pair(text, continuation)
            else:
                for model in (ours, theirs):
                    model._loglikelihood_tokens = lambda requests, **_: requests  # passed on
                request = instances("loglikelihood", [("", continuation)])
                assert ours.loglikelihood(request, True) == theirs.loglikelihood(request, disable_tqdm=True)


def test_rolling_log_likelihoods_equal_those_of_the_hugging_face_backend(folder, lm, base):
    texts = ["Galileo", "How far is it from Denver to Aspen? " * 20, "x" * 127, "x" * 128, "x" * 129]
    requests = instances("loglikelihood_rolling", [(text,) for text in texts])
    assert len(base.tok_encode(texts[1])) > 2 * base.max_length
    with one_thread():
        expected = hugging_face(folder, 2).loglikelihood_rolling(requests, disable_tqdm=True)
    assert base.loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-5, abs=1e-3)
    assert lm.loglikelihood_rolling(requests) != pytest.approx(expected, rel=1e-3)


def test_generated_texts_equal_those_of_the_hugging_face_backend(folder, base):
    """With stop strings that occur, contexts that are cut on the left, and options that differ between requests."""
    contexts = ["Who was Galileo ?", "a", "Question: How many? " * 12, "Natalia sold 48/2 ="]
    whole = base.generate_until(instances("generate_until", [(text, {"max_gen_toks": 24}) for text in contexts]))
    assert all(whole) and len(base.tok_encode(contexts[2])) > base.max_length - 24
    stops = [whole[0][3:5], whole[3][4:6]]
    options = [{"until": stops, "max_gen_toks": 24}, {"until": stops[0], "do_sample": False, "max_gen_toks": 7}]
    requests = instances("generate_until", [(text, dict(choice)) for choice in options for text in contexts])
    with one_thread():
        expected = hugging_face(folder, 4).generate_until(requests, disable_tqdm=True)
    made = base.generate_until(requests)
    assert made == expected
    assert made[0] == whole[0].partition(stops[0])[0] and len(made[3]) < len(whole[3])


def test_sampling_is_reproducible_and_what_is_unknown_is_refused(lm):
    def sample(seed=0, **options):
        lm.seed = seed
        options = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 12} | options
        return lm.generate_until(instances("generate_until", [(text, options) for text in ("Who", "Where", "When")]))

    assert sample() == sample() != sample(seed=1)
    assert sample(top_p=1e-6) == sample(do_sample=False, temperature=0.0)
    with pytest.raises(ValueError, match="options num_beams are not supported"):
        sample(num_beams=2)
    with pytest.raises(ValueError, match="max_gen_toks=128 leaves no room"):
        sample(max_gen_toks=128)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_from_files_equals_the_folded_checkpoint(folder, adapters, raw, tasks, tmp_path, rank):
    text = f"checkpoint={folder},adapter={adapters[0]},rank={rank},readout=prefix,max_length=128,batch_size=8"
    ours = get_model("mlora_jax").create_from_arg_string(text, {"batch_size": 1, "max_batch_size": None})
    loaded = load_adapted(checkpoint=str(folder), adapter=str(adapters[0]), rank=rank)
    base = fold(loaded.base, loaded.adapter, set_profile(loaded.profile, RankHierarchy(RANKS, "sqrt").prefix(rank)))
    model = load_decoder(folder)
    graphdef, state = nnx.split(model)
    plain = {tuple(k for k in path if k != "base"): leaf for path, leaf in nnx.to_flat_state(base)}
    merged = nnx.merge(graphdef, nnx.from_flat_state([(path, plain[path]) for path, _ in nnx.to_flat_state(state)]))
    save_decoder(tmp_path, merged)
    requests = instances("loglikelihood", [("Who was it ?", " Galileo"), ("", " king"), ("When ", "then")])
    with one_thread():
        expected = hugging_face(tmp_path, tokenizer_folder=folder).loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests, disable_tqdm=True)
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in expected], rtol=1e-5, atol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_read_outs_and_the_default_rank(folder, adapters):
    options = {"checkpoint": str(folder), "adapter": str(adapters[0])}
    hierarchy = RankHierarchy(RANKS, "sqrt")
    assert load_adapted(**options).p.tolist() == hierarchy.prefix(4).tolist()
    assert load_adapted(**options, rank=2, readout="masked").p.tolist() == hierarchy.masked(2).tolist()
    squeezed, trained = load_adapted(**options, readout="squeeze"), load_adapted(**options)
    assert squeezed.p.tolist() == [1.0] * 4
    folded = [
        fold(x.base, x.adapter, set_profile(x.profile, p))
        for x, p in ((squeezed, squeezed.p), (trained, hierarchy.matryoshka()))
    ]
    for ours, expected in zip(*map(jax.tree.leaves, folded), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chekpoint": "x"}, "unknown model argument 'chekpoint': did you mean checkpoint?"),
        ({}, "checkpoint=FOLDER is missing"),
        ({"rank": 4, "adapter": ""}, "rank=4 of no adapter"),
        ({"rank": 5}, "5"),
        ({"readout": "suffix"}, "unknown read-out 'suffix'"),
        ({"max_length": 129}, "max_length=129 must be in 2..128"),
    ],
)
def test_model_arguments_that_cannot_be_used(folder, adapters, options, message):
    given = {"checkpoint": str(folder), "adapter": str(adapters[0])} if options and "chekpoint" not in options else {}
    with pytest.raises(ValueError, match=message):
        NestedLM.create_from_arg_obj(given | options)


def test_all_variants_in_one_pass_equal_one_after_the_other(lm, variants, tasks, monkeypatch):
    prepared_sets, built = [], []
    prepare, build = lm.scorer.prepare, ConfigurableTask.build_all_requests
    monkeypatch.setattr(lm.scorer, "prepare", lambda requests: prepared_sets.append(1) or prepare(requests))
    monkeypatch.setattr(
        ConfigurableTask, "build_all_requests", lambda task, **o: built.append(task) or build(task, **o)
    )
    options = {"limit": 4, "bootstrap_iters": 0}
    everything = evaluate_all(lm, variants, tasks, num_fewshot=2, gen_kwargs={"max_gen_toks": 16}, **options)
    assert [*everything] == [*variants] and len(prepared_sets) == 1 and len(built) == len(NAMES)
    compiled = lm.scorer.compiled._cache_size()
    for name, variant in variants.items():
        single = NestedLM(lm.scorer, lm.generator, lm.tokenizer, variant, max_length=lm.max_length)
        alone = evaluate(single, prepared(tasks, 2, max_gen_toks=16), **options)
        assert check_equal(everything[name], alone, tolerance=1e-4) == 16
    assert lm.scorer.compiled._cache_size() == compiled
    texts = {name: json.dumps([s["resps"] for s in r["samples"]["gsm8k"]]) for name, r in everything.items()}
    assert len(set(texts.values())) == len(texts)


def state_of_the_harness(tasks) -> dict[str, object]:
    """Every attribute of lm-eval's modules and classes, of its template environment, and of loaded tasks."""
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "lm_eval"}
    owners = dict(modules)
    for name, module in modules.items():
        classes = {each for each in vars(module).values() if isinstance(each, type)}
        owners |= {f"{name}:{each.__qualname__}": each for each in classes if each.__module__.startswith("lm_eval")}
    owners |= {"environment": lm_eval.utils.env, **{f"task {name}": task for name, task in tasks["tasks"].items()}}
    owners |= {f"sampler of {name}": task.sampler for name, task in tasks["tasks"].items()}
    found = {f"{owner}.{key}": value for owner, each in owners.items() for key, value in vars(each).items()}
    for name, task in tasks["tasks"].items():
        found |= {f"config of {name}.{key}": repr(value) for key, value in vars(task.config).items()}
    return found


def test_nothing_of_the_harness_is_changed(lm, variants, raw, cache, monkeypatch):
    """Neither after an evaluation nor while one runs."""
    tasks = load_tasks(NAMES, raw_dir=str(raw), cache_dir=cache)
    options = {"limit": 2, "bootstrap_iters": 0, "num_fewshot": 1, "gen_kwargs": {"max_gen_toks": 4}}
    evaluate_all(lm, variants, load_tasks(NAMES, raw_dir=str(raw), cache_dir=cache), **options)  # imports what is slow
    before, changed, looks = state_of_the_harness(tasks), [], []
    assert len(before) > 1000 and f"task {NAMES[0]}._config" in before and "lm_eval.utils.env" in before

    def look():
        now = state_of_the_harness(tasks)
        looks.append(len(now))
        changed.extend(key for key, value in before.items() if now.get(key) is not value and now.get(key) != value)
        changed.extend(key for key in now if key not in before)

    prepare = lm.scorer.prepare
    monkeypatch.setattr(lm.scorer, "prepare", lambda requests: look() or prepare(requests))
    evaluate_all(lm, variants, tasks, keep=lambda results: look(), **options)
    look()
    assert len(looks) == 1 + len(variants) + 1 and not changed


@pytest.mark.parametrize("template", ["{{ question }}?", "question", lambda doc: doc["question"].upper()])
def test_texts_are_kept_by_document_and_template(tasks, template):
    """And are those of the harness's own task; what a function makes is made every time."""
    own = tasks["tasks"]["arc_challenge"]
    kept, docs = keeping(own), list(own.eval_docs)[:2]
    assert type(own) is ConfigurableTask and isinstance(kept, ConfigurableTask)
    for _ in range(2):
        for doc in docs:
            assert kept.doc_to_text(doc, template) == own.doc_to_text(doc, template)
            for make in ("doc_to_text", "doc_to_target", "doc_to_choice"):
                assert getattr(kept, make)(doc) == getattr(own, make)(doc)
            kept.doc_to_choice(doc).append("another")  # the caller's own list
    assert sum(key[1] == template for key in kept.texts) == (2 if template == "{{ question }}?" else 0)


def test_a_task_that_is_a_class_keeps_its_requests(tasks, monkeypatch):
    class Python(ConfigurableTask):
        built = 0

        def build_all_requests(self, **options):
            type(self).built += 1
            super().build_all_requests(**options)

    own = object.__new__(Python)
    vars(own).update(vars(tasks["tasks"]["arc_challenge"]))
    kept = keeping(own)
    kept.set_fewshot_seed(1)
    kept.set_config("num_fewshot", 0)
    for _ in range(2):
        kept.build_all_requests(limit=2)
        assert kept.instances and all(instance.resps == [] for instance in kept.instances)
        kept.instances[0].resps.append("an answer")
    assert isinstance(kept, Python) and type(kept).built == 1


def test_repeated_draws_differ_and_are_each_variants_own(lm, variants):
    answers = AnswersFromMemory(lm, variants)
    request = instances("generate_until", [("Who", {"do_sample": True, "temperature": 2.0, "max_gen_toks": 12})])
    drawn = {}
    for name in variants:
        answers.answering = name
        drawn[name] = answers.generate_until(request * 3)
    assert all(len(set(texts)) == 3 for texts in drawn.values()) and drawn["base"] != drawn["4"]
    rolling = instances("loglikelihood_rolling", [("Who was Galileo ?",), ("a",)])
    answers.answering = "4"
    single = NestedLM(lm.scorer, lm.generator, lm.tokenizer, variants["4"], max_length=lm.max_length)
    assert answers.loglikelihood_rolling(rolling) == pytest.approx(single.loglikelihood_rolling(rolling), rel=1e-6)


def test_nothing_to_evaluate_and_nothing_to_score_are_refused(lm, tasks):
    with pytest.raises(ValueError, match="variants is empty"):
        evaluate_all(lm, {}, tasks)
    with pytest.raises(ValueError, match="nothing to score"):
        lm.loglikelihood(instances("loglikelihood", [("Who", "")]), disable_tqdm=True)


TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace(" | trim", "")], ids=["trims", "keeps"])
@pytest.mark.parametrize("opens", [True, False])
def test_chats_are_rendered_as_by_the_hugging_face_backend(folder, tmp_path, template, opens):
    path = write_tokenizer(tmp_path, bos=False, chat_template=template)
    for file in ("config.json", "model.safetensors"):
        (path / file).write_bytes((folder / file).read_bytes())
    theirs, ours = hugging_face(path), NestedLM.load(checkpoint=str(path))
    turns = [
        ("system", "Be brief."),
        ("user", " Who? "),
        ("assistant", "It was "),
        ("user", "Who?"),
        ("assistant", " I "),
    ]
    chat = [{"role": role, "content": content} for role, content in turns]
    chat = chat[:4] if opens else chat
    for some in (chat, chat[1:]):
        expected = theirs.apply_chat_template([dict(turn) for turn in some], opens)
        assert ours.apply_chat_template(some, opens) == expected
    assert ours.chat_template(True) == theirs.chat_template(True) == template
    assert ours.tokenizer_name and "/" not in ours.tokenizer_name


WITHOUT = """
import socket, sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in ("torch", "transformers", "peft", "accelerate")
        return None if hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

def refuse(*_):
    raise AssertionError("a network was asked")

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
socket.socket.connect = socket.getaddrinfo = refuse
"""
EVALUATE = """
from mlora_jax.evaluate.harness import NestedLM, evaluate_all

checkpoint, adapter, raw_dir, cache_dir = sys.argv[1:]
lm = NestedLM.load(checkpoint=checkpoint, adapter=adapter, rank=2, batch_size=8)
results = evaluate_all(lm, {"2": lm.variant}, ["arc_challenge"], raw_dir=raw_dir, cache_dir=cache_dir, limit=2)
print(results["2"]["results"]["arc_challenge"]["sample_len"])
"""
COMMAND_LINE = """
from mlora_jax.cli.lm_eval import main

main(sys.argv[1:])
"""


def run_without(script, *arguments):
    finished = subprocess.run(
        [sys.executable, "-c", WITHOUT + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=400,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_evaluating_without_torch_transformers_and_network(folder, adapters, raw, tmp_path):
    assert run_without(EVALUATE, folder, adapters[0], raw, tmp_path).split()[-1] == "2"


@pytest.mark.slow  # the harness's command line reads thousands of task files
def test_the_command_line_without_torch_transformers_and_network(folder, adapters, raw, tmp_path):
    model = f"checkpoint={folder},adapter={adapters[0]},rank=2,batch_size=8"
    options = {"tasks": "arc_challenge,gsm8k", "raw_dir": raw, "cache_dir": tmp_path, "num_fewshot": 1, "limit": 2}
    options |= {"model_args": model, "gen_kwargs": "max_gen_toks=8", "output_path": tmp_path / "out"}
    command = [text for name, value in options.items() for text in (f"--{name}", value)]
    printed = run_without(COMMAND_LINE, *command)
    assert "|arc_challenge|" in printed and "strict-match" in printed
    assert list((tmp_path / "out").rglob("results_*.json"))


def test_the_command_line_says_what_is_missing(raw, capsys):
    from mlora_jax.cli.lm_eval import main

    with pytest.raises(SystemExit, match="error: hellaswag: no folder hellaswag"):
        main(["--model_args", "checkpoint=x", "--tasks", "trec,hellaswag", "--raw_dir", str(raw)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories-260k", "tinystories-656k", "stories-3m"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_real_checkpoints_on_real_data(shared, tmp_path, name, batch_size):
    path, options = shared / "models" / name, {"limit": 20, "bootstrap_iters": 0}
    for names, shots in ((("arc_challenge", "trec", "sst2"), 2), (("gsm8k",), 1)):
        loaded = load_tasks(names, raw_dir=str(shared / "data"), cache_dir=str(tmp_path))
        ours = evaluate(NestedLM.load(checkpoint=str(path)), prepared(loaded, shots, max_gen_toks=32), **options)
        with one_thread():
            theirs = evaluate(hugging_face(path, batch_size), prepared(loaded, shots, max_gen_toks=32), **options)
        assert check_equal(ours, theirs, tolerance=1e-3)
