"""The OCI bundle of one machine: what runsc is told to run, as pure data. Source: the OCI runtime specification.

The root is the machine's EROFS image itself, opened by gVisor and never unpacked; what is written lies over it in the
machine's memory, and so is in every snapshot. The machine has its own loopback and no other network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recess.machines.contract import VmSpec

INIT = "/.recess"
"""Where the machine finds guestd at its first start; from then on guestd runs from its own memory."""

_CAPABILITIES = (
    "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_ADMIN",
    "NET_BIND_SERVICE", "NET_RAW", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_ADMIN", "SYS_CHROOT", "SYS_PTRACE",
    "SYS_RESOURCE",
)  # fmt: skip
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def trial(root: Path, *, user: int) -> dict[str, Any]:
    """Return the bundle that runs `guestd --version` from a folder and ends."""
    return {
        "ociVersion": "1.0.2",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["/guestd", "--version"], "env": [], "cwd": "/"},
        "root": {"path": str(root), "readonly": True},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": _linux(user),
    }


def _linux(user: int) -> dict[str, Any]:
    """Return the namespaces; an ordinary user gets one of users, with one id in it."""
    kinds = ["pid", "network", "ipc", "uts", "mount", *(["user"] if user else [])]
    out: dict[str, Any] = {"namespaces": [{"type": kind} for kind in kinds]}
    if user:
        only = [{"containerID": 0, "hostID": user, "size": 1}]
        out |= {"uidMappings": only, "gidMappings": only}
    return out


def config(spec: VmSpec, *, root: Path, init: Path, user: int) -> dict[str, Any]:
    """Return config.json. `root`: an empty folder; `init`: the folder that holds guestd (empty at a restore, when it
    runs already); `user`: the host's user id (an ordinary user gets a user namespace of one id)."""
    capabilities = [f"CAP_{name}" for name in _CAPABILITIES]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": [f"{INIT}/guestd", "--sandbox"],
            "env": [f"PATH={_PATH}"],
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "inheritable", "permitted"), capabilities),
        },
        "root": {"path": str(root), "readonly": False},
        "hostname": "recess",
        "annotations": {
            "dev.gvisor.spec.rootfs.source": str(spec.boot.root),
            "dev.gvisor.spec.rootfs.type": "erofs",
            "dev.gvisor.spec.rootfs.overlay": "memory",
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs"},
            {"destination": INIT, "type": "bind", "source": str(init), "options": ["ro", "rbind"]},
        ],
        "linux": _linux(user),
    }


def write(folder: Path, content: dict[str, Any]) -> None:
    """Write the bundle."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content, indent=1))
