"""Which store a configuration means, and that no bucket is asked before it is needed."""

from __future__ import annotations

import pytest

from recess.blobs import LocalBlobs, RetryingBlobs
from recess.config import load_config
from recess.errors import BadInput, Corrupt, NotFound, Unavailable
from recess.node.local import LocalNode
from recess.node.stores import home_id, open_blobs, open_store
from recess.snapshots.shared import SharedStore
from recess.snapshots.store import Store
from recess.testing.machine_room import SMALL

NOBODY = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "hidden"}


def config(tmp_path, env=None, **overrides):
    tmp_path.joinpath("home").mkdir(exist_ok=True)
    return load_config(env or {}, home=tmp_path / "home", run_dir=tmp_path / "run", driver="fake", **overrides)


def test_the_usual_variables_name_the_bucket_and_its_keys(tmp_path):
    env = NOBODY | {"RECESS_STORE": "s3://b/p", "RECESS_STORE_CACHE_BYTES": "1000", "RECESS_REMOTE": "/elsewhere"}
    env |= {"AWS_DEFAULT_REGION": "second", "AWS_SESSION_TOKEN": "token"}
    found = config(tmp_path, env)
    assert (found.store, found.store_cache_bytes, found.remote) == ("s3://b/p", 1000, "/elsewhere")
    assert (found.s3_endpoint, found.s3_region, found.s3_session_token) == ("http://127.0.0.1:9", "second", "token")
    assert config(tmp_path, env | {"AWS_REGION": "first"}).s3_region == "first"
    assert config(tmp_path, env | {"AWS_ENDPOINT_URL_S3": "http://s3"}).s3_endpoint == "http://s3"
    assert "hidden" not in repr(found)


def test_a_plain_home_has_a_store_of_its_own(tmp_path):
    opened = open_store(config(tmp_path))
    assert type(opened.store) is Store
    assert opened.about()["where"] == str(tmp_path / "home" / "blobs")
    opened.store.close()


def test_a_store_that_cannot_be_reached_costs_only_what_needs_it(tmp_path):
    opened = open_store(config(tmp_path, NOBODY, store="s3://b/p"))
    assert isinstance(opened.store, SharedStore)
    assert opened.about()["copies"]["blobs"] == 0
    opened.store.close()


@pytest.mark.parametrize("address", ["bucket", "relative/folder", "s3://", "ftp://x/y"])
def test_what_is_no_address(tmp_path, address):
    with pytest.raises(BadInput):
        open_blobs(address, config(tmp_path))


def test_a_folder_and_a_bucket(tmp_path):
    assert isinstance(open_blobs(str(tmp_path / "there"), config(tmp_path)), LocalBlobs)
    assert isinstance(open_blobs("s3://b/p", config(tmp_path, NOBODY)), RetryingBlobs)


def test_a_home_keeps_its_id(tmp_path):
    first = home_id(tmp_path)
    assert home_id(tmp_path) == first
    assert len(first) == 16
    (tmp_path / "home-id").write_text("something else")
    with pytest.raises(Corrupt):
        home_id(tmp_path)


async def test_a_node_starts_and_serves_while_its_store_is_down(tmp_path, monkeypatch):
    monkeypatch.setattr("recess.blobs.retry.RetryPolicy.__init__.__defaults__", (1, 0.0, 0.0, 1.0))
    node = await LocalNode.open(config(tmp_path, NOBODY, store="s3://b/p"))
    try:
        assert await node.machines.list_machines() == []
        assert node.info()["store"]["where"] == "s3://b/p"
        with pytest.raises(Unavailable):
            await node.machines.create(SMALL, name="dev")
        assert await node.machines.list_machines(everything=True) == []
        with pytest.raises((Unavailable, NotFound)):
            await node.machines.restore("some:name")
    finally:
        await node.close()
