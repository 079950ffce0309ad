//! The VM's memory as pages by RAM offset: which ones were written, copies of them out, pages put in.
//!
//! RAM is one file. A fork maps it privately, so its written pages are the *private* ones: in `/proc/PID/pagemap`
//! present (bit 63) or swapped (bit 62) and not file-backed (bit 61 clear). A machine that was booted maps its own
//! file shared, and then every page that the file holds counts. Only this process, the VMM's parent, may read and
//! write that memory where Yama restricts ptrace: that is why the keeper does it and not the server.
//!
//! Nothing here knows of templates, layers or compression. Every loop looks at `Stop` between slices, so that a
//! deadline is kept even while gigabytes are moved.

use std::cell::OnceCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::bitmap::Bitmap;
use crate::buffer::{Buffer, INDEX};
pub use crate::segments::Segment;
use crate::segments::{find_segments, Wanted};
use crate::sys::{self, Mapping, Remote, Way, PAGE};

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE_BACKED: u64 = 1 << 61;
/// The kernel takes at most this many stretches a call.
const STRETCHES: usize = 1024;
/// Bytes moved between two looks at the deadline.
const SLICE: usize = 16 << 20;

/// Asked between slices; an error stops the work.
pub type Stop<'a> = &'a dyn Fn() -> io::Result<()>;

/// Where a VM's RAM is.
pub struct Ram {
    pub pid: libc::pid_t,
    path: PathBuf,
    device: u64,
    inode: u64,
    pub pages: usize,
    /// Found once: what is mapped there later (other files, over parts of it) does not move it.
    found: OnceCell<Vec<Segment>>,
    /// Pages that other files were mapped over (remap.rs): they differ from the RAM file without being private.
    pub placed: Bitmap,
}

impl Ram {
    /// `path` is the RAM file that `pid` was started on; its size is the memory's.
    pub fn new(pid: libc::pid_t, path: &Path) -> io::Result<Ram> {
        let about = std::fs::metadata(path)?;
        let pages = about.len() as usize / PAGE;
        Ok(Ram {
            pid,
            path: path.to_path_buf(),
            device: about.dev(),
            inode: about.ino(),
            pages,
            found: OnceCell::new(),
            placed: Bitmap::new(pages),
        })
    }

    pub fn file(&self) -> io::Result<File> {
        File::open(&self.path)
    }

