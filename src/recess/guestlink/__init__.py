"""The host side of the guest protocol: `connect` a byte channel to guestd and get a `Link`.

`link` holds the interface, `client` the implementation, `flows` the streams, `wire` the bodies, `frames` the codec.
"""

from recess.guestlink.client import Link, connect
from recess.guestlink.link import (
    ByteStream,
    ExecRequest,
    FileStat,
    GuestLink,
    IncomingHandler,
    Job,
    JobInfo,
    Thaw,
)

__all__ = [
    "ByteStream",
    "ExecRequest",
    "FileStat",
    "GuestLink",
    "IncomingHandler",
    "Job",
    "JobInfo",
    "Link",
    "Thaw",
    "connect",
]
