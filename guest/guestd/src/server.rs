//! The event loop: one thread, epoll, no timers. When nothing happens nothing runs, so a frozen machine's pages rest.
//!
//! Order of each round: events in, then every stream that can move moves, then bytes out. Streams to the host are
//! bounded by credit and by the room of the outgoing queue, streams into the guest by the window.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use crate::conn::Conn;
use crate::fail::{Fail, Outcome};
use crate::frame::{self, Event, Frame, MAX_PAYLOAD, WINDOW};
use crate::freezer::Freezer;
use crate::helper::{self, Helper};
use crate::jobs::{self, Pulled, Table};
use crate::json::{self, obj, Value};
use crate::ring::{Cursor, Read};
use crate::streams::{End, Stream};
use crate::sys::{self, Poller, Watched, EDGE, IN, OUT};
use crate::{stats, VERSION};

pub const PROTO: i64 = 1;
/// Streams that the guest may have open towards the host; more connections wait in the listener's backlog.
const MAX_INCOMING: usize = 128;
const MAX_STREAMS: usize = 512;
const BACKLOG: i32 = 128;
/// Reads of the port in one round: a host that floods must not keep jobs' output from moving.
const READS_PER_ROUND: usize = 16;

/// Where guestd runs and what it offers.
pub struct Options {
    /// PID 1 of its own machine: identity and clock are ours to set.
    pub own_machine: bool,
    pub run_dir: Option<PathBuf>,
    pub proxy_port: Option<u16>,
    pub hooks: PathBuf,
    /// The file system to sync before a freeze.
    pub disk: Option<OwnedFd>,
}

struct Listener {
    w: Watched,
    service: &'static str,
    unix: bool,
}

pub struct PendingHelper {
    w: Watched,
    request: u32,
    said: Vec<u8>,
}

pub struct Server {
    pub opts: Options,
    pub conn: Conn,
    pub jobs: Table,
    pub streams: BTreeMap<u32, Stream>,
    pub freezer: Freezer,
    /// The environment that the last thaw gave.
    pub env: Vec<(String, String)>,
    pub proxy_port: Option<u16>,
    pub serial: u32,
    poller: Poller,
    acceptor: Option<Watched>,
    listeners: Vec<Listener>,
    helpers: BTreeMap<u32, PendingHelper>,
    signals: Watched,
    scratch: Vec<u8>,
    next_open: u32,
    port_readable: bool,
    finished: bool,
}

const T_PORT: u64 = 0;
const T_SIGNALS: u64 = 1;
const T_ACCEPTOR: u64 = 2;
const T_LISTENER: u64 = 3;
const T_STREAM: u64 = 4;
const T_JOB_IN: u64 = 5;
const T_JOB_OUT: u64 = 6;
const T_HELPER: u64 = 7;

fn token(kind: u64, id: u32, sub: usize) -> u64 {
    kind << 56 | (sub as u64) << 32 | u64::from(id)
}

fn signal_fd() -> Outcome<Watched> {
    // SAFETY: the set is initialised before use.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for s in [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT] {
            libc::sigaddset(&mut set, s);
        }
        libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        let fd = sys::own(libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK));
        fd.map(Watched::new).map_err(|e| Fail::io("signalfd", &e))
    }
}

impl Server {
    pub fn new(opts: Options, freezer: Freezer) -> Outcome<Self> {
        Ok(Server {
            opts,
            conn: Conn::default(),
            jobs: Table::default(),
            streams: BTreeMap::new(),
            freezer,
            env: Vec::new(),
            proxy_port: None,
            serial: 0,
            poller: Poller::new().map_err(|e| Fail::io("epoll", &e))?,
            acceptor: None,
            listeners: Vec::new(),
            helpers: BTreeMap::new(),
            signals: signal_fd()?,
            scratch: vec![0; MAX_PAYLOAD],
            next_open: 2,
            port_readable: false,
            finished: false,
        })
    }

