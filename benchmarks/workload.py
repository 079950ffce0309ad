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

_READY = 'print("ready", len(table), flush=True)\n'

DIRTIER = WORK.replace(
    _READY + "n = 0\n",
    """pool = b"".join(json.dumps([i, random.random(), "text %d" % (i * 7)]).encode() for i in range(40_000))
block = bytearray(10 << 20)
"""
    + _READY  # only now: making the pool takes seconds
    + "n = 0\n",
).replace(
    "    time.sleep(0.05)\n",
    """    at = n * 524288 % len(block)
    start = n * 4099 % (len(pool) - 524288)
    block[at : at + 524288] = pool[start : start + 524288]
    time.sleep(0.05)
""",
)
"""The same work, and 10 MiB of memory that all change within a second or two, and compress as JSON text does."""

NPM_PROJECT = ("express@4.21.2", "lodash@4.17.21", "axios@1.7.9", "zod@3.24.1")
"""What the Node guest's project depends on; installed by the host's npm, for the guest has no network."""

NODE = r"""
import os, subprocess, time, urllib.request
open("/root/app/server.js", "w").write('''
const express = require("express"), _ = require("lodash"), axios = require("axios"), { z } = require("zod");
const Item = z.object({ n: z.number(), text: z.string() }), app = express(), seen = {};
for (let i = 0; i < 500; i++) seen["key-" + i] = Item.parse({ n: i, text: "value " + i });
app.get("/raw", (q, r) => r.json(seen));
app.get("/", async (q, r) => {
  const all = (await axios.get("http://127.0.0.1:8080/raw", { proxy: false })).data;
  r.json(_.countBy(Object.values(all), (one) => one.n % 7));
});
app.listen(8080, "127.0.0.1");
''')
server = subprocess.Popen(["node", "server.js"], cwd="/root/app")
while True:
    try:
        print(urllib.request.urlopen("http://127.0.0.1:8080/", timeout=120).read().decode())
        break
    except OSError:
        if server.poll() is not None:
            raise SystemExit("the server ended")
        time.sleep(0.2)
print("ready", flush=True)
server.wait()
"""
"""A server of an npm project (`NPM_PROJECT`, in /root/app), asked once: it asks itself, and counts what it got."""

CHROMIUM = r"""
import os, socket, subprocess, time, urllib.request
page = "<html><body><h1>A page</h1>" + "".join(f"<p>Paragraph {i} of some text.</p>" for i in range(2000)) + "</body></html>"
open("/root/page.html", "w").write(page)
browser = subprocess.Popen(["chromium", "--headless=new", "--no-sand" + "box", "--disable-gpu", "--disable-dev-shm-usage",
    "--remote-debugging-port=9222", "file:///root/page.html"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
while True:
    try:
        tabs = urllib.request.urlopen("http://127.0.0.1:9222/json", timeout=60).read().decode()
        if "page.html" in tabs:
            break
    except OSError:
        if browser.poll() is not None:
            raise SystemExit("the browser ended")
    time.sleep(0.5)
time.sleep(5)
print("ready", flush=True)
browser.wait()
"""
"""A headless Chromium with a page open."""
