//! Start one process: environment, user, session, terminal, cgroup. Returns descriptors; keeps nothing.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use crate::fail::{Fail, Outcome};
use crate::sys;
use crate::users::{self, Ids};

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const OOM_SCORE_JOB: &[u8] = b"100";

/// What to start. `env` is complete: defaults, the thaw's, the request's.
pub struct Spawn {
    pub argv: Vec<String>,
    pub env: BTreeMap<String, String>,
    pub cwd: String,
    pub ids: Option<Ids>,
    pub tty: Option<(u16, u16)>,
    pub stdin: bool,
}

/// A started process. With a terminal, `stdin` and `stdout` are the same master, duplicated.
pub struct Spawned {
    pub pid: i32,
    pub stdin: Option<OwnedFd>,
    pub stdout: OwnedFd,
    pub stderr: Option<OwnedFd>,
}

/// Resolve the user; None when guestd may not switch (an ordinary user's process mode): jobs run as it does.
pub fn who(user: &str) -> Outcome<Option<Ids>> {
    if !sys::is_root() {
        return Ok(None);
    }
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let group = fs::read_to_string("/etc/group").unwrap_or_default();
    users::resolve(user, &passwd, &group).map(Some)
}

/// The environment of a job: defaults, then the thaw's, then the request's.
pub fn environment(
    ids: Option<&Ids>,
    tty: bool,
    proxy_port: Option<u16>,
    machine: &[(String, String)],
    request: &[(String, String)],
) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    let mut set = |k: &str, v: &str| {
        env.insert(k.to_string(), v.to_string());
    };
    set("PATH", PATH);
    match ids {
        Some(ids) => {
            set("HOME", &ids.home);
            set("USER", &ids.name);
        }
        None => set(
            "HOME",
            &std::env::var("HOME").unwrap_or_else(|_| "/".into()),
        ),
    }
    if tty {
        set("TERM", "xterm-256color");
    }
    let network = machine
        .iter()
        .find(|(k, _)| k == "RECESS_NETWORK")
        .map_or("broker", |(_, v)| v.as_str());
    if let (Some(port), "broker") = (proxy_port, network) {
        let url = format!("http://127.0.0.1:{port}");
        for name in ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"] {
            set(name, &url);
        }
        set("no_proxy", "localhost,127.0.0.1");
        set("NO_PROXY", "localhost,127.0.0.1");
    }
    for (k, v) in machine.iter().chain(request) {
        set(k, v);
    }
    env
}

/// Start it. The caller must not call this while the workload is frozen: the child would stop before its exec and
/// we would wait for it for ever.
pub fn start(what: &Spawn, cgroup_procs: Option<&File>) -> Outcome<Spawned> {
    let failed = |e: io::Error| Fail::io(&what.argv[0], &e);
    let mut cmd = Command::new(&what.argv[0]);
    cmd.args(&what.argv[1..]).env_clear().envs(&what.env);
    let (stdin, stdout, stderr) = wire(&mut cmd, what).map_err(failed)?;
    let ids = what.ids.clone();
    let cwd = sys::cstr(&what.cwd).map_err(failed)?;
    let tty = what.tty.is_some();
    let procs: Option<RawFd> = cgroup_procs.map(AsRawFd::as_raw_fd);
    // SAFETY: guestd has one thread, so the child of fork may do anything the parent could.
    unsafe {
        cmd.pre_exec(move || prepare(procs, tty, ids.as_ref(), &cwd));
    }
    match cmd.spawn() {
        Ok(child) => Ok(Spawned {
            pid: child.id() as i32,
            stdin,
            stdout,
            stderr,
        }),
        Err(e) => Err(exec_failure(what, &e)),
    }
}

type Ends = (Option<OwnedFd>, OwnedFd, Option<OwnedFd>);

