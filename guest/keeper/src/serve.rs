//! The keeper's life: one loop over a few descriptors until the VMM is gone.
//!
//! It has no thread and no state on disk but what `Home` names. Whatever goes wrong with a client is that client's
//! affair; whatever goes wrong with the keeper itself ends it, and with it (PR_SET_PDEATHSIG) the VMM.

use std::io::{self, Read, Seek};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use crate::buffer::Buffer;
use crate::group::Group;
use crate::memory::Ram;
use crate::remap;
use crate::request::{self, Request, REQUEST_LIMIT};
use crate::sys;
use crate::tail::Tail;
use crate::track::{Copying, Faults, Tracker, Which};
use crate::vmm::{End, Vmm};

/// Connected clients at a time; the server needs one, a restarted one overlaps for a moment.
const CLIENTS: usize = 8;
/// Bytes of the VMM's output that go with the event of its death.
const LAST_WORDS: usize = 3072;

/// Why a VMM was ended by the kernel, when its control group says so.
const RAN_OUT: &str = "it wanted more memory than its limit";

/// Names in the run folder, which the keeper owns: it is the working directory, and it is removed at the end.
pub const SOCKET: &str = "keeper.sock";
pub const MONITOR: &str = "qmp.sock";
pub const PIDS: &str = "pids";
pub const LOG: &str = "vmm.log";

/// Whose end closes a pipe before a word was said there, and so ends the VM.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Guarded {
    /// A pager that has not brought all pages yet.
    Pager,
    /// The server, of a VM that waits to be used: nobody would ever find it again.
    Server,
}

/// A pipe that somebody must say a word on before it closes, and before that process ends, where one is known: another that
/// holds the pipe, too, hides no end then.
pub struct Guard {
    pub pipe: OwnedFd,
    pub whose: Guarded,
    pub process: Option<OwnedFd>,
}

impl Guard {
    pub fn new(pipe: OwnedFd, whose: Guarded) -> Guard {
        Guard {
            pipe,
            whose,
            process: None,
        }
    }
}

pub struct Keeper {
    /// Where the VMM's end is recorded, outside the run folder.
    pub record: Option<PathBuf>,
    pub group: Option<Group>,
    pub listener: OwnedFd,
    pub sigterm: OwnedFd,
    pub timer: OwnedFd,
    pub vmm: Vmm,
    pub ram: Ram,
    /// What the next `remap` maps from.
    pub files: Vec<OwnedFd>,
    pub log: Tail,
    pub console: Option<Tail>,
    pub clients: Vec<OwnedFd>,
    pub deadline_ns: Option<u64>,
    pub prepared: Option<Buffer>,
    pub tracker: Option<Tracker>,
    pub copying: Option<Copying>,
    pub guards: Vec<Guard>,
    /// Why we ended the VMM, once we have.
    pub reason: Option<&'static str>,
}

/// An answer: text, and a descriptor with it.
type Answer = io::Result<(String, Option<OwnedFd>)>;

impl Keeper {
    /// Serve until the VMM is gone; then say so, record it and clean up.
    pub fn run(mut self) {
        let mut log_open = true;
        loop {
            let ready = self.poll(log_open);
            if ready.log {
                log_open = self.log.drain();
            }
            if ready.console && !self.console.as_mut().is_some_and(Tail::drain) {
                self.console = None;
            }
            if ready.vmm {
                break;
            }
            if ready.sigterm {
                self.end("keeper was told to stop");
            }
            self.check_deadline();
            if ready.guards {
                self.check_guards();
            }
            for at in (0..self.clients.len()).rev() {
                if ready.clients.get(at) == Some(&true) && !self.serve(at) {
                    self.clients.swap_remove(at);
                }
            }
            if ready.listener {
                self.welcome();
            }
        }
        self.bury();
    }

