"""ARC-Easy: the grade-school science questions of ARC that are not in ARC-Challenge (Clark et al., 2018)."""

import pathlib
from typing import ClassVar

from mlora_jax.data.builders import raw_files, row_files
from mlora_jax.data.builders.arc_challenge.arc_challenge_dataset_builder import SOURCE, item
from mlora_jax.data.published import SCHEMAS


class Builder(row_files.ChoiceBuilder, skip_registration=True):
    """ARC-Easy in the splits that the harness scores and draws its examples from."""

    SCHEMA = SCHEMAS["arc_easy"]
    SPLITS: ClassVar = row_files.choice_splits("arc_easy")
    OPTIONAL = ("validation",)
    URLS: ClassVar = dict.fromkeys(SPLITS, SOURCE)
    MEMBERS: ClassVar = {
        split: f"ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-{file}.jsonl"
        for split, file in (("train", "Train"), ("validation", "Dev"), ("test", "Test"))
    }
    BUILDER_CONFIGS: ClassVar = [raw_files.published_config(URLS, pathlib.Path(__file__).parent / "checksums.tsv")]
    ITEM = staticmethod(item)
