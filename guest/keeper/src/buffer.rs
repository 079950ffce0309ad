//! Where captured pages go: a nameless file that is handed over when the capture is done.
//!
//! Layout of the file: page data from 0 (page of slot s at s * 4096), then the page numbers (u32 little endian). It is
//! as large as the VM's memory from the start, and sparse: room costs nothing until it is touched, and it is touched
//! before the pause, so that the pause pays no page faults.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::sys::{self, Mapping, PAGE};

/// Bytes of a page number.
pub const INDEX: usize = 4;

pub struct Buffer {
    pub fd: OwnedFd,
    map: Mapping,
    room: usize,
}

impl Buffer {
    /// `room`: how many pages it can take, and their numbers.
    pub fn new(room: usize) -> io::Result<Buffer> {
        let bytes = room * (PAGE + INDEX);
        let fd = sys::memfd("recess-pages", bytes as u64)?;
        let map = Mapping::new(&fd, bytes, true)?;
        Ok(Buffer { fd, map, room })
    }

    pub fn room(&self) -> usize {
        self.room
    }

    pub fn data(&mut self) -> &mut [u8] {
        let end = self.room * PAGE;
        &mut self.map.bytes_mut()[..end]
    }

    pub fn page_mut(&mut self, slot: usize) -> &mut [u8] {
        &mut self.data()[slot * PAGE..][..PAGE]
    }

    /// Have memory behind `count` slots from `first` on. Only a matter of speed: errors are found when it is used.
    pub fn touch(&mut self, first: usize, count: usize) {
        let end = first.saturating_add(count).min(self.room);
        if first < end {
            sys::populate(&mut self.data()[first * PAGE..end * PAGE]);
        }
    }

    /// Put the pages of slots in the order of their numbers: those of `sorted` are in the first slots and ascend,
    /// those of `more` come behind them in any order, and none is in both. Returns all numbers, ascending.
    pub fn sort(&mut self, sorted: &[u32], more: &[u32]) -> Vec<u32> {
        let mut order: Vec<usize> = (0..more.len()).collect();
        order.sort_unstable_by_key(|&at| more[at]);
        let behind = sorted.len();
        let data = self.data();
        let aside: Vec<u8> = order
            .iter()
            .flat_map(|at| &data[(behind + at) * PAGE..][..PAGE])
            .copied()
            .collect();
        let mut out = vec![0; sorted.len() + more.len()];
        // From the end backwards: a block of the first kind moves up by the pages that come before it.
        let mut left = sorted.len();
        for (before, &at) in order.iter().enumerate().rev() {
            let number = more[at];
            let from = sorted[..left].partition_point(|&page| page < number);
            let target = from + before + 1;
            data.copy_within(from * PAGE..left * PAGE, target * PAGE);
            out[target..target + left - from].copy_from_slice(&sorted[from..left]);
            data[(target - 1) * PAGE..][..PAGE].copy_from_slice(&aside[before * PAGE..][..PAGE]);
            out[target - 1] = number;
            left = from;
        }
        out[..left].copy_from_slice(&sorted[..left]);
        out
    }

    /// Let the file go: from now on nobody can change or cut it, so it may be mapped over a VM's memory.
    pub fn seal(self) -> io::Result<OwnedFd> {
        let Buffer { fd, map, .. } = self;
        drop(map); // the kernel refuses while somebody could write
        let seals =
            libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE | libc::F_SEAL_SEAL;
        // SAFETY: plain fcntl on a descriptor that we own.
        sys::check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) })?;
        Ok(fd)
    }

    /// Put the page numbers behind the data of as many slots, and cut the file to size.
    pub fn finish(&mut self, numbers: &[u32]) -> io::Result<()> {
        let at = numbers.len() * PAGE;
        for (place, page) in self.map.bytes_mut()[at..]
            .chunks_exact_mut(INDEX)
            .zip(numbers)
        {
            place.copy_from_slice(&page.to_le_bytes());
        }
        let size = at + numbers.len() * INDEX;
        // SAFETY: plain ftruncate; nothing beyond `size` is touched through the mapping after this.
        sys::check(unsafe { libc::ftruncate(self.fd.as_raw_fd(), size as libc::off_t) }).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    fn filled(numbers: &[u32]) -> Buffer {
        let mut buffer = Buffer::new(16).unwrap();
        for (slot, number) in numbers.iter().enumerate() {
            buffer.page_mut(slot).fill(*number as u8);
        }
        buffer
    }

    #[test]
    fn pages_are_put_in_order() {
        let cases: [(&[u32], &[u32]); 6] = [
            (&[2, 4, 6], &[5, 1, 9, 3]),
            (&[2, 4, 6], &[]),
            (&[], &[7, 3, 5]),
            (&[5, 6, 7, 8], &[1]),
            (&[1], &[9, 8, 7]),
            (&[], &[]),
        ];
        for (sorted, more) in cases {
            let mut buffer = filled(&[sorted, more].concat());
            let mut expect = [sorted, more].concat();
            expect.sort_unstable();
            assert_eq!(buffer.sort(sorted, more), expect);
            for (slot, number) in expect.iter().enumerate() {
                assert!(buffer.page_mut(slot).iter().all(|&b| b == *number as u8));
            }
        }
    }

    #[test]
    fn a_finished_file_holds_pages_and_numbers() {
        use std::io::Read;
        let mut buffer = filled(&[3, 9]);
        buffer.touch(0, 99);
        buffer.finish(&[3, 9]).unwrap();
        let mut all = Vec::new();
        let mut file = File::from(buffer.fd.try_clone().unwrap());
        file.read_to_end(&mut all).unwrap();
        assert_eq!(all.len(), 2 * 4100);
        assert_eq!(all[8192..], [3, 0, 0, 0, 9, 0, 0, 0]);
        assert_eq!((all[0], all[4096]), (3, 9));
        let sealed = File::from(buffer.seal().unwrap());
        assert!(sealed.write_at(&[1], 0).is_err());
        assert!(sealed.set_len(0).is_err());
    }
}