    fn poll(&self, log_open: bool) -> Ready {
        let watch = |fd: i32| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let console = self.console.as_ref().map_or(-1, |c| c.pipe.as_raw_fd());
        let log = if log_open {
            self.log.pipe.as_raw_fd()
        } else {
            -1
        };
        let mut fds = vec![
            watch(self.listener.as_raw_fd()),
            watch(self.sigterm.as_raw_fd()),
            watch(self.timer.as_raw_fd()),
            watch(self.vmm.pidfd.as_raw_fd()),
            watch(log),
            watch(console),
        ];
        let first_guard = fds.len();
        for guard in &self.guards {
            fds.push(watch(guard.pipe.as_raw_fd()));
            fds.push(watch(guard.process.as_ref().map_or(-1, |p| p.as_raw_fd())));
        }
        let fixed = fds.len();
        fds.extend(self.clients.iter().map(|c| watch(c.as_raw_fd())));
        // SAFETY: the array is valid for its length. EINTR leaves all revents zero: one idle turn.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
        let hit: Vec<bool> = fds.iter().map(|f| f.revents != 0).collect();
        Ready {
            listener: hit[0],
            sigterm: hit[1],
            vmm: hit[3],
            log: hit[4],
            console: hit[5],
            guards: hit[first_guard..fixed].contains(&true),
            clients: hit[fixed..].to_vec(),
        }
    }

    fn welcome(&mut self) {
        let Ok(client) = sys::accept(&self.listener) else {
            return;
        };
        // SAFETY: no pointers.
        let me = unsafe { libc::geteuid() };
        if self.clients.len() < CLIENTS && sys::peer_uid(&client).is_ok_and(|uid| uid == me) {
            self.clients.push(client);
        }
    }

    /// Take in whoever has connected but was not yet accepted: a VMM that dies at once is gone before the first turn.
    fn welcome_all(&mut self) {
        let mut known = usize::MAX;
        while known != self.clients.len() {
            known = self.clients.len();
            self.welcome();
        }
    }

    /// Answer one request. False: the client is gone or does not read, and is dropped.
    fn serve(&mut self, at: usize) -> bool {
        let mut buffer = [0u8; REQUEST_LIMIT];
        let (count, fd) = match sys::receive(&self.clients[at], &mut buffer) {
            Ok(None) => return true,
            Ok(Some((0, _))) | Err(_) => return false,
            Ok(Some(got)) => got,
        };
        let (text, fd) = match request::parse(&buffer[..count]) {
            Err(why) => (format!("err bad-request {why}"), None),
            Ok(request) => match self.answer(request, fd) {
                Ok((text, fd)) => (text, fd),
                Err(error) => (describe(&error), None),
            },
        };
        sys::send(&self.clients[at], text.as_bytes(), fd.as_ref()).is_ok()
    }

    fn answer(&mut self, request: Request, fd: Option<OwnedFd>) -> Answer {
        let done = || Ok(("ok".to_string(), None));
        match request {
            Request::Status => Ok((self.status()?, None)),
            Request::Kill => {
                self.end("killed");
                done()
            }
            Request::Deadline(from_now) => {
                self.deadline_ns = from_now.map(|ms| sys::boottime_ns() + ms * 1_000_000);
                sys::timer_set(&self.timer, self.deadline_ns.unwrap_or(0))?;
                done()
            }
            Request::Prepare => {
                self.untracked()?;
                self.prepared = None;
                self.prepared = Some(self.ram.prepare_private()?);
                done()
            }
            Request::Release => {
                (self.prepared, self.copying) = (None, None);
                done()
            }
            Request::CapturePrivate => {
                self.untracked()?;
                let ready = self.prepared.take();
                captured(self.ram.capture_private(ready, &self.stop()))
            }
            Request::CaptureFile { keep_zero } => {
                captured(self.ram.capture_file(keep_zero, &self.stop()))
            }
            Request::Inject(count) => {
                let source = fd.ok_or_else(|| invalid("no descriptor came"))?;
                self.ram.inject(&source, count, &self.stop())?;
                done()
            }
            Request::File | Request::Remap => {
                self.untracked()?;
                let fd = fd.ok_or_else(|| invalid("no descriptor came"))?;
                Ok((self.place(&request, fd)?, None))
            }
            Request::Guard => {
                let pipe = fd.ok_or_else(|| invalid("no descriptor came"))?;
                sys::set_nonblocking(&pipe)?;
                self.guards.push(Guard::new(pipe, Guarded::Pager));
                done()
            }
            Request::GuardProcess => {
                let process = fd.ok_or_else(|| invalid("no descriptor came"))?;
                let last = self.guards.iter_mut().rfind(|g| g.whose == Guarded::Pager);
                last.ok_or_else(|| invalid("no pager is watched"))?.process = Some(process);
                done()
            }
            Request::Move { console, record } => {
                let folder = fd.ok_or_else(|| invalid("no folder came"))?;
                let folder = sys::path_of(&folder)?;
                if let Some(tail) = self.console.as_mut() {
                    tail.move_to(&folder.join(console))?;
                }
                self.record = Some(folder.join(record));
                done()
            }
            request => self.answer_tracked(request, fd),
        }
    }

