"""A blob store in a bucket: S3 and what speaks its protocol, Google Cloud Storage and Azure by the same door (`obstore`).

    KEY            the blob; put-if-absent is the server's own conditional write (`If-None-Match: *`)
    .touch/KEY     empty; its time is when the blob's was last renewed, since an object's own time cannot be changed
    .tmp/RANDOM    a large blob while it is uploaded in parts; copied to its key on the server, again only if absent

A crash at any point leaves a whole blob, or an object below `.tmp/` that `clean` removes (parts of an upload that never
completed are the bucket's own to expire: give it a lifecycle rule). Nothing here waits or tries again: `retry` does.
Requests are signed with the hash of their content, so the server refuses a body that was damaged on its way.

Bounds: a blob of at most 5 GB (S3's limit for one copy). Two calls that delete one key at once may both return True.
After an answer was lost, a put that is tried again may return False although it was its own first try that added it.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import ObjectStore, from_url

from recess.blobs.contract import BlobInfo, Bytes, PieceSource, Ranges, check_key, pieces
from recess.blobs.ranges import Joined, join_ranges
from recess.errors import BadInput, Corrupt, NotFound, OutOfSpace, RecessError, Unavailable

SCHEMES = ("s3", "gs", "az")
WHOLE_BYTES = 16 << 20  # a blob up to this size is one conditional put; a larger one is uploaded in parts
PART_BYTES = 8 << 20
PARTS_AT_ONCE = 4
LIST_PAGE = 1000  # objects in one page of a listing: the most that S3 gives
READS_AT_ONCE = 8
_TMP = ".tmp/"
_TOUCH = ".touch/"
_STATUS = re.compile(r"status code: (\d{3})")
_BUSY = (408, 409, 429)  # the client errors that pass: timeout, a conflicting write under way, too many requests
_PUT_ATTEMPTS = 3

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteSettings:
    """How a bucket is reached; what is empty is left to the provider's own defaults. Times in seconds."""

    endpoint: str = ""
    region: str = ""
    access_key_id: str = field(default="", repr=False)
    secret_access_key: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)
    timeout_s: float = 60.0  # for one whole request
    connect_timeout_s: float = 5.0


def open_bucket(url: str, settings: RemoteSettings) -> S3Blobs:
    """Return the store behind `s3://BUCKET/PREFIX` (or gs://, az://). No request is made. Raises BadInput."""
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES or not url.partition("://")[2].strip("/"):
        raise BadInput(f"not the address of a bucket: {url!r}", hint="s3://BUCKET/PREFIX, gs:// or az://")
    try:
        store = from_url(url, client_options=_client(settings), retry_config=_NO_RETRY, **_options(scheme, settings))
    except (BaseError, ValueError) as exc:
        raise BadInput(f"store {url}: {_first_line(exc)}") from exc
    return S3Blobs(store, url)


# Retries are ours (`retry`): capped, jittered, with a clock that tests own.
_NO_RETRY: Any = {
    "max_retries": 0,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {"init_backoff": timedelta(0), "max_backoff": timedelta(0), "base": 2.0},
}


def _client(settings: RemoteSettings) -> Any:
    return {
        "allow_http": settings.endpoint.startswith("http://"),
        "timeout": timedelta(seconds=settings.timeout_s),
        "connect_timeout": timedelta(seconds=settings.connect_timeout_s),
    }


def _options(scheme: str, settings: RemoteSettings) -> Mapping[str, Any]:
    if scheme != "s3":
        return {}
    given = {
        "endpoint": settings.endpoint,
        "region": settings.region,
        "access_key_id": settings.access_key_id,
        "secret_access_key": settings.secret_access_key,
        "session_token": settings.session_token,
    }
    # An own endpoint (MinIO, Ceph, a test server) seldom has a host name for each bucket.
    fixed = {"virtual_hosted_style_request": not settings.endpoint, "copy_if_not_exists": "multipart"}
    return {name: value for name, value in given.items() if value} | fixed