    pub fn segments(&self) -> io::Result<&[Segment]> {
        if let Some(found) = self.found.get() {
            return Ok(found);
        }
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.pid))?;
        let wanted = Wanted {
            path: &self.path,
            device: self.device,
            inode: self.inode,
            pages: self.pages,
        };
        let found = find_segments(&maps, &wanted);
        if found.iter().map(|s| s.pages).sum::<usize>() < self.pages {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                "the VM has not mapped its memory",
            ));
        }
        Ok(self.found.get_or_init(|| found))
    }

    /// Pages that may differ from what the RAM file holds, ascending: private ones, and those that were placed.
    pub fn private_pages(&self, segments: &[Segment]) -> io::Result<Vec<u32>> {
        let mut all = self.placed.clone();
        for page in self.unshared_pages(segments)? {
            all.add(page as usize, 1);
        }
        Ok(all.members())
    }

    fn unshared_pages(&self, segments: &[Segment]) -> io::Result<Vec<u32>> {
        let pagemap = File::open(format!("/proc/{}/pagemap", self.pid))?;
        let mut out = Vec::new();
        let mut raw = vec![0u8; 32768 * 8];
        for segment in segments {
            let mut done = 0;
            while done < segment.pages {
                let count = (segment.pages - done).min(32768);
                let at = (segment.address / PAGE as u64 + done as u64) * 8;
                pagemap.read_exact_at(&mut raw[..count * 8], at)?;
                select_private(&raw[..count * 8], segment.first_page + done, &mut out);
                done += count;
            }
        }
        Ok(out)
    }

    /// Make the buffer of a capture that is about to come, while the VM still runs.
    pub fn prepare_private(&self) -> io::Result<Buffer> {
        let now = self.private_pages(self.segments()?)?.len();
        let mut buffer = Buffer::new(self.pages)?;
        // What is written between now and the pause is at most a fraction; more only costs page faults later.
        buffer.touch(0, now + now / 8 + 512);
        Ok(buffer)
    }

    /// Copy every private page. The VM must be stopped. Returns the buffer and the number of pages.
    pub fn capture_private(
        &self,
        ready: Option<Buffer>,
        stop: Stop,
    ) -> io::Result<(Buffer, usize)> {
        let segments = self.segments()?;
        let indices = self.private_pages(segments)?;
        let mut buffer = match ready {
            Some(buffer) => buffer,
            None => Buffer::new(self.pages)?,
        };
        self.read_pages(&indices, 0, &mut buffer, stop)?;
        buffer.finish(&indices)?;
        Ok((buffer, indices.len()))
    }

    /// Copy every page that the RAM file holds (zero pages too when asked): for memory that is mapped shared.
    pub fn capture_file(&self, keep_zero: bool, stop: Stop) -> io::Result<(Buffer, usize)> {
        let file = self.file()?;
        let candidates = file_pages(&file, self.pages)?;
        let source = Mapping::new(&OwnedFd::from(file), self.pages * PAGE, false)?;
        let mut buffer = Buffer::new(self.pages)?;
        let mut indices = Vec::with_capacity(candidates.len());
        for (count, &page) in candidates.iter().enumerate() {
            if count % (SLICE / PAGE) == 0 {
                stop()?;
            }
            let from = &source.bytes()[page as usize * PAGE..][..PAGE];
            if keep_zero || !is_zero(from) {
                buffer.page_mut(indices.len()).copy_from_slice(from);
                indices.push(page);
            }
        }
        buffer.finish(&indices)?;
        Ok((buffer, indices.len()))
    }

    /// Write `count` pages from `source` (laid out as a capture's buffer is) into the VM's memory.
    pub fn inject(&self, source: &OwnedFd, count: usize, stop: Stop) -> io::Result<()> {
        if count > self.pages {
            return Err(bad("more pages than the VM has"));
        }
        let file = File::from(source.try_clone()?);
        if file.metadata()?.len() < (count * (PAGE + INDEX)) as u64 {
            return Err(bad("the page file is too short"));
        }
        let mut raw = vec![0u8; count * INDEX];
        file.read_exact_at(&mut raw, (count * PAGE) as u64)?;
        let indices = parse_indices(&raw, self.pages)?;
        let segments = self.segments()?;
        // Read, not mapped: a file that shrinks under us is then an error and not a SIGBUS.
        let mut slice = vec![0u8; SLICE.min(count * PAGE)];
        for (turn, part) in indices.chunks(SLICE / PAGE).enumerate() {
            let bytes = part.len() * PAGE;
            file.read_exact_at(&mut slice[..bytes], (turn * SLICE) as u64)?;
            let pairs = part.iter().enumerate().map(|(slot, &page)| (page, slot));
            self.transfer(&Way::Write, segments, pairs, slice.as_mut_ptr(), stop)?;
        }
        Ok(())
    }

    /// Copy ascending pages of the VM to the slots from `first_slot` on.
    pub fn read_pages(
        &self,
        pages: &[u32],
        first_slot: usize,
        into: &mut Buffer,
        stop: Stop,
    ) -> io::Result<()> {
        let pairs = pages.iter().enumerate();
        self.read_pairs(pairs.map(|(at, &page)| (page, first_slot + at)), into, stop)
    }

    /// Copy pages of the VM (ascending) to slots of the buffer; every slot must be inside it.
    pub fn read_pairs(
        &self,
        pairs: impl Iterator<Item = (u32, usize)>,
        into: &mut Buffer,
        stop: Stop,
    ) -> io::Result<()> {
        let room = into.room();
        let checked = pairs.map(|(page, slot)| {
            assert!(slot < room, "slot {slot} of {room}");
            (page, slot)
        });
        self.transfer(
            &Way::Read,
            self.segments()?,
            checked,
            into.data().as_mut_ptr(),
            stop,
        )
    }

    /// The memory at `data` holds PAGE bytes for every slot that is named.
    fn transfer(
        &self,
        way: &Way,
        at: &[Segment],
        pairs: impl Iterator<Item = (u32, usize)>,
        data: *mut u8,
        stop: Stop,
    ) -> io::Result<()> {
        for batch in batches(&stretches(at, pairs)) {
            stop()?;
            // SAFETY: see above.
            let here: Vec<libc::iovec> = batch
                .iter()
                .map(|s| sys::local(unsafe { data.add(s.slot * PAGE) }, s.remote.bytes))
                .collect();
            let there: Vec<Remote> = batch.iter().map(|s| s.remote).collect();
            sys::process_vm(way, self.pid, &here, &there)?;
        }
        Ok(())
    }
}

