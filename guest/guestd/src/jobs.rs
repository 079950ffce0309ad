//! The job table: processes that outlive connections, their rings, and what became of them.

use std::collections::BTreeMap;
use std::io;

use crate::fail::{Fail, Outcome};
use crate::json::{obj, Value};
use crate::ring::{self, Cursor, Ring};
use crate::spawn::Spawned;
use crate::sys::{self, Watched};

pub const MAX_JOBS: usize = 256;
const ARGV_SHOWN: usize = 1024;

/// One process and what is left of it. `key` is the table's own number, never reused.
pub struct Job {
    pub id: String,
    pub pid: i32,
    pub argv: Vec<String>,
    pub label: String,
    pub started_s: f64,
    pub tty: bool,
    pub stdin: Option<Watched>,
    pub out: [Option<Watched>; 2],
    pub ring: Ring,
    pub exit_code: Option<i32>,
    /// Ended, and all output that was there at its end is in the ring: attached readers may be told.
    pub settled: bool,
}

/// The outcome of one read from a job's channel. Full: the readers leave no room, there may be more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pulled {
    Some,
    Empty,
    Full,
}

impl Job {
    pub fn new(
        id: String,
        argv: Vec<String>,
        label: String,
        started_s: f64,
        tty: bool,
        child: Spawned,
    ) -> Self {
        Job {
            id,
            pid: child.pid,
            argv,
            label,
            started_s,
            tty,
            stdin: child.stdin.map(Watched::new),
            out: [
                Some(Watched::new(child.stdout)),
                child.stderr.map(Watched::new),
            ],
            ring: Ring::default(),
            exit_code: None,
            settled: false,
        }
    }

    /// Read once from a channel into the ring, at most `room` bytes.
    pub fn pull(&mut self, channel: usize, room: usize, cap: usize, scratch: &mut [u8]) -> Pulled {
        let Some(w) = &self.out[channel] else {
            return Pulled::Empty;
        };
        let want = room.min(scratch.len());
        if want == 0 {
            return Pulled::Full;
        }
        match sys::read(w.raw(), &mut scratch[..want]) {
            Ok(0) => self.out[channel] = None,
            Ok(n) => {
                self.ring.push(channel as u8 + 1, &scratch[..n], cap);
                return Pulled::Some;
            }
            Err(e) if sys::would_block(&e) => {}
            Err(_) => self.out[channel] = None, // EIO: the terminal has no more users
        }
        Pulled::Empty
    }

    /// End of stdin: close the pipe; a terminal gets its end-of-file character instead.
    pub fn close_stdin(&mut self) {
        match (&self.stdin, self.tty) {
            (Some(w), true) => {
                let _ = sys::write(w.raw(), b"\x04"); // a full terminal buffer means nobody reads: nothing to end
            }
            _ => self.stdin = None,
        }
    }

    pub fn signal(&self, number: i32) -> Outcome<()> {
        if self.exit_code.is_some() {
            return Err(Fail::new("ended", format!("job {} has ended", self.id)));
        }
        if !(1..=64).contains(&number) {
            return Err(Fail::bad(format!("no such signal: {number}")));
        }
        sys::kill_group(self.pid, number).map_err(|e: io::Error| Fail::io(&self.id, &e))
    }

    pub fn row(&self) -> Value {
        let mut left = ARGV_SHOWN;
        let argv = self.argv.iter().map_while(|a| {
            let cut: String = a.chars().take(left).collect();
            left = left.saturating_sub(cut.len() + 1);
            if left == 0 && cut.is_empty() {
                None
            } else {
                Some(Value::Str(cut))
            }
        });
        let argv = Value::Arr(argv.collect());
        obj([
            ("job_id", self.id.as_str().into()),
            ("pid", i64::from(self.pid).into()),
            ("argv", argv),
            ("label", self.label.as_str().into()),
            ("started_s", self.started_s.into()),
            (
                "exit_code",
                self.exit_code.map_or(Value::Null, |c| i64::from(c).into()),
            ),
            ("stdin", self.stdin.is_some().into()),
            ("tty", self.tty.into()),
        ])
    }
}

/// All jobs, oldest first.
#[derive(Default)]
pub struct Table {
    pub jobs: BTreeMap<u32, Job>,
    next: u32,
}

impl Table {
    pub fn find(&self, id: &str) -> Option<u32> {
        self.jobs.iter().find(|(_, j)| j.id == id).map(|(k, _)| *k)
    }

    pub fn get(&mut self, id: &str) -> Outcome<(u32, &mut Job)> {
        let key = self
            .find(id)
            .ok_or_else(|| Fail::new("no_job", format!("no such job: {id}")))?;
        self.jobs
            .get_mut(&key)
            .map(|j| (key, j))
            .ok_or_else(|| Fail::new("no_job", "no such job"))
    }

    /// Make room for one more: forget the oldest ended jobs; returns their keys. Fails when all still run.
    pub fn make_room(&mut self) -> Outcome<Vec<u32>> {
        let mut gone = Vec::new();
        while self.jobs.len() >= MAX_JOBS {
            let oldest = self.jobs.iter().find(|(_, j)| j.settled).map(|(k, _)| *k);
            let key =
                oldest.ok_or_else(|| Fail::new("busy", format!("{MAX_JOBS} jobs are running")))?;
            self.jobs.remove(&key);
            gone.push(key);
        }
        Ok(gone)
    }

    pub fn fresh_id(&self) -> String {
        (self.next..)
            .map(|n| format!("j{n}"))
            .find(|id| self.find(id).is_none())
            .unwrap_or_default()
    }

    pub fn insert(&mut self, job: Job) -> u32 {
        let key = self.next;
        self.next += 1;
        self.jobs.insert(key, job);
        key
    }

    /// What a job may keep now.
    pub fn ring_cap(&self) -> usize {
        ring::cap_for(self.jobs.values().map(|j| j.ring.cost()).sum())
    }

    pub fn by_pid(&mut self, pid: i32) -> Option<&mut Job> {
        self.jobs
            .values_mut()
            .find(|j| j.pid == pid && j.exit_code.is_none())
    }

    /// Process groups that still run.
    pub fn groups(&self) -> Vec<i32> {
        self.jobs
            .values()
            .filter(|j| j.exit_code.is_none())
            .map(|j| j.pid)
            .collect()
    }
}

/// How much a job's channels may be read now: all of it when nobody is attached (the ring drops the oldest), else
/// only what the slowest attached reader leaves, so that an attached reader never misses output.
pub fn room(ring: &Ring, cursors: &[Cursor], cap: usize) -> usize {
    match cursors.iter().map(|c| ring.behind(*c)).max() {
        None => cap,
        Some(behind) => (cap / 2).saturating_sub(behind),
    }
}

/// A job id as hosts may choose it.
pub fn valid_id(id: &str) -> bool {
    (1..=64).contains(&id.len())
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::RING_BYTES;

    #[test]
    fn ids() {
        assert!(valid_id("a.b-c_9"));
        for bad in ["", "a b", "../x", &"x".repeat(65)] {
            assert!(!valid_id(bad));
        }
    }

    #[test]
    fn room_follows_the_slowest_reader() {
        let mut r = Ring::default();
        assert_eq!(room(&r, &[], RING_BYTES), RING_BYTES);
        assert_eq!(room(&r, &[Cursor::default()], RING_BYTES), RING_BYTES / 2);
        r.push(1, &[0; RING_BYTES / 2], RING_BYTES);
        assert_eq!(room(&r, &[Cursor::default()], RING_BYTES), 0);
        assert_eq!(room(&r, &[], RING_BYTES), RING_BYTES);
    }
}
