"""Which shards are still to be made in an output folder, and the last step that makes the folder complete.

A shard is done when its tar has the size that its record tells; the record is `000003.json` beside the tar while the
folder is being filled, and an entry of manifest.json afterwards. Workers that make different shards need no other
agreement, and one that is killed leaves at most a shard without a record, which is made again.
"""

import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from megarq.data.code_shards import check_size
from megarq.data.manifest import MANIFEST, CodeSettings, Manifest, ShardRecord, load_record, record_path
from megarq.errors import DataError

logger = logging.getLogger(__name__)


class Work:
    """The code shards to be made from a list of image shards: source i becomes `{i:06d}.tar`."""

    def __init__(self, folder: Path, settings: CodeSettings, sources: Sequence[str]) -> None:
        """Raises: DataError where the folder was filled from other sources or with other settings."""
        self.folder = folder
        self.settings = settings
        self.sources = list(sources)
        self._files = [f"{index:06d}.tar" for index in range(len(sources))]
        foreign = sorted(path.name for path in folder.glob("*.tar") if path.name not in self._files)
        if foreign:
            raise DataError(
                f"{folder} holds {foreign[0]}, which none of the {len(sources)} image shards becomes: it was filled "
                "from another list. Give the same --data as before, or another --output."
            )
        self._complete = Manifest.load(folder) if (folder / MANIFEST).is_file() else None

    def done(self) -> dict[int, ShardRecord]:
        """The records of the shards that are whole. Raises: DataError for one of other settings or another source."""
        return {index: record for index in range(len(self.sources)) if (record := self._done(index)) is not None}

    def finish(self) -> Manifest:
        """Write the manifest of the whole folder and remove the records that it replaces.

        Raises: DataError where a shard is missing, or there is no sample in any.
        """
        records = self.done()
        missing = [file for index, file in enumerate(self._files) if index not in records]
        if missing:
            raise DataError(
                f"{self.folder}: {len(missing)} shards are not made yet, the first is {missing[0]}. Run again."
            )
        manifest = Manifest(self.settings, tuple(records[index] for index in range(len(self.sources))))
        if manifest.samples == 0:
            raise DataError(
                f"no usable picture in {len(self.sources)} image shards, the first being {self.sources[0]!r}. "
                "Give tars whose samples have an image member (.jpg .jpeg .png .webp)."
            )
        manifest.save(self.folder)
        for file in self._files:
            record_path(self.folder, file).unlink(missing_ok=True)
        return manifest

    def _done(self, index: int) -> ShardRecord | None:
        found = load_record(self.folder, self._files[index])
        if found is None and self._complete is not None and index < len(self._complete.shards):
            found = self._complete.settings, self._complete.shards[index]
        if found is None:
            return None
        settings, record = found
        self._check_settings(settings)
        source = Path(self.sources[index]).name
        if record.source != source:
            raise DataError(
                f"{self.folder / record.file} was made from {record.source}, but image shard {index} is now {source}. "
                "Give the same --data in the same order, or another --output."
            )
        try:
            check_size(self.folder, record)
        except DataError as error:
            logger.warning("making it again: %s", error)
            return None
        return record

    def _check_settings(self, found: CodeSettings) -> None:
        for field in fields(CodeSettings):
            there, now = getattr(found, field.name), getattr(self.settings, field.name)
            if there != now:
                raise DataError(
                    f"{self.folder} was begun with {field.name}={there}, this command has {field.name}={now}. "
                    "Repeat the first command, or give another --output."
                )
