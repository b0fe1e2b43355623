"""Where images and everything large live: a directory, or a bucket of any S3 server (MinIO).

Keys are paths of plain names (`images/sha256/<hex>`); values are whole objects, written at once. Only
portable S3 is used: put, get, stat, list, delete, and rules of how long objects are kept.
"""

import asyncio
import io
import logging
import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

import urllib3
from minio import Minio
from minio.commonconfig import ENABLED, Filter
from minio.error import MinioException, S3Error
from minio.lifecycleconfig import Expiration, LifecycleConfig, Rule
from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

MAX_KEY_LENGTH = 512  # characters
PROBE = "probe"  # the key that is written to see whether the store takes anything
DAY = 86400.0  # seconds
PART_BYTES = 16 * 1024 * 1024  # of a large upload
# No segment begins with a dot: neither `..` nor the directory of unfinished writes can be named.
_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_IMAGE_ID = re.compile(r"sha256:[0-9a-f]{64}")
IMAGES = "images"  # the folder of images' originals
_IMAGE_PREFIX = f"{IMAGES}/sha256/"


class StoreError(Exception):
    """The store did not do what was asked. The tree: StoreError ← ObjectNotFound, InvalidKey, StoreUnavailable."""


class ObjectNotFound(StoreError):
    """No object under this key."""


class InvalidKey(StoreError, ValueError):
    """The key is not a path of plain names."""


class StoreUnavailable(StoreError):
    """The store cannot be reached, refuses us, or is full."""


class ObjectStore(Protocol):
    """Whole objects by key. Every method may raise InvalidKey and StoreUnavailable."""

    async def put(self, key: str, data: bytes) -> None:
        """Writes the whole object, or nothing. An object of the same key is replaced."""
        ...

    async def get(self, key: str) -> bytes:
        """The whole object.

        Raises:
            ObjectNotFound: there is none.
        """
        ...

    async def exists(self, key: str) -> bool: ...

    async def keys(self, folder: str) -> list[str]:
        """The keys of all objects under a folder (`versions/cat`), sorted; none where there is no such folder."""
        ...

    async def put_file(self, key: str, path: Path) -> None:
        """`put` of a file's contents, without holding them in memory.

        Raises:
            FileNotFoundError: there is no such file.
        """
        ...

    async def get_file(self, key: str, path: Path) -> None:
        """`get` into a file, which is there whole or not at all.

        Raises:
            ObjectNotFound: there is none.
        """
        ...

    async def delete(self, key: str) -> None:
        """Away with an object, if it is there."""
        ...

    async def prepare(self) -> None:
        """Makes the store itself, a directory or a bucket, unless it is there."""
        ...

    async def expire(self, folder: str, days: int | None) -> None:
        """Objects under a folder go when they are so old; None: they stay.

        A server is given a rule and keeps it by itself from then on. From a directory they go now.
        """
        ...


