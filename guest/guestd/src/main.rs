//! guestd: the one process of Recess inside a machine. PID 1 of it, or an ordinary process for tests.
//!
//! It knows the guest protocol and the guest's kernel. It must never know of sessions, snapshots, models or names.

mod bulk;
mod card;
mod channel;
mod conn;
mod crc;
mod doors;
mod fail;
mod files;
mod flow;
mod frame;
mod freezer;
mod helper;
mod init;
mod jobs;
mod json;
mod ops;
mod ring;
mod sandbox;
mod seal;
mod server;
mod sparse;
mod spawn;
mod stats;
mod streams;
mod sys;
mod tar;
mod tarfmt;
mod tarread;
mod thaw;
mod users;
mod vsock;
mod walk;

use std::path::{Path, PathBuf};

use fail::{Fail, Outcome};
use freezer::Freezer;
use server::{Options, Server};

pub const VERSION: &str = env!("CARGO_PKG_VERSION");
const PROXY_PORT: u16 = 3128;
const USAGE: &str = "usage: guestd --version | --sandbox | --relay | --serve-fd N [--run-dir DIR] [--proxy-port N] [--hooks DIR] [--cgroup DIR]
Without arguments, as PID 1 of a machine, guestd sets it up and serves its virtio port, or the vsock port that the kernel's parameter recess.vsock names.";

fn main() {
    sys::keep_heap();
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args == ["--version"] {
        println!("guestd {VERSION}");
        return;
    }
    if args == ["--sandbox"] || args == ["--relay"] {
        let ended = if args == ["--relay"] {
            sandbox::relay()
        } else {
            in_sandbox()
        };
        if let Err(why) = ended {
            eprintln!("guestd: {}", why.message);
            std::process::exit(1);
        }
        return;
    }
    if std::process::id() == 1 && !args.iter().any(|a| a == "--serve-fd") {
        let why = machine()
            .err()
            .unwrap_or_else(|| Fail::new("failed", "the server ended"));
        init::say(&format!("fatal: {}", why.message));
        // SAFETY: PID 1 must not return; the host sees the machine end and reads the console.
        unsafe {
            libc::sync();
            libc::reboot(libc::RB_AUTOBOOT);
            loop {
                libc::pause();
            }
        }
    }
    if let Err(why) = process(&args) {
        eprintln!("guestd: {}", why.message);
        std::process::exit(if why.kind == "usage" { 2 } else { 1 });
    }
}

/// PID 1: set the machine up, then serve for ever.
fn machine() -> Outcome<()> {
    let ready = init::run()?;
    let freezer = Freezer::cgroup(Path::new("/sys/fs/cgroup/workload"))?;
    let opts = Options {
        own_machine: true,
        own_kernel: true,
        run_dir: Some(PathBuf::from("/run/recess")),
        proxy_port: Some(PROXY_PORT),
        hooks: PathBuf::from("/etc/recess/thaw.d"),
        disk: Some(ready.disk),
    };
    let mut server = Server::new(opts, freezer)?;
    server.open_doors()?;
    server.set_port(ready.port)?;
    init::say("ready");
    server.run()
}

/// The first process of a process sandbox: the runtime has set it up; there is no kernel of our own.
fn in_sandbox() -> Outcome<()> {
    let port = sandbox::enter()?;
    let run = PathBuf::from("/run/recess");
    let disk = std::fs::File::open("/").map_err(|e| Fail::io("/", &e))?;
    let opts = Options {
        own_machine: true,
        own_kernel: false,
        run_dir: Some(run),
        proxy_port: Some(PROXY_PORT),
        hooks: PathBuf::from("/etc/recess/thaw.d"),
        disk: Some(disk.into()),
    };
    let mut server = Server::new(opts, Freezer::signals())?;
    server.open_doors()?;
    server.set_port(port)?;
    server.run()
}

/// An ordinary process that serves an inherited socket: connected, or listening for hosts that come and go.
fn process(args: &[String]) -> Outcome<()> {
    let usage = || Fail::new("usage", USAGE);
    let (mut fd, mut cgroup) = (None, None);
    let mut opts = Options {
        own_machine: false,
        own_kernel: false,
        run_dir: None,
        proxy_port: None,
        hooks: PathBuf::from("/nonexistent"),
        disk: None,
    };
    let mut words = args.iter();
    while let Some(word) = words.next() {
        let value = words.next().ok_or_else(usage)?;
        match word.as_str() {
            "--serve-fd" => fd = Some(value.parse::<i32>().map_err(|_| usage())?),
            "--run-dir" => opts.run_dir = Some(PathBuf::from(value)),
            "--proxy-port" => opts.proxy_port = Some(value.parse::<u16>().map_err(|_| usage())?),
            "--hooks" => opts.hooks = PathBuf::from(value),
            "--cgroup" => cgroup = Some(PathBuf::from(value)),
            _ => return Err(usage()),
        }
    }
    let channel = doors::inherit(fd.ok_or_else(usage)?)?;
    // SAFETY: plain call: orphans of jobs come to us, as they do to PID 1.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
    let freezer = match &cgroup {
        Some(dir) => Freezer::cgroup(dir)?,
        None => Freezer::signals(),
    };
    if let Some(run) = &opts.run_dir {
        opts.disk = std::fs::create_dir_all(run)
            .and_then(|()| std::fs::File::open(run))
            .ok()
            .map(Into::into);
    }
    let mut server = Server::new(opts, freezer)?;
    server.open_doors()?;
    if is_listening(&channel) {
        server.set_acceptor(channel)?;
    } else {
        server.set_port(channel)?;
    }
    server.run()
}

fn is_listening(fd: &std::os::fd::OwnedFd) -> bool {
    use std::os::fd::AsRawFd;
    let (mut value, mut len): (libc::c_int, libc::socklen_t) = (0, 4);
    // SAFETY: pointer and length describe the int.
    let ret = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ACCEPTCONN,
            (&raw mut value).cast(),
            &mut len,
        )
    };
    ret == 0 && value != 0
}