    /// Serve this channel from now on; with `accept`, channels that connect to this listening socket instead.
    pub fn set_port(&mut self, fd: OwnedFd) -> Outcome<()> {
        sys::set_nonblocking(fd.as_raw_fd()).map_err(|e| Fail::io("port", &e))?;
        self.hang_up();
        self.conn.port = Some(Watched::new(fd));
        Ok(())
    }

    pub fn set_acceptor(&mut self, fd: OwnedFd) -> Outcome<()> {
        sys::set_nonblocking(fd.as_raw_fd()).map_err(|e| Fail::io("listener", &e))?;
        self.acceptor = Some(Watched::new(fd));
        Ok(())
    }

    /// Open the two doors for the workload. Connections wait in the backlog until a host listens.
    pub fn open_doors(&mut self) -> Outcome<()> {
        if let Some(port) = self.opts.proxy_port {
            let listener = TcpListener::bind(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
            let listener = listener.map_err(|e| Fail::io("proxy port", &e))?;
            self.proxy_port = listener.local_addr().ok().map(|a| a.port());
            self.add_listener(listener.into(), "proxy", false)?;
        }
        if let Some(run) = &self.opts.run_dir {
            let fail = |e: std::io::Error| Fail::io("session.sock", &e);
            std::fs::create_dir_all(run).map_err(fail)?;
            let path = run.join("session.sock");
            let _ = std::fs::remove_file(&path); // an earlier run's; bind tells if it could not be removed
            let listener = UnixListener::bind(&path).map_err(fail)?;
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).map_err(fail)?;
            self.add_listener(listener.into(), "session", true)?;
        }
        Ok(())
    }

    fn add_listener(&mut self, fd: OwnedFd, service: &'static str, unix: bool) -> Outcome<()> {
        // SAFETY: plain call; raises the backlog that std set.
        sys::check(unsafe { libc::listen(fd.as_raw_fd(), BACKLOG) }).map_err(|e| Fail::io(service, &e))?;
        sys::set_nonblocking(fd.as_raw_fd()).map_err(|e| Fail::io(service, &e))?;
        self.listeners.push(Listener { w: Watched::new(fd), service, unix });
        Ok(())
    }

    /// Run until told to end (never, as PID 1).
    pub fn run(&mut self) -> Outcome<()> {
        let mut events = vec![libc::epoll_event { events: 0, u64: 0 }; 64];
        while !self.finished {
            self.refresh()?;
            let wait = if self.port_readable { 0 } else { -1 };
            let n = self.poller.wait(&mut events, wait).map_err(|e| Fail::io("epoll", &e))?;
            for ev in &events[..n] {
                let (mask, token) = (ev.events, ev.u64);
                self.event(token, mask);
            }
            if self.port_readable {
                self.read_port();
            }
            self.move_all();
        }
        let groups = self.jobs.groups();
        self.freezer.destroy(&groups);
        Ok(())
    }

    /// Set every descriptor's interest from the present state.
    fn refresh(&mut self) -> Outcome<()> {
        let fail = |e: std::io::Error| Fail::io("epoll", &e);
        let p = &self.poller;
        self.signals.want(p, token(T_SIGNALS, 0, 0), IN).map_err(fail)?;
        if let Some(w) = &mut self.conn.port {
            w.want(p, token(T_PORT, 0, 0), IN | OUT | EDGE).map_err(fail)?;
        }
        if let Some(w) = &mut self.acceptor {
            w.want(p, token(T_ACCEPTOR, 0, 0), IN).map_err(fail)?;
        }
        let frozen = self.freezer.frozen;
        let incoming = self.streams.values().filter(|s| matches!(s.end, End::Socket { incoming: true, .. })).count();
        let accept = self.conn.listening && !frozen && incoming < MAX_INCOMING;
        for (i, l) in self.listeners.iter_mut().enumerate() {
            l.w.want(p, token(T_LISTENER, i as u32, 0), if accept { IN } else { 0 }).map_err(fail)?;
        }
        for (id, h) in &mut self.helpers {
            h.w.want(p, token(T_HELPER, *id, 0), IN).map_err(fail)?;
        }
        let room = self.conn.room();
        for (id, s) in &mut self.streams {
            if let End::Socket { w, dialing, .. } = &mut s.end {
                let take = dialing.is_none() && !frozen && !s.out_eof && s.credit > 0 && room > 0;
                let give = dialing.is_some() || !s.pending.is_empty();
                let mask = (if take { IN } else { 0 }) | (if give { OUT } else { 0 });
                w.want(p, token(T_STREAM, *id, 0), mask).map_err(fail)?;
            }
        }
        self.refresh_jobs()
    }

