"""TREC question classification: six coarse types of question (Li and Roth, 2002)."""

import pathlib
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from mlora_jax.data.builders import raw_files

SOURCE = "https://cogcomp.seas.upenn.edu/Data/QA/QC/"
LABELS = ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")


class Builder(raw_files.RawFilesBuilder, skip_registration=True):
    """TREC as published: latin-1 lines `COARSE:fine question`."""

    FILES: ClassVar = {"train": "train_5500.label", "test": "TREC_10.label"}
    URLS: ClassVar = {split: SOURCE + name for split, name in FILES.items()}
    ENCODING = "latin-1"
    BUILDER_CONFIGS: ClassVar = [raw_files.published_config(URLS, pathlib.Path(__file__).parent / "checksums.tsv")]

    @classmethod
    def features(cls) -> dict[str, Any]:
        return {
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=LABELS),
            "fine": tfds.features.Text(),
        }

    @classmethod
    def parse(cls, line: str) -> dict[str, Any]:
        label, _, text = line.partition(" ")
        coarse, colon, fine = label.partition(":")
        if not colon or not fine:
            raise ValueError(f"expected 'COARSE:fine question', got {line[:60]!r}")
        if coarse not in LABELS:
            raise ValueError(f"unknown label {coarse!r}, expected one of {', '.join(LABELS)}")
        return {
            "text": raw_files.text_field({"text": text.strip()}, "text", "the question"),
            "label": coarse,
            "fine": fine,
        }
