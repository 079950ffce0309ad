//! Thin, checked wrappers over the system calls that the keeper needs. They know nothing of what they are used for.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

pub const PAGE: usize = 4096;

/// Turn a -1 into the error in `errno`.
pub fn check(ret: libc::c_int) -> io::Result<libc::c_int> {
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(ret)
    }
}

fn check_len(ret: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(ret).map_err(|_| io::Error::last_os_error())
}

fn own(ret: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: the kernel just gave us this descriptor and nobody else knows it.
    check(ret).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A path or argument as C wants it; an inner NUL is an error, never a truncation.
pub fn cstring(text: &str) -> io::Result<CString> {
    CString::new(text)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "NUL byte in an argument"))
}

/// A pipe, both ends close-on-exec: (read end, write end).
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: `fds` has room for the two descriptors, which are ours alone.
    unsafe {
        check(libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC))?;
        Ok((OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])))
    }
}

/// Standard input under another number, not blocking.
pub fn take_stdin() -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the descriptor that comes back is ours alone.
    let fd = own(unsafe { libc::fcntl(0, libc::F_DUPFD_CLOEXEC, 3) })?;
    set_nonblocking(&fd)?;
    Ok(fd)
}

pub fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: plain fcntl on a descriptor we own.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) }).map(|_| ())
}

/// Read once; `Ok(None)` when nothing is there yet, `Ok(Some(0))` at the end.
pub fn read_now(fd: &OwnedFd, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    // SAFETY: the buffer is valid for its length.
    let got = unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
    match check_len(got) {
        Ok(count) => Ok(Some(count)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
        Err(error) => Err(error),
    }
}

/// Listen on a unix socket at a short (relative) path; an old socket there is replaced. Mode 0600 by umask.
pub fn listen_unix(path: &str, kind: libc::c_int, flags: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: all-zero is a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    if path.len() >= address.sun_path.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "socket path is too long",
        ));
    }
    for (to, from) in address.sun_path.iter_mut().zip(path.bytes()) {
        *to = from as libc::c_char;
    }
    let _ = std::fs::remove_file(path);
    let socket = own(unsafe { libc::socket(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC | flags, 0) })?;
    let size = std::mem::size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: address is a complete sockaddr_un of `size` bytes.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) })?;
    check(unsafe { libc::listen(socket.as_raw_fd(), 8) })?;
    Ok(socket)
}

pub fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: null address is allowed: the peer's name is of no interest.
    own(unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            flags,
        )
    })
}

/// The user at the other end of a unix socket.
pub fn peer_uid(socket: &OwnedFd) -> io::Result<u32> {
    // SAFETY: all-zero is a valid ucred, and the length says how much may be written.
    let mut who: libc::ucred = unsafe { std::mem::zeroed() };
    let mut size = std::mem::size_of::<libc::ucred>() as libc::socklen_t;
    check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut who).cast(),
            &raw mut size,
        )
    })?;
    Ok(who.uid)
}

/// Control-message space for a few descriptors, aligned as the kernel wants it.
#[repr(C, align(8))]
struct Control([u8; 64]);

/// Receive one message and at most one descriptor; further ones are closed. `None`: nothing there. Length 0: hung up.
pub fn receive(
    socket: &OwnedFd,
    buffer: &mut [u8],
) -> io::Result<Option<(usize, Option<OwnedFd>)>> {
    let mut control = Control([0; 64]);
    let mut iov = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: msghdr points at buffers that outlive the call; descriptors found are owned at once.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut iov;
        message.msg_iovlen = 1;
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = control.0.len();
        let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
        let count = match check_len(libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags)) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut passed = Vec::new();
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*header).cmsg_len - libc::CMSG_LEN(0) as usize;
                for slot in 0..bytes / std::mem::size_of::<RawFd>() {
                    let fd = libc::CMSG_DATA(header)
                        .cast::<RawFd>()
                        .add(slot)
                        .read_unaligned();
                    passed.push(OwnedFd::from_raw_fd(fd));
                }
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
        passed.truncate(1);
        Ok(Some((count, passed.pop())))
    }
}