    /// Files come one by one, since a message carries one descriptor; the runs that name them come last.
    fn place(&mut self, request: &Request, fd: OwnedFd) -> io::Result<String> {
        if *request == Request::File {
            if self.files.len() == remap::FILES {
                return Err(invalid("too many files"));
            }
            self.files.push(fd);
            return Ok(format!("ok file={}", self.files.len() - 1));
        }
        let files = std::mem::take(&mut self.files);
        let runs = remap::parse_runs(&read_whole(fd, (remap::RUNS * remap::RUN_BYTES) as u64)?)?;
        remap::remap(&mut self.ram, &files, &runs)?;
        Ok("ok".to_string())
    }

    fn answer_tracked(&mut self, request: Request, fd: Option<OwnedFd>) -> Answer {
        let stop = self.stop();
        let absent = self.pagers();
        let tracker = self.tracker.as_mut();
        let text = match request {
            // Reading an absent page would wait for the pager, and meanwhile nobody would see it die.
            Request::PrepareTracked(Which::All) | Request::CaptureTracked(Which::All)
                if absent > 0 =>
            {
                return Err(invalid("pages are still being brought"));
            }
            Request::Track { base, faults } => return self.track(&base, faults, fd),
            Request::PrepareTracked(which) => {
                self.copying = None;
                let ready = tracker.ok_or_else(not_tracked)?;
                self.copying = Some(ready.prepare(&self.ram, which, &stop)?);
                "ok".to_string()
            }
            Request::CaptureTracked(which) => {
                let ready = self.copying.take();
                let tracker = tracker.ok_or_else(not_tracked)?;
                let copying = tracker.capture(&self.ram, which, ready, &stop)?;
                let (pages, generation) = (copying.pages(), tracker.generation);
                self.copying = Some(copying);
                format!("ok pages={pages} generation={generation}")
            }
            Request::Collect => {
                let copying = self.copying.take().filter(Copying::is_done);
                let copying = copying.ok_or_else(|| invalid("nothing was captured"))?;
                return captured(copying.collect());
            }
            Request::Committed { generation, base } => {
                tracker
                    .ok_or_else(not_tracked)?
                    .committed(generation, &base);
                "ok".to_string()
            }
            _ => match tracker {
                Some(tracker) => {
                    let (way, base) = (tracker.way(), &tracker.base);
                    format!("ok way={way} base={base} absent={absent}")
                }
                None => format!("ok way=none base=- absent={absent}"),
            },
        };
        Ok((text, None))
    }

    fn track(&mut self, base: &str, faults: Faults, fd: Option<OwnedFd>) -> Answer {
        self.untracked()?;
        let known = fd.map_or(Ok(Vec::new()), |fd| read_ranges(fd, self.ram.pages))?;
        let tracker = Tracker::start(&self.ram, base, &known, faults)?;
        let mut text = format!("ok way={}", tracker.way());
        let mut pager = None;
        if faults == Faults::Wait {
            let at = self.ram.segments()?.iter();
            let at: Vec<String> = at
                .map(|s| format!("{:x}:{}:{}", s.address, s.first_page, s.pages))
                .collect();
            text = format!("{text} at={}", at.join(","));
            pager = Some(tracker.pager_fd()?);
        }
        self.tracker = Some(tracker);
        Ok((text, pager))
    }

