"""Greedy answers under a checkpoint's generation_config.json, against `model.generate` and lm-eval's own backend."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mlora_jax.data.tasks import Style, Task
from mlora_jax.evaluate import GenerationEvaluator, Generator
from mlora_jax.evaluate.generation import warn_once
from mlora_jax.evaluate.harness import NestedLM
from mlora_jax.evaluate.programs import PromptRows
from mlora_jax.models import Tokenizer, load_decoder
from mlora_jax.models.generation_config import APPLIED, FIELDS, read_generation_settings
from mlora_jax.parallel.mesh import make_mesh
from tests.evaluate.requests import instances
from tests.oracles.torch_generate import one_thread
from tests.tiny import adapted_trees, write_checkpoint

NEW, END = 14, 2
PROMPTS = [[7], [1, 40, 41, 42, 40, 41], [1, 17, 90], [1, 300, 5, 300, 5, 300, 5, 61, 300]]


def generate(folder, prompts=PROMPTS, **options):
    """`model.generate` on each prompt alone, and the smallest gap between two largest scores of any step."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers, least = [], np.inf
    with one_thread():
        for prompt in prompts:
            found = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
                max_new_tokens=NEW, pad_token_id=0, return_dict_in_generate=True, output_scores=True, **options,
            )  # fmt: skip
            made = found.sequences[0, len(prompt) :].tolist()
            answers.append(made[: made.index(END)] if END in made else made)
            top = torch.stack(found.scores)[:, 0].topk(2).values
            least = min(least, float((top[:, 0] - top[:, 1]).min()))
    return answers, least


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), tie_word_embeddings=False)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    return folder


@pytest.fixture(scope="module")
def trees(folder):
    return adapted_trees(load_decoder(folder), 1, ("q_proj",))


@pytest.fixture(scope="module")
def plain(folder):
    return generate(folder)[0]


def with_settings(folder, tmp_path, values):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": END} | values))
    return copy


def answers_of(folder, trees, prompts=PROMPTS, *, mesh=None, **options):
    graphdef, base, adapter, profile = trees
    shapes = {"max_length": 64, "batch_size": 4, "pad_multiple": 16, "eos": (END,), "mesh": mesh}
    run = Generator(graphdef, base, profile, settings=read_generation_settings(folder), **shapes)
    made = run.generate(adapter, prompts, [[float(row % 2)] for row in range(len(prompts))], max_new_tokens=NEW,
                        **options)  # fmt: skip
    return made, run


def cases(plain):
    """Settings that change the answers; ids are taken from the plain ones."""
    first, others = plain[1], plain[3]
    ends = {"exponential_decay_length_penalty": [3, 1.9]}
    return {
        "repetition_penalty": {"repetition_penalty": 1.7},
        "repetition_penalty below 1": {"repetition_penalty": 0.6},
        "encoder_repetition_penalty": {"encoder_repetition_penalty": 2.5},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
        "no_repeat_ngram_size of one": {"no_repeat_ngram_size": 1},
        "encoder_no_repeat_ngram_size": {
            "sequence_bias": [[[40], 60.0], [[40, 41], 80.0]], "encoder_no_repeat_ngram_size": 2,
        },
        "bad_words_ids": {"bad_words_ids": [[END], [first[0]], first[4:6], others[2:5]]},
        "sequence_bias": {"sequence_bias": [[[first[1]], -30.0], [[*first[:1], 77], 60.0], [[*others[:2], 9], 60.0]]},
        "suppress_tokens": {"suppress_tokens": [first[0], others[1]]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [answer[0] for answer in plain]},
        "forced_bos_token_id": {"forced_bos_token_id": 33},
        "forced_bos_token_id, suppressed": {"forced_bos_token_id": 33, "begin_suppress_tokens": list(range(0, 300))},
        "forced_eos_token_id": {"suppress_tokens": [END], "forced_eos_token_id": [END, 60]},
        "exponential_decay_length_penalty": ends,
        "min_new_tokens": ends | {"min_new_tokens": 9},
        "min_length": ends | {"min_length": 13},
        "min_length and min_new_tokens": ends | {"min_length": 13, "min_new_tokens": 7},
        "several": ends | {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3, "min_new_tokens": 7,
                           "suppress_tokens": [plain[0][0]]},
    }  # fmt: skip


