//! A userfaultfd of another process's memory, and the scan of that process's page tables.
//!
//! Source of numbers and meanings: linux/userfaultfd.h, linux/fs.h, Documentation/admin-guide/mm/{userfaultfd,pagemap}.rst.
//! Asynchronous write protection and `PAGEMAP_SCAN` came with Linux 6.7: on older kernels `open` is refused.
//!
//! Two traps. After a protection, empty places of the page tables hold markers that plain `/proc/PID/pagemap` shows as
//! swapped: only the scan may be believed from then on. And everything must be protected once right after it was
//! registered: without markers, absent pages in an existing page table count as written.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::remote;
use crate::sys;

const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_aa01;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

const API: u64 = 0xaa;
const WP_ASYNC: u64 = 1 << 15;
const WP_UNPOPULATED: u64 = 1 << 13;
const WP_SHMEM: u64 = 1 << 12;
const MINOR_SHMEM: u64 = 1 << 10;
const MISSING_SHMEM: u64 = 1 << 5;
const USER_MODE_ONLY: u64 = 1;

/// Modes of a registration. Writes are noted.
pub const WRITES: u64 = 2;
/// And absent pages wait until somebody puts them there, also where the mapped file has some.
pub const ABSENT: u64 = 1 | 4 | WRITES;

const WRITTEN: u64 = 2;
const PROTECT_MATCHING: u64 = 1;
const CHECK_ASYNC: u64 = 2;
/// Ranges per call of the scan: 96 KiB.
const RANGES: usize = 4096;

/// A userfaultfd that belongs to another process's memory.
pub struct Uffd {
    pub fd: OwnedFd,
    /// It also catches faults that the kernel takes on the process's behalf (needs rights); else writes are tracked
    /// all the same, but nothing may be made missing.
    pub kernel_faults: bool,
}

impl Uffd {
    /// Have process `pid` create one, and take it. The process keeps its own descriptor: should we lose ours, a
    /// missing page makes it wait, and never reads as zeros.
    pub fn open(pid: libc::pid_t, user_only: bool) -> io::Result<Uffd> {
        let create = |flags: u64| -> remote::Call {
            let flags = flags | (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
            [libc::SYS_userfaultfd as u64, flags, 0, 0, 0, 0, 0]
        };
        let mut kernel_faults = !user_only;
        let mut got = -i64::from(libc::EPERM);
        if kernel_faults {
            got = remote::system_calls(pid, &[create(0)])?[0];
        }
        if got == -i64::from(libc::EPERM) {
            kernel_faults = false;
            got = remote::system_calls(pid, &[create(USER_MODE_ONLY)])?[0];
        }
        let number = libc::c_int::try_from(got).unwrap_or(-1);
        if number < 0 {
            return Err(io::Error::from_raw_os_error(-got as i32));
        }
        let pidfd = sys::pidfd_open(pid)?;
        // SAFETY: no pointers; the descriptor that comes back is ours alone.
        let fd = unsafe {
            let ret = libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0);
            OwnedFd::from_raw_fd(sys::check(ret as libc::c_int)?)
        };
        let mut features = WP_ASYNC | WP_UNPOPULATED | WP_SHMEM;
        if kernel_faults {
            features |= MISSING_SHMEM | MINOR_SHMEM;
        }
        ioctl(&fd, UFFDIO_API, &mut [API, features, 0]).map_err(|error| {
            match error.raw_os_error() {
                Some(libc::EINVAL) => {
                    io::Error::other("the kernel cannot track writes (Linux 6.7 or newer can)")
                }
                _ => error,
            }
        })?;
        Ok(Uffd { fd, kernel_faults })
    }

    pub fn register(&self, address: u64, bytes: u64, modes: u64) -> io::Result<()> {
        ioctl(&self.fd, UFFDIO_REGISTER, &mut [address, bytes, modes, 0])
    }

    /// Take it back: nothing is noted, protected or absent there any more.
    pub fn unregister(&self, address: u64, bytes: u64) -> io::Result<()> {
        ioctl(&self.fd, UFFDIO_UNREGISTER, &mut [address, bytes])
    }

    pub fn protect(&self, address: u64, bytes: u64) -> io::Result<()> {
        ioctl(&self.fd, UFFDIO_WRITEPROTECT, &mut [address, bytes, 1])
    }
}

fn ioctl(fd: &impl AsRawFd, number: libc::c_ulong, argument: &mut [u64]) -> io::Result<()> {
    // SAFETY: each caller's array is exactly the structure that the request takes.
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), number as _, argument.as_mut_ptr()) };
    sys::check(ret).map(|_| ())
}

/// Hand every range of pages written since it was last protected to `found` (address, bytes), and protect it again:
/// one atomic step per page, so a write is reported by this scan or by the next, never by none. Ranges ascend, and no
/// page is in two of them.
pub fn scan_written(
    pagemap: &File,
    address: u64,
    bytes: u64,
    mut found: impl FnMut(u64, u64),
) -> io::Result<()> {
    let mut ranges = vec![[0u64; 3]; RANGES];
    let end = address + bytes;
    let mut at = address;
    while at < end {
        let flags = PROTECT_MATCHING | CHECK_ASYNC;
        let mut argument = [
            96,
            flags,
            at,
            end,
            0,
            ranges.as_mut_ptr() as u64,
            RANGES as u64,
            0,
            0,
            WRITTEN,
            0,
            WRITTEN,
        ];
        // SAFETY: the argument is a complete pm_scan_arg, and its vector has room for RANGES ranges.
        let ret = unsafe {
            libc::ioctl(
                pagemap.as_raw_fd(),
                PAGEMAP_SCAN as _,
                argument.as_mut_ptr(),
            )
        };
        let count = match sys::check(ret) {
            Ok(count) => count as usize,
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                return Err(io::Error::other(
                    "the kernel cannot scan page tables (Linux 6.7 or newer can)",
                ))
            }
            Err(error) => return Err(error),
        };
        for range in &ranges[..count.min(RANGES)] {
            found(range[0], range[1] - range[0]);
        }
        // The kernel goes through many ranges in several walks, and tells where the last but one has ended (seen on
        // 6.18): beginning there again would name pages twice that were written in between.
        let named = ranges[..count.min(RANGES)]
            .last()
            .map_or(0, |range| range[1]);
        let reached = argument[4].max(named);
        if reached <= at {
            return Err(io::Error::other("the scan of the page tables made no way"));
        }
        at = reached;
    }
    Ok(())
}
