"""Which kernel a machine starts from: by kind, by path, by what is there."""

import json

import pytest

from recess.errors import BadInput, Corrupt, NotFound, Unavailable
from recess.images import kernel, kernels
from tests.unit.images.test_kernel import boot_image, elf

DEBIAN, TRIMMED, OWN = elf(filler=100), elf(filler=200), elf(filler=300)


def no_fetch():
    raise Unavailable("no mirror")


@pytest.fixture
def both(tmp_path):
    kernels.install(
        tmp_path, kernels.DEBIAN, boot_image(DEBIAN), "linux-image 6.1", [("b", b"second"), ("a", b"third")]
    )
    kernels.install(tmp_path, kernels.TRIMMED, TRIMMED, "linux-source 6.12")
    return tmp_path


@pytest.mark.parametrize(
    ("wanted", "kind", "content"),
    [("auto", "trimmed", TRIMMED), ("trimmed", "trimmed", TRIMMED), ("debian", "debian", DEBIAN)],
)
def test_a_kind_is_chosen(both, wanted, kind, content):
    found = kernels.choose(both, wanted, no_fetch)
    assert (found.kind, found.path.read_bytes()) == (kind, content)


def test_modules_keep_their_order(both):
    assert [p.name for p in kernels.choose(both, "debian", no_fetch).modules] == ["00-b.ko", "01-a.ko"]
    assert kernels.choose(both, "trimmed", no_fetch).modules == ()


def test_without_a_built_one_auto_is_debians(both):
    (both / "kernel" / "trimmed.json").unlink()
    assert kernels.choose(both, "auto", no_fetch).kind == "debian"
    with pytest.raises(NotFound, match="not built") as error:
        kernels.choose(both, "trimmed", no_fetch)
    assert error.value.hint == "make kernel"


def test_debians_is_fetched_when_it_is_needed_and_absent(tmp_path):
    with pytest.raises(Unavailable):
        kernels.choose(tmp_path, "auto", no_fetch)
    kernels.install(tmp_path, kernels.TRIMMED, TRIMMED, "p")
    assert kernels.choose(tmp_path, "auto", no_fetch).kind == "trimmed"
    with pytest.raises(Unavailable):
        kernels.choose(tmp_path, "debian", no_fetch)


def test_a_file_of_the_users_own(both, tmp_path):
    path = tmp_path / "vmlinux.zst"
    path.write_bytes(kernel.zstd.compress(OWN))
    found = kernels.choose(both, str(path), no_fetch)
    assert (found.kind, found.package, found.path.read_bytes()) == ("own", "vmlinux.zst", OWN)
    path.write_bytes(b"no kernel at all")
    with pytest.raises(Corrupt):
        kernels.choose(both, str(path), no_fetch)
    path.unlink()
    with pytest.raises(NotFound, match="cannot be read"):
        kernels.choose(both, str(path), no_fetch)


@pytest.mark.parametrize("word", ["", "trimed", "vmlinux"])
def test_an_unknown_word_is_refused(both, word):
    with pytest.raises(BadInput, match="no such kernel"):
        kernels.choose(both, word, no_fetch)


def test_what_is_no_kernel_is_not_installed(both):
    with pytest.raises(Corrupt):
        kernels.install(both, kernels.TRIMMED, b"\x7fELF nonsense", "p")
    assert kernels.choose(both, "trimmed", no_fetch).path.read_bytes() == TRIMMED


def test_a_pointer_to_nothing_is_corrupt(both):
    pointer = both / "kernel" / "trimmed.json"
    pointer.write_text(json.dumps({**json.loads(pointer.read_text()), "hash": "cd" * 32}))
    with pytest.raises(Corrupt, match="cdcdcdcdcdcd"):
        kernels.choose(both, "auto", no_fetch)
    assert kernels.choose(both, "debian", no_fetch).kind == "debian"


def test_a_new_kernel_shows_in_the_stamp(both):
    before = kernels.stamp(kernels.chosen_by(both, "auto"))
    assert before == kernels.stamp(kernels.chosen_by(both, "auto"))
    kernels.install(both, kernels.TRIMMED, OWN, "linux-source 6.18")
    assert kernels.stamp(kernels.chosen_by(both, "auto")) != before
    assert kernels.stamp([both / "absent"]) == ((0, 0),)


def test_a_kernel_is_described_by_its_hash(both):
    first = kernels.choose(both, "trimmed", no_fetch)
    assert kernels.describe(both, first.hash) == f"trimmed (linux-source 6.12, {first.hash[:12]})"
    kernels.install(both, kernels.TRIMMED, OWN, "linux-source 6.18")
    assert kernels.describe(both, first.hash) == f"trimmed (linux-source 6.12, {first.hash[:12]})"
    assert kernels.describe(both, "ab" * 32) == "unknown (abababababab)"
    assert kernels.describe(both, "../../x") == "unknown (../../x)"
