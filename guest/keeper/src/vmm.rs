//! The VMM as a child process: started so that it cannot outlive the keeper, watched by a pidfd.
//!
//! Descriptors in the child: 0 /dev/null, 1 and 2 the log pipe, 3 a listening socket for the control monitor, 4 the
//! write end of the console pipe; with a filtered network card 5, 6 and 7, its streams (card.rs). Everything else is
//! close-on-exec.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::card::Ends;
use crate::group::Group;
use crate::sys;

/// The environment that reaches the VMM: what a program loader needs and nothing that could be a secret.
const ENVIRONMENT: [&str; 6] = [
    "PATH",
    "HOME",
    "TMPDIR",
    "LANG",
    "LD_LIBRARY_PATH",
    "QEMU_MODULE_DIR",
];

pub struct Vmm {
    pub pid: libc::pid_t,
    pub start: u64,
    pub pidfd: OwnedFd,
}

/// How the VMM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Exit(i32),
    Signal(i32),
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            End::Exit(code) => write!(f, "exit:{code}"),
            End::Signal(number) => write!(f, "signal:{number}"),
        }
    }
}

/// What the child gets as descriptors 1+2, 3 and 4, and 5 to 7 if there is a card.
pub struct ChildFds {
    pub log: OwnedFd,
    pub monitor: OwnedFd,
    pub console: OwnedFd,
    pub card: Option<Ends>,
}

/// As many as a child is given at most.
const GIVEN_MAX: usize = 8;

fn environment() -> Vec<CString> {
    let kept = std::env::vars().filter(|(name, _)| ENVIRONMENT.contains(&name.as_str()));
    kept.filter_map(|(name, value)| CString::new(format!("{name}={value}")).ok())
        .collect()
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings
        .iter()
        .map(|s| s.as_ptr())
        .chain(std::iter::once(std::ptr::null()))
        .collect()
}

impl Vmm {
    /// Start `argv` (absolute program path), in a control group if there is one. Returns when exec succeeded; what failed
    /// before it is an error here.
    pub fn start(argv: &[String], fds: ChildFds, group: Option<&Group>) -> io::Result<Vmm> {
        let argv: Vec<CString> = argv
            .iter()
            .map(|a| sys::cstring(a))
            .collect::<io::Result<_>>()?;
        let environment = environment();
        // All memory the child needs is laid out before the fork: it makes system calls only.
        let (argv, environment) = (pointers(&argv), pointers(&environment));
        let null = std::fs::File::open("/dev/null")?;
        let (failed, report) = sys::pipe()?;
        let parent = std::process::id() as libc::pid_t;
        let mut wanted = vec![
            (null.as_raw_fd(), 0),
            (fds.log.as_raw_fd(), 1),
            (fds.log.as_raw_fd(), 2),
            (fds.monitor.as_raw_fd(), 3),
            (fds.console.as_raw_fd(), 4),
        ];
        wanted.extend(fds.card.iter().flat_map(Ends::raw).zip(5..));
        let procs = group.map(Group::procs);
        // SAFETY: the keeper has one thread; the child only makes async-signal-safe calls and then execs or exits.
        let pid = sys::check(unsafe { libc::fork() })?;
        if pid == 0 {
            unsafe {
                child(
                    &argv,
                    &environment,
                    &wanted,
                    procs,
                    parent,
                    report.as_raw_fd(),
                )
            }
        }
        drop(report);
        let mut code = [0u8; 4];
        // Blocks until exec closes the pipe or the child has written why it could not.
        let got = unsafe { libc::read(failed.as_raw_fd(), code.as_mut_ptr().cast(), code.len()) };
        if got == 4 {
            unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
            return Err(io::Error::from_raw_os_error(i32::from_ne_bytes(code)));
        }
        Ok(Vmm {
            pid,
            start: sys::start_time(pid)?,
            pidfd: sys::pidfd_open(pid)?,
        })
    }

    /// SIGKILL. Safe at any time before `reap`: until then the pid is ours even if the process is a zombie.
    pub fn kill(&self) {
        // SAFETY: no memory involved; the pid cannot have been reused because we have not waited for it.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
    }

    /// Collect the exit status; to be called once, after the pidfd became readable.
    pub fn reap(&self) -> End {
        let mut status = 0;
        // SAFETY: status is a valid int.
        unsafe { libc::waitpid(self.pid, &raw mut status, 0) };
        if libc::WIFSIGNALED(status) {
            End::Signal(libc::WTERMSIG(status))
        } else {
            End::Exit(libc::WEXITSTATUS(status))
        }
    }
}