    fn refresh_jobs(&mut self) -> Outcome<()> {
        let fail = |e: std::io::Error| Fail::io("epoll", &e);
        let cap = self.jobs.ring_cap();
        for (key, job) in &mut self.jobs.jobs {
            if job.stdin.is_none() && job.out.iter().all(Option::is_none) {
                continue;
            }
            let (cursors, waiting) = attached(&self.streams, *key);
            let open = !self.freezer.frozen && jobs::room(&job.ring, &cursors, cap) > 0;
            for (i, w) in job.out.iter_mut().enumerate() {
                if let Some(w) = w {
                    w.want(&self.poller, token(T_JOB_OUT, *key, i), if open { IN } else { 0 }).map_err(fail)?;
                }
            }
            if let Some(w) = &mut job.stdin {
                w.want(&self.poller, token(T_JOB_IN, *key, 0), if waiting { OUT } else { 0 }).map_err(fail)?;
            }
        }
        Ok(())
    }

    fn event(&mut self, tok: u64, mask: u32) {
        let (kind, id, sub) = (tok >> 56, tok as u32, (tok >> 32) as usize & 0xFF);
        match kind {
            T_PORT => self.port_readable = true,
            T_SIGNALS => self.on_signals(),
            T_ACCEPTOR => self.on_accept_host(),
            T_LISTENER => self.on_accept(id as usize),
            T_STREAM => self.on_socket(id, mask),
            T_JOB_IN => self.feed_job(id),
            T_JOB_OUT => drop(self.pull_job(id, sub.min(1))),
            T_HELPER => self.on_helper(id),
            _ => {}
        }
    }

    // ---- the channel to the host

    /// The channel is gone: the former connection's streams end, processes live on.
    pub fn hang_up(&mut self) {
        self.conn.reset();
        self.conn.decoder.clear();
        self.streams.clear();
        self.helpers.clear(); // nobody waits for their answers; the children end by themselves
    }

    fn read_port(&mut self) {
        for _ in 0..READS_PER_ROUND {
            let Some(port) = &self.conn.port else {
                self.port_readable = false;
                return;
            };
            match sys::read(port.raw(), &mut self.scratch) {
                Ok(0) => {
                    self.port_readable = false;
                    self.port_closed();
                    return;
                }
                Ok(n) => {
                    let mut decoder = std::mem::take(&mut self.conn.decoder);
                    decoder.feed(&self.scratch[..n]);
                    while let Some(event) = decoder.next() {
                        match event {
                            Event::Frame(f) => self.on_frame(&f),
                            Event::Garbage => self.on_garbage(),
                        }
                    }
                    self.conn.decoder = decoder;
                }
                Err(e) => {
                    self.port_readable = false;
                    if !sys::would_block(&e) {
                        self.port_closed();
                    }
                    return;
                }
            }
        }
    }

    /// A virtio port stays open without a host and wakes us when one comes; a socket is done with.
    fn port_closed(&mut self) {
        self.hang_up();
        if !self.opts.own_machine {
            self.conn.port = None;
            self.finished = self.acceptor.is_none();
        }
    }

