"""The keys of the study: only `experiments.study` reads them."""

import pytest

from mlora_jax.cli.config_flags import SHIPPED, read_cell, read_config
from mlora_jax.config import check_key, resolve
from mlora_jax.study.keys import STUDY, resolve_cell, without_study

CELLS = sorted(path.stem for path in SHIPPED.glob("study_*.py"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"start": (5.0,)}, r"config\.study\.rates must .* hold those of config\.study\.start \(5\.0,\)"),
        ({"rates": (1e-2, 1e-3, 3e-3)}, r"config\.study\.rates must be in rising order"),
        ({"groups": ("best",)}, r"unknown group 'best' of config\.study\.groups; known: separate, leading"),
        ({"rank": 0}, r"config\.study\.rank must be at least 1, got 0"),
        ({"seed": (1,)}, r"unknown config key config\.study\.seed; did you mean config\.study\.seeds\?"),
        ({"seeds": (-1,)}, r"an entry of config\.study\.seeds must be at least 0"),
        ({"start": (0.0,)}, r"an entry of config\.study\.start must be positive and finite, got 0\.0"),
    ],
)
def test_a_study_that_cannot_be_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        resolve_cell({"study": values})


def test_a_cell_has_all_keys():
    cell = resolve_cell({"train": {"epochs": 1}, "study": {"rank": 8}})
    assert cell.study.to_dict() == STUDY.defaults() | {"rank": 8}
    assert without_study(cell) == resolve({"train": {"epochs": 1}}) and without_study(cell).is_locked
    assert without_study(resolve({})) == resolve({})


def test_only_the_study_takes_its_keys():
    for check in (lambda: resolve({"study": {"rank": 8}}), lambda: check_key("config.study.rank")):
        with pytest.raises(ValueError, match=r"unknown config key config\.study: only experiments\.study reads it"):
            check()


@pytest.mark.parametrize("name", CELLS)
def test_other_commands_take_a_cell_as_the_experiment_that_it_is(name):
    cell, config = read_cell(name), read_config(name)
    assert cell.study.groups and "study" not in config
    assert without_study(cell) == config


def test_a_mistake_in_the_group_is_told_by_every_command(tmp_path):
    file = tmp_path / "cell.py"
    file.write_text("def get_config():\n    return {'study': {'rnak': 8}}\n")
    for read in (read_cell, read_config):
        with pytest.raises(ValueError, match=r"config\.study\.rnak; did you mean config\.study\.rank\?"):
            read(str(file))
