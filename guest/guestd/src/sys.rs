//! Thin, checked wrappers over the system calls that std has no words for. Nothing here decides anything.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Turn a -1 return into the error in errno.
pub fn check(ret: libc::c_int) -> io::Result<libc::c_int> {
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(ret)
    }
}

pub fn cstr(s: impl AsRef<[u8]>) -> io::Result<CString> {
    CString::new(s.as_ref()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Own a descriptor that a system call just returned.
pub fn own(fd: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: the callers pass the fresh result of a call that opens a descriptor; nobody else owns it.
    check(fd).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What a network interface is configured by: a socket that carries no data, and a request that names the interface.
pub fn interface(name: &str) -> io::Result<(OwnedFd, libc::ifreq)> {
    // SAFETY: a plain call.
    let socket =
        own(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: an ifreq is plain data, and all-zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero: a name ends with one.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok((socket, request))
}

pub fn read(fd: RawFd, buf: &mut [u8]) -> io::Result<usize> {
    loop {
        // SAFETY: the buffer is valid for its length.
        let n = unsafe { libc::read(fd, buf.as_mut_ptr().cast(), buf.len()) };
        if n >= 0 {
            return Ok(n as usize);
        }
        let e = io::Error::last_os_error();
        if e.raw_os_error() != Some(libc::EINTR) {
            return Err(e);
        }
    }
}

/// Write once; sockets whose peer is gone give EPIPE (SIGPIPE is ignored in guestd).
pub fn write(fd: RawFd, buf: &[u8]) -> io::Result<usize> {
    loop {
        // SAFETY: the buffer is valid for its length.
        let n = unsafe { libc::write(fd, buf.as_ptr().cast(), buf.len()) };
        if n >= 0 {
            return Ok(n as usize);
        }
        let e = io::Error::last_os_error();
        if e.raw_os_error() != Some(libc::EINTR) {
            return Err(e);
        }
    }
}

pub fn would_block(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::WouldBlock
}

pub fn set_nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: plain fcntl on a descriptor.
    unsafe {
        let flags = check(libc::fcntl(fd, libc::F_GETFL))?;
        check(libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK))?;
        check(libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC))?;
    }
    Ok(())
}

/// A pipe, both ends close-on-exec: (read, write).
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: the array has room for two descriptors.
    check(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) })?;
    Ok((own(fds[0])?, own(fds[1])?))
}

/// A pseudo terminal: (master, slave), both close-on-exec.
pub fn open_pty(rows: u16, cols: u16) -> io::Result<(OwnedFd, OwnedFd)> {
    // SAFETY: plain calls on descriptors that are owned as soon as they exist.
    unsafe {
        let master = own(libc::posix_openpt(
            libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC,
        ))?;
        check(libc::unlockpt(master.as_raw_fd()))?;
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        let slave = match own(libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags)) {
            // gVisor lacks the call; there the name is as good, for nobody mounts another /dev/pts over it.
            Err(e) if e.raw_os_error() == Some(libc::ENOTTY) => pty_by_name(&master, flags)?,
            other => other?,
        };
        set_winsize(master.as_raw_fd(), rows, cols)?;
        Ok((master, slave))
    }
}

/// The slave of a pseudo terminal, opened by its path.
fn pty_by_name(master: &OwnedFd, flags: i32) -> io::Result<OwnedFd> {
    let mut number: libc::c_uint = 0;
    // SAFETY: the number outlives the call.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTN, &mut number) })?;
    let path = format!("/dev/pts/{number}\0");
    // SAFETY: the path ends in NUL; the descriptor is owned at once.
    own(unsafe { libc::open(path.as_ptr().cast(), flags) })
}

pub fn set_winsize(fd: RawFd, rows: u16, cols: u16) -> io::Result<()> {
    let ws = libc::winsize {
        ws_row: rows,
        ws_col: cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the struct outlives the call.
    check(unsafe { libc::ioctl(fd, libc::TIOCSWINSZ, &ws) }).map(drop)
}

/// Wait until the descriptor shows one of `events`; Ok(false) when the time is over. `timeout_ms` < 0: no limit.
pub fn poll_one(fd: RawFd, events: i16, timeout_ms: i32) -> io::Result<bool> {
    let mut p = libc::pollfd {
        fd,
        events,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    match check(unsafe { libc::poll(&mut p, 1, timeout_ms) }) {
        Ok(n) => Ok(n > 0),
        Err(e) if e.raw_os_error() == Some(libc::EINTR) => Ok(false),
        Err(e) => Err(e),
    }
}

/// CLOCK_MONOTONIC in milliseconds.
pub fn monotonic_ms() -> u64 {
    let mut ts = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the struct outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut ts) };
    ts.tv_sec as u64 * 1000 + ts.tv_nsec as u64 / 1_000_000
}

pub fn mount(src: &str, dst: &str, kind: &str, flags: libc::c_ulong, data: &str) -> io::Result<()> {
    let (s, d, k, o) = (cstr(src)?, cstr(dst)?, cstr(kind)?, cstr(data)?);
    // SAFETY: all strings outlive the call.
    check(unsafe { libc::mount(s.as_ptr(), d.as_ptr(), k.as_ptr(), flags, o.as_ptr().cast()) })
        .map(drop)
}

