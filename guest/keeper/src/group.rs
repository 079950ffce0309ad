//! The VMM's control group: joined before its program runs, asked at its end whether memory ran out, then removed.
//!
//! The server makes it and writes its limits (Documentation/admin-guide/cgroup-v2.rst). Here nothing is known of them.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};

/// Greatest size that is read of `memory.events`, some lines of a name and a number.
const EVENTS_LIMIT: u64 = 4096;

pub struct Group {
    dir: PathBuf,
    procs: File,
}

impl Group {
    pub fn open(dir: &Path) -> io::Result<Group> {
        let procs = File::options().write(true).open(dir.join("cgroup.procs"))?;
        let dir = dir.to_path_buf();
        Ok(Group { dir, procs })
    }

    /// The file that a process writes "0" to, to be part of the group.
    pub fn procs(&self) -> RawFd {
        self.procs.as_raw_fd()
    }

    /// Did the kernel kill a process of the group because it wanted more memory than its limit?
    pub fn ran_out(&self) -> bool {
        let mut text = String::new();
        let read = File::open(self.dir.join("memory.events"))
            .and_then(|file| file.take(EVENTS_LIMIT).read_to_string(&mut text));
        read.is_ok() && has_killed(&text)
    }

    /// Remove it, when its processes are gone. The kernel refuses otherwise, and a later server's sweep sees to it.
    pub fn remove(&self) {
        let _ = std::fs::remove_dir(&self.dir);
    }
}

fn has_killed(events: &str) -> bool {
    events
        .lines()
        .filter_map(|line| line.strip_prefix("oom_kill "))
        .any(|count| count != "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kill_for_memory_is_seen() {
        assert!(has_killed(
            "low 0\nhigh 0\nmax 9\noom 1\noom_kill 1\noom_group_kill 1\n"
        ));
        assert!(!has_killed("max 9\noom 1\noom_kill 0\noom_group_kill 0\n"));
        assert!(!has_killed(""));
    }

    #[test]
    fn a_group_that_is_not_there_is_an_error() {
        let error = Group::open(Path::new("/nonexistent/group")).err().unwrap();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
    }
}
