//! Exact dirty tracking: which pages were written since a snapshot, and copies of them with the shortest pause.
//!
//! Three sets of pages. `ever`: what may differ from what the RAM file holds, since the VM was started. `since`: what
//! was written since the *base*, the last snapshot that the server said was stored. `fresh`: what was written since
//! the last capture; it becomes `since` when that capture's snapshot is stored. A capture that is never stored
//! therefore loses nothing: its pages are in the next one. All of this outlives the server.
//!
//! A capture has rounds. While the VM runs, what was written is copied and protected again, until a round brings
//! little (or rounds are used up); then, in the pause, the rest. A page that is written while it is being copied is
//! written after its protection, so the next round has it: only the last round must be of a stopped VM.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use crate::bitmap::Bitmap;
use crate::buffer::Buffer;
use crate::memory::{file_pages, Ram, Segment, Stop};
use crate::remote;
use crate::sys::PAGE;
use crate::uffd::{self, Uffd};

/// Pages that may be left for the pause: 20 MiB, some 5 ms.
const CALM: usize = 5120;
/// A guest that writes faster than we copy is not waited for.
const ROUNDS: usize = 4;
/// Room that is touched for the pause at least: 4 MiB.
const SPARE: usize = 1024;

/// Which pages a capture is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Written since the base.
    Delta,
    /// All that may differ from the RAM file.
    All,
}

/// Whose page faults count, and what becomes of the known ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Faults {
    /// Whatever the rights allow; only writes are tracked.
    Any,
    /// Only the process's own, which needs no rights.
    User,
    /// The kernel's too, and the known ranges are absent.
    Wait,
}

pub struct Tracker {
    uffd: Uffd,
    pagemap: File,
    ever: Bitmap,
    since: Bitmap,
    fresh: Bitmap,
    /// The snapshot that `since` counts from; `-` before the first.
    pub base: String,
    /// Counts captures, so that a late word about an old one changes nothing.
    pub generation: u64,
}

/// A capture that is being made.
pub struct Copying {
    which: Which,
    buffer: Buffer,
    sorted: Vec<u32>,
    more: Vec<u32>,
    done: bool,
}

impl Tracker {
    /// Track every write from now on. To be called before the guest runs. `base`: the snapshot whose memory this is,
    /// or `-`; `known`: ranges (first page, count) that differ from the RAM file without having been written. With
    /// `Faults::Wait` their pages are absent from now on: whoever touches one waits for a pager (`pager_fd`).
    pub fn start(
        ram: &Ram,
        base: &str,
        known: &[(u32, u32)],
        faults: Faults,
    ) -> io::Result<Tracker> {
        let segments = ram.segments()?;
        let mut ever = Bitmap::new(ram.pages);
        // Before the protection: plain pagemap is of no use after it.
        for page in ram.private_pages(segments)? {
            ever.add(page as usize, 1);
        }
        if segments.iter().any(|segment| segment.shared) {
            for page in file_pages(&ram.file()?, ram.pages)? {
                ever.add(page as usize, 1);
            }
        }
        for &(first, count) in known {
            ever.add(first as usize, count as usize);
        }
        let uffd = Uffd::open(ram.pid, faults == Faults::User)?;
        if faults == Faults::Wait && !uffd.kernel_faults {
            // QEMU reads disks into guest memory by system calls: those would fail on an absent page.
            return Err(io::Error::other(
                "no right to catch the kernel's own page faults",
            ));
        }
        let mut tracker = Tracker {
            uffd,
            pagemap: File::open(format!("/proc/{}/pagemap", ram.pid))?,
            ever,
            since: Bitmap::new(ram.pages),
            fresh: Bitmap::new(ram.pages),
            base: base.to_string(),
            generation: 0,
        };
        let absent = if faults == Faults::Wait { known } else { &[] };
        if let Err(error) = tracker.arm(ram, segments, absent) {
            // Whoever goes another way now must find the memory as it was: nobody serves its faults.
            for segment in segments {
                let bytes = (segment.pages * PAGE) as u64;
                tracker.uffd.unregister(segment.address, bytes)?;
            }
            return Err(error);
        }
        Ok(tracker)
    }

