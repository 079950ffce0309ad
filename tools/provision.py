"""Puts into the home what machines start from: kernel, initial root, the image `base`. Called by tools/setup.sh.

Idempotent; prints one line per thing done, nothing when all is there. `--json` prints where things are instead.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from recess.config import load_config
from recess.errors import RecessError
from recess.images import ImageStore, ensure_boot_files
from recess.images.store import BASE_IMAGE
from recess.units import GIB, format_bytes

_NEEDED_BYTES = 2 * GIB  # the archive, the image, the kernel package, all at once


def _say(line: str) -> None:
    print(f"   {line}", file=sys.stderr, flush=True)


def _check_space(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path).free
    if free < _NEEDED_BYTES:
        raise RecessError(
            f"{path} has {format_bytes(free)} free; building the base image needs {format_bytes(_NEEDED_BYTES)}",
            hint="free some space, or set RECESS_HOME to a larger disk",
        )


def main(arguments: list[str]) -> int:
    """Provision the home; return the exit code."""
    config = load_config()
    try:
        config.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        store = ImageStore(config.images_dir)
        if not any(image.name == BASE_IMAGE for image in store.list()):
            _check_space(config.images_dir)
        boot = ensure_boot_files(config.images_dir, config.bin_dir / "guestd", _say, kernel=config.kernel)
        base = store.ensure_base(_say)
    except RecessError as exc:
        print(f"error: {exc.message}", file=sys.stderr)
        if exc.hint:
            print(f"hint: {exc.hint}", file=sys.stderr)
        for line in str(exc.details.get("log", "")).splitlines()[-8:]:
            print(f"   | {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing half-made is left", file=sys.stderr)
        return 130
    if "--json" in arguments:
        where = {
            "kernel": str(boot.kernel),
            "initrd": str(boot.initrd),
            "root": str(base.root_path),
            "package": boot.kernel_package,
        }
        print(json.dumps(where))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
