"""The records of a study's cell: what goes in comes out, and records of something else are refused."""

import json

import numpy as np
import pytest

from mlora_jax.run.folder import LEDGER
from mlora_jax.study.keys import resolve_cell
from mlora_jax.study.records import append_new, pack, read_measured, unpack
from mlora_jax.study.rivals import Rival
from mlora_jax.training.curve_records import BASE, CURVES, CurveKey, CurveRecord, failed_line
from mlora_jax.training.records import JsonLines

RANKS, ITEMS = (1, 2, 3), 11
TRIAL, FAILED = (Rival("lora").trial(3, rate, 42) for rate in (1e-3, 1e-1))
METHODS = {"mine": (("lora", 0.5), ("per_example", 0.5))}


def config(**changes):
    return resolve_cell({"methods": METHODS, "study": {"rank": 3}} | changes)


@pytest.fixture
def folder(tmp_path):
    """The folder of a run with the base, a curve and a failed trial."""
    found = tmp_path / "cell"
    (found / "verdicts/test").mkdir(parents=True)
    verdicts = np.random.default_rng(0).uniform(size=(3, ITEMS)) < 0.4
    np.save(found / f"verdicts/test/{TRIAL.name}-prefix.npy", verdicts)
    curve = CurveRecord(TRIAL, "trec", "test", "prefix", RANKS, tuple(verdicts.mean(1)), (0.1, 0.2, None), ITEMS)
    base = CurveRecord(None, "trec", "test", BASE, (0,), (0.25,), (0.1,), ITEMS)
    with JsonLines(found / CURVES) as lines:
        lines.write(*base.to_lines(), *curve.to_lines(), failed_line(FAILED))
    write_inputs(found, data="d")
    return found


def write_inputs(folder, **digests):
    (folder / LEDGER).write_text(json.dumps({"inputs": {"base": "b", **digests}}))


def test_records_hold_what_the_folder_holds(folder, tmp_path):
    file = tmp_path / "records/cell.jsonl"
    assert append_new(folder, file, config(), origin={"revision": "abc"}) == 4
    there, here = read_measured(tmp_path / "none", file, config()), read_measured(folder)
    assert there.curves == here.curves and FAILED.name in there.curves.failed
    assert there.verdicts.keys() == here.verdicts.keys() == {CurveKey(TRIAL.name, "test", "prefix")}
    for key, verdicts in here.verdicts.items():
        np.testing.assert_array_equal(there.verdicts[key], verdicts)
    assert there.inputs == {"base": "b", "data": "d"}
    assert append_new(folder, file, config(), origin={}) == 0  # nothing is new
    assert all(json.loads(line).get("revision", "abc") == "abc" for line in file.read_text().splitlines())


def test_paths_and_further_methods_do_not_matter(folder, tmp_path):
    file = tmp_path / "cell.jsonl"
    append_new(folder, file, config(model={"path": "/here/base"}), origin={})
    assert "here" not in file.read_text()
    others = config(
        model={"path": "there"}, methods=METHODS | {"more": (("lora", 1.0),)}, study={"rank": 3, "seeds": (1,)}
    )
    assert TRIAL.name in {key.trial for key in read_measured(tmp_path, file, others).curves.whole}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train": {"epochs": 7}}, r"config\.train\.epochs was 3 and is 7"),
        ({"methods": {"mine": (("lora", 0.7), ("per_example", 0.3))}}, r"config\.methods\.mine was"),
    ],
)
def test_records_of_another_config_are_refused(folder, tmp_path, changes, named):
    file = tmp_path / "cell.jsonl"
    append_new(folder, file, config(), origin={})
    with pytest.raises(ValueError, match=rf"cell\.jsonl holds records of another config of the cell: {named}"):
        read_measured(folder, file, config(**changes))
    with pytest.raises(ValueError, match=named):
        append_new(folder, file, config(**changes), origin={})


def test_records_of_other_data_are_refused(folder, tmp_path):
    append_new(folder, tmp_path / "cell.jsonl", config(), origin={})
    write_inputs(folder, data="another")
    with pytest.raises(ValueError, match=r"cell\.jsonl holds records of another data than the run in"):
        append_new(folder, tmp_path / "cell.jsonl", config(), origin={})


@pytest.mark.parametrize(
    "damage", [("at_rank", "of"), ('"bits": "', '"bits": "AA'), ('"of_ranks": 3', '"of_ranks": 4')]
)
def test_a_damaged_line_is_named(folder, tmp_path, damage):
    file = tmp_path / "cell.jsonl"
    append_new(folder, file, config(), origin={})
    lines = file.read_text().splitlines(keepends=True)
    at = next(at for at, line in enumerate(lines) if "verdicts" in line)
    lines[at] = lines[at].replace(*damage)
    file.write_text("".join(lines))
    with pytest.raises(ValueError, match=rf"cell\.jsonl: line {at + 1} is not the record of a curve"):
        read_measured(tmp_path, file)


@pytest.mark.parametrize("shape", [(1, 1), (6, 500), (3, 7)])
def test_verdicts_are_packed_without_loss(shape):
    verdicts = np.random.default_rng(1).uniform(size=shape) < 0.5
    packed = json.loads(json.dumps(pack(verdicts)))
    np.testing.assert_array_equal(unpack(packed), verdicts)
    assert len(packed["bits"]) < verdicts.size / 8 * 4 / 3 + 24
