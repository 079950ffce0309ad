"""Puts the kernel that tools/kernel.sh built into the home, as the trimmed one: new machines start from it.

    tools/kernel_install.py FILE PACKAGE        PACKAGE: what it was built from, "linux-source-6.12 6.12.117-1"

Templates of before stay with their kernel, and so do their machines; the next template is made with this one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from recess.config import load_config
from recess.errors import RecessError
from recess.images import kernels


def main(arguments: list[str]) -> int:
    """Install the kernel; return the exit code."""
    if len(arguments) != 2:
        print("usage: tools/kernel_install.py FILE PACKAGE", file=sys.stderr)
        return 2
    config = load_config()
    try:
        kept = kernels.install(config.images_dir, kernels.TRIMMED, Path(arguments[0]).read_bytes(), arguments[1])
    except (RecessError, OSError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    unused = "" if config.kernel in (kernels.AUTO, kernels.TRIMMED) else f"; not used: RECESS_KERNEL={config.kernel}"
    print(f"==> kernel {kept.label}{unused}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
