import pytest

from recess.demo.heartbeat import longest_gap


@pytest.mark.parametrize(
    ("beats", "start", "end", "gap"),
    [
        ([1.0, 1.1, 1.2, 1.9, 2.0], 1.05, 2.0, 0.7),
        ([1.0, 1.1, 3.0], 1.15, 2.0, 1.9),  # a silence that reaches beyond the window counts whole
        ([], 1.0, 2.5, 1.5),
        ([0.5, 5.0], 1.0, 2.0, 4.5),
        ([0.9, 1.0, 1.001, 1.002], 1.0, 1.002, 0.001),
    ],
)
def test_longest_gap(beats, start, end, gap) -> None:
    assert longest_gap(beats, start, end) == pytest.approx(gap)
