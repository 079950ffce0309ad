//! Work that may block for long (syncfs, removing a tree, hooks) runs in a child process, bounded in time.
//!
//! guestd has one thread; a child made by fork shares its memory copy-on-write and ends without running destructors.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::fail::{Fail, Outcome};
use crate::sys;

/// A running helper: its pipe gives the error text, or nothing when all went well, and then its end.
pub struct Helper {
    pub pid: i32,
    pub pipe: OwnedFd,
}

/// Fork and run `work` in the child.
pub fn start(work: impl FnOnce() -> Outcome<()>) -> Outcome<Helper> {
    let fail = |e: io::Error| Fail::io("fork", &e);
    let (r, w) = sys::pipe().map_err(fail)?;
    // SAFETY: one thread, so the child is a whole copy; it leaves by _exit.
    match sys::check(unsafe { libc::fork() }).map_err(fail)? {
        0 => {
            let text = match work() {
                Ok(()) => String::new(),
                Err(f) => format!("{}\n{}", f.kind, f.message),
            };
            let sent = sys::write(w.as_raw_fd(), &text.as_bytes()[..text.len().min(4096)]);
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(if sent.is_ok() { 0 } else { 1 }) }
        }
        pid => Ok(Helper { pid, pipe: r }),
    }
}

/// Understand what a helper said. `kind` words are ours, so an unknown one is a plain failure.
pub fn verdict(said: &[u8]) -> Outcome<()> {
    if said.is_empty() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(said);
    let (kind, message) = text.split_once('\n').unwrap_or(("failed", &text));
    let known = ["not_found", "no_space", "bad_input", "refused", "failed"];
    let kind = known.into_iter().find(|k| *k == kind).unwrap_or("failed");
    Err(Fail::new(kind, message))
}

/// Run `work` in a child and wait at most this long; a child that is late is killed and left to the reaper.
pub fn run(what: &str, timeout_ms: u64, work: impl FnOnce() -> Outcome<()>) -> Outcome<()> {
    let helper = start(work)?;
    let deadline = sys::monotonic_ms() + timeout_ms;
    let mut said = Vec::new();
    loop {
        let left = deadline.saturating_sub(sys::monotonic_ms());
        let ready = left > 0
            && sys::poll_one(helper.pipe.as_raw_fd(), libc::POLLIN, left as i32).unwrap_or(false);
        if !ready && sys::monotonic_ms() >= deadline {
            // SAFETY: our own child, not yet reaped, so the id is still its.
            unsafe { libc::kill(helper.pid, libc::SIGKILL) };
            return Err(Fail::new(
                "timeout",
                format!("{what} took longer than {timeout_ms} ms"),
            ));
        }
        if !ready {
            continue;
        }
        let mut buf = [0u8; 4096];
        match sys::read(helper.pipe.as_raw_fd(), &mut buf) {
            Ok(0) => return verdict(&said),
            Ok(n) => said.extend_from_slice(&buf[..n]),
            Err(e) => return Err(Fail::io(what, &e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_how_it_went() {
        assert_eq!(run("x", 5000, || Ok(())), Ok(()));
        let e = run("x", 5000, || Err(Fail::new("no_space", "disk full"))).unwrap_err();
        assert_eq!((e.kind, e.message.as_str()), ("no_space", "disk full"));
        let late = run("x", 50, || {
            // SAFETY: plain call; the child waits to be killed.
            unsafe { libc::pause() };
            Ok(())
        });
        assert_eq!(late.unwrap_err().kind, "timeout");
    }
}
