//! keeper: the parent of one VMM, small enough to trust and to keep beside every machine.
//!
//! It starts the VMM, outlives the server that asked for it, is found again through a socket in the machine's run
//! folder, kills the VMM at a deadline of its own clock, reads and writes the VM's memory for the server (which is
//! not the VMM's parent and so may not), and at the end records how the VMM ended and removes the run folder. If the
//! keeper dies the kernel kills the VMM: a machine never runs without a living owner.
//!
//! It knows nothing of machines' names, snapshots, sessions or leases.

mod bitmap;
mod buffer;
mod card;
mod group;
mod jail;
mod memory;
mod remap;
mod remote;
mod request;
mod segments;
mod serve;
mod sys;
mod tail;
#[cfg(test)]
mod testing;
mod track;
mod tsc;
mod uffd;
mod vmm;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use card::Filter;
use group::Group;
use memory::Ram;
use serve::{Guard, Guarded, Keeper};
use tail::Tail;
use vmm::{ChildFds, Vmm};

const USAGE: &str = "\
usage: keeper run --dir DIR --ram FILE --console FILE [--record FILE] [--cgroup DIR] [--tether] [--card]
                  -- PROGRAM ARGUMENT...
       keeper jail --root DIR [--folder NAME PATH]... [--file NAME PATH]... -- PROGRAM ARGUMENT...
       keeper tsc-khz
       keeper --version
--cgroup: the control group that the program is put into, and that is removed at its end
--card: the program's network card is filtered; it gets three streams (5: sent, 6: passed, 7: answers)
--tether: standard input is a pipe; if it closes before a word was said there, the program is ended";
/// Greatest size of the console's and the log's file in bytes.
const TAIL_LIMIT: u64 = 1 << 20;

/// What `keeper run` was asked to do.
#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    dir: PathBuf,
    ram: PathBuf,
    console: PathBuf,
    record: Option<PathBuf>,
    cgroup: Option<PathBuf>,
    tether: bool,
    card: bool,
    argv: Vec<String>,
}

fn parse_options(words: &[String]) -> Result<Options, String> {
    let mut out = Options::default();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if word == "--" {
            out.argv = words.cloned().collect();
            break;
        }
        if word == "--tether" {
            out.tether = true;
            continue;
        }
        if word == "--card" {
            out.card = true;
            continue;
        }
        let value = words
            .next()
            .map(PathBuf::from)
            .ok_or_else(|| format!("{word} wants a value"))?;
        match word.as_str() {
            "--dir" => out.dir = value,
            "--ram" => out.ram = value,
            "--console" => out.console = value,
            "--record" => out.record = Some(value),
            "--cgroup" => out.cgroup = Some(value),
            _ => return Err(format!("no such option: {word}")),
        }
    }
    let paths = [&out.dir, &out.ram, &out.console];
    if out.argv.is_empty() || paths.iter().any(|path| !path.is_absolute()) {
        return Err(
            "--dir, --ram and --console (absolute paths) and a program are needed".to_string(),
        );
    }
    Ok(out)
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let code = match words.first().map(String::as_str) {
        Some("--version") => {
            println!("keeper {}", env!("CARGO_PKG_VERSION"));
            0
        }
        Some("tsc-khz") => {
            println!("{}", tsc::khz());
            0
        }
        Some("jail") => match jail::parse(&words[1..]) {
            Ok(options) => jail::run(&options),
            Err(why) => usage(&why),
        },
        Some("run") => match parse_options(&words[1..]) {
            Ok(options) => launch(options),
            Err(why) => usage(&why),
        },
        _ => usage("no such command"),
    };
    std::process::exit(code);
}

fn usage(why: &str) -> i32 {
    eprintln!("keeper: {why}\n{USAGE}");
    2
}

/// Detach (twice forked, own session) and start; the caller's process stays until the VMM runs or could not be
/// started, and says which by its exit code and standard error.
fn launch(options: Options) -> i32 {
    match detach(options.tether) {
        Err(error) => {
            eprintln!("keeper: {error}");
            1
        }
        Ok(Side::Caller(said)) => {
            if said == "ok" {
                0
            } else {
                eprintln!(
                    "keeper: {}",
                    if said.is_empty() {
                        "it died while starting"
                    } else {
                        &said
                    }
                );
                1
            }
        }
        Ok(Side::Keeper(mut report, tether)) => {
            let run_dir = options.dir.clone();
            match start(options, tether) {
                Ok(keeper) => {
                    let _ = report.write_all(b"ok");
                    drop(report);
                    keeper.run();
                    0
                }
                Err(error) => {
                    // Should the VMM be running already: it dies with this process.
                    serve::remove_folder(&run_dir);
                    let _ = write!(report, "{error}");
                    1
                }
            }
        }
    }
}

