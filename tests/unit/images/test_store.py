import json
import threading

import pytest

from recess.errors import BadInput, Corrupt, HasDependents, NameInUse, NotFound, OutOfSpace
from recess.images import debian
from recess.images import store as store_module
from recess.images.store import ImageStore


class Builder:
    """Writes a "root" that depends on the packages alone, as the real builder does."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.error: BaseException | None = None

    def __call__(self, packages, work, progress, *, cancel):
        self.calls.append(tuple(packages))
        root = work / "root.erofs"
        root.write_bytes(" ".join(packages).encode().ljust(8192, b"."))
        progress("building")
        if self.error:
            raise self.error
        return root


@pytest.fixture
def builder():
    return Builder()


@pytest.fixture
def store(tmp_path, builder):
    return ImageStore(tmp_path, builder)


def test_an_image_is_created_found_and_listed(store, tmp_path):
    told: list[str] = []
    info = store.create("media", ["ffmpeg", "ffmpeg"], told.append)
    assert info == store.get("media") == store.list()[0]
    assert info.packages == tuple(sorted({"ffmpeg", *debian.BASE_PACKAGES}))
    assert info.size_bytes == 8192 == info.root_path.stat().st_size
    assert info.root_path.stat().st_mode & 0o222 == 0
    assert "building" in told
    assert (info.root_path.parent / "root.erofs.pages").exists()
    assert store.root(info.root_hash) == info.root_path
    store.verify("media")


def test_without_the_base_packages(store):
    assert store.create("bare", [], with_base=False).packages == ()


def test_base_is_built_once(store, builder):
    assert store.ensure_base() == store.ensure_base()
    assert len(builder.calls) == 1


def test_a_taken_name_is_refused_before_anything_is_built(store, builder):
    store.create("a")
    with pytest.raises(NameInUse):
        store.create("a", ["ffmpeg"])
    assert len(builder.calls) == 1
    assert "ffmpeg" in store.create("a", ["ffmpeg"], replace=True).packages


@pytest.mark.parametrize("error", [OutOfSpace("full"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_build_that_ends_early_leaves_nothing(store, builder, tmp_path, error):
    builder.error = error
    with pytest.raises((OutOfSpace, KeyboardInterrupt)):
        store.create("a")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    with pytest.raises(NotFound):
        store.get("a")


@pytest.mark.parametrize("name", ["", "../x", "/etc/passwd", "A", "a b", ".hidden", "a" * 200, "a\n"])
def test_names_that_are_none(store, builder, name):
    for call in (store.get, store.create, store.remove, store.verify):
        with pytest.raises(BadInput):
            call(name)
    assert builder.calls == []


@pytest.mark.parametrize("package", ["--hook=x", "a;b", "", "A", "../x", "a,b"])
def test_package_names_that_are_none(store, builder, package):
    with pytest.raises(BadInput, match="package name"):
        store.create("a", [package])
    assert builder.calls == []


def test_names_with_slash_and_colon_stay_in_their_folder(store, tmp_path):
    store.create("lib/python:3.12")
    assert store.get("lib/python:3.12").name == "lib/python:3.12"
    assert [i.name for i in store.list()] == ["lib/python:3.12"]
    assert len(list((tmp_path / "names").iterdir())) == 1


def test_an_unknown_image_says_which_there_are(store):
    with pytest.raises(NotFound) as none:
        store.get("nope")
    assert "images create" in none.value.hint
    store.create("base")
    with pytest.raises(NotFound) as some:
        store.get("nope")
    assert "base" in some.value.hint
    with pytest.raises(NotFound):
        store.remove("nope")
    with pytest.raises(NotFound):
        store.root("0" * 64)
    with pytest.raises(NotFound):
        store.root("../../etc")


@pytest.mark.parametrize(
    "change",
    [
        {"root_hash": "../../x"},
        {"root_hash": None},
        {"packages": "x"},
        {"size_bytes": "1"},
        {"created": None},
        {"name": "b"},
        {"version": 9},
        {"size_bytes": 4096},
    ],
)
def test_damaged_metadata_is_corrupt_and_can_be_removed(store, tmp_path, change):
    store.create("a")
    path = tmp_path / "names" / "a.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(Corrupt, match="a"):
        store.get("a")
    store.remove("a")
    with pytest.raises(NotFound):
        store.get("a")


def test_a_lost_root_and_a_changed_root_are_corrupt(store):
    info = store.create("a")
    info.root_path.chmod(0o644)
    info.root_path.write_bytes(info.root_path.read_bytes()[:-1] + b"x")
    with pytest.raises(Corrupt, match="damaged"):
        store.verify("a")
    info.root_path.unlink()
    with pytest.raises(Corrupt, match="missing"):
        store.get("a")


def test_removing_a_name_keeps_a_root_that_another_has(store):
    one, two = store.create("one"), store.create("two")
    assert one.root_hash == two.root_hash
    assert store.only_name_of("one") == ""
    store.remove("one", in_use={one.root_hash})  # it stays
    assert store.only_name_of("two") == two.root_hash
    assert two.root_path.exists()
    store.remove("two")
    assert not two.root_path.exists()


def test_a_root_in_use_is_not_removed(store):
    info = store.create("a")
    with pytest.raises(HasDependents):
        store.remove("a", in_use={info.root_hash})
    assert store.get("a") == info
    store.create("a", ["ffmpeg"], replace=True)
    assert store.sweep(in_use={info.root_hash}) == 0
    assert store.root(info.root_hash) == info.root_path
    assert store.sweep() >= info.size_bytes
    with pytest.raises(NotFound):
        store.root(info.root_hash)


def test_pages_of_a_root(store):
    pages = store.pages(store.create("a").root_hash)
    assert pages.block_count == 2


def test_two_builds_at_once(store):
    threads = [threading.Thread(target=store.create, args=(f"i{n}", [f"package{n}"])) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [i.name for i in store.list()] == ["i0", "i1", "i2", "i3"]
    for image in store.list():
        store.verify(image.name)


def test_a_damaged_name_costs_only_itself_and_no_root(store, tmp_path):
    store.create("good", ["a-package"])
    bad = store.create("bad", ["b-package"])
    (tmp_path / "names" / "bad.json").write_text("{not json")
    good, damaged = store.survey()
    assert [info.name for info in good] == ["good"]
    assert [(name, type(error)) for name, error in damaged] == [("bad", Corrupt)]
    store.remove("good")  # which sweeps: what the damaged name stands for may be any root
    assert bad.root_path.exists()
    store.remove("bad")
    assert not bad.root_path.exists()


def test_a_sweep_never_comes_between_a_root_and_its_name(store, monkeypatch):
    sweeps, write = [], store_module.write_json

    def late(path, value):
        sweeps.append(threading.Thread(target=store.sweep))
        sweeps[0].start()
        sweeps[0].join(0.2)  # unheld, it is done long before
        write(path, value)

    monkeypatch.setattr(store_module, "write_json", late)
    store.create("media", ["ffmpeg"])
    sweeps[0].join()
    store.verify("media")