class DirectoryStore:
    """Objects as files under one directory, each put in place by a rename."""

    def __init__(self, root: Path) -> None:
        self.root = root

    async def put(self, key: str, data: bytes) -> None:
        await asyncio.to_thread(self._put, self._path(key), data)

    async def get(self, key: str) -> bytes:
        return await asyncio.to_thread(self._get, self._path(key))

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(self._path(key).is_file)

    async def keys(self, folder: str) -> list[str]:
        return await asyncio.to_thread(self._keys, self._path(folder))

    async def put_file(self, key: str, path: Path) -> None:
        with path.open("rb") as source:
            await asyncio.to_thread(self._put, self._path(key), source)

    async def get_file(self, key: str, path: Path) -> None:
        await asyncio.to_thread(self._get_file, self._path(key), path)

    async def delete(self, key: str) -> None:
        await asyncio.to_thread(self._path(key).unlink, missing_ok=True)

    async def prepare(self) -> None:
        await self.put(PROBE, b"")

    async def expire(self, folder: str, days: int | None) -> None:
        if days is not None:
            await asyncio.to_thread(self._remove_before, self._path(folder), time.time() - days * DAY)

    def _remove_before(self, folder: Path, moment: float) -> None:
        for path in folder.rglob("*"):
            with suppress(FileNotFoundError):
                if path.is_file() and path.stat().st_mtime < moment:
                    path.unlink()

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _put(self, path: Path, data: bytes | BinaryIO) -> None:
        source = io.BytesIO(data) if isinstance(data, bytes) else data
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.root / ".unfinished"
            unfinished.mkdir(exist_ok=True)
            _write_whole(path, source, unfinished)
        except OSError as error:
            raise StoreUnavailable(f"the object store {self.root} cannot be written: {error.strerror}") from error

    def _keys(self, folder: Path) -> list[str]:
        return sorted(path.relative_to(self.root).as_posix() for path in folder.rglob("*") if path.is_file())

    def _get_file(self, source: Path, path: Path) -> None:
        try:
            with source.open("rb") as file:
                _write_whole(path, file, path.parent)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise ObjectNotFound(f"no object {source.relative_to(self.root)}") from None

    def _get(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise ObjectNotFound(f"no object {path.relative_to(self.root)}") from None
        except OSError as error:
            raise StoreUnavailable(f"the object store {self.root} cannot be read: {error.strerror}") from error


class MinioStore:
    """Objects in one bucket of an S3 server. The bucket must be there."""

    def __init__(self, client: Minio, bucket: str) -> None:
        self.client = client
        self.bucket = bucket

    async def put(self, key: str, data: bytes) -> None:
        await asyncio.to_thread(self._put, check_key(key), data)

    async def get(self, key: str) -> bytes:
        return await asyncio.to_thread(self._get, check_key(key))

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(self._exists, check_key(key))

    async def keys(self, folder: str) -> list[str]:
        return await asyncio.to_thread(self._keys, check_key(folder))

    async def put_file(self, key: str, path: Path) -> None:
        await asyncio.to_thread(self._put_file, check_key(key), path)

    async def get_file(self, key: str, path: Path) -> None:
        await asyncio.to_thread(self._get_file, check_key(key), path)

    async def delete(self, key: str) -> None:
        await asyncio.to_thread(self._delete, check_key(key))

    async def prepare(self) -> None:
        await asyncio.to_thread(self._prepare)

    async def expire(self, folder: str, days: int | None) -> None:
        await asyncio.to_thread(self._expire, check_key(folder), days)

    def _expire(self, folder: str, days: int | None) -> None:
        """Rules of others stay as they are."""
        name = f"basalt-{folder}"
        ours = Rule(ENABLED, Filter(prefix=f"{folder}/"), name, expiration=Expiration(days=days)) if days else None
        try:
            found = self.client.get_bucket_lifecycle(self.bucket)
            rules = found.rules if found else []
            others = [rule for rule in rules if rule.rule_id != name]
            if ours:
                self.client.set_bucket_lifecycle(self.bucket, LifecycleConfig([*others, ours]))
            elif others and len(others) < len(rules):
                self.client.set_bucket_lifecycle(self.bucket, LifecycleConfig(others))
            elif len(others) < len(rules):
                self.client.delete_bucket_lifecycle(self.bucket)
        except (MinioException, urllib3.exceptions.HTTPError, OSError) as error:
            raise self._unavailable(error) from error

    def _prepare(self) -> None:
        try:
            if not self.client.bucket_exists(self.bucket):
                self.client.make_bucket(self.bucket)
        except S3Error as error:
            if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):  # another was quicker
                raise self._unavailable(error) from error
        except (MinioException, urllib3.exceptions.HTTPError, OSError) as error:
            raise self._unavailable(error) from error

    def _put_file(self, key: str, path: Path) -> None:
        with path.open("rb") as file:
            try:
                self.client.put_object(self.bucket, key, file, path.stat().st_size, part_size=PART_BYTES)
            except (MinioException, urllib3.exceptions.HTTPError, OSError) as error:
                raise self._unavailable(error) from error

    def _get_file(self, key: str, path: Path) -> None:
        try:
            self.client.fget_object(self.bucket, key, str(path))
        except (MinioException, urllib3.exceptions.HTTPError, OSError) as error:
            if _is_missing(error):
                raise ObjectNotFound(f"no object {key}") from None
            raise self._unavailable(error) from error

    def _put(self, key: str, data: bytes) -> None:
        try:
            self.client.put_object(self.bucket, key, io.BytesIO(data), len(data))
        except (MinioException, urllib3.exceptions.HTTPError, OSError) as error:
            raise self._unavailable(error) from error

    def _get(self, key: str) -> bytes:
        try:
            response = self.client.get_object(self.bucket, key)
            try:
                return response.read()
            finally:
                response.close()
                response.release_conn()
        except (MinioException, urllib3.exceptions.HTTPError, OSError) as error:
            if _is_missing(error):
                raise ObjectNotFound(f"no object {key}") from None
            raise self._unavailable(error) from error

    def _exists(self, key: str) -> bool:
        try:
            self.client.stat_object(self.bucket, key)
        except (MinioException, urllib3.exceptions.HTTPError, OSError) as error:
            if _is_missing(error):
                return False
            raise self._unavailable(error) from error
        return True

    def _delete(self, key: str) -> None:
        try:
            self.client.remove_object(self.bucket, key)
        except (MinioException, urllib3.exceptions.HTTPError, OSError) as error:
            raise self._unavailable(error) from error

    def _keys(self, folder: str) -> list[str]:
        try:
            found = list(self.client.list_objects(self.bucket, f"{folder}/", recursive=True))
        except (MinioException, urllib3.exceptions.HTTPError, OSError) as error:
            raise self._unavailable(error) from error
        return sorted(each.object_name for each in found if each.object_name)

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        why = error.code if isinstance(error, S3Error) else "it cannot be reached"
        return StoreUnavailable(f"the object store's bucket {self.bucket}: {why}")


