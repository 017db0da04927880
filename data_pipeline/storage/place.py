"""Where a corpus really lies, as the pipeline sees it: a local folder, and a bucket behind it if `out` is an address.

    place = Place(config, say)      inputs are brought; place.config holds local paths alone
    with lock(place.out), place.held():
        ...                         place.send_step(step) after each step that was marked

A corpus in a local folder passes through here untouched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from data_pipeline.config import CorpusConfig, StorageConfig
from data_pipeline.layout import ADDRESSES
from data_pipeline.records import InputError, StorageError
from data_pipeline.storage.address import address_fault, is_address, local_path, shown
from data_pipeline.storage.bucket import Bucket
from data_pipeline.storage.copies import Inputs, bring, folder_of
from data_pipeline.storage.lease import Lease
from data_pipeline.storage.mirror import Mirror
from data_pipeline.store import Step, write_json


def work_folder(work: str) -> Path:
    """`work`, or gpt2train/ in the user's cache folder (XDG Base Directory Specification 0.8)."""
    if work:
        return Path(work).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2train"


class Place:
    """`config.out`, whichever it is. Raises InputError for an address that cannot be used."""

    def __init__(self, config: CorpusConfig, say: Callable[[str], None]) -> None:
        self.given = config
        """The settings as the user gave them, addresses included; these are kept with the corpus."""
        work = work_folder(config.work)
        self._inputs = Inputs(config, work)
        self.faults = self._inputs.faults
        self.config = self._inputs.config
        """The same with local paths."""
        self.address_of = self._inputs.address_of
        self._mirror: Mirror | None = None
        self._say = say
        if is_address(config.out):
            bucket = Bucket(config.out, retry_s=config.storage.retry_s)
            self.config = replace(self.config, out=str(folder_of(config.out, work, "corpora")))
            self._mirror = Mirror(bucket, Path(self.config.out), config.storage, say)

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def remote(self) -> bool:
        return self._mirror is not None

    def with_inputs_here(self, config: CorpusConfig) -> tuple[CorpusConfig, list[str]]:
        """Other settings of the same corpus with local paths, and the faults of those that could not be had."""
        inputs = Inputs(config, work_folder(self.given.work))
        self.address_of.update(inputs.address_of)
        return inputs.config, inputs.faults

    @contextmanager
    def held(self) -> Iterator[None]:
        """Own the bucket, bring what is stored, and send what was made. Only under the lock of `out`."""
        if self.address_of:
            write_json({address: path for path, address in self.address_of.items()}, self.out / ADDRESSES)
        if self._mirror is None:
            yield
            return
        mirror, address = self._mirror, self._mirror.bucket.address
        lease = Lease(address, self.given.storage, self._say)
        try:
            before = lease.acquire()
        except FileNotFoundError as e:
            raise InputError(f"out={address}: there is no such bucket ({e}); make it first") from None
        except StorageError as e:  # nothing was begun yet: it is the address or the rights that are wrong
            raise InputError(f"out={e}") from None
        try:
            mirror.pull(before)
            mirror.begin(lease)
            try:
                yield
            except InputError:
                mirror.finish()  # such as a corpus of which no document is left: that, too, is a result
                raise
            mirror.finish()
        except BaseException:
            mirror.stop()
            raise
        finally:
            lease.release()

    def send_step(self, step: Step, beside: Sequence[Path] = ()) -> None:
        if self._mirror is not None:
            self._mirror.send_step(step, beside)


FOR_WHY = ("ledger/*.parquet", "tokens/documents.parquet")
FOR_REPORT = ("summary.json", "ledger/*.parquet", "documents/*.parquet", "dedup/*.parquet", "tokens/documents.parquet")
"""What a reader needs of a corpus: token shards and WARC files stay where they are."""


def reading(setting: str, place: str, only: tuple[str, ...]) -> Path:
    """A folder to read a corpus in: `place` itself, or local copies of what `only` names of it.

    Raises InputError, which names `setting`, for a place that cannot be read.
    """
    if not is_address(place):
        return Path(local_path(place))
    if fault := address_fault(place):
        raise InputError(f"{setting}={shown(place)}: {fault}; see docs/storage.md")
    try:
        return bring(place, work_folder(""), StorageConfig(), only)
    except FileNotFoundError:
        raise InputError(f"{setting}={place}: holds no corpus; check the bucket and the name") from None
    except StorageError as e:
        raise InputError(f"{setting}={e}") from None