/// The child's way from fork to exec. Never returns.
unsafe fn child(
    argv: &[*const libc::c_char],
    environment: &[*const libc::c_char],
    wanted: &[(RawFd, RawFd)],
    procs: Option<RawFd>,
    parent: libc::pid_t,
    report: RawFd,
) -> ! {
    libc::setsid();
    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
    if libc::getppid() != parent {
        libc::_exit(126); // the keeper died before the signal was set
    }
    if procs.is_some_and(|procs| libc::write(procs, b"0".as_ptr().cast(), 1) != 1) {
        fail(report);
    }
    let mut empty: libc::sigset_t = std::mem::zeroed();
    libc::sigemptyset(&raw mut empty);
    libc::sigprocmask(libc::SIG_SETMASK, &raw const empty, std::ptr::null_mut());
    libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    // Two steps, since a source may have the number of another's target.
    let mut high = [0; GIVEN_MAX];
    for (slot, (from, _)) in high.iter_mut().zip(wanted) {
        *slot = libc::fcntl(*from, libc::F_DUPFD_CLOEXEC, 64);
    }
    let report = libc::fcntl(report, libc::F_DUPFD_CLOEXEC, 64);
    for (from, (_, to)) in high.iter().zip(wanted) {
        libc::dup2(*from, *to);
    }
    let given = wanted.iter().fold(0, |most, (_, to)| most.max(*to));
    libc::close_range(
        given as libc::c_uint + 1,
        libc::c_uint::MAX,
        libc::CLOSE_RANGE_CLOEXEC as libc::c_int,
    );
    libc::execve(argv[0], argv.as_ptr(), environment.as_ptr());
    fail(report)
}

/// Tell the keeper what the last call failed with, and end.
unsafe fn fail(report: RawFd) -> ! {
    let code = (*libc::__errno_location()).to_ne_bytes();
    libc::write(report, code.as_ptr().cast(), code.len());
    libc::_exit(127)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::OwnedFd;

    fn fds() -> (File, File, ChildFds) {
        let (log_read, log) = sys::pipe().unwrap();
        let (console_read, console) = sys::pipe().unwrap();
        let monitor = OwnedFd::from(File::open("/dev/null").unwrap());
        (
            File::from(log_read),
            File::from(console_read),
            ChildFds {
                log,
                monitor,
                console,
                card: None,
            },
        )
    }

    fn words(argv: &[&str]) -> Vec<String> {
        argv.iter().map(|a| (*a).to_string()).collect()
    }

    #[test]
    fn the_child_has_its_descriptors_and_its_end_is_seen() {
        let (mut log, mut console, fds) = fds();
        let script = "echo out; echo err >&2; echo con >&4; ls /proc/self/fd | wc -l; exit 3";
        let vmm = Vmm::start(&words(&["/bin/sh", "-c", script]), fds, None).unwrap();
        let (mut said, mut shown) = (String::new(), String::new());
        log.read_to_string(&mut said).unwrap();
        console.read_to_string(&mut shown).unwrap();
        assert_eq!(vmm.reap(), End::Exit(3));
        assert_eq!(shown, "con\n");
        // 0 to 4, and the one that ls itself opens
        assert_eq!(
            said.split_whitespace().collect::<Vec<_>>(),
            ["out", "err", "6"]
        );
    }

    #[test]
    fn a_card_gives_three_more() {
        let (mut log, _console, mut fds) = fds();
        let (_filter, ends) = crate::card::Filter::new().unwrap();
        fds.card = Some(ends);
        let vmm = Vmm::start(&words(&["/bin/ls", "/proc/self/fd"]), fds, None).unwrap();
        let mut said = String::new();
        log.read_to_string(&mut said).unwrap();
        assert_eq!(vmm.reap(), End::Exit(0));
        assert_eq!(said.split_whitespace().count(), 9); // 0 to 7, and its own
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error() {
        let (_log, _console, fds) = fds();
        let error = Vmm::start(&words(&["/nonexistent/qemu"]), fds, None)
            .err()
            .unwrap();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
    }

    #[test]
    fn kill_ends_it() {
        let (_log, _console, fds) = fds();
        let vmm = Vmm::start(&words(&["/bin/sleep", "60"]), fds, None).unwrap();
        assert!(vmm.start > 0);
        vmm.kill();
        assert_eq!(vmm.reap(), End::Signal(9));
    }
}