    /// A pager that says something has put every page there; one that is gone before has left the VM with pages that
    /// nobody will ever bring. A server that says something has taken the VM into use and written that down.
    fn check_guards(&mut self) {
        let before = self.pagers();
        let mut broken = None;
        self.guards.retain(|guard| {
            // Asked before the pipe is read: one that has said its word may end.
            let ended = guard.process.as_ref().is_some_and(sys::has_ended);
            let mut word = [0u8; 16];
            match sys::read_now(&guard.pipe, &mut word) {
                Ok(None) if !ended => true,
                Ok(Some(count)) if count > 0 => false,
                _ => {
                    broken = Some(guard.whose);
                    false
                }
            }
        });
        match broken {
            Some(Guarded::Pager) => self.end("its pager died"),
            Some(Guarded::Server) => self.end("nobody is left to use it"),
            None if before > 0 && self.pagers() == 0 => {
                // One that does not read it asks again some time.
                for client in &self.clients {
                    let _ = sys::send(client, b"filled", None);
                }
            }
            None => {}
        }
    }

    /// How many pagers still bring pages.
    fn pagers(&self) -> usize {
        let pagers = self.guards.iter().filter(|g| g.whose == Guarded::Pager);
        pagers.count()
    }

    /// Plain pagemap lies once pages are protected.
    fn untracked(&self) -> io::Result<()> {
        match self.tracker {
            Some(_) => Err(invalid("the VM's writes are tracked already")),
            None => Ok(()),
        }
    }

    /// What long work asks between slices: has the deadline passed?
    fn stop(&self) -> impl Fn() -> io::Result<()> {
        let deadline = self.deadline_ns;
        move || match deadline {
            Some(at) if sys::boottime_ns() >= at => {
                Err(io::Error::new(io::ErrorKind::TimedOut, "deadline passed"))
            }
            _ => Ok(()),
        }
    }

    fn status(&self) -> io::Result<String> {
        let me = std::process::id() as libc::pid_t;
        let left = self
            .deadline_ns
            .map(|at| at.saturating_sub(sys::boottime_ns()) / 1_000_000);
        let left = left.map_or("none".to_string(), |ms| ms.to_string());
        let (pid, start, keeper_start) = (self.vmm.pid, self.vmm.start, sys::start_time(me)?);
        Ok(format!(
            "ok pid={pid} start={start} keeper={me} keeper_start={keeper_start} deadline_ms={left}"
        ))
    }

    fn check_deadline(&mut self) {
        if self.deadline_ns.is_some_and(|at| sys::boottime_ns() >= at) {
            self.end("deadline passed");
            self.deadline_ns = None;
            let _ = sys::timer_set(&self.timer, 0);
        }
    }

    fn end(&mut self, why: &'static str) {
        self.reason.get_or_insert(why);
        self.vmm.kill();
    }

    /// The VMM is gone: collect it, tell the clients, record it, remove the run folder.
    fn bury(mut self) {
        let end = self.vmm.reap();
        self.log.drain();
        if let Some(console) = self.console.as_mut() {
            console.drain();
        }
        if let Some(group) = &self.group {
            if group.ran_out() {
                self.reason.get_or_insert(RAN_OUT);
            }
            group.remove();
        }
        self.welcome_all();
        let words = self.log.last(LAST_WORDS).unwrap_or_default();
        let obituary = obituary(end, self.reason, &words);
        if let Some(path) = &self.record {
            let _ = write_whole(path, &obituary);
        }
        remove_run_folder();
        for client in &self.clients {
            let _ = sys::send(client, &obituary, None);
        }
    }
}

/// Which descriptors have something to say.
struct Ready {
    listener: bool,
    sigterm: bool,
    vmm: bool,
    log: bool,
    console: bool,
    guards: bool,
    clients: Vec<bool>,
}

