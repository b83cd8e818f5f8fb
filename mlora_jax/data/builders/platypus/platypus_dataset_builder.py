"""Open-Platypus: instructions of science and logic with worked answers (Lee et al., 2023)."""

import pathlib
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from mlora_jax.data.builders import raw_files, row_files
from mlora_jax.data.published import Row, Schema

SOURCE = (
    "https://huggingface.co/datasets/garage-bAInd/Open-Platypus/resolve/37141edbdb7826378cce118c46a109b813e1f038/"
    "data/train-00000-of-00001-4fe2df04669d1669.parquet"
)


class Builder(row_files.RowFilesBuilder, skip_registration=True):
    """Open-Platypus as published: instruction, input (empty in most rows) and output."""

    SCHEMA = Schema(fields=("instruction", "output"), evaluated="train", shots="train")
    SPLITS: ClassVar = {"train": "train"}
    URLS: ClassVar = {"train": SOURCE}
    BUILDER_CONFIGS: ClassVar = [raw_files.published_config(URLS, pathlib.Path(__file__).parent / "checksums.tsv")]

    @classmethod
    def features(cls) -> dict[str, Any]:
        return {name: tfds.features.Text() for name in ("instruction", "input", "output")}

    @classmethod
    def stored(cls, row: Row) -> dict[str, Any]:
        given = row.get("input") or ""
        if not isinstance(given, str):
            raise ValueError(f"the key 'input' must be text, got {type(given).__name__}")
        return {name: raw_files.text_field(row, name) for name in ("instruction", "output")} | {"input": given}
