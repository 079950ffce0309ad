"""Index version 2 and recoded files: stored bytes stay readable, and today's writer makes the same index of them.

Written once (`python -m tests.golden.test_frame_formats`, which refuses to write over them), never made again.
"""

from pathlib import Path

from blake3 import blake3

from recess.frames import RecodedReader, SeekableReader, WorkPool, build_seekable, recode
from recess.frames.index_v2 import encode_index
from tests.unit.snapshots.helpers import page

HERE = Path(__file__).parent
NAME = "1e96d6ee3f98fc0ebe564f32e03f7aa4240b8f521728d74f80b2cf96423a4d0c"
RAWS = [b"".join(page(n).tobytes() for n in pair) for pair in ((1, 2), (3, 4), (5, 6), (7, 8), (9, 10))]


def read(name):
    data = (HERE / name).read_bytes()
    return (lambda at, n: data[at : at + n]), len(data)


def original():
    return SeekableReader(*read("frames_v2.zst"), NAME, b"GOLD", "golden")


def test_the_stored_file_is_read():
    reader = original()
    assert (reader.table.count, reader.table.level, reader.extra) == (5, 3, b"extra")
    assert [reader.frame(i) for i in range(5)] == RAWS


def test_the_stored_recoded_file_is_read():
    reader = RecodedReader(*read("recoded_v1.zst"), NAME, b"GOLD", "golden")
    assert (reader.table.count, reader.own_table.count, reader.own_table.level, reader.extra) == (5, 3, 19, b"extra")
    assert [reader.frame(i) for i in range(5)] == RAWS


def test_todays_index_is_the_same():
    reader = original()
    assert blake3(encode_index(b"GOLD", reader.table, reader.extra)).hexdigest() == NAME


def test_today_the_stored_file_is_recoded_to_the_same_content():
    data = b"".join(recode(original(), level=9, frame_bytes=1 << 16))
    reader = RecodedReader(lambda at, n: data[at : at + n], len(data), NAME, b"GOLD", "today")
    assert [reader.frame(i) for i in range(5)] == RAWS


if __name__ == "__main__":
    pool = WorkPool(1)
    made = build_seekable(b"GOLD", len(RAWS), RAWS.__getitem__, b"extra", level=3, pool=pool)
    bytes_ = b"".join(made.pieces)
    with (HERE / "frames_v2.zst").open("xb") as file:
        file.write(bytes_)
    reader_ = SeekableReader(lambda at, n: bytes_[at : at + n], len(bytes_), made.index_hash, b"GOLD", "made")
    with (HERE / "recoded_v1.zst").open("xb") as file:
        file.writelines(recode(reader_, level=19, frame_bytes=1 << 14))
    print(made.index_hash)
    pool.close()
