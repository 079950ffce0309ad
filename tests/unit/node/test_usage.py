"""What takes space on a node: the parts that need no node."""

from recess.node.usage import Kind, waiting

NAME = "waiting VMs (memory)"


def test_what_waits_is_one_line() -> None:
    assert waiting({}) == Kind(NAME, 0, 0, 0, 0)
    one = {"waiting": 2, "memory_bytes": 44, "limit": 4, "taken": 1, "missed": 1}
    assert waiting({"qemu": one, "other": {**one, "waiting": 1}}) == Kind(NAME, 3, 0, 88, 88)