NAMES = tuple(cases([list(range(10, 24))] * 4))


SLOW = (
    "repetition_penalty below 1",
    "no_repeat_ngram_size of one",
    "forced_bos_token_id, suppressed",
    "min_length and min_new_tokens",
)


def test_every_field_that_is_applied_is_tested():
    made = [case for name, case in cases([list(range(10, 24))] * 4).items() if name not in SLOW]
    assert {name for case in made for name in case} == {name for name, row in FIELDS.items() if row.effect == APPLIED}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in NAMES])
def test_greedy_answers_equal_those_of_transformers(folder, trees, plain, tmp_path, name):
    """Prompts of different lengths in one batch, at ranks of their own; the adapter's B is zero."""
    values = cases(plain)[name]
    copy = with_settings(folder, tmp_path, values)
    expected, gap = generate(copy)
    assert gap > 1e-4 or name.startswith("forced") or "suppress" in name
    without = dict([*values.items()][:-1])  # the field that the case is about comes last
    assert expected != (generate(with_settings(folder, tmp_path / "without", without))[0] if without else plain)
    made, run = answers_of(copy, trees)
    assert made == expected
    assert run.compilations == 2


def test_a_later_step_than_one_call_of_decode_sees_the_whole_text(folder, trees, tmp_path):
    copy = with_settings(folder, tmp_path, {"no_repeat_ngram_size": 1, "repetition_penalty": 1.2})
    graphdef, base, adapter, profile = trees
    run = Generator(graphdef, base, profile, settings=read_generation_settings(copy), max_length=64, batch_size=1,
                    pad_multiple=8, eos=())  # fmt: skip
    (made,) = run.generate(adapter, [[1, 5]], jnp.ones(1), max_new_tokens=50)
    assert len(made) == 50 and len({1, 5, *made}) == 52


def test_rows_that_lie_on_a_mesh_follow_the_same_rules(folder, trees, tmp_path):
    copy = with_settings(folder, tmp_path, SETTINGS | {"min_new_tokens": 8})
    mesh = make_mesh({"trial": 1, "data": 2, "fsdp": 1, "tensor": 1}, jax.devices()[:2])
    assert answers_of(copy, trees, mesh=mesh)[0] == answers_of(copy, trees)[0] == generate(copy)[0]


def test_what_says_nothing_leaves_the_programs_as_they_were(folder, trees, tmp_path):
    """No rows of tokens are kept, and the compiled step has the same text."""
    copy = with_settings(folder, tmp_path, {"repetition_penalty": 1.0, "top_k": 20, "no_repeat_ngram_size": 0})
    graphdef, base, adapter, profile = trees
    texts = []
    for settings in (None, read_generation_settings(copy)):
        run = Generator(graphdef, base, profile, settings=settings, max_length=64, batch_size=4, pad_multiple=16,
                        eos=(END,))  # fmt: skip
        rows = PromptRows(*(jnp.zeros(4, jnp.int32),) * 3)
        state = run.programs.begin(4, 16, base, adapter)
        assert state.tokens is None
        arguments = base, adapter, jnp.ones(1), state, rows, jnp.asarray(4), None
        texts.append(run.programs.decode.lower(False, *arguments).as_text())
    assert texts[0] == texts[1]


def test_logits_that_are_not_finite_are_told_even_where_a_rule_hides_them(folder, trees, tmp_path, caplog):
    copy = with_settings(folder, tmp_path, {"suppress_tokens": [*range(1, 330)]})
    graphdef, base, adapter, profile = trees
    broken = jax.tree.map(lambda x: x * jnp.nan, adapter)
    made, _ = answers_of(copy, (graphdef, base, broken, profile), PROMPTS[1:2] * 2)
    assert made == [[], []] and "not finite" in caplog.text


def test_settings_of_draws_are_named_and_what_is_unknown_too(folder, trees, tmp_path, caplog):
    copy = with_settings(folder, tmp_path, {"top_p": 0.5, "top_k": 5, "do_sample": True, "chat_format": "x"})
    made, run = answers_of(copy, trees)
    assert made == generate(copy)[0]
    assert [r.getMessage().partition(".json: ")[2] for r in caplog.records] == [
        "chat_format='x' is not applied: it is no field that transformers or this program knows"
    ]
    caplog.clear()
    for _ in range(2):
        run.generate(trees[2], PROMPTS[:1], jnp.ones(1), max_new_tokens=2, temperature=0.5)
    assert [record.getMessage().partition(".json: ")[2] for record in caplog.records] == [
        "draws do not apply top_p=0.5, top_k=5: ask for it"
    ]