    /// The byte stream is damaged: nothing of this connection can be trusted any more; only a new hello helps.
    fn on_garbage(&mut self) {
        if self.conn.attached() {
            self.conn.reset();
            self.streams.clear();
            self.helpers.clear();
            self.conn.frame(frame::DESYNC, 0, 0, b"");
        }
    }

    fn on_frame(&mut self, f: &Frame) {
        if f.kind == frame::HELLO {
            self.on_hello(f);
            return;
        }
        if !self.conn.attached() {
            return;
        }
        match f.kind {
            frame::REQUEST => match self.conn.assemble(f.stream, f.flags, f.payload) {
                Ok(Some(body)) => self.on_request(f.stream, &body),
                Ok(None) => {}
                Err(fail) => self.conn.reply(f.stream, Err(fail)),
            },
            frame::DATA => self.on_data(f.stream, f.payload),
            frame::CREDIT => {
                if let (Some(s), Ok(bytes)) = (self.streams.get_mut(&f.stream), f.payload.try_into()) {
                    s.credit = (s.credit + u32::from_le_bytes(bytes) as usize).min(WINDOW);
                }
            }
            frame::EOF => {
                if let Some(s) = self.streams.get_mut(&f.stream) {
                    s.in_eof = true;
                    self.deliver(f.stream);
                }
            }
            frame::RESET if f.flags & frame::FLAG_LINGER != 0 => self.linger(f.stream),
            frame::RESET => drop(self.streams.remove(&f.stream)),
            frame::PING => self.conn.frame(frame::PONG, 0, f.stream, &f.payload[..f.payload.len().min(64)]),
            frame::LISTEN => self.conn.listening = f.flags & 1 == 1,
            _ => {} // a newer host's: unknown frames mean nothing here
        }
    }

    /// A hello with a new nonce is a new connection: streams of the former one end. With the same nonce it is the
    /// same host asking again, because its hello met the unfinished frame of an earlier one.
    fn on_hello(&mut self, f: &Frame) {
        let body = json::parse(f.payload).unwrap_or(Value::Null);
        let nonce = body.get("nonce").and_then(Value::as_str).unwrap_or_default();
        if nonce.len() != 32 {
            return;
        }
        if self.conn.nonce.as_deref() != Some(nonce) {
            self.conn.reset();
            self.streams.clear();
            self.helpers.clear();
        }
        if f.flags & frame::FLAG_RETRY != 0 {
            self.conn.pad();
        }
        let same = body.get("proto").and_then(Value::as_int) == Some(PROTO);
        let reply = obj([
            ("proto", PROTO.into()),
            ("nonce", nonce.into()),
            ("guestd", VERSION.into()),
            ("boot_id", stats::boot_id().into()),
            ("mode", if self.opts.own_machine { "machine" } else { "process" }.into()),
            ("frozen", self.freezer.frozen.into()),
        ]);
        self.conn.frame(frame::HELLO, 0, 0, reply.text().as_bytes());
        if same {
            self.conn.nonce = Some(nonce.to_string());
        }
    }

    // ---- streams

    pub fn add_stream(&mut self, id: u32, end: End) -> Outcome<()> {
        if id == 0 || id % 2 == 0 || self.streams.contains_key(&id) {
            return Err(Fail::bad("not a free odd stream number"));
        }
        if self.streams.len() >= MAX_STREAMS {
            return Err(Fail::new("busy", format!("{MAX_STREAMS} streams are open")));
        }
        self.streams.insert(id, Stream::new(end));
        Ok(())
    }

    /// End a stream from our side and say why.
    pub fn abort(&mut self, id: u32, why: &Fail) {
        if let Some(s) = self.streams.remove(&id) {
            if let End::Put { request, .. } = s.end {
                self.conn.reply(request, Err(why.clone()));
            } else {
                self.conn.reset_stream(id, why);
            }
        }
    }

