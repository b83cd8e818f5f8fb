"""GSM8K: grade-school mathematics with worked answers (Cobbe et al., 2021)."""

import pathlib
import re
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from mlora_jax.data.builders import raw_files

SOURCE = (
    "https://raw.githubusercontent.com/openai/grade-school-math/"
    "3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/"
)
FINAL_ANSWER = re.compile(r"#### -?[0-9.,]+\s*\Z")


class Builder(raw_files.RawFilesBuilder, skip_registration=True):
    """GSM8K as published: question and worked answer, which ends in `#### number`."""

    FILES: ClassVar = {"train": "train.jsonl", "test": "test.jsonl"}
    URLS: ClassVar = {split: SOURCE + name for split, name in FILES.items()}
    BUILDER_CONFIGS: ClassVar = [raw_files.published_config(URLS, pathlib.Path(__file__).parent / "checksums.tsv")]

    @classmethod
    def features(cls) -> dict[str, Any]:
        return {"question": tfds.features.Text(), "answer": tfds.features.Text()}

    @classmethod
    def parse(cls, line: str) -> dict[str, Any]:
        row = raw_files.json_object(line)
        parsed = {key: raw_files.text_field(row, key) for key in ("question", "answer")}
        if not FINAL_ANSWER.search(parsed["answer"]):
            raise ValueError("the answer does not end in '#### number'")
        return parsed