def test_what_is_refused_stops_generation_alone(folder, trees, tmp_path):
    copy = with_settings(folder, tmp_path, {"num_beams": 3})
    with pytest.raises(ValueError, match=r"generation_config.json: num_beams=3 is not supported \(there is no beam"):
        answers_of(copy, trees)
    lm = NestedLM.load(checkpoint=str(copy))
    assert lm.loglikelihood(instances("loglikelihood", [("Who", " was")]), disable_tqdm=True)
    with pytest.raises(ValueError, match="num_beams=3 is not supported"):
        lm.generate_until(instances("generate_until", [("Who", {"max_gen_toks": 4})]))
    with pytest.raises(ValueError, match="num_beams=3 is not supported"):
        evaluator(copy, trees)


ROWS = [{"prompt": p, "answer": "7", "choices": [], "label": -1} for p in ("How far ?", "a", "Natalia sold 48/2 =")]
SETTINGS = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "exponential_decay_length_penalty": [6, 1.5]}


def evaluator(folder, trees):
    graphdef, base, _, profile = trees
    return GenerationEvaluator(
        graphdef, base, profile, ROWS, Tokenizer.load(folder), boundary="separate", stop=(END,), max_length=64,
        task=Task(name="own", styles={"default": Style(prompt="")}, metric="exact_match"), max_new_tokens=NEW,
        batch_size=4, pad_multiple=16, settings=read_generation_settings(folder),
    )  # fmt: skip


def test_exact_match_answers_under_the_settings(folder, trees, tmp_path):
    copy = with_settings(folder, tmp_path, SETTINGS)
    tokenizer = Tokenizer.load(copy)
    made, _ = generate(copy, [tokenizer.encode(row["prompt"], bos=True) for row in ROWS])
    assert evaluator(copy, trees).texts(trees[2], jnp.zeros(1)) == [tokenizer.decode(ids) for ids in made]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    "settings", [{"repetition_penalty": 1.5}, SETTINGS | {"min_new_tokens": 8}], ids=["one", "all"]
)
def test_harness_texts_equal_those_of_the_hugging_face_backend(folder, tmp_path, settings, batch_size):
    """In batches with prompts of different lengths, which that backend pads on the left."""
    copy = with_settings(folder, tmp_path, settings)
    contexts = ["Who was Galileo ?", "a", "Question: How many? " * 3, "Natalia sold 48/2 ="]
    requests = instances("generate_until", [(text, {"until": ["zz"], "max_gen_toks": 20}) for text in contexts])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(copy)
    model = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
    with one_thread():
        theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")
        expected = theirs.generate_until(requests, disable_tqdm=True)
    assert NestedLM.load(checkpoint=str(copy)).generate_until(requests) == expected
    assert NestedLM.load(checkpoint=str(folder)).generate_until(requests) != expected


def test_the_harness_names_a_limit_that_it_does_not_take(folder, tmp_path, caplog):
    warn_once.cache_clear()
    copy = with_settings(folder, tmp_path, {"max_new_tokens": 64})
    request = instances("generate_until", [("Who", {"max_gen_toks": 4})])
    NestedLM.load(checkpoint=str(copy)).generate_until(request)
    assert "max_new_tokens=64 is not applied: the task's limit of 4 tokens holds" in caplog.text


def test_config_json_is_the_older_place(folder, tmp_path):
    """Where there is no generation_config.json transformers takes settings of generation from config.json."""
    copy = with_settings(folder, tmp_path, {})
    (copy / "generation_config.json").unlink()
    for name, value in {"repetition_penalty": 1.5, "suppress_tokens": [4], "min_new_tokens": 3}.items():
        values = json.loads((folder / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(values | {name: value}))
        model = AutoModelForCausalLM.from_pretrained(copy)
        assert getattr(model.generation_config, name) == value
        assert [*read_generation_settings(copy).applied()] == [name]
