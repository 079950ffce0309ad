"""The acts of the story: build, lunch, message, fork, crash, upgrade. Each does, measures and checks from outside."""

from __future__ import annotations

import asyncio
import json
import time

from recess.demo import log_reading as read
from recess.demo.processes import wait_gone
from recess.demo.report import Step
from recess.demo.seed import blobs_of
from recess.demo.world import World, example_folder
from recess.sdk.transport import Json
from recess.units import format_duration

AGENT = "coder"
SESSION = "lunch"
TURN_S = 180.0
IDLE = "2s"


async def turn(world: World, session: str, text: str) -> tuple[int, list[Json]]:
    """Send a message and follow its turn to the end; return the message's position and the entries after it."""
    position = await world.client.send(session, text, key=f"{session}/{text}")
    return position, await end_of_turn(world, session, position, text)


async def end_of_turn(world: World, session: str, position: int, text: str) -> list[Json]:
    """Follow a turn to its end and tell it. Raises StoryFailed if it did not end well."""
    end, seen = await world.client.wait_entry(
        session, position, lambda e: e["kind"] == "turn.end", f"the answer to {text!r}", TURN_S
    )
    world.report.tell(f"user: {text}")
    took = read.durations(seen)
    for entry in read.of_kind(seen, "tool.start"):
        arguments = json.dumps(entry["body"]["arguments"], ensure_ascii=False)
        shown = arguments if len(arguments) < 80 else arguments[:77] + "..."
        seconds = f"  ({format_duration(took[entry['ref']])})" if entry["ref"] in took else ""
        world.report.tell(f"  {entry['body']['name']} {shown}{seconds}")
    world.report.tell(f"agent: {read.last_text(seen)}")
    step = world.report.steps[-1]
    world.report.check(step, "the turn ended well", end["body"].get("status") == "done", end["body"])
    return seen


async def open_house(world: World) -> None:
    """Start the server, store the agent's first version, start a session and its machine."""
    report = world.report
    step = report.begin("start", "a server starts, version 1 of the agent is deployed, a session begins")
    server_s = await world.start_server()
    started, blobs = time.monotonic(), blobs_of(world.config.home)
    await world.client.warm_up(report.tell)
    template_s = time.monotonic() - started
    if blobs_of(world.config.home) != blobs:
        await world.keep_template()
    routes = {"llm": world.model.base_url, "pay": world.pay.url, "git": world.git.url}
    source = (example_folder() / "agent.py").read_text()
    version = await world.client.deploy(AGENT, source, {"idle": IDLE, "routes": routes})
    world.memory["version"] = version
    started = time.monotonic()
    row = await world.client.start_session(AGENT, SESSION, report.tell)
    report.check(step, "the session exists", row.get("name") == SESSION, row)
    machine_s = time.monotonic() - started
    report.check(step, "it has a machine", bool(row["machine"]) and bool(world.machines()))
    report.end(step, server_s=server_s, template_s=template_s, machine_s=machine_s, version=version[:12])


async def build(world: World) -> None:
    """The user asks for a site; the agent clones, writes, installs, starts a server, remembers."""
    report = world.report
    step = report.begin("build", "the user asks for a small site")
    _, seen = await turn(
        world, SESSION, "Build me a small site, starting from http://127.0.0.1:3128/route/git/site.git"
    )
    outputs = read.tool_outputs(seen)
    report.check(step, "a git repository was cloned", world.git.commit[:7] in outputs[0][1], outputs[0])
    report.check(step, "a local Python package was installed", "1.0" in outputs[2][1], outputs[2])
    now = read.look(seen)
    report.check(step, "the dev server answers over HTTP", "Lunch menu" in now["page"], now)
    known = json.loads(read.output_of(seen, "recall"))
    report.check(step, "the agent's dict is filled", known["memory"].get("colour") == "teal", known)
    report.check(step, "the model's key was used and is in no process of the machine", now["keys"] == "0", now)
    report.check(step, "the model refused no transcript and no key", not world.model.refused, list(world.model.refused))
    world.memory.update(now, agent_nonce=known["process"]["nonce"], position=str(seen[-1]["position"]))
    report.end(step, model_calls=len(world.model.requests), tool_calls=len(outputs), git_objects=world.git.served)


async def lunch(world: World) -> None:
    """Nobody says anything for two seconds: frozen, no VM process, memory given back."""
    report, client = world.report, world.client
    step = report.begin("lunch", "nobody says anything: the machine is put away")
    before = world.machines()
    report.check(step, "a VM was running", bool(before), before)
    position = int(world.memory["position"])
    ending = asyncio.create_task(_gone([one.pid for one in before]))
    entry, _ = await client.wait_entry(
        SESSION, position, lambda e: e["kind"] == "machine.snapshot", "the idle freeze", 60.0
    )
    left, gone = await ending
    report.check(step, "no VM process is left", not left and not world.machines(), world.machines())
    row = await client.session(SESSION)
    report.check(step, "the session is frozen", row["state"] == "frozen", row["state"])
    body = entry["body"]
    report.check(step, "the snapshot carries its log position", body["position"] == entry["position"], body)
    freed = sum(one.pss_bytes for one in before)
    figures = read.snapshot_figures(entry) | read.put_away_figures(entry, gone)
    report.end(step, **figures, memory_given_back_bytes=freed, processes_ended=len(before))


