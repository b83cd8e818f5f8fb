"""MMLU: questions of 57 subjects with four choices (Hendrycks et al., 2021)."""

import pathlib
from collections.abc import Sequence
from typing import ClassVar

from mlora_jax.data.builders import raw_files, row_files
from mlora_jax.data.published import SCHEMAS, Row

SOURCE = "https://people.eecs.berkeley.edu/~hendrycks/data.tar"


def item(row: Row) -> tuple[str, Sequence[str], int]:
    """Returns the question, the choices and the label of a published row."""
    return row["question"].strip(), [str(choice) for choice in row["choices"]], int(row["answer"])


class Builder(row_files.ChoiceBuilder, skip_registration=True):
    """MMLU with all subjects together."""

    SCHEMA = SCHEMAS["mmlu"]
    SPLITS: ClassVar = row_files.choice_splits("mmlu")
    OPTIONAL = ("validation",)
    URLS: ClassVar = dict.fromkeys(SPLITS, SOURCE)
    MEMBERS: ClassVar = {"train": "data/auxiliary_train/", "validation": "data/val/", "test": "data/test/"}
    BUILDER_CONFIGS: ClassVar = [raw_files.published_config(URLS, pathlib.Path(__file__).parent / "checksums.tsv")]
    ITEM = staticmethod(item)