    fn on_data(&mut self, id: u32, payload: &[u8]) {
        let Some(s) = self.streams.get_mut(&id) else { return };
        if s.in_eof || payload.len() > s.may_receive() {
            self.abort(id, &Fail::bad("data beyond the credit or the end of file"));
            return;
        }
        s.pending.extend(payload);
        self.deliver(id);
    }

    /// The host closed the stream: deliver what it sent before, take nothing more, then close.
    fn linger(&mut self, id: u32) {
        match self.streams.get_mut(&id) {
            Some(s) if matches!(s.end, End::Socket { dialing: None, .. }) => {
                s.in_eof = true;
                s.out_eof = true;
                self.deliver(id);
            }
            _ => drop(self.streams.remove(&id)),
        }
    }

    /// Move what the host sent to where it goes, as far as it goes now.
    fn deliver(&mut self, id: u32) {
        let Some(s) = self.streams.get_mut(&id) else { return };
        let end = match &mut s.end {
            End::Socket { dialing: Some(_), .. } => return,
            End::Job { key, .. } => {
                let key = *key;
                self.feed_job(key);
                return;
            }
            End::Socket { w, .. } => drain(&mut s.pending, |b| sys::write(w.raw(), b)),
            End::Put { sink, .. } => match sink {
                Some(sink) => put_all(sink.as_mut(), &mut s.pending),
                None => return,
            },
            End::Get { .. } => Ok(std::mem::take(&mut s.pending).len()),
        };
        match end {
            Ok(n) => self.credit(id, n),
            Err(fail) => {
                self.abort(id, &fail);
                return;
            }
        }
        self.after_delivery(id);
    }

    fn credit(&mut self, id: u32, n: usize) {
        let Some(s) = self.streams.get_mut(&id) else { return };
        if let (Some(grant), false) = (s.delivered(n), s.in_eof) {
            self.conn.frame(frame::CREDIT, 0, id, &grant.to_le_bytes());
        }
        s.tidy();
    }

    /// Once all is delivered, pass on the end of file.
    fn after_delivery(&mut self, id: u32) {
        let Some(s) = self.streams.get_mut(&id) else { return };
        if !s.in_eof || s.in_done || !s.pending.is_empty() {
            return;
        }
        s.in_done = true;
        match &mut s.end {
            End::Socket { w, .. } => {
                // SAFETY: plain call; a peer that is gone makes it fail, which the next read tells.
                unsafe { libc::shutdown(w.raw(), libc::SHUT_WR) };
                if s.out_eof {
                    // Closing with unread input would reset the connection under the peer's last read.
                    for _ in 0..READS_PER_ROUND {
                        if sys::read(w.raw(), &mut self.scratch).map_or(true, |n| n == 0) {
                            break;
                        }
                    }
                    self.streams.remove(&id);
                }
            }
            End::Put { sink, request } => {
                let (sink, request) = (sink.take(), *request);
                self.streams.remove(&id);
                if let Some(sink) = sink {
                    let outcome = sink.finish();
                    self.conn.reply(request, outcome);
                }
            }
            End::Job { .. } | End::Get { .. } => {}
        }
    }

    fn on_socket(&mut self, id: u32, mask: u32) {
        let Some(s) = self.streams.get_mut(&id) else { return };
        if let End::Socket { w, dialing, .. } = &mut s.end {
            if let Some(request) = *dialing {
                let outcome = socket_error(w.raw());
                *dialing = None;
                if outcome.is_err() {
                    self.streams.remove(&id);
                }
                self.conn.reply(request, outcome.map(|()| obj([])));
            }
        }
        if mask & OUT != 0 {
            self.deliver(id);
        }
        self.read_socket(id);
    }