async def _gone(pids: list[int]) -> tuple[list[int], float]:
    """Wait for the end of these processes; return those that are left, and the wall time when the last one ended."""
    return await wait_gone(pids, 80.0), time.time()


async def message(world: World) -> None:
    """A message comes: thawed, the same coroutine, dict, dev server."""
    report, client, past = world.report, world.client, world.memory
    step = report.begin("message", "a message arrives")
    started = time.monotonic()
    text = "Is it still up?"
    position = await client.send(SESSION, text, key="still-up")
    accepted = time.monotonic() - started
    thaw, _ = await client.wait_entry(SESSION, position, lambda e: e["kind"] == "machine.restore", "the thaw", 60.0)
    thawed = time.monotonic() - started
    seen = await end_of_turn(world, SESSION, position, text)
    body = thaw["body"]
    report.check(step, "the rung is told: a local snapshot, not older than the log", body["rung"] == 2, body)
    report.check(step, "nothing was lost", not body.get("stale"), body)
    known = json.loads(read.output_of(seen, "recall"))
    process = known["process"]
    report.check(step, "the same coroutine went on counting: turn 2", process["turns"] == 2, process)
    report.check(step, "the agent's RAM-only nonce is unchanged", process["nonce"] == past["agent_nonce"], process)
    report.check(step, "the dict is there", known["memory"] == {"colour": "teal", "port": "8000"}, known)
    report.check(step, "the dev server answered the agent", "Lunch menu" in read.look(seen)["page"], seen)
    now = read.look(seen)
    report.check(step, "the dev server is the same process, its nonce unchanged", _same(now, past, "nonce", "pid"), now)
    report.check(step, "the kernel never rebooted", _same(now, past, "boot_id"), now)
    going_on = float(now["uptime_s"]) > float(past["uptime_s"]) and int(now["served"]) > int(past["served"])
    report.check(step, "uptime and the server's counter went on", going_on, (now, past))
    report.end(step, accepted_s=accepted, thawed_s=thawed, **read.restore_figures(thaw))


def _same(a: dict[str, str], b: dict[str, str], *names: str) -> bool:
    return all(a[name] == b[name] for name in names)


async def fork(world: World) -> None:
    """Two children go different ways."""
    report, client, past = world.report, world.client, world.memory
    step = report.begin("fork", "try both ways: the session is forked twice")
    children: list[Json] = []
    async with client.heartbeat(str((await client.session(SESSION))["machine"])) as heart:
        moments = [time.monotonic()]
        for name in ("red", "blue"):
            body = {"name": f"{SESSION}-{name}"}
            children.append(await client.call("POST", f"/v1/sessions/{SESSION}/fork", body, key=f"fork-{name}"))
            moments.append(time.monotonic())
    ways = await asyncio.gather(
        *(
            turn(world, child["id"], f"Make it variant {name}")
            for child, name in zip(children, ("red", "blue"), strict=True)
        )
    )
    parent = {e["position"]: read.said(e) for e in await client.entries(SESSION)}
    lives = [read.look(seen) for _, seen in ways]
    for child in children:
        at = int(child["fork_position"])
        log = await client.entries(child["id"])
        shared = [read.said(e) for e in log if e["position"] <= at]
        own = [read.said(e) for e in log if e["position"] > at]
        report.check(
            step, "log equal up to the fork", len(shared) == at and shared == [parent[p] for p in range(1, at + 1)]
        )
        report.check(step, "log different after it", bool(own) and own[0] != parent.get(at + 1), own[:1])
    differ = "Variant red" in lives[0]["page"] and "Variant blue" in lives[1]["page"]
    report.check(step, "files differ only after the fork", differ and "Lunch menu" in past["page"], lives)
    fresh = [{one["random"], one["uuid"]} for one in (*lives, past)]
    report.check(step, "random bytes differ", not fresh[0] & fresh[1] and not fresh[0] & fresh[2], fresh)
    names = [one["hostname"] for one in lives] + [past["hostname"]]
    ids = [one["machine_id"] for one in lives] + [past["machine_id"]]
    report.check(step, "hostnames and machine ids differ", len(set(names)) == 3 and len(set(ids)) == 3, (names, ids))
    both = all(_same(one, past, "nonce", "boot_id") for one in lives)
    report.check(step, "both children have the parent's memory: the server's nonce", both, lives)
    for child in children:
        await client.call("POST", f"/v1/sessions/{child['id']}/close", {})
    snapshots = read.of_kind(await client.entries(SESSION), "machine.snapshot")
    origin = [entry for entry in snapshots if entry["body"]["snapshot"] == children[0]["snapshot"]]
    report.check(step, "the snapshot they stem from is in the parent's log", len(origin) == 1, snapshots)
    thaws = [read.of_kind(seen, "machine.restore") for _, seen in ways]
    figures = read.snapshot_figures(origin[0])
    if heart.beats and "standstill_s" in figures:  # the parent ran on through it (else it was asleep already)
        figures["workload_felt_s"] = heart.longest_s + float(figures["standstill_s"])
    figures |= read.restore_figures(thaws[0][0]) if thaws[0] else {}
    report.end(step, first_fork_s=moments[1] - moments[0], second_fork_s=moments[2] - moments[1], **figures)


