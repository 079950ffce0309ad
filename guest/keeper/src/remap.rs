//! Files mapped over parts of a VM's memory: the quickest way to bring large memory back when it lies here uncompressed.
//!
//! The kernel reads what is touched, and VMs that map one file share its pages. The files must not change or shrink as
//! long as a VM has them mapped; removing their names is fine.

use std::io;

use crate::memory::{bad, Ram};
use crate::remote;
use crate::sys::PAGE;

/// Map files over parts of the memory: for each four numbers the VMM's descriptor, the first page in that file, the
/// first page of the memory, and the count. Privately: what the guest writes stays its own.
pub fn remap(ram: &Ram, numbers: &[u32]) -> io::Result<()> {
    let mut calls = Vec::new();
    for run in numbers.chunks(4) {
        let [fd, from, first, count] = run else {
            return Err(bad("the list of mappings has an odd size"));
        };
        let (first, count) = (*first as usize, *count as usize);
        let segment = ram.segments()?.iter().find(|s| {
            s.first_page <= first && count > 0 && first + count <= s.first_page + s.pages
        });
        let segment = segment.ok_or_else(|| bad("a mapping is not in the VM's memory"))?;
        let address = segment.address + ((first - segment.first_page) * PAGE) as u64;
        let access = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE) as u64;
        let length = (count * PAGE) as u64;
        let offset = u64::from(*from) * PAGE as u64;
        let mmap = libc::SYS_mmap as u64;
        calls.push([mmap, address, length, access, flags, u64::from(*fd), offset]);
        calls.push([
            libc::SYS_madvise as u64,
            address,
            length,
            libc::MADV_DONTFORK as u64,
            0,
            0,
            0,
        ]);
    }
    let done = remote::system_calls(ram.pid, &calls)?;
    match done.iter().find(|&&result| result < 0 && result > -4096) {
        Some(error) => Err(io::Error::from_raw_os_error(-*error as i32)),
        None => Ok(()),
    }
}
