"""What the hard guests do, as scripts for a machine's shell: begin, wait until in the middle, and prove the end.

Each script ends with 0 when what it says is so; waits are loops of the guest over what it can see, bounded by the test's own
time limit. Everything that proves something is a property of the program's result, not of its speed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HardGuest:
    """A program and its work. `begin` leaves it running; `midway` returns once it is in the middle; `proof` waits for its
    end and prints what must be the same in every copy of the machine."""

    name: str
    image: str
    begin: str
    midway: str
    proof: str
    memory_mib: int = 512
    cpus: int = 1


FFMPEG = HardGuest(
    "FFmpeg in the middle of an encode",
    "hard",
    # One thread: the same frames in give the same bytes out, however often it was frozen.
    begin="cd /root; nohup ffmpeg -nostdin -v error -progress progress -f lavfi -i testsrc2=size=320x240:rate=25:duration=12 "
    "-c:v libx264 -preset veryfast -threads 1 -fflags +bitexact -flags +bitexact out.mkv >log 2>&1 &",
    midway="cd /root; until grep -q '^frame=[1-9][0-9]' progress 2>/dev/null; do sleep 0.1; done; "
    "! grep -q progress=end progress",
    proof="cd /root; until grep -q progress=end progress; do sleep 0.2; done; "
    "while pgrep -x ffmpeg >/dev/null; do sleep 0.1; done; cat log; "
    "ffprobe -v error -count_frames -select_streams v -show_entries stream=nb_read_frames -of csv=p=0 out.mkv; "
    "sha256sum <out.mkv",
)

_SQL = "/usr/lib/postgresql/*/bin"
POSTGRES = HardGuest(
    "PostgreSQL under pgbench",
    "hard",
    begin="set -e; mkdir -p /root/db /var/run/postgresql; chown -R postgres /root/db /var/run/postgresql; chmod 755 /root; "
    "su postgres -s /bin/sh -c '"
    f"set -e; cd /tmp; set -- {_SQL}; PATH=$1:$PATH; initdb -D /root/db --no-sync >/tmp/init 2>&1; "
    'pg_ctl -D /root/db -w -t 120 -l /tmp/log -o "-c listen_addresses=" start >/dev/null; createdb bench; '
    "pgbench -i -q -s 1 bench >/dev/null 2>&1; "
    "nohup pgbench -n -c 2 -t 250 -l --log-prefix=/tmp/acked bench >/tmp/result 2>&1 &'",
    midway="until [ $(cat /tmp/acked.* 2>/dev/null | wc -l) -ge 20 ]; do sleep 0.1; done; pgrep -x pgbench >/dev/null",
    # Every transaction that a client was told of is a row, and the three tables agree.
    proof="while pgrep -x pgbench >/dev/null; do sleep 0.2; done; "
    f"cd /tmp; set -- {_SQL}; grep 'actually processed\\|failed' /tmp/result; "
    "su postgres -s /bin/sh -c \"$1/psql -Atq bench -c 'select count(*) from pgbench_history' "
    "-c 'select (select sum(delta) from pgbench_history) = (select sum(abalance) from pgbench_accounts)' "
    "-c 'select (select sum(tbalance) from pgbench_tellers) = (select sum(bbalance) from pgbench_branches)'\"",
)

_DEV_SERVER = """
const fs = require('fs'), http = require('http'), nonce = Math.random().toString(36);
let changes = 0;
fs.watch('/root/site', () => { changes += 1; });
http.createServer((q, r) => {
  r.end(nonce + ' ' + changes + ' ' + fs.readFileSync('/root/site/page', 'utf8'));
}).listen(3000, '127.0.0.1');
"""
NODE = HardGuest(
    "a Node dev server with file watchers",
    "hard",
    begin=f"mkdir -p /root/site; echo one >/root/site/page; cat >/root/dev.js <<'END'\n{_DEV_SERVER}\nEND\n"
    "cd /root; nohup node dev.js >log 2>&1 &",
    midway="until curl -sf http://127.0.0.1:3000/ | tee /root/first | grep -q one; do sleep 0.2; done",
    # The same process (its nonce), and its watcher still sees what is written.
    proof='set -e; cd /root; was=$(curl -sf http://127.0.0.1:3000/); [ "${was%% *}" = "$(cut -d\' \' -f1 first)" ]; '
    "before=$(echo $was | cut -d' ' -f2); echo two >site/page; "
    "until [ $(curl -sf http://127.0.0.1:3000/ | cut -d' ' -f2) -gt $before ]; do sleep 0.1; done; "
    "curl -sf http://127.0.0.1:3000/ | cut -d' ' -f1,3",
)

_BEACON = r"""
import http.server
PAGE = b"<script>const nonce = Math.random(); let n = 0; setInterval(() => fetch('/beat?' + nonce + '=' + ++n), 300);</script>"
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith('/beat?'):
            with open('/root/beats', 'a') as out:
                out.write(self.path[6:].replace('=', ' ') + '\n')
        self.send_response(200); self.send_header('Content-Type', 'text/html'); self.end_headers()
        self.wfile.write(PAGE if self.path == '/' else b'')
    def log_message(self, *a): pass
