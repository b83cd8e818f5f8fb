"""The base of the builders: finds raw files, digests them and reads them line by line, with errors that name the line.

A build is named by its sources. For local files, the name holds the digest of their bytes, so a changed file gets a new
build and an old build is never used for it. The bytes are digested once more while they are read, and a file that has
changed in between stops the build. For a published download, the name holds the digest of its addresses and of the
checksums that are registered beside its builder, which TFDS compares with the downloaded files. If no checksums are
registered, nothing is compared: the name depends only on the addresses, and two machines may hold different rows under
one name. TFDS writes a build under another name and renames it when it is complete, so an incomplete build is never
used.
"""

import abc
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, cast

import tensorflow_datasets as tfds

from mlora_jax.models.text_file import MalformedLineError, check_text, text_lines

DIGEST_LETTERS = 16


@dataclasses.dataclass(frozen=True)
class RawFile:
    """A raw file.

    Attributes:
      path: the path of the file.
      sha256: the digest of its bytes; empty: the file was downloaded, and TFDS checks it if a checksum is registered.
    """

    path: pathlib.Path
    sha256: str = ""

    @classmethod
    def at(cls, path: str | pathlib.Path) -> "RawFile":
        """Digests a local file."""
        path = pathlib.Path(path)
        with open(path, "rb") as file:
            return cls(path, hashlib.file_digest(file, "sha256").hexdigest())

    def lines(self, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
        """Yields (number from 1, text) of every line, see `text_lines`. Blank lines may stand only at the end.

        Raises:
          ValueError: some bytes are not text, or a blank line stands between others; the message names the file and the
            line.
          RuntimeError: the file has changed since it was digested.
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


def _digested(file: Iterable[bytes], digest: Any) -> Iterator[bytes]:
    for part in file:
        digest.update(part)
        yield part


@dataclasses.dataclass
class RawFilesConfig(tfds.core.BuilderConfig):
    """The config of a build from raw files.

    Attributes:
      files: split -> local file; empty: the build is made from the published download.
    """

    files: Mapping[str, RawFile] = dataclasses.field(default_factory=dict)


def digest_of(parts: Mapping[str, str]) -> str:
    """Returns the first 16 hexadecimal digits of the sha256 of a small table; they are the same on every machine."""
    return hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()[:DIGEST_LETTERS]


def local_config(files: Mapping[str, str | pathlib.Path]) -> RawFilesConfig:
    """Returns the config of a build from local files.

    Args:
      files: split -> path.
    """
    found = {split: RawFile.at(path) for split, path in files.items()}
    name = f"raw-{digest_of({split: file.sha256 for split, file in found.items()})}"
    return RawFilesConfig(name=name, description="Built from local raw files.", files=found)


def published_config(urls: Mapping[str, str], checksums: pathlib.Path) -> RawFilesConfig:
    """Returns the config of a build from the published download.

    Args:
      urls: split -> address.
      checksums: the path of the registered checksums, which need not exist.
    """
    registered = checksums.read_text("utf-8") if checksums.exists() else ""
    name = f"published-{digest_of({**urls, 'checksums': registered})}"
    unchecked = "" if registered else ", whose bytes are not checked: no checksums are registered"
    return RawFilesConfig(name=name, description=f"Built from the published download{unchecked}.")


def text_field(row: Mapping[str, Any], key: str, what: str = "") -> str:
    """Returns row[key], a text that is not blank.

    Args:
      row: the row.
      key: the key of the text.
      what: the name of the text in errors; empty: the key.

    Raises:
      ValueError: the text is missing, blank or not a string, or it holds half a surrogate pair; the message names it.
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
      ValueError: the line is not JSON, or not an object.
    """
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    return row


class QuietBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder without the announcements of TFDS on standard output and without its warning about new configs."""

    def _create_builder_config(self, builder_config: Any, version: Any) -> Any:
        if isinstance(builder_config, tfds.core.BuilderConfig):
            return builder_config
        return super()._create_builder_config(builder_config, version)

    def _log_download_bytes(self) -> None:
        pass

    def _log_download_done(self) -> None:
        pass


class RawFilesBuilder(QuietBuilder, skip_registration=True):
    """A builder that turns each line of its raw files into one row, in the file's order.

    A subclass states where the files are (`FILES`, `URLS`), what a row holds (`features`), and how a line becomes a row
    (`parse`). It is not registered in TFDS, where some of these names are taken.
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
        """Parses a line into a row.

        Raises:
          ValueError: the line is malformed; the message says how.
        """

    @classmethod
    def config_for(cls, *, raw_dir: str = "", **_: Any) -> tfds.core.BuilderConfig:
        """Returns the config of a build from `raw_dir`, or from the published download if it is empty."""
        return cls.local(raw_dir) if raw_dir else cls.BUILDER_CONFIGS[0]

    @classmethod
    def local(cls, folder: str) -> RawFilesConfig:
        """Returns the config of a build from `folder`, or from the folder in it that has the name of this data set.

        Raises:
          FileNotFoundError: a file is missing; the message names the folder and all missing files.
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

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        files = cast(RawFilesConfig, self.builder_config).files
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