    fn arm(&mut self, ram: &Ram, segments: &[Segment], absent: &[(u32, u32)]) -> io::Result<()> {
        if !absent.is_empty() {
            forget_all(ram.pid, segments)?;
        }
        for segment in segments {
            let bytes = (segment.pages * PAGE) as u64;
            self.uffd.register(segment.address, bytes, uffd::WRITES)?;
            self.uffd.protect(segment.address, bytes)?;
        }
        for &(first, count) in absent {
            self.register_absent(segments, first as usize, count as usize)?;
        }
        // The first look shows whether this kernel can scan at all, before anybody relies on it.
        self.scan(ram).map(|_| ())
    }

    fn register_absent(&self, segments: &[Segment], first: usize, count: usize) -> io::Result<()> {
        for segment in segments {
            let from = first.max(segment.first_page);
            let to = (first + count).min(segment.first_page + segment.pages);
            if from < to {
                let address = segment.address + ((from - segment.first_page) * PAGE) as u64;
                let bytes = ((to - from) * PAGE) as u64;
                self.uffd.register(address, bytes, uffd::ABSENT)?;
            }
        }
        Ok(())
    }

    /// What a pager needs to serve absent pages.
    pub fn pager_fd(&self) -> io::Result<OwnedFd> {
        self.uffd.fd.try_clone()
    }

    /// How it came about, in one word: `kernel` sees the kernel's own accesses too, `user` only needs no rights.
    pub fn way(&self) -> &'static str {
        if self.uffd.kernel_faults {
            "kernel"
        } else {
            "user"
        }
    }

    /// Note and return the pages written since the last scan, ascending.
    fn scan(&mut self, ram: &Ram) -> io::Result<Vec<u32>> {
        let mut found = Vec::new();
        for segment in ram.segments()? {
            let bytes = (segment.pages * PAGE) as u64;
            let (ever, since, fresh) = (&mut self.ever, &mut self.since, &mut self.fresh);
            uffd::scan_written(&self.pagemap, segment.address, bytes, |address, length| {
                let (first, count) = pages_of(segment, address, length);
                for set in [&mut *ever, &mut *since, &mut *fresh] {
                    set.add(first, count);
                }
                found.extend((first..first + count).map(|page| page as u32));
            })?;
        }
        Ok(found)
    }

    /// Copy while the VM runs, until little is left, and touch the memory that the pause will need.
    pub fn prepare(&mut self, ram: &Ram, which: Which, stop: Stop) -> io::Result<Copying> {
        self.scan(ram)?;
        let sorted = match which {
            Which::Delta => self.since.members(),
            Which::All => self.ever.members(),
        };
        let mut copying = Copying {
            which,
            buffer: Buffer::new(ram.pages)?,
            sorted,
            more: Vec::new(),
            done: false,
        };
        copying.buffer.touch(0, copying.sorted.len());
        ram.read_pages(&copying.sorted, 0, &mut copying.buffer, stop)?;
        let mut last = copying.sorted.len();
        for _ in 1..ROUNDS {
            if last <= CALM {
                break;
            }
            last = self.round(ram, &mut copying, stop)?;
        }
        copying.buffer.touch(copying.pages(), last.max(SPARE));
        Ok(copying)
    }

    /// Copy what was written since the last look. Returns how many pages that was.
    fn round(&mut self, ram: &Ram, copying: &mut Copying, stop: Stop) -> io::Result<usize> {
        let found = self.scan(ram)?;
        let (again, new) = copying.place(&found);
        ram.read_pairs(again.into_iter(), &mut copying.buffer, stop)?;
        let first = copying.pages();
        ram.read_pages(&new, first, &mut copying.buffer, stop)?;
        copying.more.extend(new);
        Ok(found.len())
    }

    /// The last round, of a stopped VM: from here on the copies are of one instant. Returns the number of pages.
    pub fn capture(
        &mut self,
        ram: &Ram,
        which: Which,
        ready: Option<Copying>,
        stop: Stop,
    ) -> io::Result<Copying> {
        let mut copying = match ready {
            Some(copying) if copying.which == which && !copying.done => copying,
            _ => self.prepare(ram, which, stop)?,
        };
        self.round(ram, &mut copying, stop)?;
        copying.done = true;
        self.fresh.clear();
        self.generation += 1;
        Ok(copying)
    }

    /// The capture of this generation is stored as `base`. A word about an older one changes nothing: its pages stay
    /// in the next capture, which is more than needed and never less.
    pub fn committed(&mut self, generation: u64, base: &str) {
        if generation == self.generation {
            self.since = self.fresh.clone();
            self.base = base.to_string();
        }
    }
}

