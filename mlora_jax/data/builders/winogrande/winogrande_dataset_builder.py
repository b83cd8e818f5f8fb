"""WinoGrande: which of two words fills the blank (Sakaguchi et al., 2019)."""

import pathlib
from collections.abc import Sequence
from typing import ClassVar

from mlora_jax.data.builders import raw_files, row_files
from mlora_jax.data.published import SCHEMAS, Row

SOURCE = "https://storage.googleapis.com/ai2-mosaic/public/winogrande/winogrande_1.1.zip"


def item(row: Row) -> tuple[str, Sequence[str], int]:
    """Returns the sentence with a blank, both options and the label of a published row."""
    if str(row["answer"]) not in ("1", "2"):
        raise ValueError(f"the answer must be 1 or 2, got {row['answer']!r}")
    return row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1


class Builder(row_files.ChoiceBuilder, skip_registration=True):
    """WinoGrande; the question is a sentence with a blank, and the choices are its two options."""

    SCHEMA = SCHEMAS["winogrande"]
    SPLITS: ClassVar = row_files.choice_splits("winogrande")
    URLS: ClassVar = dict.fromkeys(SPLITS, SOURCE)
    MEMBERS: ClassVar = {"train": "winogrande_1.1/train_xl.jsonl", "test": "winogrande_1.1/dev.jsonl"}
    BUILDER_CONFIGS: ClassVar = [raw_files.published_config(URLS, pathlib.Path(__file__).parent / "checksums.tsv")]
    ITEM = staticmethod(item)
