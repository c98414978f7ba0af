"""Objects of a store, by obstore: S3 and what speaks it, GCS, Azure, local directories.

What obstore says of an error is never passed on: it has the request's URL, which may be signed.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from prefixstore.errors import ConfigError, TierError, TierFull, TierTimeout, TierUnavailable
from prefixstore.tiers.remote.config import RemoteTierConfig
from prefixstore.tiers.remote.endpoints import may_be_plain
from prefixstore.tiers.remote.listing import list_directory

if TYPE_CHECKING:
    from obstore.store import ObjectStore

# Long answers are read in pieces of this size. Read at once, 8 MiB would be a new allocation each
# time, and be copied only after all of it has come.
PIECE_BYTES = 1 << 20
DELETE_BATCH = 1000  # what S3 takes at most
_MAX_PARTS_AT_ONCE = 4

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist")
_BAD_RANGE = ("Requested range was invalid", "status code: 416")
_LOOPS = ("Too many levels of symbolic links", "File system loop found")
_METADATA = ("//169.254.169.254", "//metadata.google.internal")
_BAD_ADDRESS = ("builder error",)  # the client's only words for an address that it cannot ask
_DENIED = (401, 403)
_SLOW_DOWN = (429, 503)


class ObjectInfo(NamedTuple):
    """What a store tells of an object."""

    path: str
    num_bytes: int
    modified: datetime


class Objects:
    """The objects of one bucket. Opening asks no server; all else is to run on an event loop.

    In a directory, a link to nothing or to itself is no object, and written over.

    Raises:
        ConfigError: On opening, if obstore is not installed or refuses the configuration.
        TierUnavailable: On opening, if a local directory cannot be made. Elsewhere, with the other
            errors of tiers: what the store answered, in our words.
    """

    def __init__(self, config: RemoteTierConfig) -> None:
        try:
            import obstore
        except ModuleNotFoundError:
            raise ConfigError(
                "remote tier: expected the package obstore, got none;"
                " it comes with `pip install kvkernels[remote]`"
            ) from None
        self._name = config.name
        self._bucket = config.bucket
        self._part_bytes = config.part_bytes
        self._errors = obstore.exceptions
        self._is_directory = config.kind == "file"
        self._can_create = True  # until the store refuses
        try:
            self._store = _open_store(config)
        except (obstore.exceptions.BaseError, OSError, ValueError) as error:
            if config.kind == "file":
                raise TierUnavailable(f"{config.name}: {config.bucket}: cannot be made") from None
            kind = type(error).__name__
            raise ConfigError(
                f"{config.name}: the environment's settings for {config.kind}:// are refused"
                f" ({kind}); see docs/remote.md"
            ) from None

    def takes_in_parts(self, num_bytes: int) -> bool:
        """Whether an object of this size is uploaded in parts."""
        return num_bytes > self._part_bytes

    async def head(self, path: str) -> ObjectInfo | None:
        """What there is under this name."""
        with self._translated():
            try:
                return _info(await self._store.head_async(path))
            except FileNotFoundError as error:
                self._check_bucket(error)
                return None
            except self._errors.GenericError as error:
                if not self._is_loop(error):
                    raise
                return None

    async def get(
        self,
        path: str,
        part: tuple[int, int] | None,
        wants: Callable[[ObjectInfo], bool],
        hand_over: Callable[[Any], None],
    ) -> ObjectInfo | None:
        """Read an object or, with `part`, as much of these bytes as it has.

        Args:
            path: Its name.
            part: First byte, and the one after the last.
            wants: Asked before the contents are read; they are left where it says no.
            hand_over: Called with each piece.
        """
        with self._translated():
            try:
                result = await self._store.get_async(path, options={"range": part} if part else {})
            except FileNotFoundError as error:
                self._check_bucket(error)
                return None
            except self._errors.GenericError as error:
                is_short = part is not None and _is_any_of(_BAD_RANGE, error)
                if not is_short and not self._is_loop(error):
                    raise
                return await self.head(path)  # an object that ends before the range, or a loop
            info = _info(result.meta)
            start, end = result.range
            if not wants(info):
                pass  # the connection is closed with it
            elif end - start <= PIECE_BYTES:
                hand_over(await result.bytes_async())
            else:
                async for piece in result.stream(PIECE_BYTES):
                    hand_over(piece)
            return info

    async def create(self, path: str, data: bytes) -> bool:
        """Write an object unless there is one; False where there was.

        Where the store cannot tell, it is written over.
        """
        if self._can_create:
            with self._translated():
                try:
                    await self._store.put_async(path, data, mode="create", use_multipart=False)
                    return True
                except self._errors.AlreadyExistsError:
                    if not self._is_directory or await self.head(path) is not None:
                        return False
                    # else it is no file, and is written over if it can be
                except self._errors.BaseError as error:
                    is_unsupported = isinstance(error, self._errors.NotSupportedError)
                    if _status(error) != 501 and not is_unsupported:
                        raise
                    self._can_create = False
        await self.overwrite(path, data)
        return True

    async def overwrite(self, path: str, data: bytes) -> None:
        """Write an object, a long one in parts; it is there when all of it is.

        The client (from 0.12 on) deletes the parts after an error, but not those of an upload that
        is cancelled, of which it does not tell the name either: a rule of the bucket has to.
        """
        with self._translated():
            await self._store.put_async(
                path,
                data,
                use_multipart=self.takes_in_parts(len(data)),
                chunk_size=self._part_bytes,
                max_concurrency=_MAX_PARTS_AT_ONCE,
            )

    async def delete(self, paths: Sequence[str]) -> None:
        """Delete objects, together where the store does that; those that are gone do not matter."""
        with self._translated():
            try:
                await self._store.delete_async(list(paths))
                return
            except FileNotFoundError as error:
                self._check_bucket(error)
        for path in paths:  # one by one: where one was gone, the others may still exist
            with self._translated():
                try:
                    await self._store.delete_async(path)
                except FileNotFoundError as error:
                    self._check_bucket(error)

    async def list(self, prefix: str) -> AsyncIterator[Sequence[ObjectInfo]]:
        """All objects below a name, in batches."""
        batches: AsyncIterator[Sequence[Any]]
        if self._is_directory:
            one_by_one = self._store.list(prefix, chunk_size=1)
            batches = list_directory(one_by_one, self._is_loop, DELETE_BATCH)
        else:
            batches = self._store.list(prefix, chunk_size=DELETE_BATCH)
        while True:
            with self._translated():
                try:
                    batch = await anext(batches)
                except StopAsyncIteration:
                    return
            yield [_info(meta) for meta in batch]

    def _is_loop(self, error: Exception) -> bool:
        """Whether an error is that of a link to itself."""
        return isinstance(error, self._errors.GenericError) and _is_any_of(_LOOPS, error)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (self._errors.BaseError, OSError) as error:
            raise self._translate(error) from None

    def _check_bucket(self, error: FileNotFoundError) -> None:
        """Raise where it is the bucket that is absent. A HEAD's answer does not tell."""
        if _is_any_of(_NO_BUCKET, error):
            raise TierUnavailable(f"{self._name}: expected a bucket {self._bucket}, got none")

    def _translate(self, error: Exception) -> TierError:
        status, os_error = _status(error), _OS_ERROR.search(str(error))
        code = _CODE.search(str(error))
        answer = " ".join(str(word) for word in (status, code and code[1]) if word)
        if _is_any_of(_METADATA, error):
            return TierUnavailable(
                f"{self._name}: expected credentials in the environment, and the cloud's own"
                " service that gives them to its machines does not answer"
            )
        denied = (self._errors.PermissionDeniedError, self._errors.UnauthenticatedError)
        if isinstance(error, denied) or status in _DENIED:
            return TierUnavailable(
                f"{self._name}: permission denied ({answer or 'by the file system'}):"
                " expected credentials in the environment that may do this"
            )
        if isinstance(error, FileNotFoundError):
            return TierUnavailable(f"{self._name}: expected {self._bucket}, got none")
        if status in _SLOW_DOWN:
            return TierTimeout(f"{self._name}: expected an answer, got {answer}: throttled")
        if status == 507 or (os_error and int(os_error[1]) == errno.ENOSPC):
            return TierFull(f"{self._name}: expected room for a record, got none")
        if status is not None:
            return TierUnavailable(f"{self._name}: expected success, got {answer}")
        if os_error:
            return TierUnavailable(f"{self._name}: {os.strerror(int(os_error[1]))}")
        if _is_any_of(_BAD_ADDRESS, error):
            return TierUnavailable(
                f"{self._name}: expected a server's address by https://, got another one in the"
                " environment or in an answer"
            )
        if _is_any_of(("timed out", "TimedOut"), error):
            return TierTimeout(f"{self._name}: expected an answer, got none in time")
        if _is_any_of(("HTTP error",), error):
            return TierUnavailable(f"{self._name}: the connection cannot be made, or was cut")
        return TierUnavailable(f"{self._name}: the client failed: {type(error).__name__}")