fn bad(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

/// Page numbers from their bytes: ascending and inside the memory, or an error.
fn parse_indices(raw: &[u8], pages: usize) -> io::Result<Vec<u32>> {
    let mut out: Vec<u32> = Vec::with_capacity(raw.len() / INDEX);
    for word in raw.chunks_exact(INDEX) {
        let page = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
        if page as usize >= pages || out.last().is_some_and(|&last| last >= page) {
            return Err(bad(
                "page numbers are not ascending or not in the VM's memory",
            ));
        }
        out.push(page);
    }
    Ok(out)
}

fn select_private(raw: &[u8], first: usize, out: &mut Vec<u32>) {
    for (offset, word) in raw.chunks_exact(8).enumerate() {
        let entry = u64::from_ne_bytes([
            word[0], word[1], word[2], word[3], word[4], word[5], word[6], word[7],
        ]);
        if entry & (PRESENT | SWAPPED) != 0 && entry & FILE_BACKED == 0 {
            out.push((first + offset) as u32);
        }
    }
}

/// Pages that lie one after the other both in the VM and in the slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stretch {
    remote: Remote,
    slot: usize,
}

/// Ascending (page, slot) pairs as stretches.
fn stretches(segments: &[Segment], pairs: impl Iterator<Item = (u32, usize)>) -> Vec<Stretch> {
    let mut out: Vec<Stretch> = Vec::new();
    let mut segments = segments.iter().peekable();
    for (page, slot) in pairs {
        let page = page as usize;
        while segments
            .next_if(|s| page >= s.first_page + s.pages)
            .is_some()
        {}
        let Some(segment) = segments.peek() else {
            break;
        };
        let address = segment.address + ((page - segment.first_page) * PAGE) as u64;
        match out.last_mut() {
            Some(Stretch { remote, slot: from })
                if remote.address + remote.bytes as u64 == address
                    && *from + remote.bytes / PAGE == slot
                    && remote.bytes < SLICE =>
            {
                remote.bytes += PAGE
            }
            _ => out.push(Stretch {
                remote: Remote {
                    address,
                    bytes: PAGE,
                },
                slot,
            }),
        }
    }
    out
}

/// Cut into pieces that one system call takes and that end soon enough to look at the clock.
fn batches(stretches: &[Stretch]) -> Vec<&[Stretch]> {
    let mut out = Vec::new();
    let (mut from, mut bytes) = (0, 0);
    for (at, stretch) in stretches.iter().enumerate() {
        if at - from == STRETCHES || (at > from && bytes + stretch.remote.bytes > SLICE) {
            out.push(&stretches[from..at]);
            (from, bytes) = (at, 0);
        }
        bytes += stretch.remote.bytes;
    }
    if from < stretches.len() {
        out.push(&stretches[from..]);
    }
    out
}

/// Pages of a sparse file that hold data.
pub fn file_pages(file: &File, pages: usize) -> io::Result<Vec<u32>> {
    let mut out = Vec::new();
    let mut at: libc::off_t = 0;
    loop {
        // SAFETY: plain lseek; the file's offset is used by nobody else.
        let data = unsafe { libc::lseek(file.as_raw_fd(), at, libc::SEEK_DATA) };
        if data < 0 {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(libc::ENXIO) {
                Ok(out)
            } else {
                Err(error)
            };
        }
        let end = unsafe { libc::lseek(file.as_raw_fd(), data, libc::SEEK_HOLE) };
        sys::check(if end < 0 { -1 } else { 0 })?;
        let last = (end as usize).div_ceil(PAGE).min(pages);
        out.extend((data as usize / PAGE..last).map(|page| page as u32));
        at = end;
    }
}