    fn read_socket(&mut self, id: u32) {
        let room = self.conn.room();
        let Some(s) = self.streams.get_mut(&id) else { return };
        let End::Socket { w, dialing: None, .. } = &s.end else { return };
        let want = s.credit.min(room).min(self.scratch.len());
        if want == 0 || s.out_eof || self.freezer.frozen {
            return;
        }
        match sys::read(w.raw(), &mut self.scratch[..want]) {
            Ok(0) => {
                s.out_eof = true;
                self.conn.frame(frame::EOF, 0, id, b"");
                if s.in_done {
                    self.streams.remove(&id);
                }
            }
            Ok(n) => {
                s.credit -= n;
                self.conn.frame(frame::DATA, 0, id, &self.scratch[..n]);
            }
            Err(e) if sys::would_block(&e) => {}
            Err(e) => self.abort(id, &Fail::io("connection", &e)),
        }
    }

    /// Move sources and rings towards the host until credit, room or data end; returns whether anything moved.
    fn pump(&mut self) -> bool {
        let ids: Vec<u32> = self.streams.keys().copied().collect();
        ids.into_iter().fold(false, |moved, id| self.pump_one(id) || moved)
    }

    fn pump_one(&mut self, id: u32) -> bool {
        let room = self.conn.room();
        let Some(s) = self.streams.get_mut(&id) else { return false };
        let want = s.credit.min(room).min(self.scratch.len());
        match &mut s.end {
            End::Get { source } if want > 0 && !s.out_eof => match source.read(&mut self.scratch[..want]) {
                Ok(0) => {
                    self.conn.frame(frame::EOF, 0, id, b"");
                    self.streams.remove(&id);
                }
                Ok(n) => {
                    s.credit -= n;
                    self.conn.frame(frame::DATA, 0, id, &self.scratch[..n]);
                }
                Err(fail) => self.abort(id, &fail),
            },
            End::Job { key, cursor } if want > 0 => {
                let Some(job) = self.jobs.jobs.get(key) else {
                    self.abort(id, &Fail::new("no_job", "the job was forgotten"));
                    return true;
                };
                match job.ring.read(cursor, want) {
                    Read::Gap => self.conn.frame(frame::DATA, 0, id, b""),
                    Read::Bytes(channel, data) => {
                        s.credit -= data.len();
                        self.conn.frame(frame::DATA, channel, id, data);
                    }
                    Read::End => {
                        let (Some(code), true) = (job.exit_code, job.settled) else { return false };
                        let body = obj([("exit_code", i64::from(code).into())]).text();
                        self.conn.frame(frame::EXIT, 0, id, body.as_bytes());
                        self.streams.remove(&id);
                    }
                }
            }
            _ => return false,
        }
        true
    }

    fn move_all(&mut self) {
        loop {
            self.settle_jobs();
            let moved = self.pump();
            match self.conn.flush() {
                Ok(true) if moved => {}
                Ok(_) => return,
                Err(_) => {
                    self.port_closed();
                    return;
                }
            }
        }
    }

    // ---- jobs

    /// Give a job's stdin what its attached streams hold.
    fn feed_job(&mut self, key: u32) {
        let ids: Vec<u32> = self.streams.iter().filter(|(_, s)| s.is_of(key)).map(|(id, _)| *id).collect();
        for id in ids {
            let (Some(s), Some(job)) = (self.streams.get_mut(&id), self.jobs.jobs.get_mut(&key)) else { continue };
            let n = match &job.stdin {
                Some(w) => drain(&mut s.pending, |b| sys::write(w.raw(), b)).unwrap_or_else(|_| {
                    job.stdin = None; // the process closed its end: what comes now has no reader
                    std::mem::take(&mut s.pending).len()
                }),
                None => std::mem::take(&mut s.pending).len(),
            };
            if s.in_eof && s.pending.is_empty() && !s.in_done {
                s.in_done = true;
                job.close_stdin();
            }
            self.credit(id, n);
        }
    }

    fn pull_job(&mut self, key: u32, channel: usize) -> Pulled {
        let cap = self.jobs.ring_cap();
        let Some(job) = self.jobs.jobs.get_mut(&key) else { return Pulled::Empty };
        let room = jobs::room(&job.ring, &attached(&self.streams, key).0, cap);
        job.pull(channel, room, cap, &mut self.scratch)
    }