/// Send one message, with a descriptor if there is one. Never blocks: a full socket is an error.
pub fn send(socket: &OwnedFd, text: &[u8], fd: Option<&OwnedFd>) -> io::Result<()> {
    let mut control = Control([0; 64]);
    let mut iov = libc::iovec {
        iov_base: text.as_ptr().cast_mut().cast(),
        iov_len: text.len(),
    };
    // SAFETY: as in `receive`; the kernel only reads.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut iov;
        message.msg_iovlen = 1;
        if let Some(fd) = fd {
            let size = std::mem::size_of::<RawFd>() as libc::c_uint;
            message.msg_control = control.0.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(size) as usize;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(size) as usize;
            libc::CMSG_DATA(header)
                .cast::<RawFd>()
                .write_unaligned(fd.as_raw_fd());
        }
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        check_len(libc::sendmsg(socket.as_raw_fd(), &raw const message, flags)).map(|_| ())
    }
}

/// The path of an open folder, as it is now.
pub fn path_of(folder: &OwnedFd) -> io::Result<PathBuf> {
    let path = std::fs::read_link(format!("/proc/self/fd/{}", folder.as_raw_fd()))?;
    if path.is_dir() {
        Ok(path)
    } else {
        Err(io::Error::from_raw_os_error(libc::ENOTDIR))
    }
}

pub fn pidfd_open(pid: libc::pid_t) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let ret = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    own(ret as libc::c_int)
}

/// Whether the process of this pidfd has ended.
pub fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut one = libc::pollfd {
        fd: pidfd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid entry.
    unsafe { libc::poll(&raw mut one, 1, 0) > 0 }
}

/// Nanoseconds of CLOCK_BOOTTIME: monotonic, and it goes on while the host sleeps, as a lease does.
pub fn boottime_ns() -> u64 {
    clock_ns(libc::CLOCK_BOOTTIME)
}

pub fn clock_ns(clock: libc::clockid_t) -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a valid timespec; these clocks always exist.
    unsafe { libc::clock_gettime(clock, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// A timer on CLOCK_BOOTTIME, disarmed.
pub fn timer() -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    own(unsafe {
        libc::timerfd_create(libc::CLOCK_BOOTTIME, libc::TFD_CLOEXEC | libc::TFD_NONBLOCK)
    })
}

/// Arm a timer at an absolute time in nanoseconds; 0 disarms it.
pub fn timer_set(timer: &OwnedFd, at_ns: u64) -> io::Result<()> {
    let zero = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let at = libc::timespec {
        tv_sec: (at_ns / 1_000_000_000) as libc::time_t,
        tv_nsec: (at_ns % 1_000_000_000) as libc::c_long,
    };
    let setting = libc::itimerspec {
        it_interval: zero,
        it_value: at,
    };
    // SAFETY: the setting is valid; no old value is asked for.
    check(unsafe {
        libc::timerfd_settime(
            timer.as_raw_fd(),
            libc::TFD_TIMER_ABSTIME,
            &raw const setting,
            std::ptr::null_mut(),
        )
    })
    .map(|_| ())
}

/// A descriptor that becomes readable on SIGTERM (which is blocked from now on).
pub fn sigterm_fd() -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised before use.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        check(libc::sigprocmask(
            libc::SIG_BLOCK,
            &raw const set,
            std::ptr::null_mut(),
        ))?;
        own(libc::signalfd(
            -1,
            &raw const set,
            libc::SFD_CLOEXEC | libc::SFD_NONBLOCK,
        ))
    }
}

/// Unlinked memory as a file.
pub fn memfd(name: &str, bytes: u64) -> io::Result<OwnedFd> {
    let name = cstring(name)?;
    // SAFETY: name is NUL-terminated.
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    let fd = own(unsafe { libc::memfd_create(name.as_ptr(), flags) })?;
    check(unsafe { libc::ftruncate(fd.as_raw_fd(), bytes as libc::off_t) })?;
    Ok(fd)
}

/// Bytes of a file.
pub fn size(fd: &OwnedFd) -> io::Result<u64> {
    // SAFETY: all-zero is a valid stat, and it is ours.
    let mut about: libc::stat = unsafe { std::mem::zeroed() };
    check(unsafe { libc::fstat(fd.as_raw_fd(), &raw mut about) })?;
    Ok(about.st_size as u64)
}

/// A shared mapping of a file, unmapped when dropped.
pub struct Mapping {
    address: *mut u8,
    length: usize,
}

impl Mapping {
    /// Map `length` bytes from the start.
    pub fn new(fd: &OwnedFd, length: usize, write: bool) -> io::Result<Mapping> {
        if length == 0 {
            return Ok(Mapping {
                address: std::ptr::null_mut(),
                length: 0,
            });
        }
        let access = if write {
            libc::PROT_READ | libc::PROT_WRITE
        } else {
            libc::PROT_READ
        };
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let got = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                access,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if got == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping {
            address: got.cast(),
            length,
        })
    }

    pub fn bytes(&self) -> &[u8] {
        if self.length == 0 {
            return &[];
        }
        // SAFETY: the mapping is live; files mapped here are ours and are not truncated while mapped.
        unsafe { std::slice::from_raw_parts(self.address, self.length) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        if self.length == 0 {
            return &mut [];
        }
        // SAFETY: as above, and mapped for writing by the callers that use this.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.length) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.length > 0 {
            // SAFETY: exactly what was mapped.
            unsafe { libc::munmap(self.address.cast(), self.length) };
        }
    }
}