async def crash(world: World) -> None:
    """The VM and the server are killed between "charged" and "recorded"."""
    report, client, pay = world.report, world.client, world.pay
    step = report.begin("crash", "the power goes between a charge and its record")
    pay.hold()
    text = "Charge 5 dollars"
    position = await client.send(SESSION, text, key="charge")
    async with asyncio.timeout(TURN_S):
        await pay.counted.wait()
    pending = read.open_calls(await client.entries(SESSION, position))
    report.check(step, "charged, and the result not yet recorded", pending == ["charge"], pending)
    killed = await world.kill_everything()
    report.check(step, "server, keeper and VM are dead (SIGKILL)", len(killed) >= 2, killed)
    pay.release()
    started = time.monotonic()
    server_s = await world.start_server()
    seen = await end_of_turn(world, SESSION, position, text)
    recovered = time.monotonic() - started
    report.check(step, "the charge stands once", (len(pay.charges), pay.calls) == (1, 1), (pay.charges, pay.calls))
    settled = [e for e in read.of_kind(seen, "tool.settled") if e["body"].get("by") == "verify"]
    report.check(step, "the open call was settled by asking, not by repeating", len(settled) == 1, seen)
    thaws = [e for e in read.of_kind(seen, "machine.restore") if e["body"]["stale"]]
    report.check(step, "the log says that the machine is older than the log", bool(thaws), seen)
    body = thaws[-1]["body"]
    report.check(step, "and what was lost", bool(body.get("lost")) and body["position"] < body["head"], body)
    asked = json.dumps(world.model.requests[-1]["messages"])
    report.check(step, "the model was told", "[recess] " in asked and "I was told" in read.last_text(seen), asked)
    report.check(step, "the model refused no transcript", not world.model.refused, list(world.model.refused))
    report.tell(f"lost: {body['lost']}")
    lost = int(body["head"]) - int(body["position"])
    report.end(
        step,
        killed=len(killed),
        server_s=server_s,
        recovered_s=recovered,
        entries_ahead=lost,
        **read.restore_figures(thaws[-1]),
    )


async def upgrade(world: World) -> None:
    """Version 2 of the code takes the next turn."""
    report, client, past = world.report, world.client, world.memory
    step = report.begin("upgrade", "the team ships version 2 of the agent")
    source = (example_folder() / "agent_v2.py").read_text()
    routes = {"llm": world.model.base_url, "pay": world.pay.url, "git": world.git.url}
    version = await client.deploy(AGENT, source, {"idle": IDLE, "routes": routes})
    _, seen = await turn(world, SESSION, "What did we do so far?")
    codes = [(e["body"]["old"], e["body"]["new"]) for e in read.of_kind(seen, "code")]
    report.check(step, "the log says which code took over", codes == [(past["version"], version)], codes)
    headings = read.output_of(seen, "outline")
    report.check(step, "the new version's new tool was used", headings == "Lunch menu", headings)
    text = read.last_text(seen)
    whole = all(words in text for words in ("Build me a small site", "Is it still up", "Charge 5 dollars"))
    report.check(step, "it has the whole context", whole, text)
    report.check(step, "the dev server answered the new agent", "Lunch menu" in read.look(seen)["page"], seen)
    now = read.look(seen)
    report.check(
        step, "the dev server never stopped: the same process and nonce", _same(now, past, "nonce", "pid"), now
    )
    report.end(step, old=past["version"][:12], new=version[:12])


async def good_night(world: World) -> None:
    """Close the session, end the server: nothing is left."""
    report = world.report
    step: Step = report.begin("end", "the session is closed, the server ends")
    await world.client.call("POST", f"/v1/sessions/{SESSION}/close", {})
    left = await world.stop()
    report.check(step, "no process is left behind", not left, left)
    report.end(step)


ACTS = (open_house, build, lunch, message, fork, crash, upgrade, good_night)
