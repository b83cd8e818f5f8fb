"""Data sets of rows: every local form, the archives and Parquet files as they are published, what a bad row says."""

import bz2
import io
import json
import pathlib
import tarfile
import zipfile

import pyarrow
import pyarrow.parquet
import pytest

from mlora_jax.data.builders.hellaswag.hellaswag_dataset_builder import clean
from mlora_jax.data.load import hold_out, load_task
from mlora_jax.data.published import SCHEMAS, archive_rows
from mlora_jax.data.tasks import TASKS
from tests.evaluate import raw_data

PLATYPUS = [
    {"instruction": f"Add {n} and {n}.", "input": "" if n % 2 else "As a number.", "output": f"It is {2 * n}."}
    for n in range(20)
]
MMLU_ROWS = raw_data.mmlu_rows(["anatomy"])
# Task -> the split and rows of each of its files; those of the harness's tests are in the published schema.
FILES = {
    "platypus": {"train": PLATYPUS},
    "arc_challenge": {"train": raw_data.instruction_rows(), "test": raw_data.instruction_rows(1)},
    "hellaswag": {split: raw_data.hellaswag_rows(split) for split in ("train", "validation")},
    "mmlu": {split: MMLU_ROWS for split in ("auxiliary_train", "validation", "test")},
    "winogrande": {split: raw_data.winogrande_rows() for split in ("train", "validation")},
}
# The first training row, worded here by hand.
FIRST = {
    "platypus": (
        "### Instruction:\nAdd 0 and 0.\n\n### Input:\nAs a number.\n\n### Response:\n",
        "It is 0.",
        [],
    ),
    "arc_challenge": (
        "Question: Is ice cold?\nAnswer:",
        " yes",
        [" yes", " no", " sometimes", " nobody knows that at all"],
    ),
    "hellaswag": (
        "Roofing: A man of the train is sitting on a roof. He",
        " sleeps.. Well",
        [" sleeps.. Well", " falls.", " sings.", " eats."],
    ),
    "mmlu": ("Is ice cold?\nA. yes\nB. no\nC. both\nD. neither\nAnswer:", " A", [" A", " B", " C", " D"]),
    "winogrande": (
        "The red trophy does not fit, as the _ is too big.\nThe blank is:",
        " trophy",
        [" trophy", " suitcase"],
    ),
}