fn captured(done: io::Result<(Buffer, usize)>) -> Answer {
    let (buffer, pages) = done?;
    Ok((format!("ok pages={pages}"), Some(buffer.seal()?)))
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

fn not_tracked() -> io::Error {
    invalid("the VM's writes are not tracked")
}

/// All of a descriptor's bytes, from the beginning; more than `limit` is an error.
fn read_whole(fd: OwnedFd, limit: u64) -> io::Result<Vec<u8>> {
    let mut raw = Vec::new();
    let mut file = std::fs::File::from(fd);
    file.rewind()?; // whoever wrote it shares its position
    file.take(limit + 1).read_to_end(&mut raw)?;
    if raw.len() as u64 > limit {
        return Err(invalid("the list is too long"));
    }
    Ok(raw)
}

/// Pairs of u32 (little endian): first page and count, all inside the memory.
fn read_ranges(fd: OwnedFd, pages: usize) -> io::Result<Vec<(u32, u32)>> {
    let raw = read_whole(fd, 8 * pages as u64)?;
    if raw.len() % 8 != 0 {
        return Err(invalid("the list of ranges has an odd size"));
    }
    let number = |word: &[u8]| u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
    let ranges: Vec<(u32, u32)> = raw
        .chunks_exact(8)
        .map(|pair| (number(pair), number(&pair[4..])))
        .collect();
    let inside = |&(first, count): &(u32, u32)| first as usize + count as usize <= pages;
    if ranges.iter().all(inside) {
        Ok(ranges)
    } else {
        Err(invalid("a range is not in the VM's memory"))
    }
}

fn describe(error: &io::Error) -> String {
    let code = match error.raw_os_error() {
        Some(libc::ENOSPC | libc::ENOMEM | libc::EDQUOT | libc::EMFILE) => "no-space",
        _ if error.kind() == io::ErrorKind::InvalidInput => "bad-request",
        _ => "failed",
    };
    format!("err {code} {error}")
}

fn obituary(end: End, reason: Option<&'static str>, words: &[u8]) -> Vec<u8> {
    let mut text = format!("dead {end} {}\n", reason.unwrap_or("it ended by itself")).into_bytes();
    text.extend_from_slice(words);
    text
}

/// Temp name and rename: a reader sees all of it or nothing.
pub fn write_whole(path: &Path, data: &[u8]) -> io::Result<()> {
    let aside = path.with_extension("new");
    std::fs::write(&aside, data)?;
    std::fs::rename(&aside, path)
}

/// Remove the run folder by the name it has now: the server renames that of a VM which it takes into use.
fn remove_run_folder() {
    // Gone already: there is nothing to remove.
    if let Ok(path) = std::env::current_dir() {
        remove_folder(&path);
    }
}

/// Remove a flat folder. What is not ours to remove stays, and then so does the folder.
pub fn remove_folder(path: &Path) {
    if let Ok(entries) = std::fs::read_dir(path) {
        for entry in entries.flatten() {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    let _ = std::fs::remove_dir(path);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn ranges(numbers: &[u32], pages: usize) -> io::Result<Vec<(u32, u32)>> {
        let fd = sys::memfd("test", 0).unwrap();
        let mut file = std::fs::File::from(fd.try_clone().unwrap());
        for number in numbers {
            file.write_all(&number.to_le_bytes()).unwrap();
        }
        read_ranges(fd, pages)
    }

    #[test]
    fn ranges_are_read_from_their_beginning_and_checked() {
        assert_eq!(ranges(&[3, 2, 9, 1], 10).unwrap(), vec![(3, 2), (9, 1)]);
        assert_eq!(ranges(&[], 10).unwrap(), vec![]);
        assert!(ranges(&[3, 2, 9], 10).is_err());
        assert!(ranges(&[9, 2], 10).is_err());
        assert!(ranges(&[u32::MAX, u32::MAX], 10).is_err());
        assert!(ranges(&[0, 1, 2, 1], 1).is_err());
    }

    #[test]
    fn an_obituary_says_how_and_why() {
        assert_eq!(
            obituary(End::Exit(1), None, b"bad disk"),
            b"dead exit:1 it ended by itself\nbad disk"
        );
        assert!(obituary(End::Signal(9), Some("deadline passed"), b"")
            .starts_with(b"dead signal:9 deadline passed\n"));
    }

    #[test]
    fn errors_have_codes() {
        assert!(describe(&io::Error::from_raw_os_error(libc::ENOSPC)).starts_with("err no-space "));
        assert!(describe(&io::Error::new(io::ErrorKind::InvalidInput, "x"))
            .starts_with("err bad-request "));
        assert!(describe(&io::Error::from_raw_os_error(libc::EPERM)).starts_with("err failed "));
    }
}
