"""SST-2: the binary Stanford sentiment treebank, whole sentences (Socher et al., 2013)."""

import pathlib
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from mlora_jax.data.builders import raw_files

SOURCE = "https://raw.githubusercontent.com/clairett/pytorch-sentiment-classification/master/data/SST2/"
LABELS = ("negative", "positive")


class Builder(raw_files.RawFilesBuilder, skip_registration=True):
    """SST-2 in its clean form: lines `sentence TAB 0|1`, with labels for the test sentences too.

    The name of the published build depends only on its addresses. These belong to a branch that may change, and the
    bytes are not checked. The name of a build from `raw_dir` depends on the bytes.
    """

    FILES: ClassVar = {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}
    URLS: ClassVar = {split: SOURCE + name for split, name in FILES.items()}
    # There is no checksums.tsv, because the publisher states no checksums and none was verified against the download.
    BUILDER_CONFIGS: ClassVar = [raw_files.published_config(URLS, pathlib.Path(__file__).parent / "checksums.tsv")]

    @classmethod
    def features(cls) -> dict[str, Any]:
        return {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=LABELS)}

    @classmethod
    def parse(cls, line: str) -> dict[str, Any]:
        fields = line.split("\t")
        if len(fields) != 2:
            raise ValueError(f"expected 'sentence TAB label', got {len(fields)} field(s): {line[:60]!r}")
        text, label = fields[0].strip(), fields[1].strip()
        if label not in ("0", "1"):
            raise ValueError(f"the label must be 0 (negative) or 1 (positive), got {label!r}")
        return {"text": raw_files.text_field({"text": text}, "text", "the sentence"), "label": int(label)}
