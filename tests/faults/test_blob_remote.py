"""A remote store that is slow, flaky, cut off, down, or lists late: real S3 server, real sockets, a proxy that spoils."""

import itertools
import secrets
import time

import pytest

from recess.blobs import RetryingBlobs, RetryPolicy
from recess.blobs.s3 import RemoteSettings, open_bucket
from recess.errors import BadInput, Corrupt, NotFound, Unavailable
from recess.testing.blob_faults import FaultProxy
from recess.testing.blob_server import s3_server

FAST = RetryPolicy(tries=6, first_s=0.001, most_s=0.01)


@pytest.fixture(scope="module")
def server():
    with s3_server() as running:
        yield running


@pytest.fixture
def proxy(server):
    with FaultProxy(server.endpoint).running() as running:
        yield running


@pytest.fixture
def bare(server, proxy):
    url = server.make_bucket(f"f-{secrets.token_hex(6)}")
    return open_bucket(url, server.through(proxy.url))


@pytest.fixture
def blobs(bare):
    return RetryingBlobs(bare, FAST)


def test_a_busy_store_is_waited_for(blobs, bare, proxy):
    proxy.fail(2)
    assert blobs.put("k", b"data") is True
    proxy.fail(2)
    assert blobs.get("k", max_bytes=4) == b"data"
    proxy.fail(1)
    with pytest.raises(Unavailable) as caught:
        bare.get("k", max_bytes=4)
    assert caught.value.details["retryable"] is True


def test_a_body_that_breaks_off_is_read_again(blobs, bare, proxy):
    data = bytes(range(256)) * 64
    blobs.put("k", data)
    proxy.cut(2)
    assert blobs.get("k", max_bytes=len(data)) == data
    proxy.cut(2)
    assert blobs.get_range("k", 100, 5000) == data[100:5100]
    proxy.cut(1)
    with pytest.raises(Unavailable):
        bare.get_range("k", 0, 5000)


def test_a_lost_answer_of_a_put_leaves_the_blob_once(blobs, proxy):
    proxy.lose(1)
    assert blobs.put("k", b"data") is False  # the first try added it, which nobody could know
    assert blobs.get("k", max_bytes=4) == b"data"
    assert [info.key for info in blobs.list_blobs()] == ["k"]


def test_a_store_that_is_down_is_unavailable_and_comes_back(blobs, proxy):
    blobs.put("k", b"data")
    proxy.down = True
    for call in (lambda: blobs.get("k", max_bytes=4), lambda: blobs.put("n", b""), lambda: list(blobs.list_blobs())):
        with pytest.raises(Unavailable) as caught:
            call()
        assert caught.value.details["tries"] == 6
        assert "try again" in caught.value.hint
    proxy.down = False
    assert blobs.get("k", max_bytes=4) == b"data"


def test_nobody_listens(server):
    gone = open_bucket("s3://b", server.through("http://127.0.0.1:9"))
    with pytest.raises(Unavailable) as caught:
        gone.exists("k")
    assert caught.value.details["retryable"] is True


def test_a_slow_store_times_out_and_is_tried_again(server, proxy):
    url = server.make_bucket(f"f-{secrets.token_hex(6)}")
    settings = RemoteSettings(proxy.url, "us-east-1", "id", "secret", timeout_s=0.2)
    blobs = open_bucket(url, settings)
    blobs.put("k", b"data")
    proxy.delay_s = 5.0
    began = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        blobs.get("k", max_bytes=4)
    assert time.monotonic() - began < 4.0
    assert caught.value.details["retryable"] is True
    proxy.delay_s = 0.0
    assert blobs.get("k", max_bytes=4) == b"data"


def test_a_listing_that_lags_hides_but_never_lies(blobs, proxy):
    blobs.put("d/old", b"x")
    proxy.forgetful = True
    blobs.put("d/new", b"y")
    assert [info.key for info in blobs.list_blobs("d/")] == ["d/old"]
    assert blobs.exists("d/new")
    assert blobs.get("d/new", max_bytes=1) == b"y"
    proxy.forgetful = False
    assert sorted(info.key for info in blobs.list_blobs("d/")) == ["d/new", "d/old"]


def test_a_listing_has_pages(server, bare, proxy, monkeypatch):
    monkeypatch.setattr("recess.blobs.s3.LIST_PAGE", 7)
    for number in range(20):
        bare.put(f"p/k{number:02}", b"")
    assert [i.key for i in bare.list_blobs("p/")] == [f"p/k{n:02}" for n in range(20)]
    first = [i.key for i in itertools.islice(bare.list_blobs("p/"), 3)]
    assert first == ["p/k00", "p/k01", "p/k02"]


def test_near_ranges_are_one_request(bare, proxy):
    data = bytes(range(256)) * 8192  # 2 MiB
    bare.put("k", data)
    before = proxy.requests["GET"]
    asked = [(0, 100), (5000, 100), (60_000, 10), (2_000_000, 5)]
    assert bare.get_ranges("k", asked) == [data[o : o + n] for o, n in asked]
    assert proxy.requests["GET"] - before == 2


def test_a_missing_bucket_is_not_a_missing_blob(server):
    blobs = open_bucket("s3://there-is-no-such-bucket", server.settings)
    for call in (lambda: blobs.get("k", max_bytes=1), lambda: blobs.put("k", b""), lambda: list(blobs.list_blobs())):
        with pytest.raises(Unavailable) as caught:
            call()
        assert caught.value.details["retryable"] is False


def test_a_crash_in_a_long_upload_leaves_only_what_clean_removes(bare, proxy):
    def breaking():
        yield from (bytes(1 << 20) for _ in range(20))
        proxy.down = True  # the process dies here: nothing of it reaches the store any more
        yield bytes(1 << 20)

    with pytest.raises(Unavailable):
        bare.put_stream("k", breaking)
    proxy.down = False
    assert not bare.exists("k")
    assert list(bare.list_blobs()) == []


def test_leftovers_of_uploads_are_cleaned(bare):
    import obstore

    obstore.put(bare._store, ".tmp/left", b"x", use_multipart=False)
    bare.put("k", b"x")
    bare.touch("k")
    assert bare.clean(before_s=time.time() - 3600) == 0
    assert bare.clean(before_s=time.time() + 3600) == 1
    assert [m["path"] for page in obstore.list(bare._store) for m in page] == ["k"]


def test_short_and_missing_ranges(bare):
    bare.put("k", b"12345")
    with pytest.raises(Corrupt):
        bare.get_range("k", 3, 10)
    with pytest.raises(Corrupt):
        bare.get_range("k", 300, 10)
    with pytest.raises(NotFound):
        bare.get_range("no", 300, 10)


@pytest.mark.parametrize("url", ["s3://", "http://x/y", "bucket", "s3:/x", "ftp://x"])
def test_what_is_no_bucket(url):
    with pytest.raises(BadInput):
        open_bucket(url, RemoteSettings())


@pytest.mark.parametrize("url", ["gs://bucket/prefix", "az://container/prefix"])
def test_the_same_door_leads_to_other_clouds(url, monkeypatch):
    """Built without a request (there is no server of theirs here); the methods are the same code."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    assert open_bucket(url, RemoteSettings()).where == url
