"""Which shards are still to be made in an output folder, who makes them, and the last step that completes the folder.

A shard is done when its tar has the size that its record tells; the record is `000003.json` beside the tar while the
folder is being filled, and an entry of manifest.json afterwards. Locks keep workers apart (`data/shared_work`).
"""

import logging
import os
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from megarq.data.code_shards import check_size
from megarq.data.faults import Faults
from megarq.data.manifest import MANIFEST, CodeSettings, Manifest, ShardRecord, load_record, record_path
from megarq.data.shared_work import locked, remove_leftovers, take_files
from megarq.data.sources import is_local, local_size, source_name
from megarq.errors import DataError
from megarq.inference.pretrained import save_rqvae
from megarq.rqvae.model import RQVAE

logger = logging.getLogger(__name__)


class Work:
    """The code shards to be made from a list of image shards: source i becomes `{i:06d}.tar`."""

    def __init__(self, folder: Path, settings: CodeSettings, sources: Sequence[str]) -> None:
        """Raises: DataError where the folder was filled from other sources, or a file is named twice."""
        self.folder = folder
        self.settings = settings
        self.sources = list(sources)
        self.files = [f"{index:06d}.tar" for index in range(len(sources))]
        foreign = sorted(path.name for path in folder.glob("*.tar") if path.name not in self.files)
        if foreign:
            raise DataError(
                f"{folder} holds {foreign[0]}, which none of the {len(sources)} image shards becomes: it was filled "
                "from another list. Give the same --data as before, or another --output."
            )
        for path, times in Counter(os.path.realpath(source) for source in sources if is_local(source)).items():
            if times > 1:
                raise DataError(f"--data names {path} {times} times, by other spellings or links. Name it once.")
        self._complete: Manifest | None = None
        self._version: tuple[int, int] | None = None
        self._refresh()

    def done(self) -> dict[int, ShardRecord]:
        """The records of the shards that are whole. Raises: DataError for one of other settings or another source."""
        return {index: record for index in range(len(self.sources)) if (record := self._done(index)) is not None}

    def count_done(self) -> int:
        """How many shards have a record, whoever made them; cheap."""
        recorded = set(os.listdir(self.folder))  # noqa: PTH208
        complete = {shard.file for shard in self._complete.shards} if self._complete else set()
        return sum(file in complete or record_path(self.folder, file).name in recorded for file in self.files)

    def take(self, number: int, workers: int, but: Iterable[int] = ()) -> Generator[int, None, None]:
        """Shards for worker `number` of `workers` to make, each locked until the next is asked for (`take_files`)."""
        return take_files(self.folder, self.files, lambda index: self._done(index) is not None, number, workers, but)

    def finish(self, rqvae: RQVAE, failures: Mapping[int, str], max_bad_rate: float) -> Manifest | None:
        """Complete the folder: RQ-VAE, manifest, and nothing left of records, locks and killed runs' half files.

        failures: what went wrong with shards. None where the missing shards are other workers' to make.
        Raises: DataError where a shard failed and nobody made it since, or too many or all samples are bad.
        """
        with locked(self.folder, MANIFEST, wait=True):
            self._refresh()
            records = self.done()
            lost = {self.sources[index]: why for index, why in sorted(failures.items()) if index not in records}
            if lost:
                raise DataError(
                    f"{len(lost)} of {len(self.sources)} image shards could not be read:\n    "
                    + "\n    ".join(f"{source}: {why}" for source, why in lost.items())
                    + "\nRun the same command again once they can: it makes these alone."
                )
            if len(records) < len(self.sources):
                return None
            faults = Faults(max_bad_rate)
            count_records(faults, records.values())
            faults.finish()
            manifest = Manifest(self.settings, tuple(records[index] for index in range(len(self.sources))))
            if manifest.samples == 0:
                raise DataError(
                    f"no usable picture in {len(self.sources)} image shards, the first being {self.sources[0]!r}. "
                    "Give tars whose samples have an image member (.jpg .jpeg .png .webp .bmp .tif .tiff)."
                )
            if self.settings.caption_field and not any(record.captioned for record in manifest.shards):
                raise DataError(
                    f"no picture has a caption in the field {self.settings.caption_field!r} of its .json. Give the "
                    "name of the field to --caption-field, and another --output."
                )
            save_rqvae(rqvae, self.folder)
            manifest.save(self.folder)
            for file in self.files:
                record_path(self.folder, file).unlink(missing_ok=True)
            remove_leftovers(self.folder, self.files)
            (self.folder / f".{MANIFEST}.lock").unlink(missing_ok=True)
            return manifest

    def _refresh(self) -> None:
        """Read the manifest where it is new, or another worker has replaced it."""
        try:
            found = (self.folder / MANIFEST).stat()
        except FileNotFoundError:
            return
        if self._version != (version := (found.st_ino, found.st_mtime_ns)):
            self._complete, self._version = Manifest.load(self.folder), version

    def _done(self, index: int) -> ShardRecord | None:
        found = self._find(index)
        if found is None:
            return None
        settings, record = found
        self._check_settings(settings)
        source = source_name(self.sources[index])
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
        size = local_size(self.sources[index])
        if size and record.source_bytes and size != record.source_bytes:
            logger.warning("making %s again: %s had %d bytes, now %d", record.file, source, record.source_bytes, size)
            return None
        return record

    def _find(self, index: int) -> tuple[CodeSettings, ShardRecord] | None:
        """The record of a shard, beside it or in the manifest, which replaces it at any moment."""
        try:
            found = load_record(self.folder, self.files[index])
        except DataError:
            if record_path(self.folder, self.files[index]).exists():
                raise
            found = None
        if found is None:
            self._refresh()
        if found is None and self._complete is not None and index < len(self._complete.shards):
            found = self._complete.settings, self._complete.shards[index]
        return found

    def _check_settings(self, found: CodeSettings) -> None:
        for field in fields(CodeSettings):
            there, now = getattr(found, field.name), getattr(self.settings, field.name)
            if there != now:
                raise DataError(
                    f"{self.folder} was begun with {field.name}={there}, this command has {field.name}={now}. "
                    "Repeat the first command, or give another --output."
                )


def count_records(faults: Faults, records: Iterable[ShardRecord]) -> None:
    """Count the samples of finished shards."""
    for record in records:
        faults.count_finished(record.source, record.samples, record.skipped, record.faults)