    /// Jobs that ended: take what their pipes still hold; once empty their readers may be told of the end.
    fn settle_jobs(&mut self) {
        if self.freezer.frozen {
            return;
        }
        let ended = |j: &jobs::Job| j.exit_code.is_some() && !j.settled;
        let keys: Vec<u32> = self.jobs.jobs.iter().filter(|(_, j)| ended(j)).map(|(k, _)| *k).collect();
        for key in keys {
            let empty = (0..2).all(|channel| loop {
                match self.pull_job(key, channel) {
                    Pulled::Some => {}
                    Pulled::Empty => break true,
                    Pulled::Full => break false,
                }
            });
            if let (true, Some(job)) = (empty, self.jobs.jobs.get_mut(&key)) {
                job.settled = true;
                job.stdin = None;
            }
        }
    }

    fn on_signals(&mut self) {
        let mut info = [0u8; 128];
        while let Ok(n) = sys::read(self.signals.raw(), &mut info) {
            let signal = u32::from_ne_bytes([info[0], info[1], info[2], info[3]]) as i32;
            if n == info.len() && signal != libc::SIGCHLD && !self.opts.own_machine {
                self.finished = true;
            }
        }
        self.reap();
    }

    /// Collect every ended child: jobs, helpers, and (as PID 1) everybody's orphans.
    pub fn reap(&mut self) {
        loop {
            let mut status = 0;
            // SAFETY: the status outlives the call.
            let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
            if pid <= 0 {
                return;
            }
            let code =
                if libc::WIFSIGNALED(status) { 128 + libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) };
            if let Some(job) = self.jobs.by_pid(pid) {
                job.exit_code = Some(code);
            }
        }
    }

    // ---- doors, hosts, helpers

    fn on_accept_host(&mut self) {
        let Some(acceptor) = &self.acceptor else { return };
        // SAFETY: no address is asked for.
        let fd = unsafe { libc::accept4(acceptor.raw(), std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC) };
        if let Ok(fd) = sys::own(fd) {
            if self.set_port(fd).is_err() {
                self.conn.port = None;
            }
        }
    }

    fn on_accept(&mut self, index: usize) {
        let Some(l) = self.listeners.get(index) else { return };
        let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: no address is asked for.
        let fd = unsafe { libc::accept4(l.w.raw(), std::ptr::null_mut(), std::ptr::null_mut(), flags) };
        let Ok(fd) = sys::own(fd) else { return };
        let meta = if l.unix { peer(&fd) } else { obj([]) };
        let body = obj([("service", l.service.into()), ("meta", meta)]);
        let id = self.next_open;
        self.next_open = self.next_open.checked_add(2).unwrap_or(2);
        self.streams.insert(id, Stream::new(End::Socket { w: Watched::new(fd), dialing: None, incoming: true }));
        self.conn.frame(frame::OPEN, 0, id, body.text().as_bytes());
    }

    /// Answer `request` when this helper ends.
    pub fn add_helper(&mut self, request: u32, h: Helper) {
        self.helpers.insert(request, PendingHelper { w: Watched::new(h.pipe), request, said: Vec::new() });
    }

    fn on_helper(&mut self, id: u32) {
        let Some(h) = self.helpers.get_mut(&id) else { return };
        let mut buf = [0u8; 4096];
        match sys::read(h.w.raw(), &mut buf) {
            Ok(n) if n > 0 => h.said.extend_from_slice(&buf[..n]),
            _ => {
                let (request, outcome) = (h.request, helper::verdict(&h.said));
                self.helpers.remove(&id);
                self.conn.reply(request, outcome.map(|()| obj([])));
            }
        }
    }

    pub fn procs(&self) -> Option<&File> {
        self.freezer.procs()
    }
}

impl Stream {
    fn is_of(&self, job: u32) -> bool {
        matches!(&self.end, End::Job { key, .. } if *key == job)
    }
}