enum Side {
    /// The process that was started: what the keeper reported.
    Caller(String),
    /// The keeper to be, with the pipe it reports through, and its tether.
    Keeper(File, Option<OwnedFd>),
}

fn detach(tethered: bool) -> io::Result<Side> {
    // SAFETY: plain system calls in a program with one thread.
    unsafe {
        libc::umask(0o077);
        libc::close_range(3, libc::c_uint::MAX, 0);
        let tether = tethered.then(sys::take_stdin).transpose()?;
        let (listen, report) = sys::pipe()?;
        let first = sys::check(libc::fork())?;
        if first > 0 {
            drop(report);
            libc::waitpid(first, std::ptr::null_mut(), 0);
            let mut said = String::new();
            File::from(listen).take(4096).read_to_string(&mut said)?;
            return Ok(Side::Caller(said));
        }
        drop(listen);
        libc::setsid();
        if sys::check(libc::fork())? > 0 {
            libc::_exit(0);
        }
        let null = File::options().read(true).write(true).open("/dev/null")?;
        for standard in 0..3 {
            sys::check(libc::dup2(null.as_raw_fd(), standard))?;
        }
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        libc::signal(libc::SIGHUP, libc::SIG_IGN);
        libc::signal(libc::SIGINT, libc::SIG_IGN);
        Ok(Side::Keeper(File::from(report), tether))
    }
}

fn start(options: Options, tether: Option<OwnedFd>) -> io::Result<Keeper> {
    std::env::set_current_dir(&options.dir)?;
    let sigterm = sys::sigterm_fd()?;
    let listener = sys::listen_unix(serve::SOCKET, libc::SOCK_SEQPACKET, libc::SOCK_NONBLOCK)?;
    let monitor = sys::listen_unix(serve::MONITOR, libc::SOCK_STREAM, 0)?;
    let (log_pipe, log) = sys::pipe()?;
    let (console_pipe, console) = sys::pipe()?;
    let log_tail = Tail::new(log_pipe, &options.dir.join(serve::LOG), TAIL_LIMIT)?;
    let console_tail = Tail::new(console_pipe, &options.console, TAIL_LIMIT)?;
    let timer = sys::timer()?;
    let group = options.cgroup.as_deref().map(Group::open).transpose()?;
    let (filter, card) = options.card.then(Filter::new).transpose()?.unzip();
    let vmm = Vmm::start(
        &options.argv,
        ChildFds {
            log,
            monitor,
            console,
            card,
        },
        group.as_ref(),
    )?;
    if let Some(filter) = filter {
        filter.start()?; // only now: a process with one thread may fork
    }
    let ram = Ram::new(vmm.pid, &options.ram)?;
    let me = std::process::id() as libc::pid_t;
    let pids = format!(
        "keeper {me} {}\nvmm {} {}\n",
        sys::start_time(me)?,
        vmm.pid,
        vmm.start
    );
    serve::write_whole(&options.dir.join(serve::PIDS), pids.as_bytes())?;
    Ok(Keeper {
        record: options.record,
        group,
        listener,
        sigterm,
        timer,
        vmm,
        ram,
        files: Vec::new(),
        log: log_tail,
        console: Some(console_tail),
        clients: Vec::<OwnedFd>::new(),
        deadline_ns: None,
        prepared: None,
        tracker: None,
        copying: None,
        guards: tether
            .map(|pipe| Guard::new(pipe, Guarded::Server))
            .into_iter()
            .collect(),
        reason: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_string).collect()
    }

    #[test]
    fn options_are_parsed_and_missing_ones_told() {
        let options = parse_options(&words(
            "--dir /d --ram /r --console /c --record /x --cgroup /g -- /q -m 1",
        ))
        .unwrap();
        assert_eq!(options.argv, words("/q -m 1"));
        assert_eq!(options.record, Some(PathBuf::from("/x")));
        assert_eq!(options.cgroup, Some(PathBuf::from("/g")));
        assert!(!options.tether);
        let tethered = words("--dir /d --ram /r --tether --console /c -- /q");
        assert!(parse_options(&tethered).unwrap().tether);
        let carded = words("--dir /d --card --ram /r --console /c -- /q");
        assert!(parse_options(&carded).unwrap().card);
        assert!(parse_options(&words("--dir /d --ram /r -- /q")).is_err());
        assert!(parse_options(&words("--dir d --ram /r --console /c -- /q")).is_err());
        assert!(parse_options(&words("--wrong /d -- /q")).is_err());
        assert!(parse_options(&words("--dir")).is_err());
    }
}
