"""HellaSwag: which ending follows (Zellers et al., 2019)."""

import pathlib
import re
from collections.abc import Sequence
from typing import ClassVar

from mlora_jax.data.builders import raw_files, row_files
from mlora_jax.data.published import SCHEMAS, Row

SOURCE = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/"


def clean(text: str) -> str:
    """Removes WikiHow's marks from a text, as lm-evaluation-harness does.

    >>> clean(" How to wash [title] Dry. [step] Now it  is done")
    'How to wash. Dry. Now it is done'
    """
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def item(row: Row) -> tuple[str, Sequence[str], int]:
    """Returns the context, the endings and the label of a published row. The six-line form has an undivided context."""
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}" if "ctx_a" in row else row["ctx"]
    return clean(f"{row['activity_label']}: {context}"), [clean(ending) for ending in row["endings"]], int(row["label"])


class Builder(row_files.ChoiceBuilder, skip_registration=True):
    """HellaSwag with the contexts and endings that the harness shows."""

    SCHEMA = SCHEMAS["hellaswag"]
    SPLITS: ClassVar = row_files.choice_splits("hellaswag")
    URLS: ClassVar = {"train": f"{SOURCE}hellaswag_train.jsonl", "test": f"{SOURCE}hellaswag_val.jsonl"}
    BUILDER_CONFIGS: ClassVar = [raw_files.published_config(URLS, pathlib.Path(__file__).parent / "checksums.tsv")]
    ITEM = staticmethod(item)
