"""Every blob store passes the same suite, wrapped or not."""

import secrets

import pytest

from recess.blobs import CachingBlobs, LocalBlobs, MemoryBlobs, MeteredBlobs, RetryingBlobs
from recess.blobs.caching import unchecked
from recess.blobs.s3 import open_bucket
from recess.testing.blob_server import s3_server
from recess.testing.blob_suite import BlobStoreSuite

MIB = 1 << 20


@pytest.fixture(scope="module")
def server():
    with s3_server() as running:
        yield running


@pytest.fixture
def bucket(server):
    """An empty store in a bucket, below a prefix."""
    return open_bucket(server.make_bucket(f"b-{secrets.token_hex(6)}") + "/some/prefix", server.settings)


class TestMemory(BlobStoreSuite):
    @pytest.fixture
    def blobs(self):
        return MemoryBlobs()


class TestLocal(BlobStoreSuite):
    @pytest.fixture
    def blobs(self, tmp_path):
        return LocalBlobs(tmp_path / "blobs")


class TestS3(BlobStoreSuite):
    @pytest.fixture
    def blobs(self, bucket):
        return bucket


class TestRetryingMeteredS3(BlobStoreSuite):
    """As a node uses it."""

    @pytest.fixture
    def blobs(self, bucket):
        return MeteredBlobs(RetryingBlobs(bucket))


class TestCaching(BlobStoreSuite):
    @pytest.fixture
    def blobs(self, tmp_path):
        local = LocalBlobs(tmp_path / "copies")
        return CachingBlobs(MemoryBlobs(), local, unchecked, max_bytes=64 * MIB, whole_max_bytes=32 * MIB)


class TestCachingWithoutRoom(BlobStoreSuite):
    """Nothing is kept: every read goes through."""

    @pytest.fixture
    def blobs(self, tmp_path):
        return CachingBlobs(MemoryBlobs(), LocalBlobs(tmp_path / "copies"), unchecked, max_bytes=0, whole_max_bytes=0)
