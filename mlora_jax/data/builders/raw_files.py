"""What every builder shares: raw files found, digested and read line by line, with errors that name the line.

A build is named by what it was made from. For local files the name holds the digest of their bytes, so a
changed file is another build and an old one can never be served for it. The bytes are digested once more
while they are read: a file that changes in between stops the build. For a published download the name holds
the digest of its addresses and of the checksums registered beside its builder, which TFDS compares with what it
fetched. Where none are registered, nothing is compared: the name tells the addresses and not what lay there, and
two machines may hold different rows under one name. TFDS writes a build aside and renames it when it is complete,
so a killed build is never served.
"""

import abc
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from mlora_jax.models.text_file import MalformedLineError, check_text, text_lines

DIGEST_LETTERS = 16


@dataclasses.dataclass(frozen=True)
class RawFile:
    """A local file and the sha256 of its bytes (empty: downloaded, and checked by TFDS if a checksum is registered)."""

    path: pathlib.Path
    sha256: str = ""

    @classmethod
    def at(cls, path: str | pathlib.Path) -> "RawFile":
        path = pathlib.Path(path)
        with open(path, "rb") as file:
            return cls(path, hashlib.file_digest(file, "sha256").hexdigest())

    def lines(self, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
        """Yields (1-based number, text) of every line, see `text_lines`; blank lines are allowed at the end only.

        Raises:
            ValueError: bytes that are not text, or a blank line between others; the message names file and line.
            RuntimeError: the file is not the one that was digested.
        """
        digest = hashlib.sha256()
        blank = 0
        with self.path.open("rb") as file:
            for number, text in text_lines(_digested(file, digest), self.path, encoding):
                if not text.strip():
                    blank = blank or number
                    continue
                if blank:
                    raise MalformedLineError(self.path, blank, "the line is empty")
                yield number, text
        if self.sha256 and digest.hexdigest() != self.sha256:
            raise RuntimeError(f"{self.path} changed while it was read: run again")


def _digested(file: Iterable[bytes], digest) -> Iterator[bytes]:
    for part in file:
        digest.update(part)
        yield part


@dataclasses.dataclass
class RawFilesConfig(tfds.core.BuilderConfig):
    """A build's name and the local raw files it is made from, by split (empty: the published download)."""

    files: Mapping[str, RawFile] = dataclasses.field(default_factory=dict)


def digest_of(parts: Mapping[str, str]) -> str:
    """The first 16 hex letters of the sha256 of a small table, the same on every machine."""
    return hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()[:DIGEST_LETTERS]


def local_config(files: Mapping[str, str | pathlib.Path]) -> RawFilesConfig:
    """The config of a build from local files: split -> path."""
    found = {split: RawFile.at(path) for split, path in files.items()}
    name = f"raw-{digest_of({split: file.sha256 for split, file in found.items()})}"
    return RawFilesConfig(name=name, description="Built from local raw files.", files=found)


def published_config(urls: Mapping[str, str], checksums: pathlib.Path) -> RawFilesConfig:
    """The config of a build from the published download: split -> address, with the registered checksums, if any."""
    registered = checksums.read_text("utf-8") if checksums.exists() else ""
    name = f"published-{digest_of({**urls, 'checksums': registered})}"
    unchecked = "" if registered else ", whose bytes are not checked: no checksums are registered"
    return RawFilesConfig(name=name, description=f"Built from the published download{unchecked}.")


def text_field(row: Mapping[str, Any], key: str, what: str = "") -> str:
    """Returns row[key], a text that is not blank.

    Raises:
        ValueError: it is missing, no text, blank, or holds half a surrogate pair; the message names the key.
    """
    name = what or f"the key {key!r}"
    if key not in row:
        raise ValueError(f"{name} is missing (found {sorted(row)})")
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {type(value).__name__} {json.dumps(value)[:40]}")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    return check_text(value, name)


def json_object(text: str) -> dict[str, Any]:
    """Parses a JSON object from one line.

    Raises:
        ValueError: it is not JSON, or not an object.
    """
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    return row


class QuietBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder without TFDS's announcements on standard output and its warning of new configs."""

    def _create_builder_config(self, builder_config, version):
        if isinstance(builder_config, tfds.core.BuilderConfig):
            return builder_config
        return super()._create_builder_config(builder_config, version)

    def _log_download_bytes(self) -> None:
        pass

    def _log_download_done(self) -> None:
        pass


class RawFilesBuilder(QuietBuilder, skip_registration=True):
    """A builder that turns each line of its raw files into one row, in the file's order.

    A subclass states where the files are (`FILES`, `URLS`), what a row holds (`FEATURES`), and how a line
    becomes a row (`parse`). It is not entered in TFDS's table of names, where some of these names are taken.
    """

    VERSION = tfds.core.Version("1.0.0")
    FILES: ClassVar[Mapping[str, str]] = {}
    URLS: ClassVar[Mapping[str, str]] = {}
    ENCODING: ClassVar[str] = "utf-8"

    @classmethod
    @abc.abstractmethod
    def features(cls) -> dict[str, Any]:
        """The TFDS features of a row."""

    @classmethod
    @abc.abstractmethod
    def parse(cls, line: str) -> dict[str, Any]:
        """One line as a row; raises ValueError with what is wrong."""

    @classmethod
    def config_for(cls, *, raw_dir: str = "", **_: str) -> tfds.core.BuilderConfig:
        """The config of a build from `raw_dir`, or of the published download."""
        return cls.local(raw_dir) if raw_dir else cls.BUILDER_CONFIGS[0]

    @classmethod
    def local(cls, folder: str) -> RawFilesConfig:
        """The config of a build from `folder`, or from the folder of this data set's name in it.

        Raises:
            FileNotFoundError: names the folder and every file that is missing from it.
        """
        root = pathlib.Path(folder).expanduser()
        nested = root / cls.name
        root = nested if nested.is_dir() else root
        missing = [name for name in cls.FILES.values() if not (root / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{cls.name}: no {' and no '.join(missing)} in the folder {root}; raw_dir must hold "
                f"{', '.join(cls.FILES.values())} itself or in a folder {cls.name!r}"
            )
        return local_config({split: root / name for split, name in cls.FILES.items()})

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(self.features()),
            disable_shuffling=True,  # row i is line i of the file
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        files = self.builder_config.files
        if not files:
            paths = dl_manager.download(dict(self.URLS))
            files = {split: RawFile(pathlib.Path(path)) for split, path in paths.items()}
        return {split: self._generate_examples(file) for split, file in files.items()}

    def _generate_examples(self, file: RawFile) -> Iterator[tuple[int, dict[str, Any]]]:
        row = -1
        for row, (number, line) in enumerate(file.lines(self.ENCODING)):
            try:
                parsed = self.parse(line)
            except ValueError as error:
                raise MalformedLineError(file.path, number, str(error)) from error
            yield row, parsed
        if row < 0:
            raise ValueError(f"{file.path} holds no rows")
