"""What limits keep from being measured, against an evaluator that is handed the reference answers' own tokens."""

import re
import types

import jax.numpy as jnp
import numpy as np
import pytest

from mlora_jax.config import resolve
from mlora_jax.data.tasks import TASKS, Style, Task
from mlora_jax.data.tokenize import encode_row
from mlora_jax.evaluate import GenerationEvaluator
from mlora_jax.evaluate.limits import warn_of_limits
from mlora_jax.evaluate.task_files import generated_tokens
from mlora_jax.models import load_decoder
from mlora_jax.run.experiment import Experiment
from tests.tiny import adapted_trees, write_jsonl

CONTEXT, EOS = 128, (2,)
STYLES = {"default": Style(prompt="")}
GSM8K = TASKS["gsm8k"]
PLAIN = Task(name="own", styles=STYLES, metric="exact_match")
CHOICE = Task(name="own", styles=STYLES, metric="choice")
TOKENS = Task(name="own", styles=STYLES, metric="tokens")


def row(answer, prompt="How far ?"):
    return {"prompt": prompt, "answer": answer, "choices": [], "label": -1}


REASONED = [row(f"{'so 1 + 1 = 2, ' * n}\n#### 1,2{n}") for n in (0, 1, 2, 5)]
EARLY = [row(f"#### 7{' and more' * n}") for n in (0, 9)]
SHORT = [row(" 7"), row(" 12 \n\n"), row(" the whole of it")]
STOPPED = [row("Question: is it ?\n#### 7"), row("#### 7\nQuestion: what ?"), *REASONED]


@pytest.fixture(scope="module")
def adapted(checkpoint):
    return adapted_trees(load_decoder(checkpoint), 2, ("q_proj",))


def warnings(tokenizer, caplog, task, rows, *, split="test", context=CONTEXT, **changes):
    """The warnings of one split; changes are keys of a config with _ for the dot."""
    config = {}
    for name, value in changes.items():
        group, _, key = name.partition("_")
        config.setdefault(group, {})[key] = value
    data = types.SimpleNamespace(task=task, boundary="separate")
    caplog.clear()
    warn_of_limits(resolve(config), data, {split: rows}, tokenizer, context=context, eos=EOS)
    return [record.getMessage() for record in caplog.records]


def verdicts(adapted, tokenizer, monkeypatch, task, rows, limit):
    """Those of the evaluator where the model answers with the reference's tokens, cut to the limit."""
    graphdef, base, adapter, profile = adapted
    shapes = {"max_length": CONTEXT, "batch_size": 2, "pad_multiple": 16}
    options = {"boundary": "separate", "task": task, "stop": EOS, "max_new_tokens": limit, **shapes}
    evaluator = GenerationEvaluator(graphdef, base, profile, rows, tokenizer, **options)

    def raw_answers(adapter, prompts, p, *, max_new_tokens, stop):
        made = []
        for row in rows:
            example = encode_row(row, tokenizer, boundary="separate")
            tokens = example.tokens[example.loss_mask].tolist()
            made.append(np.array(tokens[: tokens.index(2)][:max_new_tokens], np.int32))
        return made

    monkeypatch.setattr(evaluator.generator, "raw_answers", raw_answers)
    return evaluator(adapter, jnp.zeros(2))