fn wire(cmd: &mut Command, what: &Spawn) -> io::Result<Ends> {
    if let Some((rows, cols)) = what.tty {
        let (master, slave) = sys::open_pty(rows, cols)?;
        if let Some(ids) = &what.ids {
            // SAFETY: plain call on an owned descriptor. 5 is the tty group everywhere.
            sys::check(unsafe { libc::fchown(slave.as_raw_fd(), ids.uid, 5) })?;
        }
        cmd.stdin(Stdio::from(slave.try_clone()?))
            .stdout(Stdio::from(slave.try_clone()?))
            .stderr(Stdio::from(slave));
        let input = master.try_clone()?;
        sys::set_nonblocking(input.as_raw_fd())?;
        return Ok((Some(input), master, None));
    }
    let stdin = if what.stdin {
        let (r, w) = sys::pipe()?;
        cmd.stdin(Stdio::from(r));
        sys::set_nonblocking(w.as_raw_fd())?;
        Some(w)
    } else {
        cmd.stdin(Stdio::null());
        None
    };
    let (out_r, out_w) = sys::pipe()?;
    let (err_r, err_w) = sys::pipe()?;
    cmd.stdout(Stdio::from(out_w)).stderr(Stdio::from(err_w));
    sys::set_nonblocking(out_r.as_raw_fd())?;
    sys::set_nonblocking(err_r.as_raw_fd())?;
    Ok((stdin, out_r, Some(err_r)))
}

/// Runs in the child between fork and exec.
fn prepare(
    procs: Option<RawFd>,
    tty: bool,
    ids: Option<&Ids>,
    cwd: &std::ffi::CStr,
) -> io::Result<()> {
    // SAFETY: plain system calls in the child.
    unsafe {
        if let Some(fd) = procs {
            sys::write(fd, b"0")?; // join before anything of the user's runs
        }
        sys::reset_signals()?;
        sys::check(libc::setsid())?;
        if tty {
            sys::check(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
        }
        let oom = libc::open(
            c"/proc/self/oom_score_adj".as_ptr(),
            libc::O_WRONLY | libc::O_CLOEXEC,
        );
        if oom >= 0 {
            let _ = sys::write(oom, OOM_SCORE_JOB); // best effort: raising one's own score is always allowed
            libc::close(oom);
        }
        libc::umask(0o022);
        if let Some(ids) = ids {
            sys::check(libc::setgroups(ids.groups.len(), ids.groups.as_ptr()))?;
            sys::check(libc::setgid(ids.gid))?;
            sys::check(libc::setuid(ids.uid))?;
        }
        sys::check(libc::chdir(cwd.as_ptr()))?;
    }
    Ok(())
}

/// Tell a missing program from a missing folder: the errno alone does not.
fn exec_failure(what: &Spawn, e: &io::Error) -> Fail {
    let argv0 = &what.argv[0];
    if fs::metadata(&what.cwd).map_or(true, |m| !m.is_dir()) {
        return Fail::bad(format!("no such folder in the guest: {}", what.cwd));
    }
    match e.raw_os_error() {
        Some(libc::ENOENT) => Fail::new(
            "no_program",
            format!("no such program in the guest: {argv0}"),
        ),
        Some(libc::EACCES | libc::ENOEXEC | libc::EISDIR | libc::ENOTDIR) => Fail::new(
            "not_executable",
            format!("cannot be executed in the guest: {argv0}"),
        ),
        _ => Fail::io(argv0, e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(items: &[(&str, &str)]) -> Vec<(String, String)> {
        items
            .iter()
            .map(|(k, v)| (k.to_string(), v.to_string()))
            .collect()
    }

    #[test]
    fn the_request_wins_over_the_machine_over_the_defaults() {
        let env = environment(
            None,
            false,
            Some(3128),
            &pairs(&[("A", "1"), ("PATH", "/m")]),
            &pairs(&[("A", "2")]),
        );
        assert_eq!(env["A"], "2");
        assert_eq!(env["PATH"], "/m");
        assert_eq!(env["https_proxy"], "http://127.0.0.1:3128");
        assert!(!env.contains_key("TERM"));
    }

    #[test]
    fn no_proxy_without_broker() {
        let env = environment(
            None,
            true,
            Some(3128),
            &pairs(&[("RECESS_NETWORK", "full")]),
            &[],
        );
        assert!(!env.contains_key("http_proxy"));
        assert_eq!(env["TERM"], "xterm-256color");
        assert!(!environment(None, false, None, &[], &[]).contains_key("http_proxy"));
    }
}
