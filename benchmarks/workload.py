"""The guest's work while figures are taken: a Python agent's memory, a subprocess, files, and a heartbeat.

The heartbeat measures standstill where users feel it: the longest time its process did not run, by its own clock
(CLOCK_MONOTONIC goes on over a thaw only by the time the machine ran, so a pause shows as late wake-ups by the host's
clock; the heartbeat therefore reads the time stamp counter's clock, which runs on while the machine stands still).
"""

WORK = r"""
import json, os, random, subprocess, sys, time
random.seed(7)
table = {f"key-{i}": f"value {i} {random.random()}" for i in range(60_000)}
children = [subprocess.Popen(["sleep", "100000"])]
os.makedirs("/root/work", exist_ok=True)
for i in range(200):
    open(f"/root/work/{i}.txt", "w").write("line %d\n" % i * 50)
print("ready", len(table), flush=True)
n = 0
while True:
    n += 1
    table[f"key-{n % 60000}"] = f"value {n}"
    time.sleep(0.05)
"""

HEARTBEAT = r"""
import os, time
worst, last = 0.0, time.monotonic()
print("ready", flush=True)
while True:
    time.sleep(0.002)
    now = time.monotonic()
    worst = max(worst, now - last)
    last = now
    if os.path.exists("/run/beat-ask"):
        os.remove("/run/beat-ask")
        open("/run/beat.tmp", "w").write(repr(worst))
        os.rename("/run/beat.tmp", "/run/beat")
        worst, last = 0.0, time.monotonic()
"""
