//! `keeper jail`: one program with files of its own and processes of its own, made by system calls alone.
//!
//!   keeper jail --root DIR [--folder NAME PATH]... [--file NAME PATH]... -- PROGRAM ARGUMENT...
//!
//! In a new mount namespace each PATH is mounted at DIR/NAME; nobody else ever sees it there, and it is gone with the
//! processes. In a new process namespace the program runs as a child of that namespace's first process, which is this
//! program, too. A program that changes its user (Firecracker's jailer) loses its death signal by that; the first process
//! keeps its own, and with it the kernel ends all the others. So the chain is
//!
//!   whoever started this -> outer (waits) -> first (waits; dies with outer) -> the program
//!
//! Standard output of the program is descriptor 4, as the keeper gives it (vmm.rs); 3 and 4 are closed. The exit code is the
//! program's, 128 and the signal's number if one ended it, 1 if the jail could not be made (the reason is on standard error).
//!
//! It knows nothing of what the files are and what the program is.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use crate::request::file_name;
use crate::sys;

/// What is mounted where. `folder`: it is one, else a file.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    name: String,
    path: String,
    folder: bool,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Options {
    root: PathBuf,
    mounts: Vec<Mount>,
    argv: Vec<String>,
}

pub fn parse(words: &[String]) -> Result<Options, String> {
    let mut out = Options::default();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} wants a value"));
        match word.as_str() {
            "--root" => out.root = PathBuf::from(value()?),
            "--folder" | "--file" => out.mounts.push(Mount {
                name: file_name(value()?)?,
                path: value()?.clone(),
                folder: word == "--folder",
            }),
            "--" => {
                out.argv = words.cloned().collect();
                break;
            }
            _ => return Err(format!("no such option: {word}")),
        }
    }
    if out.argv.is_empty() || !out.root.is_absolute() {
        return Err("--root (an absolute path) and a program are needed".to_string());
    }
    Ok(out)
}

/// Make the jail, run the program in it to its end, and return the exit code.
pub fn run(options: &Options) -> i32 {
    match make(options).and_then(|()| fork_first(&options.argv)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("keeper: the jail could not be made: {error}");
            1
        }
    }
}

fn make(options: &Options) -> io::Result<()> {
    // SAFETY: no pointers.
    sys::check(unsafe { libc::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWPID) })?;
    mount(None, "/", libc::MS_REC | libc::MS_PRIVATE)?;
    for one in &options.mounts {
        let target = options.root.join(&one.name);
        if one.folder {
            fs::create_dir(&target)?;
        } else {
            fs::File::create(&target)?;
        }
        let target = target.to_str().ok_or(io::ErrorKind::InvalidInput)?;
        mount(Some(&one.path), target, libc::MS_BIND)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", one.path)))?;
    }
    Ok(())
}

fn mount(source: Option<&str>, target: &str, flags: libc::c_ulong) -> io::Result<()> {
    let source = source.map(sys::cstring).transpose()?;
    let target = sys::cstring(target)?;
    // SAFETY: the strings live beyond the call; the other pointers may be null.
    sys::check(unsafe {
        libc::mount(
            source.as_ref().map_or(std::ptr::null(), |s| s.as_ptr()),
            target.as_ptr(),
            std::ptr::null(),
            flags,
            std::ptr::null(),
        )
    })?;
    Ok(())
}

fn fork_first(argv: &[String]) -> io::Result<i32> {
    let argv: Vec<CString> = argv
        .iter()
        .map(|a| sys::cstring(a))
        .collect::<io::Result<_>>()?;
    let outer = sys::pidfd_open(std::process::id() as libc::pid_t)?;
    // SAFETY: this program has one thread; the standard output is nobody's yet.
    unsafe {
        sys::check(libc::dup2(4, 1))?;
        libc::close_range(3, 4, 0);
        match sys::check(libc::fork())? {
            0 => libc::_exit(first(&argv, &outer)),
            child => Ok(wait(child)),
        }
    }
}

/// The first process of the namespace: all others end with it.
unsafe fn first(argv: &[CString], outer: &OwnedFd) -> i32 {
    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
    if sys::has_ended(outer) {
        return 1; // before the signal was set
    }
    match libc::fork() {
        -1 => 1,
        0 => {
            let mut pointers: Vec<_> = argv.iter().map(|a| a.as_ptr()).collect();
            pointers.push(std::ptr::null());
            libc::execv(pointers[0], pointers.as_ptr());
            eprintln!("keeper: {}", io::Error::last_os_error());
            libc::_exit(127)
        }
        child => wait(child),
    }
}

/// Return how this child ended; others, which the first process inherits, are collected meanwhile.
fn wait(child: libc::pid_t) -> i32 {
    loop {
        let mut status = 0;
        // SAFETY: status is a valid int.
        let ended = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        if ended == child {
            return code_of(status);
        }
        if ended < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return 1;
        }
    }
}

/// The exit code that tells of this end, as a shell has it.
fn code_of(status: libc::c_int) -> i32 {
    if libc::WIFSIGNALED(status) {
        128 + libc::WTERMSIG(status)
    } else {
        libc::WEXITSTATUS(status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Options, String> {
        let words: Vec<String> = text.split(' ').map(str::to_string).collect();
        parse(&words)
    }

    #[test]
    fn what_is_mounted_where() {
        let options =
            parsed("--root /r --folder shm /run/shm --file disk /d/disk.raw -- /bin/jailer --id x")
                .unwrap();
        assert_eq!(options.root, PathBuf::from("/r"));
        let names: Vec<_> = options
            .mounts
            .iter()
            .map(|m| (m.name.as_str(), m.path.as_str(), m.folder))
            .collect();
        assert_eq!(
            names,
            [("shm", "/run/shm", true), ("disk", "/d/disk.raw", false)]
        );
        assert_eq!(options.argv, ["/bin/jailer", "--id", "x"]);
    }

    #[test]
    fn a_name_is_one_of_the_root_folder() {
        for bad in ["../x", "a/b", "..", ""] {
            assert!(parsed(&format!("--root /r --file {bad} /x -- /p")).is_err());
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for bad in [
            "--root",
            "--root /r",
            "--root r -- /p",
            "--file x",
            "--file x /y -- /p",
            "--chroot /r -- /p",
        ] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_childs_end_is_told() {
        for (script, code) in [("exit 7", 7), ("kill -9 $$", 137)] {
            let mut child = std::process::Command::new("/bin/sh");
            let child = child.args(["-c", script]).spawn().unwrap();
            let mut status = 0;
            // SAFETY: our own child; status is a valid int.
            unsafe { libc::waitpid(child.id() as libc::pid_t, &raw mut status, 0) };
            assert_eq!(code_of(status), code);
        }
    }
}