class StoreSettings(BaseSettings):
    """The settings every service that reads or writes objects shares; service settings inherit them."""

    model_config = SettingsConfigDict(extra="ignore")

    store: str = Field(
        default="var/objects", validation_alias="BASALT_STORE"
    )  # a directory, file:///directory or s3://bucket
    s3_endpoint: str | None = Field(default=None, validation_alias="BASALT_S3_ENDPOINT")  # http(s)://host:port
    s3_access_key: str | None = Field(default=None, validation_alias="BASALT_S3_ACCESS_KEY")
    s3_secret_key: SecretStr | None = Field(default=None, validation_alias="BASALT_S3_SECRET_KEY")
    s3_region: str = Field(default="us-east-1", validation_alias="BASALT_S3_REGION")
    image_days: int | None = Field(
        default=None, ge=1, validation_alias="BASALT_IMAGE_DAYS"
    )  # after which the originals of images that clients sent are removed; kept where it is not set

    def open_store(self) -> ObjectStore:
        """The object store these settings name.

        Raises:
            ValueError: they name none.
        """
        return open_object_store(
            self.store,
            endpoint=self.s3_endpoint,
            access_key=self.s3_access_key,
            secret_key=self.s3_secret_key.get_secret_value() if self.s3_secret_key else None,
            region=self.s3_region,
        )

    def check_store(self) -> None:
        """Writes to the store and reads from it, for a service to say at its start what would fail later.

        Raises:
            ValueError: the settings name no store, or it cannot be reached, refuses us, or is full.
        """
        store = self.open_store()

        async def use() -> None:
            await store.put(PROBE, b"basalt")
            await store.get(PROBE)

        try:
            asyncio.run(use())
        except StoreError as error:
            at = f" at BASALT_S3_ENDPOINT={self.s3_endpoint}" if isinstance(store, MinioStore) else ""
            raise ValueError(f"BASALT_STORE={self.store}{at} cannot be used: {error}") from error


