"""ARC-Challenge: grade-school science questions that retrieval does not answer (Clark et al., 2018)."""

import pathlib
from collections.abc import Sequence
from typing import ClassVar

from mlora_jax.data.builders import raw_files, row_files
from mlora_jax.data.published import SCHEMAS, Row

SOURCE = "https://ai2-public-datasets.s3-us-west-2.amazonaws.com/arc/ARC-V1-Feb2018.zip"


def item(row: Row) -> tuple[str, Sequence[str], int]:
    """Returns the question, the choices and the label of a published row."""
    choices = row["choices"]
    if row["answerKey"] not in choices["label"]:
        raise ValueError(f"the answer {row['answerKey']!r} is none of {', '.join(choices['label'])}")
    return row["question"], choices["text"], choices["label"].index(row["answerKey"])


class Builder(row_files.ChoiceBuilder, skip_registration=True):
    """ARC-Challenge in the splits that the harness scores and draws its examples from."""

    SCHEMA = SCHEMAS["arc_challenge"]
    SPLITS: ClassVar = row_files.choice_splits("arc_challenge")
    OPTIONAL = ("validation",)
    URLS: ClassVar = dict.fromkeys(SPLITS, SOURCE)
    MEMBERS: ClassVar = {
        split: f"ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-{file}.jsonl"
        for split, file in (("train", "Train"), ("validation", "Dev"), ("test", "Test"))
    }
    BUILDER_CONFIGS: ClassVar = [raw_files.published_config(URLS, pathlib.Path(__file__).parent / "checksums.tsv")]
    ITEM = staticmethod(item)