def _open_store(config: RemoteTierConfig) -> ObjectStore:
    from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

    if config.kind == "file":
        return LocalStore(prefix=config.bucket, mkdir=True)
    common: dict[str, Any] = {
        "client_options": {
            "allow_http": may_be_plain(config.kind, config.endpoint),
            "connect_timeout": timedelta(seconds=config.connect_timeout_s),
            "timeout": timedelta(seconds=config.request_timeout_s),
        },
        "retry_config": {
            "max_retries": config.max_retries,
            "retry_timeout": timedelta(seconds=config.request_timeout_s),
            # each pause is drawn at random, up to twice the one before
            "backoff": {
                "init_backoff": timedelta(milliseconds=50),
                "max_backoff": timedelta(seconds=5),
                "base": 2,
            },
        },
    }
    own: dict[str, Any] = {}
    if config.anonymous:
        own["skip_signature"] = True
    if config.endpoint is not None:
        own["endpoint"] = config.endpoint.rstrip("/")
    if config.kind == "gs":
        return GCSStore(config.bucket, **own, **common)
    if config.kind == "az":
        if config.account is not None:
            own["account_name"] = config.account
        return AzureStore(config.bucket, **own, **common)
    if config.region is not None:
        own["region"] = config.region
    if "endpoint" in own:  # over every other that the environment has
        own["config"] = {"aws_endpoint_url_s3": own.pop("endpoint")}
    own["disable_bulk_delete"] = not config.bulk_delete
    return S3Store(config.bucket, **own, **common)


def _info(meta: Any) -> ObjectInfo:
    return ObjectInfo(meta["path"], meta["size"], meta["last_modified"])


def _status(error: Exception) -> int | None:
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None


def _is_any_of(words: Sequence[str], error: Exception) -> bool:
    return any(word in str(error) for word in words)
