//! Stop the workload as one and let it go again.
//!
//! In a machine: the cgroup v2 freezer. Jobs and all their children live in one cgroup; `cgroup.freeze` stops them at
//! one point and `cgroup.events` tells when it is reached. As an ordinary process on a host (tests, the process
//! driver) without a cgroup of its own: SIGSTOP to each job's process group, which misses children that left it.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::fail::{Fail, Outcome};
use crate::sys;

enum Means {
    Cgroup {
        dir: PathBuf,
        procs: File,
        freeze: File,
        events: File,
    },
    Signals,
}

pub struct Freezer {
    means: Means,
    pub frozen: bool,
}

impl Freezer {
    /// Make (or take over) the workload's cgroup.
    pub fn cgroup(dir: &Path) -> Outcome<Self> {
        let fail = |e: std::io::Error| Fail::io(&dir.display().to_string(), &e);
        fs::create_dir_all(dir).map_err(fail)?;
        let open = |name: &str| {
            OpenOptions::new()
                .write(true)
                .open(dir.join(name))
                .map_err(fail)
        };
        // Kept open: walking their paths costs more than the freeze itself (see thaw::Kept).
        Ok(Freezer {
            means: Means::Cgroup {
                dir: dir.to_path_buf(),
                procs: open("cgroup.procs")?,
                freeze: open("cgroup.freeze")?,
                events: File::open(dir.join("cgroup.events")).map_err(fail)?,
            },
            frozen: false,
        })
    }

    pub fn signals() -> Self {
        Freezer {
            means: Means::Signals,
            frozen: false,
        }
    }

    pub fn name(&self) -> &'static str {
        match self.means {
            Means::Cgroup { .. } => "cgroup",
            Means::Signals => "signals",
        }
    }

    /// The file a new process writes "0" to, to be part of the workload.
    pub fn procs(&self) -> Option<&File> {
        match &self.means {
            Means::Cgroup { procs, .. } => Some(procs),
            Means::Signals => None,
        }
    }

    /// Freeze; when the bound is over everything runs again and an error says so.
    pub fn freeze(&mut self, groups: &[i32], timeout_ms: u64) -> Outcome<()> {
        if self.frozen {
            return Ok(());
        }
        let deadline = sys::monotonic_ms() + timeout_ms;
        let done = match &self.means {
            Means::Cgroup { freeze, events, .. } => {
                write_freeze(freeze, b"1").and_then(|()| await_events(events, "frozen 1", deadline))
            }
            Means::Signals => stop_groups(groups, deadline),
        };
        match done {
            Ok(true) => {
                self.frozen = true;
                Ok(())
            }
            other => {
                let _ = self.release(groups); // the error below is the news; a failed release shows in the next call
                other?;
                Err(Fail::new(
                    "timeout",
                    format!("the workload did not freeze in {timeout_ms} ms"),
                ))
            }
        }
    }

    /// Let the workload run.
    pub fn unfreeze(&mut self, groups: &[i32]) -> Outcome<()> {
        if self.frozen {
            self.release(groups)?;
            self.frozen = false;
        }
        Ok(())
    }

    fn release(&self, groups: &[i32]) -> Outcome<()> {
        match &self.means {
            Means::Cgroup { freeze, .. } => write_freeze(freeze, b"0"),
            Means::Signals => {
                for g in groups {
                    let _ = sys::kill_group(*g, libc::SIGCONT); // a group that is gone needs nothing
                }
                Ok(())
            }
        }
    }

    /// Kill all of the workload (process mode's end).
    pub fn destroy(&mut self, groups: &[i32]) {
        for g in groups {
            let _ = sys::kill_group(*g, libc::SIGKILL); // gone already is as good
        }
        if let Means::Cgroup {
            dir,
            freeze,
            events,
            ..
        } = &self.means
        {
            let _ = fs::write(dir.join("cgroup.kill"), "1"); // since Linux 5.14; the groups above cover the rest
            let _ = write_freeze(freeze, b"0"); // killed while frozen: let them die
            let until = sys::monotonic_ms() + 2000;
            let _ = await_events(events, "populated 0", until); // then the folder can go; a leftover is harmless
            let _ = fs::remove_dir(dir);
        }
    }
}

fn write_freeze(file: &File, value: &[u8]) -> Outcome<()> {
    file.write_all_at(value, 0)
        .map_err(|e| Fail::io("cgroup.freeze", &e))
}

/// Wait for a line in cgroup.events; the kernel raises POLLPRI at each change.
fn await_events(f: &File, line: &str, deadline: u64) -> Outcome<bool> {
    let fail = |e: std::io::Error| Fail::io("cgroup.events", &e);
    let mut text = [0u8; 256];
    loop {
        let n = f.read_at(&mut text, 0).map_err(fail)?;
        if text[..n]
            .split(|b| *b == b'\n')
            .any(|l| l == line.as_bytes())
        {
            return Ok(true);
        }
        let left = deadline.saturating_sub(sys::monotonic_ms());
        if left == 0 {
            return Ok(false);
        }
        sys::poll_one(f.as_raw_fd(), libc::POLLPRI, left as i32).map_err(fail)?;
    }
}

/// SIGSTOP every group and wait until no leader can run its program any more.
fn stop_groups(groups: &[i32], deadline: u64) -> Outcome<bool> {
    for g in groups {
        let _ = sys::kill_group(*g, libc::SIGSTOP); // a group that is gone needs nothing
    }
    for g in groups {
        while !rests(&fs::read_to_string(format!("/proc/{g}/stat")).unwrap_or_default()) {
            if sys::monotonic_ms() >= deadline {
                return Ok(false);
            }
            // A stop has no descriptor to wait on (pidfds tell of exits only): look again each millisecond.
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
    Ok(true)
}

/// Judge a line of /proc/PID/stat: stopped, dead, gone, or asleep in the kernel where only its end or the stop that is
/// pending lets it out (a shell whose vfork child was stopped before its exec waits so).
fn rests(stat: &str) -> bool {
    let state = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.trim_start().chars().next());
    matches!(state, None | Some('T' | 't' | 'Z' | 'X' | 'D'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states() {
        assert!(rests("") && rests("7 (a) b) T 1") && rests("7 (sh) D 1") && rests("7 (sh) Z 1"));
        assert!(!rests("7 (T) R 1") && !rests("7 (sh) S 1"));
    }

    #[test]
    fn a_process_is_stopped_and_goes_on() {
        use std::os::unix::process::CommandExt;
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            .process_group(0)
            .spawn()
            .unwrap();
        let group = [child.id() as i32];
        let mut freezer = Freezer::signals();
        freezer.freeze(&group, 5000).unwrap();
        freezer.freeze(&group, 5000).unwrap();
        assert!(freezer.frozen);
        freezer.unfreeze(&group).unwrap();
        assert!(!freezer.frozen);
        freezer.destroy(&group);
        child.wait().unwrap();
    }
}
