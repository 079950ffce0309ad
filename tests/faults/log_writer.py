"""A process that appends to a log and says what was acknowledged, one line each, until it is killed."""

import asyncio
import sys
from pathlib import Path

from recess.contextlog import SCHEMA, Delta, DirectoryBodies, Draft, SqlLog
from recess.db import Database


async def main(home: Path) -> None:
    db = Database.open(home / "recess.db", [SCHEMA])
    log = SqlLog(db, DirectoryBodies(home / "bodies"))
    row = await log.create(agent="a", code_version="v", session_id="ses_1")
    row = await log.claim(row.id, "n", 1e12, now=0.0)

    async def client(name: int) -> None:
        i = 0
        while True:
            text = f"{name}/{i} " + "x" * (40_000 if i % 7 == 0 else 10)
            done = await log.append_inbox(row.id, Draft("user", {"text": text}, key=f"{name}/{i}"))
            print("inbox", done.position, f"{name}/{i}", flush=True)
            i += 1

    async def owner() -> None:
        part = 0
        while True:
            await log.put_delta(row.id, row.epoch, Delta(1, part, 0, "streamed"))
            print("delta", part, part, flush=True)
            drafts = [
                Draft("assistant", {"text": f"reply {part}", "part": part}, turn=1, key=f"p{part}"),
                Draft("note", {"pair": part}),
            ]
            done = await log.append(row.id, row.epoch, drafts)
            print("pair", done[0].position, part, flush=True)
            part += 1

    await asyncio.gather(owner(), *(client(n) for n in range(3)))


asyncio.run(main(Path(sys.argv[1])))
