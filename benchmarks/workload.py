"""The guest's work while figures are taken: a Python agent's memory, a subprocess, files, and a heartbeat.

Every clock of the guest stands still with it, so a standstill cannot be measured by the guest's own clock: the
heartbeat prints a byte every 2 ms, and the host takes the longest time between two of them.
"""

WORK = r"""
import json, os, random, subprocess, sys, time
random.seed(7)
table = {f"key-{i}": f"value {i} {random.random()}" for i in range(60_000)}
children = [subprocess.Popen(["sleep", "100000"])]
os.makedirs("/root/files", exist_ok=True)
for i in range(200):
    open(f"/root/files/{i}.txt", "w").write("line %d\n" % i * 50)
print("ready", len(table), flush=True)
n = 0
while True:
    n += 1
    table[f"key-{n % 60000}"] = f"value {n}"
    time.sleep(0.05)
"""

HEARTBEAT = r"""
import os, time
while True:
    os.write(1, b".")
    time.sleep(0.002)
"""
