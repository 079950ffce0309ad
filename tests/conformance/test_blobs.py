"""Every blob store passes the same suite."""

import pytest

from recess.blobs import LocalBlobs, MemoryBlobs
from recess.testing.blob_suite import BlobStoreSuite


class TestMemory(BlobStoreSuite):
    @pytest.fixture
    def blobs(self):
        return MemoryBlobs()


class TestLocal(BlobStoreSuite):
    @pytest.fixture
    def blobs(self, tmp_path):
        return LocalBlobs(tmp_path / "blobs")