def write(folder: pathlib.Path, files, ending: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in files.items():
        path = folder / f"{split}.{ending}"
        if ending == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text(json.dumps(rows) if ending == "json" else "".join(f"{json.dumps(row)}\n" for row in rows))
    return str(folder)


@pytest.mark.parametrize("task", FILES)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_local_files_give_every_row(task, ending, tmp_path, cache):
    data = load_task(task, raw_dir=write(tmp_path / task, FILES[task], ending), cache_dir=cache)
    prompt, answer, choices = FIRST[task]
    first = {key: data.train[0][key] for key in ("prompt", "answer", "choices", "row")}
    assert first == {"prompt": prompt, "answer": answer, "choices": choices, "row": 0}
    if task != "platypus":
        evaluated = FILES[task][SCHEMAS[task].evaluated]
        assert (len(data.test), len(data.train)) == (len(evaluated), len(next(iter(FILES[task].values()))))
        assert len(data.validation) == (task == "mmlu")
        assert all(row["answer"] == row["choices"][row["label"]] for row in data.test)


def test_a_json_list_is_read_as_its_lines_are(tmp_path, cache):
    builds = [
        load_task("winogrande", raw_dir=write(tmp_path / ending, FILES["winogrande"], ending), cache_dir=cache)
        for ending in ("json", "jsonl")
    ]
    assert list(builds[0].train) == list(builds[1].train) and builds[0].build != builds[1].build


def test_a_data_set_without_test_rows_holds_some_out(tmp_path, cache):
    data = load_task("platypus", raw_dir=write(tmp_path, FILES["platypus"], "jsonl"), cache_dir=cache, holdout=0.2)
    held = hold_out(20, 0.2)
    assert [row["row"] for row in data.test] == sorted(held) and len(data.train) == 16
    assert data.train[0]["prompt"].count("### Input:") == 1
    odd = next(row for row in data.train if row["row"] % 2)
    assert odd["prompt"] == f"### Instruction:\nAdd {odd['row']} and {odd['row']}.\n\n### Response:\n"


def test_hellaswag_from_six_lines_an_item(tmp_path, cache):
    folder = tmp_path / "hellaswag"
    write(folder, {"train": raw_data.hellaswag_rows("train")}, "jsonl")
    with bz2.open(folder / "hellaswag_val_full.txt.bz2", "wt", encoding="utf-8") as file:
        file.write("Roofing: A man: he sits. he\n3\nsleeps.\nfalls.\nsings.\neats.\n")
    (row,) = load_task("hellaswag", raw_dir=str(tmp_path), cache_dir=cache).test
    assert (row["prompt"], row["answer"]) == ("Roofing: A man: he sits. he", " eats.")


def test_hellaswag_is_cleaned_as_the_harness_does():
    from lm_eval.tasks.hellaswag.utils import preprocess

    for text in (" Wash. [title] Dry [step] it.  Then  rest", "plain", "[header] How [title] [step] x"):
        assert clean(text) == preprocess(text)


def test_real_arc_has_every_row_and_its_own_answer(shared, cache):
    data = load_task("arc_challenge", raw_dir=str(shared / "data"), cache_dir=cache)
    assert (len(data.train), len(data.test)) == (1119, 1172)
    stored = json.loads((shared / "data/arc_challenge/test.json").read_text())
    for number in (0, 500, 1171):
        words, answer = stored[number]["instruction"], stored[number]["answer"].removeprefix("answer")
        row = data.test[number]
        assert row["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:") in words
        assert f"Answer{answer}:{row['answer']}" in words


# As the archives are published: member -> its text.
ARC_LINE = {
    "id": "Mercury_7",
    "question": {
        "stem": "Is ice cold?",
        "choices": [{"text": "no", "label": "1"}, {"text": "yes", "label": "2"}, {"text": "both", "label": "3"}],
    },
    "answerKey": "2",
}
ARCHIVES = {
    "arc_challenge": {
        f"ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-{split}.jsonl": f"{json.dumps(ARC_LINE)}\n"
        for split in ("Train", "Dev", "Test")
    },
    "winogrande": {
        f"winogrande_1.1/{split}.jsonl": f"{json.dumps(raw_data.winogrande_rows()[0])}\n"
        for split in ("train_xl", "dev")
    },
    "mmlu": {
        "data/auxiliary_train/race.csv": '"Is, say, ice\ncold?",no,yes,both,neither,B\n',
        "data/auxiliary_train/obqa.csv": "First?,a,b,c,d,D\n",
        "data/val/anatomy_val.csv": "Bones?,0,1,2,3,A\n",
        "data/test/anatomy_test.csv": "Teeth?,0,1,2,3,C\n",
        "data/test/virology_test.csv": "Virus?,0,1,2,3,D\n",
        "data/dev/virology_dev.csv": "Shown?,0,1,2,3,D\n",
    },
}


def write_archive(path: pathlib.Path, members) -> pathlib.Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in {**members, "other/readme": "x"}.items():
                archive.writestr(name, text)
        return path
    with tarfile.open(path, "w") as archive:
        for name, text in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return path


def download(monkeypatch, task, paths):
    """Has TFDS fetch local files in place of the task's addresses."""
    asked = []

    def fetch(manager, urls):
        asked.append(urls)
        return {url: paths for url in urls.values()} if isinstance(paths, pathlib.Path) else paths

    monkeypatch.setattr("tensorflow_datasets.download.DownloadManager.download", fetch)
    return asked


@pytest.mark.parametrize(
    ("task", "name", "train", "test"),
    [
        ("arc_challenge", "arc.zip", [("Question: Is ice cold?\nAnswer:", " yes")], 1),
        ("winogrande", "w.zip", [(FIRST["winogrande"][0], " trophy")], 1),
        (
            "mmlu",
            "data.tar",
            [
                ("First?\nA. a\nB. b\nC. c\nD. d\nAnswer:", " D"),
                ("Is, say, ice\ncold?\nA. no\nB. yes\nC. both\nD. neither\nAnswer:", " B"),
            ],
            2,
        ),
    ],
)
def test_published_archives_are_read_member_by_member(task, name, train, test, tmp_path, cache, monkeypatch):
    asked = download(monkeypatch, task, write_archive(tmp_path / name, ARCHIVES[task]))
    data = load_task(task, cache_dir=cache)
    assert [(row["prompt"], row["answer"]) for row in data.train] == train and len(data.test) == test
    assert asked == [{url: url for url in TASKS[task].builder.URLS.values()}] and len(asked[0]) == 1
    assert data.build.parent.name.startswith("published-")


def test_published_parquet_is_read_whatever_its_name(tmp_path, cache, monkeypatch):
    write(tmp_path, FILES["platypus"], "parquet")
    download(monkeypatch, "platypus", (tmp_path / "train.parquet").rename(tmp_path / "garage-bAInd_OpenPlatypus_x1"))
    assert len(load_task("platypus", cache_dir=cache).train) == 18


def test_archives_without_the_member_or_none_at_all_are_named(tmp_path):
    path = write_archive(tmp_path / "a.zip", {"x.jsonl": "{}\n"})
    with pytest.raises(ValueError, match=r"a\.zip has no y\.jsonl in it"):
        list(archive_rows(path, "y.jsonl"))
    (tmp_path / "b.zip").write_text("no archive")
    with pytest.raises(ValueError, match=r"b\.zip is neither a zip nor a tar archive"):
        list(archive_rows(tmp_path / "b.zip", "y.jsonl"))


@pytest.mark.parametrize("task", FILES)
def test_every_address_has_a_registered_checksum(task):
    builder = TASKS[task].builder
    assert set(builder.url_infos) == set(builder.URLS.values())
    assert set(builder.URLS) <= set(builder.SPLITS) and "not checked" not in builder.BUILDER_CONFIGS[0].description


BAD = [
    ("platypus", {"train": [{"instruction": "Do.", "output": " "}]}, r"train\.jsonl, row 0: the key 'output' is empty"),
    ("platypus", {"train": [PLATYPUS[0] | {"input": 3}]}, "row 0: the key 'input' must be text, got int"),
    (
        "winogrande",
        {"train": [*raw_data.winogrande_rows(), {"sentence": "A _.", "answer": "1"}], "validation": []},
        r"row 2: not in the published schema: KeyError\('option1'\)",
    ),
    (
        "winogrande",
        {"train": [raw_data.winogrande_rows()[0] | {"answer": ""}], "validation": []},
        "the answer must be 1 or 2, got ''",
    ),
    (
        "mmlu",
        {"auxiliary_train": MMLU_ROWS, "test": [MMLU_ROWS[0] | {"answer": 4}]},
        r"test\.jsonl, row 0: the label 4 is none of 4 choices",
    ),
    ("hellaswag", {"train": raw_data.hellaswag_rows("train"), "validation": []}, r"validation\.jsonl holds no rows"),
]


@pytest.mark.parametrize(("task", "files", "message"), BAD)
def test_a_row_that_cannot_be_used_is_named(task, files, message, tmp_path, cache):
    with pytest.raises(ValueError, match=message):
        load_task(task, raw_dir=write(tmp_path, files, "jsonl"), cache_dir=cache)


def test_a_missing_split_is_named(tmp_path, cache):
    folder = write(tmp_path, {"validation": raw_data.hellaswag_rows("validation")}, "jsonl")
    with pytest.raises(FileNotFoundError, match=r"hellaswag: no file of the split train in the folder .*SPLIT\.jsonl"):
        load_task("hellaswag", raw_dir=folder, cache_dir=cache)


def test_a_changed_file_is_another_build(tmp_path, cache):
    folder = write(tmp_path, FILES["winogrande"], "jsonl")
    before = load_task("winogrande", raw_dir=folder, cache_dir=cache)
    path = tmp_path / "train.jsonl"
    path.write_text(path.read_text().replace("red", "bed", 1))
    after = load_task("winogrande", raw_dir=folder, cache_dir=cache)
    assert after.build != before.build and "bed trophy" in after.train[0]["prompt"]
