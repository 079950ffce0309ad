//! What several modules' tests need: a process whose memory is looked at from outside.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::buffer::Buffer;
use crate::memory::Ram;
use crate::sys::PAGE;

pub const PAGES: usize = 256;

/// A child with a private mapping of a file, which writes the pages it is told to.
pub struct Writer {
    pub pid: libc::pid_t,
    order: OwnedFd,
    done: OwnedFd,
    path: PathBuf,
}

impl Writer {
    pub fn start(name: &str, flags: libc::c_int) -> (Writer, Ram) {
        let path =
            Path::new("/dev/shm").join(format!("keeper-track-{name}-{}", std::process::id()));
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        file.set_len((PAGES * PAGE) as u64).unwrap();
        file.write_all_at(&[1; 16 * PAGE], 0).unwrap();
        let (order_read, order) = crate::sys::pipe().unwrap();
        let (done, done_write) = crate::sys::pipe().unwrap();
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the child makes system calls and writes to its own mapping, nothing else.
        let pid = unsafe {
            let map = libc::mmap(
                std::ptr::null_mut(),
                PAGES * PAGE,
                access,
                flags,
                file.as_raw_fd(),
                0,
            );
            assert_ne!(map, libc::MAP_FAILED);
            let pid = libc::fork();
            if pid == 0 {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                keep_only(order_read.as_raw_fd(), done_write.as_raw_fd());
                libc::write(done_write.as_raw_fd(), [0u8].as_ptr().cast(), 1);
                let mut told = [0u8; 2];
                while libc::read(order_read.as_raw_fd(), told.as_mut_ptr().cast(), 2) == 2 {
                    *map.cast::<u8>().add(told[0] as usize * PAGE) = told[1];
                    libc::write(done_write.as_raw_fd(), told.as_ptr().cast(), 1);
                }
                libc::_exit(0);
            }
            libc::munmap(map, PAGES * PAGE);
            let mut ready = [0u8];
            assert_eq!(
                libc::read(done.as_raw_fd(), ready.as_mut_ptr().cast(), 1),
                1
            );
            pid
        };
        let ram = Ram::new(pid, &path).unwrap();
        let writer = Writer {
            pid,
            order,
            done,
            path,
        };
        (writer, ram)
    }

    pub fn write(&self, page: u8, value: u8) {
        let mut back = [0u8];
        // SAFETY: buffers are valid for their lengths.
        unsafe {
            let order = [page, value];
            assert_eq!(
                libc::write(self.order.as_raw_fd(), order.as_ptr().cast(), 2),
                2
            );
            assert_eq!(
                libc::read(self.done.as_raw_fd(), back.as_mut_ptr().cast(), 1),
                1
            );
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // SAFETY: our own child.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
        }
        std::fs::remove_file(&self.path).unwrap();
    }
}

/// A child that writes every other page of a private mapping, over and over, as fast as it can.
pub struct Restless {
    pub pid: libc::pid_t,
    path: PathBuf,
}

impl Restless {
    pub fn start(name: &str, pages: usize) -> (Restless, Ram) {
        let path = Path::new("/dev/shm").join(format!("keeper-{name}-{}", std::process::id()));
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        file.set_len((pages * PAGE) as u64).unwrap();
        let (ready, ready_write) = crate::sys::pipe().unwrap();
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the child writes to its own mapping, nothing else.
        let pid = unsafe {
            let flags = libc::MAP_PRIVATE;
            let none = std::ptr::null_mut();
            let map = libc::mmap(none, pages * PAGE, access, flags, file.as_raw_fd(), 0);
            assert_ne!(map, libc::MAP_FAILED);
            let pid = libc::fork();
            if pid == 0 {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                keep_only(ready_write.as_raw_fd(), ready_write.as_raw_fd());
                libc::write(ready_write.as_raw_fd(), [0u8].as_ptr().cast(), 1);
                loop {
                    for page in (0..pages).step_by(2) {
                        map.cast::<u8>().add(page * PAGE).write_volatile(1);
                    }
                }
            }
            libc::munmap(map, pages * PAGE);
            let mut told = [0u8];
            libc::read(ready.as_raw_fd(), told.as_mut_ptr().cast(), 1);
            pid
        };
        let ram = Ram::new(pid, &path).unwrap();
        (Restless { pid, path }, ram)
    }
}

impl Drop for Restless {
    fn drop(&mut self) {
        // SAFETY: our own child.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
        }
        std::fs::remove_file(&self.path).unwrap();
    }
}

/// A forked child must not hold the pipes of tests that run beside this one.
pub unsafe fn keep_only(one: libc::c_int, other: libc::c_int) {
    for fd in 3..256 {
        if fd != one && fd != other {
            libc::close(fd);
        }
    }
}

/// Page numbers and first bytes of a finished capture.
pub fn content((buffer, count): (Buffer, usize)) -> Vec<(u32, u8)> {
    let file = File::from(buffer.fd.try_clone().unwrap());
    let byte = |at: usize| {
        let mut one = [0u8];
        file.read_exact_at(&mut one, at as u64).unwrap();
        one[0]
    };
    let number = |slot: usize| {
        let at = count * PAGE + slot * 4;
        u32::from_le_bytes([byte(at), byte(at + 1), byte(at + 2), byte(at + 3)])
    };
    (0..count)
        .map(|slot| (number(slot), byte(slot * PAGE)))
        .collect()
}

/// A process that traces another, so that nobody else can.
pub struct Tracer(libc::pid_t);

impl Tracer {
    pub fn start(pid: libc::pid_t) -> Tracer {
        let (tell, told) = crate::sys::pipe().unwrap();
        // SAFETY: the tracer makes system calls only.
        let tracer = unsafe {
            let tracer = libc::fork();
            if tracer == 0 {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                keep_only(told.as_raw_fd(), told.as_raw_fd());
                let ret = libc::ptrace(libc::PTRACE_SEIZE, pid, 0usize, 0usize);
                libc::write(told.as_raw_fd(), [ret as u8].as_ptr().cast(), 1);
                libc::pause();
            }
            tracer
        };
        let mut seized = [9u8];
        // SAFETY: the buffer is valid.
        unsafe { libc::read(tell.as_raw_fd(), seized.as_mut_ptr().cast(), 1) };
        assert_eq!(seized, [0]);
        Tracer(tracer)
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // SAFETY: our own child.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), 0);
        }
    }
}