/// Whether a path lies in a file system whose files the kernel makes up: their sizes say nothing.
pub fn made_up(path: &std::path::Path) -> io::Result<bool> {
    use std::os::unix::ffi::OsStrExt;
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: statfs is plain data and valid when zeroed; the string and the struct outlive the call.
    let kind = unsafe {
        let mut about: libc::statfs = std::mem::zeroed();
        check(libc::statfs(path.as_ptr(), &mut about))?;
        about.f_type as i64
    };
    const PROC: i64 = 0x9fa0;
    const SYSFS: i64 = 0x6265_6572;
    const CGROUP2: i64 = 0x6367_7270;
    Ok([PROC, SYSFS, CGROUP2].contains(&kind))
}

pub fn unmount(path: &str) -> io::Result<()> {
    let path = cstr(path)?;
    // SAFETY: the string outlives the call.
    check(unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) }).map(drop)
}

/// Send a signal to a process group. Never to everybody (-1) or to our own group (0).
pub fn kill_group(pgid: i32, signal: i32) -> io::Result<()> {
    if pgid <= 1 {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: plain call.
    check(unsafe { libc::kill(-pgid, signal) }).map(drop)
}

/// Give a child between fork and exec the signals every program expects: none blocked, none ignored. guestd blocks
/// those it reads from its signalfd, and masks survive exec.
pub fn reset_signals() -> io::Result<()> {
    // SAFETY: the set is initialised before use; plain calls.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        check(libc::sigprocmask(
            libc::SIG_SETMASK,
            &none,
            std::ptr::null_mut(),
        ))?;
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
    Ok(())
}

pub fn is_root() -> bool {
    // SAFETY: always succeeds.
    unsafe { libc::geteuid() == 0 }
}

/// Run before every ordinary process and kernel thread (or like them again); children never inherit it.
pub fn set_first(first: bool) -> io::Result<()> {
    let policy = if first {
        libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK
    } else {
        libc::SCHED_OTHER
    };
    let param = libc::sched_param {
        sched_priority: i32::from(first),
    };
    // SAFETY: the struct outlives the call.
    check(unsafe { libc::sched_setscheduler(0, policy, &param) }).map(drop)
}

/// Epoll with 64-bit tokens.
pub struct Poller {
    fd: OwnedFd,
}

impl Poller {
    pub fn new() -> io::Result<Self> {
        // SAFETY: plain call.
        Ok(Poller {
            fd: own(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?,
        })
    }

    fn ctl(&self, op: libc::c_int, fd: RawFd, mask: u32, token: u64) -> io::Result<()> {
        let mut ev = libc::epoll_event {
            events: mask,
            u64: token,
        };
        // SAFETY: the struct outlives the call.
        check(unsafe { libc::epoll_ctl(self.fd.as_raw_fd(), op, fd, &mut ev) }).map(drop)
    }

    pub fn wait(&self, events: &mut [libc::epoll_event], timeout_ms: i32) -> io::Result<usize> {
        // SAFETY: the slice is valid for its length.
        let n = unsafe {
            libc::epoll_wait(
                self.fd.as_raw_fd(),
                events.as_mut_ptr(),
                events.len() as libc::c_int,
                timeout_ms,
            )
        };
        match check(n) {
            Ok(n) => Ok(n as usize),
            Err(e) if e.raw_os_error() == Some(libc::EINTR) => Ok(0),
            Err(e) => Err(e),
        }
    }
}

/// A descriptor with the interest it is registered for. Mask 0 means: not registered, so that a hang-up on a
/// descriptor nobody wants to hear of does not spin the loop.
pub struct Watched {
    pub fd: OwnedFd,
    mask: u32,
}

impl Watched {
    pub fn new(fd: OwnedFd) -> Self {
        Watched { fd, mask: 0 }
    }

    pub fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Set the interest; costs a system call only when it changes. Dropping the descriptor ends it.
    pub fn want(&mut self, poller: &Poller, token: u64, mask: u32) -> io::Result<()> {
        if mask == self.mask {
            return Ok(());
        }
        let op = match (self.mask, mask) {
            (0, _) => libc::EPOLL_CTL_ADD,
            (_, 0) => libc::EPOLL_CTL_DEL,
            _ => libc::EPOLL_CTL_MOD,
        };
        poller.ctl(op, self.raw(), mask, token)?;
        self.mask = mask;
        Ok(())
    }
}

pub const IN: u32 = libc::EPOLLIN as u32;
pub const OUT: u32 = libc::EPOLLOUT as u32;
pub const EDGE: u32 = libc::EPOLLET as u32;

/// Keep up to a MiB of freed heap, and serve what is smaller from it: giving memory back and faulting it in again is
/// the longest thing guestd would do when a machine wakes.
pub fn keep_heap() {
    // SAFETY: plain calls, before anything is allocated by a second thread (there is none).
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 20);
    }
}
