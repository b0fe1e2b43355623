"""Both object stores keep the same promises; the S3 one against a real S3 server over HTTP."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from minio.commonconfig import ENABLED, Filter
from minio.lifecycleconfig import Expiration, LifecycleConfig, Rule
from typer.testing import CliRunner

from basalt.cli import app
from basalt.object_store import (
    DirectoryStore,
    InvalidKey,
    MinioStore,
    ObjectNotFound,
    ObjectStore,
    StoreSettings,
    StoreUnavailable,
    image_id_of_key,
    image_key,
    open_object_store,
)

KEY = "images/sha256/" + "a" * 64


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The endpoint of a moto server."""
    pytest.importorskip("moto", reason="moto[server] is the S3 server of this test")
    pytest.importorskip("flask", reason="moto[server] is the S3 server of this test")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/moto-api/", trust_env=False)
                break
            except httpx.HTTPError:
                assert time.monotonic() < deadline, "moto did not start"
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def open_s3(endpoint: str, bucket: str = "basalt") -> MinioStore:
    store = open_object_store(f"s3://{bucket}", endpoint=endpoint, access_key="key", secret_key="secret")
    assert isinstance(store, MinioStore)
    return store


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "directory":
        return DirectoryStore(tmp_path / "objects")
    opened = open_s3(request.getfixturevalue("s3"))
    if not opened.client.bucket_exists(opened.bucket):
        opened.client.make_bucket(opened.bucket)
    return opened


@pytest.mark.parametrize("data", [b"", b"x", os.urandom(6_000_000)], ids=["empty", "small", "large"])
async def test_gives_back_what_was_put(store: ObjectStore, data: bytes):
    await store.put(KEY, data)
    assert await store.get(KEY) == data
    assert await store.exists(KEY)


async def test_what_is_deleted_is_gone(store: ObjectStore):
    await store.put("files/a", b"a")
    await store.delete("files/a")
    assert not await store.exists("files/a")
    await store.delete("files/a")


async def test_replaces(store: ObjectStore):
    await store.put(KEY, b"old")
    await store.put(KEY, b"new")
    assert await store.get(KEY) == b"new"


async def test_what_is_not_there(store: ObjectStore):
    missing = "images/sha256/" + "b" * 64
    assert not await store.exists(missing)
    assert not await store.exists("images")
    with pytest.raises(ObjectNotFound):
        await store.get(missing)


async def test_lists_what_lies_under_a_folder(store: ObjectStore):
    for key in ("listed/b/2", "listed/a", "listed/b/1", "listed-not/c"):
        await store.put(key, b"x")
    assert await store.keys("listed") == ["listed/a", "listed/b/1", "listed/b/2"]
    assert await store.keys("listed/b") == ["listed/b/1", "listed/b/2"]
    assert await store.keys("listed/a") == await store.keys("lis") == await store.keys("nothing") == []


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "/etc/passwd",
        "../outside",
        "a/../../outside",
        "a/..",
        "a//b",
        "a/",
        ".",
        ".unfinished/x",
        "a/.hidden",
        "a\\..\\b",
        "a\x00b",
        "a\nb",
        "a b",
        "ä",
        "a" * 513,
    ],
)
async def test_keys_that_are_none(store: ObjectStore, key: str):
    for work in (store.put(key, b"x"), store.get(key), store.exists(key), store.keys(key)):
        with pytest.raises(InvalidKey):
            await work


async def test_a_reader_never_sees_half_an_object(tmp_path: Path):
    store = DirectoryStore(tmp_path)
    values = [bytes([n]) * 2_000_000 for n in range(4)]
    await store.put(KEY, values[0])

    async def read() -> set[bytes]:
        return {await store.get(KEY) for _ in range(20)}

    _, seen = await asyncio.gather(asyncio.gather(*(store.put(KEY, value) for value in values)), read())
    assert seen <= set(values)
    assert list((tmp_path / ".unfinished").iterdir()) == []


async def test_a_directory_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    store = DirectoryStore(tmp_path / "file")
    with pytest.raises(StoreUnavailable):
        await store.put(KEY, b"x")


async def test_an_s3_server_that_is_away_and_comes_back_is_told_and_used(s3: str):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        closed = listener.getsockname()[1]
    away = open_s3(f"http://127.0.0.1:{closed}")
    for work in (away.put(KEY, b"x"), away.get(KEY), away.exists(KEY), away.keys("images")):
        with pytest.raises(StoreUnavailable, match="reached"):
            await work


async def test_a_bucket_that_is_not_there_is_not_an_object_that_is_not_there(s3: str):
    store = open_s3(s3, "no-such-bucket")
    with pytest.raises(StoreUnavailable, match="NoSuchBucket"):
        await store.get(KEY)