/// Drop what the VMM has touched of its memory at its start: such a page would be there, and nobody would ask for it.
fn forget_all(pid: libc::pid_t, segments: &[Segment]) -> io::Result<()> {
    let calls: Vec<remote::Call> = segments
        .iter()
        .map(|s| {
            let number = libc::SYS_madvise as u64;
            let length = (s.pages * PAGE) as u64;
            [
                number,
                s.address,
                length,
                libc::MADV_DONTNEED as u64,
                0,
                0,
                0,
            ]
        })
        .collect();
    match remote::system_calls(pid, &calls)?.iter().find(|&&r| r < 0) {
        Some(error) => Err(io::Error::from_raw_os_error(-*error as i32)),
        None => Ok(()),
    }
}

fn pages_of(segment: &Segment, address: u64, length: u64) -> (usize, usize) {
    let first = segment.first_page + ((address - segment.address) as usize) / PAGE;
    (first, length as usize / PAGE)
}

impl Copying {
    pub fn pages(&self) -> usize {
        self.sorted.len() + self.more.len()
    }

    /// Tell pages that have a slot already (with it) from new ones.
    fn place(&self, found: &[u32]) -> (Vec<(u32, usize)>, Vec<u32>) {
        let mut later: Vec<(u32, usize)> = self
            .more
            .iter()
            .enumerate()
            .map(|(at, &page)| (page, self.sorted.len() + at))
            .collect();
        later.sort_unstable();
        let (mut again, mut new) = (Vec::new(), Vec::new());
        for &page in found {
            if let Ok(slot) = self.sorted.binary_search(&page) {
                again.push((page, slot));
            } else if let Ok(at) = later.binary_search_by_key(&page, |&(page, _)| page) {
                again.push(later[at]);
            } else {
                new.push(page);
            }
        }
        (again, new)
    }

    /// Bring the pages into order. Done when the VM runs again: it moves memory.
    pub fn collect(mut self) -> io::Result<(Buffer, usize)> {
        let numbers = self.buffer.sort(&self.sorted, &self.more);
        self.buffer.finish(&numbers)?;
        Ok((self.buffer, numbers.len()))
    }

