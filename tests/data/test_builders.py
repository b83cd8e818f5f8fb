"""Raw files to builds: what is served, under which name, and what a bad line says."""

import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest
import tensorflow_datasets as tfds

from mlora_jax.data.builders.gsm8k import gsm8k_dataset_builder
from mlora_jax.data.builders.raw_files import MalformedLineError, RawFile, published_config
from mlora_jax.data.builders.sst2 import sst2_dataset_builder
from mlora_jax.data.builders.trec import trec_dataset_builder
from mlora_jax.data.load import load_task
from mlora_jax.data.tasks import TASKS

REPOSITORY = pathlib.Path(__file__).parents[2]
ROWS = {"gsm8k": (7473, 0, 1319), "trec": (5452, 0, 500), "sst2": (6920, 872, 1821)}


@pytest.mark.parametrize("task", ROWS)
def test_real_files_give_every_row_in_the_files_order(task, shared, cache):
    data = load_task(task, raw_dir=str(shared / "data"), cache_dir=cache)
    assert (len(data.train), len(data.validation), len(data.test)) == ROWS[task]
    builder = TASKS[task].builder
    path = shared / "data" / task / builder.FILES["train"]
    lines = path.read_bytes().decode(builder.ENCODING).splitlines()
    for row in (0, 1, len(lines) // 2, len(lines) - 1):
        words = data.train[row]["prompt"].split(": ", 1)[1].rsplit("\n", 1)[0]
        line = json.loads(lines[row])["question"] if task == "gsm8k" else lines[row]
        assert words in line and data.train[row]["row"] == row


def test_real_classifications_have_every_label_and_its_own_answer(shared, cache):
    data = load_task("trec", raw_dir=str(shared / "data"), cache_dir=cache)
    counts = [0] * 6
    for row in data.test:
        assert row["answer"] == row["choices"][row["label"]]
        counts[row["label"]] += 1
    # TREC_10.label counted with `cut -d: -f1 | sort | uniq -c`: ABBR, ENTY, DESC, HUM, LOC, NUM.
    assert counts == [9, 94, 138, 65, 81, 113]


def test_registered_checksums_of_gsm8k_are_those_of_the_real_files(shared):
    table = (pathlib.Path(gsm8k_dataset_builder.__file__).parent / "checksums.tsv").read_text().splitlines()
    registered = {line.split("\t")[3]: (int(line.split("\t")[1]), line.split("\t")[2]) for line in table}
    for name, expected in registered.items():
        content = (shared / "data" / "gsm8k" / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == expected


@pytest.mark.parametrize("task", ("gsm8k", "trec"))
def test_every_address_has_a_registered_checksum(task):
    builder = TASKS[task].builder
    assert set(builder.url_infos) == set(builder.URLS.values())


def test_a_download_without_checksums_is_called_unchecked():
    told = {name: TASKS[name].builder.BUILDER_CONFIGS[0].description for name in ("gsm8k", "trec", "sst2")}
    assert {name for name, text in told.items() if "not checked" in text} == {"sst2"}
    assert not TASKS["sst2"].builder.url_infos


@pytest.mark.parametrize("task", ROWS)
def test_raw_dir_is_the_folder_or_holds_it(task, raw, cache):
    folder = raw(task)
    inside = load_task(task, raw_dir=folder, cache_dir=cache)
    above = load_task(task, raw_dir=str(pathlib.Path(folder).parent), cache_dir=cache)
    assert inside.build == above.build
    assert list(inside.train) == list(above.train)


CHANGES = [
    ("gsm8k", "train", "train.jsonl", b"One and", b"Ore and"),
    ("gsm8k", "test", "test.jsonl", b"One and", b"Ore and"),
    ("trec", "train", "train_5500.label", b"Galileo", b"Galilea"),
    ("trec", "test", "TREC_10.label", b"atom", b"atem"),
    ("sst2", "train", "train.tsv", b"joy", b"toy"),
    ("sst2", "validation", "dev.tsv", b"not good", b"hot good"),
    ("sst2", "test", "test.tsv", b"very good\t1", b"very good\t0"),
]


@pytest.mark.parametrize(("task", "split", "name", "old", "new"), CHANGES)
def test_a_changed_byte_is_another_build_and_new_rows(task, split, name, old, new, raw, cache):
    path = pathlib.Path(raw(task)) / name
    before = load_task(task, raw_dir=str(path.parent), cache_dir=cache)
    rows = list(getattr(before, split))
    content = path.read_bytes()
    assert sum(a != b for a, b in zip(old, new, strict=True)) == 1 and old in content
    path.write_bytes(content.replace(old, new, 1))
    after = load_task(task, raw_dir=str(path.parent), cache_dir=cache)
    assert after.build != before.build
    changed = list(getattr(after, split))
    assert changed[0] != rows[0] and changed[1:] == rows[1:]
    path.write_bytes(content)
    again = load_task(task, raw_dir=str(path.parent), cache_dir=cache)
    assert again.build == before.build and list(getattr(again, split)) == rows


def test_the_build_is_reused_while_the_files_stay(raw, cache, monkeypatch):
    folder = raw("trec")
    build = load_task("trec", raw_dir=folder, cache_dir=cache).build

    def parse(line):
        raise AssertionError("built again")

    monkeypatch.setattr(trec_dataset_builder.Builder, "parse", staticmethod(parse))
    assert load_task("trec", raw_dir=folder, cache_dir=cache).build == build


def test_a_file_that_changes_while_it_is_read_stops_the_build(raw, cache):
    folder = pathlib.Path(raw("trec"))
    file = RawFile.at(folder / "TREC_10.label")
    (folder / "TREC_10.label").write_text("NUM:date When was it ?\n")
    with pytest.raises(RuntimeError, match=r"TREC_10\.label changed while it was read"):
        list(file.lines())


def test_a_missing_file_is_named_with_its_folder(raw, cache):
    folder = pathlib.Path(raw("trec"))
    (folder / "TREC_10.label").unlink()
    with pytest.raises(FileNotFoundError, match=rf"trec: no TREC_10\.label in the folder {folder}; raw_dir must"):
        load_task("trec", raw_dir=str(folder), cache_dir=cache)
    with pytest.raises(FileNotFoundError, match=r"no train_5500\.label and no TREC_10\.label in the folder"):
        load_task("trec", raw_dir=str(folder / "nowhere"), cache_dir=cache)


GOOD = json.dumps({"question": "How many?", "answer": "#### 3"})
MALFORMED = [
    ("gsm8k", "train", '{"question": "How', r"not JSON: Unterminated string starting at at column 14"),
    ("gsm8k", "train", "[1]", r"expected a JSON object, got list"),
    ("gsm8k", "test", '{"question": "a"}', r"the key 'answer' is missing \(found \['question'\]\)"),
    ("gsm8k", "train", '{"question": 7, "answer": "#### 3"}', r"the key 'question' must be text, got int 7"),
    ("gsm8k", "train", '{"question": " ", "answer": "#### 3"}', r"the key 'question' is empty"),
    ("gsm8k", "train", '{"question": "a", "answer": "three"}', r"the answer does not end in '#### number'"),
    (
        "gsm8k",
        "train",
        '{"question": "\\ud800", "answer": "#### 3"}',
        r"the key 'question' holds half a surrogate pair",
    ),
    ("gsm8k", "train", "", r"the line is empty"),
    (
        "trec",
        "train_5500",
        "PLANT:tree What is an oak ?",
        r"unknown label 'PLANT', expected one of ABBR, ENTY, DESC",
    ),
    ("trec", "train_5500", "HUM Who ?", r"expected 'COARSE:fine question', got 'HUM Who \?'"),
    ("trec", "TREC_10", "HUM:ind", r"the question is empty"),
    ("sst2", "train", "a film\t2", r"the label must be 0 \(negative\) or 1 \(positive\), got '2'"),
    ("sst2", "dev", "a film", r"expected 'sentence TAB label', got 1 field\(s\): 'a film'"),
    ("sst2", "test", "\t1", r"the sentence is empty"),
]
GOOD_LINES = {"gsm8k": GOOD, "trec": "NUM:date When ?", "sst2": "a film\t1"}


@pytest.mark.parametrize(("task", "file", "line", "message"), MALFORMED)
def test_a_malformed_line_is_named(task, file, line, message, raw, cache):
    good = GOOD_LINES[task]
    folder = raw(task, **{file: [good, line, good]})
    with pytest.raises(MalformedLineError, match=rf"{file}\.\w+, line 2: {message}"):
        load_task(task, raw_dir=folder, cache_dir=cache)
    # Nothing is left that could be served, and the mended file is.
    folder = raw(task, **{file: [good, good, good]})
    load_task(task, raw_dir=folder, cache_dir=cache)


def test_bytes_that_are_not_text_are_named(raw, cache):
    folder = raw("sst2", encoding="latin-1", train=["fine\t1", "caf\xe9\t1"])
    with pytest.raises(MalformedLineError, match=r"train\.tsv, line 2: byte 4 of the line, 0xE9, is not UTF-8 text"):
        load_task("sst2", raw_dir=folder, cache_dir=cache)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize(
    ("mark", "encoding"), [("\ufeff", "utf-8"), ("", None)], ids=["byte-order mark", "as published"]
)
@pytest.mark.parametrize(("task", "field"), [("gsm8k", "question"), ("trec", "text"), ("sst2", "text")])
def test_files_that_other_programs_have_written(task, field, mark, encoding, end, raw, cache):
    """The text of the first row, and the number of rows, whatever the line ends are and though the last lacks its."""
    lines = {"gsm8k": GOOD.replace("How", "Été"), "trec": "NUM:date Été ?", "sst2": "Été\t1"}
    folder = pathlib.Path(raw(task))
    for file in folder.iterdir():
        text = mark + end.join([lines[task]] * 3)
        file.write_bytes(text.encode(encoding or ("latin-1" if task == "trec" else "utf-8")))
    data = load_task(task, raw_dir=str(folder), cache_dir=cache)
    texts = [data.train.stored(row)[field] for row in range(len(data.train))]
    expected = {"gsm8k": json.loads(lines["gsm8k"])["question"], "trec": "Été ?", "sst2": "Été"}[task]
    assert texts == [expected] * 3 and len(data.test) == 3


def test_a_file_without_rows_is_named(raw, cache):
    with pytest.raises(ValueError, match=r"dev\.tsv holds no rows"):
        load_task("sst2", raw_dir=raw("sst2", dev=[]), cache_dir=cache)


def test_latin_1_windows_ends_byte_order_mark_and_blank_end(raw, cache):
    folder = raw("trec", encoding="latin-1", train_5500=["LOC:city Where is K\xf6ln ?\r", ""])
    assert load_task("trec", raw_dir=folder, cache_dir=cache).train[0]["prompt"] == "Question: Where is Köln ?\nType:"
    folder = raw("gsm8k", train=["\ufeff" + GOOD + "\r", "", ""])
    assert len(load_task("gsm8k", raw_dir=folder, cache_dir=cache).train) == 1


def test_a_killed_build_is_never_served(raw, cache):
    folder = raw("trec")
    script = (
        "import os\n"
        "from mlora_jax.data.builders.trec.trec_dataset_builder import Builder\n"
        "from mlora_jax.data.load import load_task\n"
        "parse, seen = Builder.parse, []\n"
        "def dying(line):\n"
        "    seen.append(line)\n"
        "    return parse(line) if len(seen) < 4 else os._exit(9)\n"  # train is written, test is not
        "Builder.parse = staticmethod(dying)\n"
        f"load_task('trec', raw_dir={folder!r}, cache_dir={cache!r})\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, timeout=120, check=False)
    assert killed.returncode == 9
    left = [path.name for path in pathlib.Path(cache).rglob("*") if path.is_dir()]
    assert any(name.startswith("incomplete") for name in left)
    data = load_task("trec", raw_dir=folder, cache_dir=cache)
    assert (len(data.train), len(data.test)) == (3, 1)


def test_a_build_finished_by_another_process_is_used(raw, cache, monkeypatch):
    folder = raw("trec")
    parse = trec_dataset_builder.Builder.parse
    nested = []

    def parse_while_another_builds(line):
        if not nested:
            nested.append(None)
            nested[0] = load_task("trec", raw_dir=folder, cache_dir=cache).build
        return parse(line)

    monkeypatch.setattr(trec_dataset_builder.Builder, "parse", staticmethod(parse_while_another_builds))
    data = load_task("trec", raw_dir=folder, cache_dir=cache)
    assert data.build == nested[0] and len(data.train) == 3


def test_a_damaged_build_is_named(raw, cache):
    folder = raw("trec")
    build = load_task("trec", raw_dir=folder, cache_dir=cache).build
    for path in build.iterdir():
        path.unlink()
    with pytest.raises(RuntimeError, match=rf"the build {build} is damaged: delete that folder"):
        load_task("trec", raw_dir=folder, cache_dir=cache)


@pytest.fixture
def server(raw, monkeypatch):
    """Serves the raw SST-2 files on this machine; yields their address and the requests so far."""
    folder = raw("sst2")
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=folder)

        def log_message(self, form, *values):
            asked.append(self.path)

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}/", asked
        listening.shutdown()
        thread.join()


def downloading(monkeypatch, address, checksums=None):
    """Points the SST-2 builder at another address, with checksums {file: sha256}."""
    builder = sst2_dataset_builder.Builder
    urls = {split: address + name for split, name in builder.FILES.items()}
    known = tfds.download.checksums.UrlInfo
    infos = {
        address + name: known(size=1, checksum=digest, filename=name) for name, digest in (checksums or {}).items()
    }
    monkeypatch.setattr(builder, "URLS", urls)
    monkeypatch.setattr(builder, "url_infos", infos)
    monkeypatch.setattr(builder, "BUILDER_CONFIGS", [published_config(urls, pathlib.Path("absent"))])


def test_the_published_download_gives_the_rows_of_the_same_local_files(server, raw, cache, monkeypatch):
    address, asked = server
    downloading(monkeypatch, address)
    data = load_task("sst2", cache_dir=cache)
    local = load_task("sst2", raw_dir=raw("sst2"), cache_dir=cache)
    assert data.build != local.build and data.build.parent.name.startswith("published-")
    for split in ("train", "validation", "test"):
        assert list(getattr(data, split)) == list(getattr(local, split))
    assert sorted(asked) == ["/dev.tsv", "/test.tsv", "/train.tsv"]
    load_task("sst2", cache_dir=cache)
    assert len(asked) == 3


def test_a_download_that_differs_from_its_checksum_is_refused(server, cache, monkeypatch):
    address, _ = server
    downloading(monkeypatch, address, {"train.tsv": "0" * 64})
    with pytest.raises(Exception, match=r"train\.tsv.*checksum") as caught:
        load_task("sst2", cache_dir=cache)
    assert type(caught.value).__name__ == "NonMatchingChecksumError"


def test_quickstart_is_generated_and_named_by_its_rows(cache, monkeypatch):
    from mlora_jax.data import quickstart_text

    data = load_task("quickstart", cache_dir=cache)
    expected = list(quickstart_text.task_rows("test", 0))
    assert [{key: row[key] for key in expected[0]} for row in data.test] == expected
    assert len(data.train) == len(list(quickstart_text.task_rows("train", 0)))

    def other_rows(split, seed=0):
        return iter([{"prompt": f"{split} a", "answer": " b", "choices": [" b", " c"], "label": 0}])

    monkeypatch.setattr(quickstart_text, "task_rows", other_rows)
    other = load_task("quickstart", cache_dir=cache)
    assert other.build != data.build and len(other.train) == 1 and other.test[0]["prompt"] == "test a"


def test_tensorflow_is_absent_and_imports_are_lazy_and_quiet(cache):
    script = (
        "import sys, importlib.util\n"
        "assert importlib.util.find_spec('tensorflow') is None\n"
        "import mlora_jax.data\n"
        "from mlora_jax.data import TASKS, load_task\n"
        "late = {'tensorflow_datasets', 'grain', 'array_record'}\n"
        "assert not late & set(sys.modules), late & set(sys.modules)\n"
        f"data = load_task('quickstart', cache_dir={cache!r})\n"
        "assert len(data.train) > len(data.test) > 0\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('tensorflow', 'keras')]\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("task", TASKS)
def test_every_builder_ships_what_tfds_reads_from_its_folder(task):
    metadata = TASKS[task].builder.get_metadata()
    assert metadata.description and metadata.tags