class S3Blobs:
    """Blobs in an object store of `obstore`; `where` is its address, for messages."""

    def __init__(self, store: ObjectStore, where: str) -> None:
        self._store = store
        self.where = where

    # --- writing -----------------------------------------------------------------------------------------------

    def put(self, key: str, data: Bytes | Sequence[Bytes]) -> bool:
        """See `BlobStore.put`."""
        check_key(key)
        views = pieces(data) or [memoryview(b"")]
        if sum(view.nbytes for view in views) > WHOLE_BYTES:
            return self._put_long(key, iter(views))
        return self._add(key, lambda: obstore.put(self._store, key, views, mode="create", use_multipart=False))

    def put_stream(self, key: str, source: PieceSource) -> bool:
        """See `BlobStore.put_stream`. What is in memory at a time: WHOLE_BYTES, or PARTS_AT_ONCE parts."""
        check_key(key)
        iterator = source()
        head: list[Bytes] = []
        size = 0
        for piece in iterator:
            head.append(piece)
            size += len(piece)
            if size > WHOLE_BYTES:
                break
        else:
            return self.put(key, head)
        return self._put_long(key, chain(head, iterator))

    def _put_long(self, key: str, source: Iterator[Bytes]) -> bool:
        """Upload in parts, each a request with a time limit of its own, then give it its name if that is free."""
        if self.touch(key):
            return False
        temp = _TMP + secrets.token_hex(12)
        try:
            self._upload(key, temp, source)
            return self._add(key, lambda: obstore.copy(self._store, temp, key, overwrite=False))
        finally:
            with contextlib.suppress(BaseError, FileNotFoundError):  # what stays is removed by `clean`
                obstore.delete(self._store, temp)

    def _upload(self, key: str, temp: str, source: Iterator[Bytes]) -> None:
        """Upload a stream in parts. What the stream raises comes out as it was, not as the library wraps it."""
        failure: list[BaseException] = []

        def watched() -> Iterator[memoryview]:
            try:
                for piece in source:
                    yield from pieces(piece)
            except BaseException as exc:
                failure.append(exc)
                raise

        try:
            self._call(
                key,
                lambda: obstore.put(
                    self._store,
                    temp,
                    watched(),
                    use_multipart=True,
                    chunk_size=PART_BYTES,
                    max_concurrency=PARTS_AT_ONCE,
                ),
            )
        except RecessError:
            if failure:
                raise failure[0] from None
            raise

    def _add(self, key: str, write: Callable[[], object]) -> bool:
        """Run a conditional write; if the blob is there, renew its time."""
        for _ in range(_PUT_ATTEMPTS):
            try:
                self._call(key, write)
            except AlreadyExistsError:
                if self.touch(key):
                    return False
                continue  # it was there, and has just been deleted
            return True
        raise self._unavailable(key, "somebody keeps deleting it", retryable=True)

    def touch(self, key: str) -> bool:
        """See `BlobStore.touch`."""
        if not self.exists(key):
            return False
        self._call(key, lambda: obstore.put(self._store, _TOUCH + key, b"", use_multipart=False))
        return True

    def delete(self, key: str) -> bool:
        """See `BlobStore.delete`."""
        there = self.exists(key)
        for name in (key, _TOUCH + key) if there else ():
            with contextlib.suppress(FileNotFoundError, NotFound):
                self._call(key, partial(obstore.delete, self._store, name))
        return there

    def clean(self, *, before_s: float) -> int:
        """See `BlobStore.clean`. Renewals that old say no more than the blob's own time and go, too."""
        counts = {_TMP: 0, _TOUCH: 0}
        for prefix in counts:
            old = [m["path"] for m in self._objects(prefix) if m["last_modified"].timestamp() < before_s]
            for path in old:
                with contextlib.suppress(FileNotFoundError, NotFound):
                    self._call(path, partial(obstore.delete, self._store, path))
            counts[prefix] = len(old)
        return counts[_TMP]

    # --- reading -----------------------------------------------------------------------------------------------

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """See `BlobStore.get`."""
        check_key(key)

        def read() -> bytes:
            result = obstore.get(self._store, key)
            size = result.meta["size"]
            if size > max_bytes:
                raise Corrupt(f"blob {key} holds {size} bytes, at most {max_bytes} were expected", blob=key)
            return bytes(result.bytes())

        return self._call(key, read)

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """See `BlobStore.get_range`."""
        return self.get_ranges(key, [(offset, length)])[0]

    def get_ranges(self, key: str, ranges: Ranges) -> list[bytes]:
        """See `BlobStore.get_ranges`: near ranges are one request (`join_ranges`), far ones run in parallel."""
        check_key(key)
        for offset, length in ranges:
            if offset < 0 or length < 0:
                raise self._short(key, offset + length)
        if any(not length for _, length in ranges):  # no request can ask for nothing, but it must lie in the blob
            furthest = max(offset + length for offset, length in ranges)
            if self.stat(key).size_bytes < furthest:
                raise self._short(key, furthest)
        asked = [(place, offset, length) for place, (offset, length) in enumerate(ranges) if length]
        joined = join_ranges([(offset, length) for _, offset, length in asked])
        out = [b""] * len(ranges)
        for part, data in zip(joined, self._fetch_all(key, joined), strict=True):
            for number, start, length in part.wanted:
                out[asked[number][0]] = data[start : start + length]
        return out

    def _fetch_all(self, key: str, parts: Sequence[Joined]) -> list[bytes]:
        if len(parts) < 2:
            return [self._fetch(key, part.offset, part.length) for part in parts]
        with ThreadPoolExecutor(min(len(parts), READS_AT_ONCE), thread_name_prefix="blob-ranges") as pool:
            return list(pool.map(lambda part: self._fetch(key, part.offset, part.length), parts))

    def _fetch(self, key: str, offset: int, length: int) -> bytes:
        try:
            data = self._call(key, lambda: obstore.get_range(self._store, key, start=offset, length=length))
        except Unavailable as exc:
            # A range outside the blob is refused in as many ways as there are servers: its size tells.
            if exc.details.get("retryable") or self.stat(key).size_bytes >= offset + length:
                raise
            raise self._short(key, offset + length) from exc
        if len(data) != length:
            raise self._short(key, offset + length)
        return bytes(data)

    def _short(self, key: str, end: int) -> Corrupt:
        return Corrupt(f"blob {key} ends before byte {end}", blob=key)

    def stat(self, key: str) -> BlobInfo:
        """See `BlobStore.stat`."""
        check_key(key)
        meta = self._call(key, lambda: obstore.head(self._store, key))
        times = [meta["last_modified"].timestamp()]
        with contextlib.suppress(NotFound):
            times.append(self._call(key, lambda: obstore.head(self._store, _TOUCH + key))["last_modified"].timestamp())
        return BlobInfo(key, meta["size"], max(times))

    def exists(self, key: str) -> bool:
        """See `BlobStore.exists`."""
        check_key(key)
        try:
            self._call(key, lambda: obstore.head(self._store, key))
        except NotFound:
            return False
        return True

    def list_blobs(self, prefix: str = "") -> Iterator[BlobInfo]:
        """See `BlobStore.list_blobs`; a page at a time."""
        folder = prefix.rpartition("/")[0]
        if folder:
            check_key(folder)
        renewed = {
            m["path"].removeprefix(_TOUCH): m["last_modified"].timestamp() for m in self._objects(_TOUCH + folder)
        }
        for meta in self._objects(folder):
            key = meta["path"]
            if key.startswith(prefix) and not key.startswith("."):
                yield BlobInfo(key, meta["size"], max(meta["last_modified"].timestamp(), renewed.get(key, 0.0)))

    def _objects(self, folder: str) -> Iterator[Mapping[str, Any]]:
        pages = iter(obstore.list(self._store, folder.rstrip("/") or None, chunk_size=LIST_PAGE))
        while (page := self._call(folder, lambda: next(pages, None))) is not None:
            yield from page

    # --- errors ------------------------------------------------------------------------------------------------

    def _call(self, key: str, request: Callable[[], T]) -> T:
        """Run a request, its errors translated; AlreadyExistsError is passed on, it is an answer."""
        try:
            return request()
        except AlreadyExistsError:
            raise
        except FileNotFoundError as exc:
            if "NoSuchBucket" in str(exc) or "ContainerNotFound" in str(exc):
                raise self._unavailable(key, "there is no such bucket", hint="create the bucket first") from exc
            raise NotFound(f"no such blob: {key}", kind="blob", ref=key) from exc
        except (PermissionDeniedError, UnauthenticatedError) as exc:
            hint = "check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and the bucket's policy"
            raise self._unavailable(key, "access is refused", hint=hint) from exc
        except (BaseError, OSError) as exc:
            status = int(found[1]) if (found := _STATUS.search(str(exc))) else 0
            if status == 507:
                raise OutOfSpace(f"no space for blob {key} in {self.where}", hint="enlarge the bucket's quota") from exc
            passing = not 400 <= status < 500 or status in _BUSY
            raise self._unavailable(key, _first_line(exc), retryable=passing) from exc

    def _unavailable(self, key: str, why: str, *, hint: str = "", retryable: bool = False) -> Unavailable:
        if retryable:
            hint = "is the store up, and reachable from here? what was stored is safe; try again"
        return Unavailable(f"blob store {self.where}: {key}: {why}", hint=hint, retryable=retryable)


def _first_line(exc: Exception) -> str:
    """Return what an error of the library says, without its dump of the request and without a URL's query."""
    lines = str(exc).splitlines() or [type(exc).__name__]
    return re.sub(r"\?\S*", "", lines[0])[:300]
