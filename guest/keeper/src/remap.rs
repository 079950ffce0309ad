//! Pages mapped in place: stretches of files laid over the VM's memory, privately, before it runs. Nothing is copied, and
//! all machines that map the same file share its pages in the page cache until they write.
//!
//! The VMM opens our descriptors (`remote::open_ours`) and maps every run with `MAP_FIXED`. What QEMU touched there at
//! its start goes with the old mapping. The dirty tracking that follows (track.rs) covers the new mappings as it does
//! the old: a page nobody writes is never copied again. Without tracking the placed pages count as differing from the
//! RAM file (`Ram::placed`), since plain pagemap shows them as a file's.
//!
//! If it fails half-way every page is still one of two right ones: the mapped file's, or the RAM file's, and whoever asks
//! must then write all pages there (`inject`), which is right over both.
//!
//! A file must stay as it is while it is mapped: one that shrinks kills the VMM (SIGBUS). Who hands it over sees to that.

use std::io;
use std::os::fd::OwnedFd;

use crate::memory::{Ram, Segment};
use crate::remote::{self, Call};
use crate::sys::{self, PAGE};

/// Files of one machine at a time.
pub const FILES: usize = 64;
/// Runs of one machine: each is a mapping, and cuts another in two. The kernel allows 65530.
pub const RUNS: usize = 16384;
/// Bytes of a run in a request: four u32, little endian.
pub const RUN_BYTES: usize = 16;

/// `count` pages of the memory from `first` on are those of file number `file` from its page `at` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub first: u32,
    pub count: u32,
    pub file: u32,
    pub at: u32,
}

/// Runs from their bytes.
pub fn parse_runs(raw: &[u8]) -> io::Result<Vec<Run>> {
    if !raw.len().is_multiple_of(RUN_BYTES) || raw.len() > RUNS * RUN_BYTES {
        return Err(bad("the list of runs has an odd size"));
    }
    let number = |word: &[u8]| u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
    let run = |raw: &[u8]| Run {
        first: number(raw),
        count: number(&raw[4..]),
        file: number(&raw[8..]),
        at: number(&raw[12..]),
    };
    Ok(raw.chunks_exact(RUN_BYTES).map(run).collect())
}

/// Map the runs over the memory. To be called before the guest runs and before its writes are tracked.
pub fn remap(ram: &mut Ram, files: &[OwnedFd], runs: &[Run]) -> io::Result<()> {
    check(runs, ram.pages, &sizes(files)?)?;
    let segments = ram.segments()?;
    if segments.iter().any(|segment| segment.shared) {
        return Err(bad("the memory is mapped shared"));
    }
    if runs.is_empty() {
        return Ok(());
    }
    let opened = remote::open_ours(ram.pid, files)?;
    let calls = map_calls(segments, runs, &opened);
    let mapped = remote::run_all(ram.pid, &calls);
    remote::close(ram.pid, &opened)?;
    for run in runs {
        ram.placed.add(run.first as usize, run.count as usize);
    }
    mapped
}

fn map_calls(segments: &[Segment], runs: &[Run], opened: &[u64]) -> Vec<Call> {
    let access = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let flags = (libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE) as u64;
    let mut calls = Vec::with_capacity(runs.len());
    for run in runs {
        for segment in segments {
            let first = (run.first as usize).max(segment.first_page);
            let end = (run.first + run.count) as usize;
            let end = end.min(segment.first_page + segment.pages);
            if first < end {
                let address = segment.address + ((first - segment.first_page) * PAGE) as u64;
                let offset = (run.at as usize + first - run.first as usize) * PAGE;
                let (number, length) = (libc::SYS_mmap as u64, ((end - first) * PAGE) as u64);
                let file = opened[run.file as usize];
                calls.push([number, address, length, access, flags, file, offset as u64]);
            }
        }
    }
    calls
}

/// Whole pages of each file.
fn sizes(files: &[OwnedFd]) -> io::Result<Vec<u64>> {
    files
        .iter()
        .map(|fd| sys::size(fd).map(|bytes| bytes / PAGE as u64))
        .collect()
}

/// Every run lies inside the memory and inside its file, and they ascend without touching each other's pages.
fn check(runs: &[Run], pages: usize, sizes: &[u64]) -> io::Result<()> {
    let mut end = 0u64;
    for run in runs {
        let size = sizes
            .get(run.file as usize)
            .ok_or_else(|| bad("a run names a file that did not come"))?;
        let (first, count) = (u64::from(run.first), u64::from(run.count));
        if first < end || count == 0 || first + count > pages as u64 {
            return Err(bad("runs are not ascending or not in the VM's memory"));
        }
        if u64::from(run.at) + count > *size {
            return Err(bad("a run is not in its file"));
        }
        end = first + count;
    }
    Ok(())
}