@pytest.mark.parametrize(
    ("task", "rows"),
    [(GSM8K, REASONED), (GSM8K, EARLY), (GSM8K, STOPPED), (PLAIN, SHORT)],
    ids=["reasons", "early", "stop", "whole"],
)
def test_counts_are_those_of_an_evaluator_that_is_given_the_references(
    adapted, tokenizer, monkeypatch, caplog, task, rows
):
    whole = verdicts(adapted, tokenizer, monkeypatch, task, rows, CONTEXT - 1)
    for limit in (1, 2, 4, 8, 16, 32, 64):
        right = verdicts(adapted, tokenizer, monkeypatch, task, rows, limit)
        said = warnings(tokenizer, caplog, task, rows, evaluation_max_new_tokens=limit)
        wrong, beyond = int((~whole).sum()), int((whole & ~right).sum())
        assert [f"{wrong} of {len(rows)} test items count as wrong even where" in text for text in said].count(
            True
        ) == bool(wrong)
        assert [f"the reference answers of {beyond} of {len(rows)} test items need" in text for text in said].count(
            True
        ) == bool(beyond)
        if beyond:
            need = int(
                said[bool(wrong)].partition("evaluation.max_new_tokens=")[2].partition("max_new_tokens=")[2].split()[0]
            )
            assert (verdicts(adapted, tokenizer, monkeypatch, task, rows, need) == whole).all()
            assert not (verdicts(adapted, tokenizer, monkeypatch, task, rows, need - 1) == whole).all()


def test_nothing_is_said_where_every_reference_fits(tokenizer, caplog):
    assert warnings(tokenizer, caplog, GSM8K, REASONED, evaluation_max_new_tokens=100) == []
    assert warnings(tokenizer, caplog, PLAIN, SHORT, evaluation_max_new_tokens=100) == []


def test_some_references_are_longer(tokenizer, caplog):
    count = len(tokenizer.encode(" the whole of it", bos=False))
    assert warnings(tokenizer, caplog, PLAIN, SHORT, evaluation_max_new_tokens=count - 1) == [
        f"the reference answers of 1 of 3 test items need more than config.evaluation.max_new_tokens={count - 1} "
        f"tokens, the longest {count}; an answer that is cut off before its end counts as wrong: set "
        f"config.evaluation.max_new_tokens={count} or more"
    ]


def test_all_references_are_longer(tokenizer, caplog):
    rows = [row(" 1234567890" * n) for n in (2, 3)]
    said = warnings(tokenizer, caplog, PLAIN, rows, evaluation_max_new_tokens=1)
    assert len(said) == 2 and "the reference answers of 2 of 2 test items" in said[0]
    assert said[1] == "none of the 2 test items can be right, so their accuracy will be 0 at every rank"
    # A number behind shorter reasons is right too.
    said = warnings(tokenizer, caplog, GSM8K, REASONED, evaluation_max_new_tokens=1)
    assert len(said) == 1 and "the reference answers of 4 of 4 test items" in said[0]


def test_an_accuracy_of_zero_that_would_decide_about_training_is_an_error(tokenizer, caplog):
    rows = [row(" 1234567890" * n) for n in (2, 3)]
    given = {"split": "validation", "evaluation_max_new_tokens": 1}
    with pytest.raises(ValueError, match=r"none of the 2 validation items can be right.* decide which adapter is kept"):
        warnings(tokenizer, caplog, PLAIN, rows, validation_every=5, **given)
    for changes in ({}, {"validation_every": 5, "validation_measure": "loss"}):
        assert len(warnings(tokenizer, caplog, PLAIN, rows, **given, **changes)) == 2


def test_answers_that_do_not_fit_into_the_context(tokenizer, caplog):
    said = warnings(tokenizer, caplog, PLAIN, [row(" 1234567890" * 20), row(" 7")], evaluation_max_new_tokens=64)
    assert len(said) == 1 and said[0].endswith("the model's context has 128 tokens, so shorten those answers")


def test_stop_strings_in_a_reference(tokenizer, caplog):
    said = warnings(tokenizer, caplog, GSM8K, STOPPED, evaluation_max_new_tokens=100)
    assert said == [
        "1 of 6 test items count as wrong even where a model answers with the reference word for word, the first of "
        "them row 0: it holds the stop string 'Question:', which ends an answer; the task sets it"
    ]


def test_a_token_in_a_reference_that_ends_an_answer(tokenizer, caplog):
    text = tokenizer.decode([2], skip_special_tokens=False)
    said = warnings(tokenizer, caplog, PLAIN, [row(" 7"), row(f" 7{text} 8")], evaluation_max_new_tokens=100)
    assert len(said) == 1 and "the first of them row 1: its tokens up to the first that ends an answer spell" in said[0]