/// The cursors of a job's attached readers, and whether any of them holds input for it.
fn attached(streams: &BTreeMap<u32, Stream>, job: u32) -> (Vec<Cursor>, bool) {
    let mut cursors = Vec::new();
    let mut waiting = false;
    for s in streams.values() {
        if let End::Job { key, cursor } = &s.end {
            if *key == job {
                cursors.push(*cursor);
                waiting |= !s.pending.is_empty();
            }
        }
    }
    (cursors, waiting)
}

/// Write as much as goes; returns how much went.
fn drain(
    pending: &mut std::collections::VecDeque<u8>,
    mut write: impl FnMut(&[u8]) -> std::io::Result<usize>,
) -> Outcome<usize> {
    let mut total = 0;
    while !pending.is_empty() {
        match write(pending.as_slices().0) {
            Ok(n) => {
                pending.drain(..n);
                total += n;
            }
            Err(e) if sys::would_block(&e) => break,
            Err(e) => return Err(Fail::io("connection", &e)),
        }
    }
    Ok(total)
}

fn put_all(sink: &mut dyn crate::streams::Sink, pending: &mut std::collections::VecDeque<u8>) -> Outcome<usize> {
    let n = pending.len();
    let (a, b) = pending.as_slices();
    sink.write(a)?;
    sink.write(b)?;
    pending.clear();
    Ok(n)
}

fn socket_error(fd: i32) -> Outcome<()> {
    let mut code: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: pointer and length describe the int.
    unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ERROR, (&raw mut code).cast(), &mut len) };
    if code == 0 { Ok(()) } else { Err(Fail::io("dial", &std::io::Error::from_raw_os_error(code))) }
}

/// Who connected to the unix socket.
fn peer(fd: &OwnedFd) -> Value {
    let mut cred = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: pointer and length describe the struct.
    unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, (&raw mut cred).cast(), &mut len) };
    obj([("pid", i64::from(cred.pid).into()), ("uid", i64::from(cred.uid).into())])
}

/// A stream socket of this family, non-blocking, on its way to the address.
pub fn dial(addr: std::net::SocketAddr) -> Outcome<OwnedFd> {
    let fail = |e: std::io::Error| Fail::io(&format!("dial {addr}"), &e);
    let family = if addr.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: address structs are filled fully and outlive the calls.
    unsafe {
        let fd = sys::own(libc::socket(family, kind, 0)).map_err(fail)?;
        let ret = match addr {
            std::net::SocketAddr::V4(a) => {
                let mut sa: libc::sockaddr_in = std::mem::zeroed();
                sa.sin_family = libc::AF_INET as u16;
                sa.sin_port = a.port().to_be();
                sa.sin_addr.s_addr = u32::from_ne_bytes(a.ip().octets());
                libc::connect(fd.as_raw_fd(), (&raw const sa).cast(), size_of_val(&sa) as u32)
            }
            std::net::SocketAddr::V6(a) => {
                let mut sa: libc::sockaddr_in6 = std::mem::zeroed();
                sa.sin6_family = libc::AF_INET6 as u16;
                sa.sin6_port = a.port().to_be();
                sa.sin6_addr.s6_addr = a.ip().octets();
                libc::connect(fd.as_raw_fd(), (&raw const sa).cast(), size_of_val(&sa) as u32)
            }
        };
        match sys::check(ret) {
            Err(e) if e.raw_os_error() != Some(libc::EINPROGRESS) => Err(fail(e)),
            _ => Ok(fd),
        }
    }
}

/// Take a descriptor number that the parent left open for us.
pub fn inherit(fd: i32) -> Outcome<OwnedFd> {
    // SAFETY: only queries; ownership is taken below once it is known to be open.
    sys::check(unsafe { libc::fcntl(fd, libc::F_GETFD) }).map_err(|e| Fail::io("--serve-fd", &e))?;
    // SAFETY: the number was given to us by the parent for this purpose and is used once.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