fn bad(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{content, Writer};
    use crate::track::{Faults, Tracker, Which};
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    fn go() -> io::Result<()> {
        Ok(())
    }

    /// A file of pages, each filled with its byte.
    fn pages(bytes: &[u8]) -> OwnedFd {
        let fd = sys::memfd("test", (bytes.len() * PAGE) as u64).unwrap();
        let file = File::from(fd.try_clone().unwrap());
        for (at, &byte) in bytes.iter().enumerate() {
            file.write_all_at(&[byte; PAGE], (at * PAGE) as u64)
                .unwrap();
        }
        fd
    }

    fn run(first: u32, count: u32, file: u32, at: u32) -> Run {
        Run {
            first,
            count,
            file,
            at,
        }
    }

    fn first_bytes(ram: &Ram, pages: std::ops::Range<u32>) -> Vec<u8> {
        let numbers: Vec<u32> = pages.collect();
        let mut buffer = crate::buffer::Buffer::new(numbers.len()).unwrap();
        ram.read_pages(&numbers, 0, &mut buffer, &go).unwrap();
        buffer.data().chunks(PAGE).map(|page| page[0]).collect()
    }

    #[test]
    fn runs_are_laid_over_the_memory_and_only_writes_count_from_then_on() {
        let (writer, mut ram) = Writer::start("remap", libc::MAP_PRIVATE);
        writer.write(5, 99); // touched at its start: goes with the old mapping
        let files = [pages(&[10, 11, 12, 13]), pages(&[20, 21])];
        let runs = [run(4, 2, 0, 1), run(6, 2, 1, 0), run(100, 1, 0, 3)];
        remap(&mut ram, &files, &runs).unwrap();
        assert_eq!(first_bytes(&ram, 3..9), [1, 11, 12, 20, 21, 1]);
        let mut tracker = Tracker::start(&ram, "snp_a", &[], Faults::Any).unwrap();
        let delta = tracker.capture(&ram, Which::Delta, None, &go).unwrap();
        assert_eq!(delta.pages(), 0);
        writer.write(6, 66);
        writer.write(200, 2);
        let delta = tracker.capture(&ram, Which::Delta, None, &go).unwrap();
        assert_eq!(content(delta.collect().unwrap()), [(6, 66), (200, 2)]);
        let all = tracker.capture(&ram, Which::All, None, &go).unwrap();
        let expect = [(4, 11), (5, 12), (6, 66), (7, 21), (100, 13), (200, 2)];
        assert_eq!(content(all.collect().unwrap()), expect);
        let mut kept = [0u8];
        let file = File::from(files[1].try_clone().unwrap());
        file.read_exact_at(&mut kept, 0).unwrap();
        assert_eq!(kept, [20]); // the machine's write is its own
    }

    #[test]
    fn without_tracking_placed_pages_are_in_every_capture() {
        let (writer, mut ram) = Writer::start("placed", libc::MAP_PRIVATE);
        remap(&mut ram, &[pages(&[7, 8])], &[run(30, 2, 0, 0)]).unwrap();
        writer.write(3, 3);
        writer.write(31, 9);
        let taken = ram.capture_private(None, &go).unwrap();
        assert_eq!(content(taken), [(3, 3), (30, 7), (31, 9)]);
    }

    #[test]
    fn nonsense_is_refused_before_anything_is_mapped() {
        let (_writer, mut ram) = Writer::start("refused", libc::MAP_PRIVATE);
        let files = [pages(&[1, 2])];
        for runs in [
            vec![run(0, 3, 0, 0)],
            vec![run(0, 1, 0, 2)],
            vec![run(0, 1, 1, 0)],
            vec![run(0, 0, 0, 0)],
            vec![run(255, 2, 0, 0)],
            vec![run(8, 1, 0, 0), run(8, 1, 0, 1)],
            vec![run(u32::MAX, u32::MAX, 0, u32::MAX)],
        ] {
            let error = remap(&mut ram, &files, &runs).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{runs:?}");
        }
        let private = ram.private_pages(ram.segments().unwrap()).unwrap();
        assert_eq!(private, Vec::<u32>::new());
        let (_writer, mut shared) = Writer::start("refused-shared", libc::MAP_SHARED);
        assert!(remap(&mut shared, &files, &[run(0, 1, 0, 0)]).is_err());
    }

    #[test]
    fn a_process_that_somebody_else_traces_keeps_its_memory() {
        let (writer, mut ram) = Writer::start("remap-traced", libc::MAP_PRIVATE);
        let tracer = crate::testing::Tracer::start(writer.pid);
        let error = remap(&mut ram, &[pages(&[9])], &[run(1, 1, 0, 0)]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        drop(tracer);
        assert_eq!(first_bytes(&ram, 0..2), [1, 1]);
        remap(&mut ram, &[pages(&[9])], &[run(1, 1, 0, 0)]).unwrap();
        assert_eq!(first_bytes(&ram, 0..2), [1, 9]);
    }

    #[test]
    fn runs_are_parsed_and_bounded() {
        let raw: Vec<u8> = [3u32, 2, 1, 9]
            .iter()
            .flat_map(|n| n.to_le_bytes())
            .collect();
        assert_eq!(parse_runs(&raw).unwrap(), [run(3, 2, 1, 9)]);
        assert!(parse_runs(&raw[1..]).is_err());
        assert!(parse_runs(&vec![0; (RUNS + 1) * RUN_BYTES]).is_err());
    }
}