@pytest.mark.parametrize(
    ("length", "new", "way_out"),
    [
        (16, 8, r": set config.data.max_length=\d+ or more"),
        (128, 120, r"context of 128 tokens has to hold config.evaluation.max_new_tokens=120 besides, so lower that or"),
    ],
)
def test_prompts_that_lose_their_beginning(tokenizer, caplog, length, new, way_out):
    rows = [row(" 7", prompt="How far is it ? " * n) for n in (1, 4, 6)]
    counts = [len(tokenizer.encode(each["prompt"], bos=True)) for each in rows]
    most = min(length, CONTEXT - new)
    cut = sum(count > most for count in counts)
    said = warnings(tokenizer, caplog, PLAIN, rows, data_max_length=length, evaluation_max_new_tokens=new)
    assert cut and len(said) == 1
    start = (
        f"{cut} of 3 test prompts are longer than {most} tokens, the longest {max(counts)}, and lose their beginning"
    )
    assert said[0].startswith(start)
    assert re.search(way_out, said[0])


@pytest.mark.parametrize("task", [CHOICE, TOKENS], ids=["choice", "tokens"])
def test_rows_that_data_max_length_cuts(tokenizer, caplog, task):
    choices = [" yes", " no"] if task is CHOICE else []
    rows = [row(" yes", prompt="How far is it ? " * n) | {"choices": choices, "label": 0} for n in (1, 2, 6)]
    counts = [len(encode_row(each, tokenizer, boundary="separate").tokens) - (task is CHOICE) for each in rows]
    for limit, cut in ((max(counts), 0), (max(counts) - 1, 1), (min(counts), 2)):
        said = warnings(tokenizer, caplog, task, rows, data_max_length=limit)
        assert len(said) == bool(cut)
        if cut:
            assert said[0].startswith(f"{cut} of 3 test items are longer than config.data.max_length={limit} tokens")
            assert said[0].endswith(f": set config.data.max_length={max(counts)} or more")
    said = warnings(tokenizer, caplog, task, rows, data_max_length=8, context=8)
    assert said[0].endswith("the model's context has 8 tokens, so shorten them")


def test_a_run_says_it_once_when_it_loads_its_data(checkpoint, caplog, tmp_path):
    own = write_jsonl(tmp_path / "own.jsonl", rows=20, shift=500)
    config = resolve(
        {
            "model": {"path": str(checkpoint)},
            "data": {"file": str(own), "cache_dir": str(tmp_path / "cache"), "max_length": 64},
            "evaluation": {"max_new_tokens": 1},
        }
    )
    experiment = Experiment.load(config)
    said = [record.getMessage() for record in caplog.records]
    for name, rows in experiment.rows.items():
        start = f"the reference answers of {len(rows)} of {len(rows)} {name} items need more than"
        assert len([text for text in said if text.startswith(start)]) == 1
    experiment.adapted(1), experiment.adapted(2)
    assert len(caplog.records) == len(said)


def test_a_harness_task_whose_answers_leave_no_room(tokenizer, caplog, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("task: own\noutput_type: generate_until\ngeneration_kwargs:\n  max_gen_toks: 99\n")
    assert generated_tokens("gsm8k", 256) == 256 and generated_tokens(str(own), 256) == 99
    assert generated_tokens("hellaswag", 256) is None and generated_tokens("mmlu", 256) is None
    tasks = (("gsm8k", 3), str(own))
    with pytest.raises(ValueError, match=r"the answers of the task gsm8k of config.evaluation.tasks may have 256 tok"):
        warnings(tokenizer, caplog, PLAIN, SHORT, evaluation_tasks=tasks, evaluation_max_new_tokens=64)
    assert warnings(tokenizer, caplog, PLAIN, SHORT, evaluation_tasks=tasks, context=512) == []
