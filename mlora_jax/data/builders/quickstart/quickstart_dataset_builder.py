"""Generates the task of the quickstart; nothing is downloaded."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import tensorflow_datasets as tfds

from mlora_jax.data import quickstart_text
from mlora_jax.data.builders import raw_files

SPLITS = ("train", "test")


@dataclasses.dataclass
class GeneratedConfig(tfds.core.BuilderConfig):
    """The config of a build of generated rows.

    Attributes:
      seed: the seed that the rows are generated from.
    """

    seed: int = 0


def generated_config(seed: int = 0) -> GeneratedConfig:
    """Returns the config of a build of generated rows, whose name holds the digest of the rows.

    Args:
      seed: the seed that the rows are generated from.
    """
    digest = hashlib.sha256()
    for split in SPLITS:
        for row in quickstart_text.task_rows(split, seed):
            digest.update(json.dumps([split, row], sort_keys=True).encode())
    name = f"generated-{digest.hexdigest()[: raw_files.DIGEST_LETTERS]}"
    return GeneratedConfig(name=name, description=f"Generated from seed {seed}.", seed=seed)


class Builder(raw_files.QuietBuilder, skip_registration=True):
    """The generated task; prompt, answer, choices and label are stored as they are."""

    VERSION = tfds.core.Version("1.0.0")

    @classmethod
    def config_for(cls, **_: Any) -> GeneratedConfig:
        """Returns the config of a build of the rows of seed 0."""
        return generated_config()

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "prompt": tfds.features.Text(),
            "answer": tfds.features.Text(),
            "choices": tfds.features.Sequence(tfds.features.Text()),
            "label": tfds.features.Scalar(np.int64),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(quickstart_text.task_rows(split, cast(GeneratedConfig, self.builder_config).seed))