/// Have memory behind these pages now rather than at first use. A kernel before 5.14 cannot: then they are written to.
pub fn populate(pages: &mut [u8]) {
    // SAFETY: the slice is mapped; populating changes no byte of it.
    let ret = unsafe {
        libc::madvise(
            pages.as_mut_ptr().cast(),
            pages.len(),
            libc::MADV_POPULATE_WRITE,
        )
    };
    if ret < 0 {
        for page in pages.chunks_mut(PAGE) {
            page[0] = std::hint::black_box(page[0]);
        }
    }
}

/// One stretch of another process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote {
    pub address: u64,
    pub bytes: usize,
}

pub enum Way {
    Read,
    Write,
}

/// One stretch of our own memory, for `process_vm`.
pub fn local(address: *mut u8, bytes: usize) -> libc::iovec {
    libc::iovec {
        iov_base: address.cast(),
        iov_len: bytes,
    }
}

/// Copy between our stretches and those (at most 1024 each) of process `pid`; anything short of all is an error.
/// The callers own what the local stretches name.
pub fn process_vm(
    way: &Way,
    pid: libc::pid_t,
    here: &[libc::iovec],
    stretches: &[Remote],
) -> io::Result<()> {
    let total: usize = stretches.iter().map(|s| s.bytes).sum();
    let there: Vec<libc::iovec> = stretches
        .iter()
        .map(|s| local(s.address as *mut u8, s.bytes))
        .collect();
    let (ours, theirs) = (here.len() as libc::c_ulong, there.len() as libc::c_ulong);
    // SAFETY: local memory is the callers'; remote addresses are checked by the kernel.
    let moved = unsafe {
        match way {
            Way::Read => {
                libc::process_vm_readv(pid, here.as_ptr(), ours, there.as_ptr(), theirs, 0)
            }
            Way::Write => {
                libc::process_vm_writev(pid, here.as_ptr(), ours, there.as_ptr(), theirs, 0)
            }
        }
    };
    if check_len(moved)? == total {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "memory of the VM was only partly reachable",
        ))
    }
}

/// Start time of a process in clock ticks since boot: with the pid it names a process for ever.
pub fn start_time(pid: libc::pid_t) -> io::Result<u64> {
    let text = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"))?;
    parse_start_time(&text)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "odd /proc/PID/stat"))
}

fn parse_start_time(stat: &str) -> Option<u64> {
    // The command name may hold spaces and brackets: fields count from the last closing one.
    stat.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(19)?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_time_survives_odd_names() {
        let fields: Vec<String> = (3..=30).map(|n| n.to_string()).collect();
        let stat = format!("77 (a) b (c)) {}", fields.join(" "));
        assert_eq!(parse_start_time(&stat), Some(22));
        assert_eq!(parse_start_time("nonsense"), None);
    }

    #[test]
    fn messages_carry_one_descriptor() {
        let mut fds = [0; 2];
        check(unsafe {
            libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0, fds.as_mut_ptr())
        })
        .unwrap();
        let (a, b) = unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) };
        let file = memfd("test", 4096).unwrap();
        let mut buffer = [0; 64];
        assert!(receive(&b, &mut buffer).unwrap().is_none());
        send(&a, b"hello", Some(&file)).unwrap();
        let (count, fd) = receive(&b, &mut buffer).unwrap().unwrap();
        assert_eq!(&buffer[..count], b"hello");
        assert!(Mapping::new(&fd.unwrap(), 4096, true).is_ok());
        drop(a);
        assert_eq!(receive(&b, &mut buffer).unwrap().unwrap().0, 0);
    }

    #[test]
    fn own_memory_can_be_copied() {
        let page = vec![7u8; PAGE];
        let mut out = vec![0u8; PAGE];
        let from = Remote {
            address: page.as_ptr() as u64,
            bytes: PAGE,
        };
        process_vm(
            &Way::Read,
            std::process::id() as i32,
            &[local(out.as_mut_ptr(), PAGE)],
            &[from],
        )
        .unwrap();
        assert_eq!(page, out);
    }
}