    pub fn is_done(&self) -> bool {
        self.done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{content, Restless, Tracer, Writer};

    fn go() -> io::Result<()> {
        Ok(())
    }

    fn take(tracker: &mut Tracker, ram: &Ram, which: Which) -> Vec<(u32, u8)> {
        content(
            tracker
                .capture(ram, which, None, &go)
                .unwrap()
                .collect()
                .unwrap(),
        )
    }

    #[test]
    fn a_capture_holds_what_was_written_since_the_base() {
        let (writer, ram) = Writer::start("since", libc::MAP_PRIVATE);
        writer.write(3, 30); // before it is tracked: private
        let mut tracker = Tracker::start(&ram, "-", &[(100, 2)], Faults::Any).unwrap();
        writer.write(5, 50);
        writer.write(200, 60);
        let all = [(3, 30), (5, 50), (100, 0), (101, 0), (200, 60)];
        assert_eq!(take(&mut tracker, &ram, Which::All), all);
        assert_eq!(take(&mut tracker, &ram, Which::Delta), [(5, 50), (200, 60)]);
        tracker.committed(tracker.generation, "snp_a");
        writer.write(5, 51);
        assert_eq!(take(&mut tracker, &ram, Which::Delta), [(5, 51)]);
        // that one is never stored: its page is in the next
        writer.write(7, 70);
        assert_eq!(take(&mut tracker, &ram, Which::Delta), [(5, 51), (7, 70)]);
        tracker.committed(tracker.generation - 1, "snp_b"); // too late
        assert_eq!(tracker.base, "snp_a");
        assert_eq!(take(&mut tracker, &ram, Which::Delta).len(), 2);
        let stored = tracker.generation;
        writer.write(9, 90); // between the capture and the word that it is stored
        tracker.committed(stored, "snp_c");
        assert_eq!(take(&mut tracker, &ram, Which::Delta), [(9, 90)]);
    }

    #[test]
    fn what_is_written_between_the_rounds_is_of_the_last_instant() {
        let (writer, ram) = Writer::start("rounds", libc::MAP_PRIVATE);
        let mut tracker = Tracker::start(&ram, "-", &[], Faults::User).unwrap();
        assert_eq!(tracker.way(), "user");
        for page in [10, 20, 30] {
            writer.write(page, page);
        }
        let ready = tracker.prepare(&ram, Which::Delta, &go).unwrap();
        writer.write(20, 99);
        writer.write(15, 15);
        writer.write(5, 5);
        let done = tracker
            .capture(&ram, Which::Delta, Some(ready), &go)
            .unwrap();
        writer.write(30, 77); // after the capture
        assert_eq!(
            content(done.collect().unwrap()),
            [(5, 5), (10, 10), (15, 15), (20, 99), (30, 30)]
        );
    }

    #[test]
    fn what_could_not_be_armed_is_as_it_was() {
        let (writer, ram) = Writer::start("arm", libc::MAP_PRIVATE);
        let anonymous = [Segment {
            address: 0x1000, // nothing is mapped there: it cannot be registered
            first_page: 200,
            pages: 1,
            shared: false,
        }];
        let mut tracker = Tracker::start(&ram, "-", &[], Faults::Any).unwrap();
        assert!(tracker.arm(&ram, &anonymous, &[]).is_err());
        for segment in ram.segments().unwrap() {
            let bytes = (segment.pages * PAGE) as u64;
            tracker.uffd.unregister(segment.address, bytes).unwrap();
        }
        writer.write(3, 3);
        // plain pagemap tells the truth again, and the memory may be registered anew
        let private = ram.private_pages(ram.segments().unwrap()).unwrap();
        assert_eq!(private, vec![3]);
        let mut again = Tracker::start(&ram, "-", &[], Faults::Any).unwrap();
        writer.write(4, 4);
        assert_eq!(take(&mut again, &ram, Which::Delta), [(4, 4)]);
    }

    #[test]
    fn a_page_is_named_once_however_often_it_is_written_meanwhile() {
        let (_writer, ram) = Restless::start("restless", 16384);
        let tracker = Tracker::start(&ram, "-", &[], Faults::Any).unwrap();
        let segment = ram.segments().unwrap()[0];
        let mut shown = 0;
        for _ in 0..2000 {
            std::thread::sleep(std::time::Duration::from_millis(10)); // it has to have written much
            let mut named: Vec<(u64, u64)> = Vec::new();
            let bytes = (segment.pages * PAGE) as u64;
            uffd::scan_written(&tracker.pagemap, segment.address, bytes, |at, length| {
                if named.len() % 512 == 511 {
                    std::thread::sleep(std::time::Duration::from_millis(1)); // it writes on
                }
                named.push((at, at + length));
            })
            .unwrap();
            assert!(named.windows(2).all(|two| two[0].1 <= two[1].0));
            // The kernel goes through some 512 ranges in a walk: with fewer nothing is shown.
            shown += usize::from(named.len() > 1500);
            if shown == 5 {
                return;
            }
        }
        panic!("{shown} scans of many pages: too few to show anything");
    }

    #[test]
    fn shared_memory_counts_what_its_file_holds() {
        let (writer, ram) = Writer::start("shared", libc::MAP_SHARED);
        let mut tracker = Tracker::start(&ram, "-", &[], Faults::Any).unwrap();
        assert_eq!(take(&mut tracker, &ram, Which::All).len(), 16);
        writer.write(40, 4);
        assert_eq!(take(&mut tracker, &ram, Which::Delta), [(40, 4)]);
        assert_eq!(take(&mut tracker, &ram, Which::All).len(), 17);
    }

    #[test]
    fn the_deadline_stops_a_copy_and_nothing_is_lost() {
        let (writer, ram) = Writer::start("deadline", libc::MAP_PRIVATE);
        let mut tracker = Tracker::start(&ram, "-", &[], Faults::Any).unwrap();
        writer.write(1, 1);
        let late = || Err(io::Error::from(io::ErrorKind::TimedOut));
        assert!(tracker.capture(&ram, Which::Delta, None, &late).is_err());
        assert_eq!(take(&mut tracker, &ram, Which::Delta), [(1, 1)]);
    }

    #[test]
    fn a_process_that_somebody_else_traces_is_refused() {
        let (writer, ram) = Writer::start("traced", libc::MAP_PRIVATE);
        let tracer = Tracer::start(writer.pid);
        let error = Tracker::start(&ram, "-", &[], Faults::Any).err().unwrap();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        drop(tracer);
        assert!(Tracker::start(&ram, "-", &[], Faults::Any).is_ok());
    }
}