def test_image_keys():
    image_id = "sha256:" + "0a" * 32
    assert image_id_of_key(image_key(image_id)) == image_id
    for wrong in ("sha256:abc", "md5:" + "0a" * 32, "sha256:" + "0A" * 32, image_id + "\n"):
        with pytest.raises(InvalidKey):
            image_key(wrong)
    for wrong in ("sha256/" + "0a" * 32, "images/sha256/", "images/sha256/../x", "checkpoints/" + "0a" * 32):
        with pytest.raises(InvalidKey):
            image_id_of_key(wrong)


def test_opened_by_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for url in (str(tmp_path), f"file://{tmp_path}"):
        opened = open_object_store(url)
        assert isinstance(opened, DirectoryStore)
        assert opened.root == tmp_path
    monkeypatch.setenv("BASALT_STORE", "s3://images")
    monkeypatch.setenv("BASALT_S3_ENDPOINT", "https://minio:9000")
    monkeypatch.setenv("BASALT_S3_SECRET_KEY", "hush")
    with pytest.raises(ValueError, match="BASALT_S3_ACCESS_KEY is not set"):
        StoreSettings().open_store()
    monkeypatch.setenv("BASALT_S3_ACCESS_KEY", "key")
    settings = StoreSettings()
    assert "hush" not in repr(settings)
    opened = settings.open_store()
    assert isinstance(opened, MinioStore)
    assert opened.bucket == "images"


@pytest.mark.parametrize("url", ["", "http://minio:9000/bucket", "file://relative/path", "s3://bucket"])
def test_urls_that_name_no_store(url: str):
    with pytest.raises(ValueError, match="BASALT_"):
        open_object_store(url)


def test_a_bucket_is_made_once_and_checked(s3: str, monkeypatch: pytest.MonkeyPatch):
    for name, value in (("ENDPOINT", s3), ("ACCESS_KEY", "key"), ("SECRET_KEY", "secret")):
        monkeypatch.setenv(f"BASALT_S3_{name}", value)
    monkeypatch.setenv("BASALT_STORE", "s3://new-bucket")
    settings = StoreSettings()
    with pytest.raises(ValueError, match=f"BASALT_S3_ENDPOINT={s3} cannot be used: .*NoSuchBucket"):
        settings.check_store()
    for _ in range(2):
        asyncio.run(settings.open_store().prepare())
    settings.check_store()


async def test_a_directory_loses_what_is_too_old(tmp_path: Path):
    store = DirectoryStore(tmp_path)
    old, new, other = KEY, "images/sha256/" + "c" * 64, "datasets/a"
    for key in (old, new, other):
        await store.put(key, b"x")
    for key in (old, other):
        os.utime(tmp_path / key, (0, time.time() - 8 * 86400))
    await store.expire("images", None)
    assert await store.exists(old)
    await store.expire("images", 7)
    assert [await store.exists(key) for key in (old, new, other)] == [False, True, True]
    await store.expire("nothing-there", 7)


def test_a_bucket_has_a_rule_for_what_is_too_old(s3: str, monkeypatch: pytest.MonkeyPatch):
    for name, value in (("ENDPOINT", s3), ("ACCESS_KEY", "key"), ("SECRET_KEY", "secret")):
        monkeypatch.setenv(f"BASALT_S3_{name}", value)
    monkeypatch.setenv("BASALT_STORE", "s3://with-rules")
    client = open_s3(s3, "with-rules").client
    client.make_bucket("with-rules")
    theirs = Rule(ENABLED, Filter(prefix="logs/"), "theirs", expiration=Expiration(days=3))
    client.set_bucket_lifecycle("with-rules", LifecycleConfig([theirs]))

    def rules_after(days: str | None) -> dict[str, tuple[str, int]]:
        monkeypatch.setenv("BASALT_IMAGE_DAYS", days) if days else monkeypatch.delenv("BASALT_IMAGE_DAYS")
        prepared = CliRunner().invoke(app, ["store", "prepare"])
        assert prepared.exit_code == 0, prepared.output
        found = client.get_bucket_lifecycle("with-rules")
        return {rule.rule_id: (rule.rule_filter.prefix, rule.expiration.days) for rule in found.rules}

    assert rules_after("30") == {"theirs": ("logs/", 3), "basalt-images": ("images/", 30)}
    assert rules_after("7") == {"theirs": ("logs/", 3), "basalt-images": ("images/", 7)}
    assert rules_after(None) == {"theirs": ("logs/", 3)}
    client.delete_bucket_lifecycle("with-rules")
    asyncio.run(open_s3(s3, "with-rules").expire("images", 5))
    asyncio.run(open_s3(s3, "with-rules").expire("images", None))
    assert client.get_bucket_lifecycle("with-rules") is None
