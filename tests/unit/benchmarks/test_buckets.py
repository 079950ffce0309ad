"""The benchmarks' bucket: served by what is installed, reached by what it says, its speed in a line."""

from benchmarks import buckets
from recess.config import load_config
from recess.node.stores import open_blobs
from recess.units import MIB


def test_a_bucket_is_served_and_reached_as_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(buckets.shutil, "which", lambda _name: None)  # the one that is always there
    monkeypatch.setattr(buckets, "PROBE_BYTES", 2 * MIB)
    monkeypatch.setattr(buckets, "READS", 2)
    assert buckets.server_here() == "moto"
    with buckets.served(tmp_path) as bucket:
        blobs = open_blobs(bucket.config["store"], load_config(home=tmp_path / "home", **bucket.config))
        assert blobs.put("layers/one", b"bytes")
        assert not blobs.put("layers/one", b"bytes")
        assert blobs.get_range("layers/one", 1, 3) == b"yte"
        assert bucket.speed().startswith("moto itself: a GET of 64 KiB of a 2 MiB object ")
