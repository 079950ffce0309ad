//! The event loop: one thread, epoll, no timers. When nothing happens nothing runs, so a frozen machine's pages rest.
//!
//! Order of each round: events in, then every stream that can move moves, then bytes out. Streams to the host are
//! bounded by credit and by the room of the outgoing queue, streams into the guest by the window.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use crate::conn::Conn;
use crate::doors::Listener;
use crate::fail::{Fail, Outcome};
use crate::flow::drain;
use crate::frame::MAX_PAYLOAD;
use crate::freezer::Freezer;
use crate::helper::{self, Helper};
use crate::jobs::{self, Pulled, Table};
use crate::json::obj;
use crate::ring::Cursor;
use crate::seal::Seal;
use crate::stats;
use crate::streams::{End, Stream};
use crate::sys::{self, Poller, Watched, EDGE, IN, OUT};
use crate::thaw;

pub const PROTO: i64 = 1;
/// Streams that the guest may have open towards the host; more connections wait in the listener's backlog.
const MAX_INCOMING: usize = 128;

/// Where guestd runs and what it offers.
pub struct Options {
    /// PID 1 of its own machine: identity and clock are ours to set.
    pub own_machine: bool,
    /// Its kernel's generator and clock are ours as well; in a process sandbox both are the host's.
    pub own_kernel: bool,
    pub run_dir: Option<PathBuf>,
    pub proxy_port: Option<u16>,
    pub hooks: PathBuf,
    /// The file system to sync before a freeze.
    pub disk: Option<OwnedFd>,
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
    pub kept: thaw::Kept,
    pub seals: Vec<Seal>,
    /// Read once: it lasts as long as the kernel does.
    pub boot_id: String,
    pub proxy_port: Option<u16>,
    pub serial: u32,
    poller: Poller,
    pub acceptor: Option<Watched>,
    pub listeners: Vec<Listener>,
    pub helpers: BTreeMap<u32, PendingHelper>,
    signals: Watched,
    pub scratch: Vec<u8>,
    pub next_open: u32,
    pub port_readable: bool,
    pub finished: bool,
    /// It runs before everybody else.
    first: bool,
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
        let fd = sys::own(libc::signalfd(
            -1,
            &set,
            libc::SFD_CLOEXEC | libc::SFD_NONBLOCK,
        ));
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
            kept: thaw::Kept::default(),
            seals: Vec::new(),
            boot_id: stats::boot_id(),
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
            first: false,
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

    /// Run until told to end (never, as PID 1).
    pub fn run(&mut self) -> Outcome<()> {
        let mut events = vec![libc::epoll_event { events: 0, u64: 0 }; 64];
        while !self.finished {
            self.refresh()?;
            let wait = if self.port_readable { 0 } else { -1 };
            let n = self
                .poller
                .wait(&mut events, wait)
                .map_err(|e| Fail::io("epoll", &e))?;
            for ev in &events[..n] {
                let (mask, token) = (ev.events, ev.u64);
                self.event(token, mask);
            }
            if self.port_readable {
                self.read_port();
            }
            self.move_all();
            self.give_way();
        }
        let groups = self.jobs.groups();
        self.freezer.destroy(&groups);
        Ok(())
    }

    /// While the workload is frozen guestd runs before all else, so that what a restored machine owes its host (hello, thaw)
    /// is not held up by what its kernel has to catch up with, nor by the workload that the thaw lets go. Only then: with
    /// priority for ever it would be woken for each line that a job writes.
    fn give_way(&mut self) {
        let first = self.opts.own_kernel && self.freezer.frozen;
        if first != self.first && sys::set_first(first).is_ok() {
            self.first = first;
        }
    }

    /// Set every descriptor's interest from the present state.
    fn refresh(&mut self) -> Outcome<()> {
        let fail = |e: std::io::Error| Fail::io("epoll", &e);
        let p = &self.poller;
        self.signals
            .want(p, token(T_SIGNALS, 0, 0), IN)
            .map_err(fail)?;
        if let Some(w) = &mut self.conn.port {
            w.want(p, token(T_PORT, 0, 0), IN | OUT | EDGE)
                .map_err(fail)?;
        }
        if let Some(w) = &mut self.acceptor {
            w.want(p, token(T_ACCEPTOR, 0, 0), IN).map_err(fail)?;
        }
        let frozen = self.freezer.frozen;
        let incoming = self
            .streams
            .values()
            .filter(|s| matches!(s.end, End::Socket { incoming: true, .. }))
            .count();
        let accept = self.conn.listening && !frozen && incoming < MAX_INCOMING;
        for (i, l) in self.listeners.iter_mut().enumerate() {
            l.w.want(
                p,
                token(T_LISTENER, i as u32, 0),
                if accept { IN } else { 0 },
            )
            .map_err(fail)?;
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
                    w.want(
                        &self.poller,
                        token(T_JOB_OUT, *key, i),
                        if open { IN } else { 0 },
                    )
                    .map_err(fail)?;
                }
            }
            if let Some(w) = &mut job.stdin {
                w.want(
                    &self.poller,
                    token(T_JOB_IN, *key, 0),
                    if waiting { OUT } else { 0 },
                )
                .map_err(fail)?;
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

    // ---- jobs

    /// Give a job's stdin what its attached streams hold.
    pub fn feed_job(&mut self, key: u32) {
        let ids: Vec<u32> = self
            .streams
            .iter()
            .filter(|(_, s)| s.is_of(key))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            let (Some(s), Some(job)) = (self.streams.get_mut(&id), self.jobs.jobs.get_mut(&key))
            else {
                continue;
            };
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
        let Some(job) = self.jobs.jobs.get_mut(&key) else {
            return Pulled::Empty;
        };
        let room = jobs::room(&job.ring, &attached(&self.streams, key).0, cap);
        job.pull(channel, room, cap, &mut self.scratch)
    }

    /// Jobs that ended: take what their pipes still hold; once empty their readers may be told of the end.
    pub fn settle_jobs(&mut self) {
        if self.freezer.frozen {
            return;
        }
        let ended = |j: &jobs::Job| j.exit_code.is_some() && !j.settled;
        let keys: Vec<u32> = self
            .jobs
            .jobs
            .iter()
            .filter(|(_, j)| ended(j))
            .map(|(k, _)| *k)
            .collect();
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
            let code = if libc::WIFSIGNALED(status) {
                128 + libc::WTERMSIG(status)
            } else {
                libc::WEXITSTATUS(status)
            };
            if let Some(job) = self.jobs.by_pid(pid) {
                job.exit_code = Some(code);
            }
        }
    }

    // ---- helpers

    /// Answer `request` when this helper ends.
    pub fn add_helper(&mut self, request: u32, h: Helper) {
        self.helpers.insert(
            request,
            PendingHelper {
                w: Watched::new(h.pipe),
                request,
                said: Vec::new(),
            },
        );
    }

    fn on_helper(&mut self, id: u32) {
        let Some(h) = self.helpers.get_mut(&id) else {
            return;
        };
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