def open_object_store(
    url: str,
    *,
    endpoint: str | None = None,
    access_key: str | None = None,
    secret_key: str | None = None,
    region: str = "us-east-1",
) -> ObjectStore:
    """A directory (a path or `file:///absolute/path`), or `s3://bucket` at `endpoint`.

    Raises:
        ValueError: the URL is of another kind, or the endpoint is missing or no http(s) URL.
    """
    parts = urlsplit(url)
    if parts.scheme == "s3":
        return _open_s3(parts.netloc, endpoint, access_key, secret_key, region)
    if parts.scheme == "file":
        if parts.netloc or not parts.path.startswith("/"):
            raise ValueError(f"BASALT_STORE {url!r}: a file URL is written file:///absolute/directory")
        return DirectoryStore(Path(unquote(parts.path)))
    if "://" in url or not url:
        raise ValueError(f"BASALT_STORE {url!r}: give a directory, file:///directory or s3://bucket")
    return DirectoryStore(Path(url))


def image_key(image_id: str) -> str:
    """`sha256:<hex>` → the key under which that image's original bytes are stored."""
    if not _IMAGE_ID.fullmatch(image_id):
        raise InvalidKey(f"{image_id!r} is no image id: it is written sha256:<64 hex digits>")
    return _IMAGE_PREFIX + image_id.removeprefix("sha256:")


def image_id_of_key(key: str) -> str:
    """The inverse of `image_key`.

    Raises:
        InvalidKey: the key is not an image's.
    """
    image_id = "sha256:" + key.removeprefix(_IMAGE_PREFIX)
    if not key.startswith(_IMAGE_PREFIX) or not _IMAGE_ID.fullmatch(image_id):
        raise InvalidKey(f"{key[:100]!r} is no image's key: it is written {_IMAGE_PREFIX}<64 hex digits>")
    return image_id


def check_key(key: str) -> str:
    """The key itself.

    Raises:
        InvalidKey: it is not a path of plain names.
    """
    if len(key) > MAX_KEY_LENGTH or not _KEY.fullmatch(key):
        raise InvalidKey(
            f"{key[:100]!r} is not a key: a key is names of letters, digits, '.', '_' and '-', joined by '/', "
            f"none beginning with '.', at most {MAX_KEY_LENGTH} characters"
        )
    return key


def _write_whole(path: Path, source: BinaryIO, unfinished: Path) -> None:
    """Writes a file by way of one in the folder `unfinished`."""
    descriptor, name = tempfile.mkstemp(dir=unfinished, prefix=".unfinished-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _open_s3(
    bucket: str, endpoint: str | None, access_key: str | None, secret_key: str | None, region: str
) -> MinioStore:
    server = urlsplit(endpoint or "")
    if server.scheme not in ("http", "https") or not server.netloc or server.path not in ("", "/"):
        raise ValueError(f"BASALT_S3_ENDPOINT {endpoint!r}: s3://{bucket} needs it, written http(s)://host:port")
    missing = [name for name, key in (("ACCESS", access_key), ("SECRET", secret_key)) if not key]
    if missing:
        raise ValueError(f"BASALT_S3_{missing[0]}_KEY is not set: s3://{bucket} needs it")
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # what it tries again; what it gives up on, we say
    client = Minio(
        server.netloc,
        access_key=access_key,
        secret_key=secret_key,
        secure=server.scheme == "https",
        region=region,
        # The SDK's own default waits five minutes for a dead server.
        http_client=urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=2, read=20), retries=urllib3.Retry(2, backoff_factor=0.2), maxsize=16
        ),
    )
    return MinioStore(client, bucket)


def _is_missing(error: Exception) -> bool:
    return isinstance(error, S3Error) and error.code == "NoSuchKey"