fn is_zero(page: &[u8]) -> bool {
    // SAFETY: every bit pattern is a valid u64.
    let (head, words, tail) = unsafe { page.align_to::<u64>() };
    head.iter().all(|&b| b == 0) && tail.iter().all(|&b| b == 0) && words.iter().all(|&w| w == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_means_present_or_swapped_and_not_of_the_file() {
        let entries = [
            0,
            PRESENT,
            PRESENT | FILE_BACKED,
            SWAPPED,
            SWAPPED | FILE_BACKED,
        ];
        let raw: Vec<u8> = entries.iter().flat_map(|e: &u64| e.to_ne_bytes()).collect();
        let mut out = Vec::new();
        select_private(&raw, 10, &mut out);
        assert_eq!(out, vec![11, 13]);
    }

    fn stretch(address: u64, pages: usize, slot: usize) -> Stretch {
        Stretch {
            remote: Remote {
                address,
                bytes: pages * PAGE,
            },
            slot,
        }
    }

    #[test]
    fn runs_join_across_pages_but_not_across_segments() {
        let at = [
            Segment {
                address: 0x10000,
                first_page: 0,
                pages: 4,
                shared: false,
            },
            Segment {
                address: 0x90000,
                first_page: 4,
                pages: 4,
                shared: false,
            },
        ];
        let pages = [0, 1, 3, 4, 5];
        let pairs = pages.iter().enumerate().map(|(slot, &page)| (page, slot));
        let runs = stretches(&at, pairs);
        let expect = vec![
            stretch(0x10000, 2, 0),
            stretch(0x13000, 1, 2),
            stretch(0x90000, 2, 3),
        ];
        assert_eq!(runs, expect);
        let scattered = [(0, 5), (1, 6), (3, 0)];
        let expect = vec![stretch(0x10000, 2, 5), stretch(0x13000, 1, 0)];
        assert_eq!(stretches(&at, scattered.into_iter()), expect);
    }

    #[test]
    fn batches_respect_both_limits() {
        let many = vec![stretch(0, 1, 0); 2500];
        let sizes: Vec<usize> = batches(&many).iter().map(|b| b.len()).collect();
        assert_eq!(sizes, vec![1024, 1024, 452]);
        let large = vec![stretch(0, SLICE / PAGE, 0); 3];
        assert_eq!(batches(&large).len(), 3);
        assert!(batches(&[]).is_empty());
    }

    #[test]
    fn indices_are_checked() {
        let raw = |pages: &[u32]| {
            pages
                .iter()
                .flat_map(|p| p.to_le_bytes())
                .collect::<Vec<u8>>()
        };
        assert_eq!(parse_indices(&raw(&[1, 2, 9]), 10).unwrap(), vec![1, 2, 9]);
        assert!(parse_indices(&raw(&[1, 10]), 10).is_err());
        assert!(parse_indices(&raw(&[2, 2]), 10).is_err());
    }

    #[test]
    fn own_private_pages_round_trip() {
        let path = Path::new("/dev/shm").join(format!("keeper-ram-{}", std::process::id()));
        std::fs::write(&path, vec![1u8; 64 * PAGE]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let length = 64 * PAGE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let fd = file.as_raw_fd();
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                access,
                libc::MAP_PRIVATE,
                fd,
                0,
            )
        };
        assert_ne!(map, libc::MAP_FAILED);
        let memory = unsafe { std::slice::from_raw_parts_mut(map.cast::<u8>(), length) };
        memory[5 * PAGE] = 9;
        memory[6 * PAGE] = 8;
        memory[60 * PAGE] = 7;
        let ram = Ram::new(std::process::id() as i32, &path).unwrap();
        let ready = ram.prepare_private().unwrap();
        let (buffer, count) = ram.capture_private(Some(ready), &|| Ok(())).unwrap();
        assert_eq!(count, 3);
        assert_eq!(
            buffer
                .fd
                .try_clone()
                .map(File::from)
                .unwrap()
                .metadata()
                .unwrap()
                .len(),
            3 * 4100
        );
        memory[5 * PAGE] = 0;
        memory[60 * PAGE] = 0;
        ram.inject(&buffer.fd, 3, &|| Ok(())).unwrap();
        assert_eq!(
            (
                memory[5 * PAGE],
                memory[6 * PAGE],
                memory[60 * PAGE],
                memory[7 * PAGE]
            ),
            (9, 8, 7, 1)
        );
        assert!(ram.inject(&buffer.fd, 4, &|| Ok(())).is_err());
        assert!(ram.capture_private(None, &|| Err(bad("deadline"))).is_err());
        unsafe { libc::munmap(map, length) };
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn file_capture_leaves_zero_pages_out_unless_asked() {
        let path = Path::new("/dev/shm").join(format!("keeper-file-{}", std::process::id()));
        let file = File::create(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[3; PAGE], 10 * PAGE as u64).unwrap();
        file.write_all_at(&[0; PAGE], 20 * PAGE as u64).unwrap();
        let ram = Ram::new(std::process::id() as i32, &path).unwrap();
        assert_eq!(ram.capture_file(false, &|| Ok(())).unwrap().1, 1);
        assert_eq!(ram.capture_file(true, &|| Ok(())).unwrap().1, 2);
        std::fs::remove_file(&path).unwrap();
    }
}