http.server.ThreadingHTTPServer(('127.0.0.1', 8000), Handler).serve_forever()
"""
# What the page says, asked over DevTools: a WebSocket's handshake, one question, one answer (RFC 6455).
_ASK = r"""
import json, os, socket, struct, urllib.request
pages = json.load(urllib.request.urlopen('http://127.0.0.1:9222/json/list'))
(page,) = [page for page in pages if page['url'] == 'http://127.0.0.1:8000/']
link = socket.create_connection(('127.0.0.1', 9222))
path = page['webSocketDebuggerUrl'].split('9222', 1)[1]
link.sendall((f'GET {path} HTTP/1.1\r\nHost: 127.0.0.1:9222\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n'
              'Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n').encode())
said = link.makefile('rb')
while said.readline().strip(): pass
question = json.dumps({'id': 1, 'method': 'Runtime.evaluate', 'params': {'expression': 'nonce + " " + n'}}).encode()
link.sendall(bytes([0x81, 0x80 | len(question)]) + bytes(4) + question)
size = said.read(2)[1]
print(json.loads(said.read(struct.unpack('>H', said.read(2))[0] if size == 126 else size))['result']['result']['value'])
"""
CHROMIUM = HardGuest(
    "headless Chromium with an open page",
    "browser",
    # The page is opened over DevTools, once the browser is up. A child of the browser that did not reach it in 15 s ends itself,
    # and a page that its network service was to load stays blank for ever: in software that takes longer.
    begin=f"cat >/root/beacon.py <<'END'\n{_BEACON}\nEND\ncat >/root/ask.py <<'END'\n{_ASK}\nEND\n"
    "cd /root; nohup python3 beacon.py >beacon.log 2>&1 & "
    "until curl -sf http://127.0.0.1:8000/ >/dev/null; do sleep 0.1; done; cd /root; "
    "nohup chromium --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --user-data-dir=/root/p "
    "--disable-component-update --disable-background-networking --disable-features=PreloadTopChromeWebUI "
    "--ipc-connection-timeout=600 --remote-debugging-port=9222 about:blank >chromium.log 2>&1 & "
    "until curl -sf -X PUT 'http://127.0.0.1:9222/json/new?http://127.0.0.1:8000/' >/dev/null; do sleep 0.3; done",
    midway="until [ $(wc -l </root/beats 2>/dev/null || echo 0) -ge 3 ]; do sleep 0.3; done",
    # The page was never loaded again: DevTools finds the nonce in it that all beats have, its counter has come at least as far
    # as they, and goes on. A beat that was on its way may be late or lost in a copy, as any request over a network.
    proof="set -e; cd /root; most() { cut -d' ' -f2 beats | sort -n | tail -n 1; }; then=$(most); "
    "until [ $(most) -ge $((then + 3)) ]; do sleep 0.3; done; now=$(most); "
    "set -- $(python3 ask.py); [ $(cut -d' ' -f1 beats | sort -u) = $1 ]; [ $2 -ge $now ]; echo $1",
    memory_mib=1024,
    cpus=2,  # in software, one is busy for most of half an hour before the page opens
)

GUESTS = (FFMPEG, POSTGRES, NODE, CHROMIUM)
