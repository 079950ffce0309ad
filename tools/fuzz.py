"""Fuzzes the readers of foreign bytes (`recess.testing.fuzz`) with Atheris, one after the other: `make fuzz`.

    tools/fuzz.py [--seconds N] [TARGET]...

Begins with the corpus in tests/property/corpus, works in build/fuzz, and stops at the first input that a reader cannot take:
an error that is not Recess's own, more than 1 GiB of memory, more than 20 s. What it found is left in build/fuzz; once mended
it belongs into the corpus, which the ordinary tests replay. Needs atheris (pip install recess[fuzz]).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORPUS = ROOT / "tests" / "property" / "corpus"
OUT = ROOT / "build" / "fuzz"


def fuzz(target: str, seconds: int) -> None:
    """Fuzz one target in this process; the library ends it."""
    import atheris

    sys.path.insert(0, str(ROOT))
    with atheris.instrument_imports(include=["recess"]):
        from recess.testing.fuzz import TARGETS, give_files
    from tests.golden.test_snapshot_formats import stored_files

    blobs, _ = stored_files()
    give_files({info.key: blobs.get(info.key, max_bytes=1 << 30) for info in blobs.list_blobs()})
    found = OUT / target
    (found / "corpus").mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_total_time={seconds}",
        "-rss_limit_mb=1024",
        "-timeout=20",
        "-verbosity=0",
        "-print_final_stats=1",
    ]
    options += [f"-artifact_prefix={found}/", str(found / "corpus"), str(CORPUS / target)]
    atheris.Setup([sys.argv[0], *options], TARGETS[target])
    atheris.Fuzz()


def main() -> int:
    """Run each target in a process of its own; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="default: all")
    parser.add_argument("--seconds", type=int, default=120, help="of each target")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    targets = args.targets or sorted(folder.name for folder in CORPUS.iterdir())
    if args.here:
        fuzz(targets[0], args.seconds)
        return 0
    for target in targets:
        print(f"==> {target}", file=sys.stderr, flush=True)
        again = [sys.executable, __file__, "--here", "--seconds", str(args.seconds), target]
        # The warnings of the libraries beneath are not what is looked for.
        ran = subprocess.run(again, check=False, env={**os.environ, "PYTHONWARNINGS": "ignore"})
        if ran.returncode:
            print(f"error: {target}: see above and {OUT / target}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
