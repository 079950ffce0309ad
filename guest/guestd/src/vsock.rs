//! The channel where the machine has no virtio port: a vsock (Firecracker).
//!
//! No vsock connection survives a snapshot, but a listening socket does, and so does everything inside. So the channel is
//! cut in two, as in a process sandbox (sandbox.rs): a child, the holder, keeps one end of a socket pair for ever, which
//! to guestd is what a virtio port is to it; the host comes and goes by connecting to the holder's port.
//!
//! A vsock cannot be closed in one direction only, so the host's bytes come in pieces: a length (u32, little endian) and
//! that many bytes. Length 0 is the host's leave: everything before it was delivered, what the holder had in hand was
//! sent, and it closes. Guest to host the bytes are bare. The newest connection counts; an older one is closed. While
//! nobody is there the holder reads nothing, so guestd's output waits where it is.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use crate::fail::{Fail, Outcome};
use crate::sandbox::{put, take};
use crate::sys;

const PIECE: usize = 64 * 1024;
const BACKLOG: libc::c_int = 4;

/// Listen on this port, start the holder, and return guestd's end of the channel.
pub fn enter(port: u32) -> Outcome<OwnedFd> {
    let fail = |e: io::Error| Fail::io("vsock", &e);
    let door = listen(port).map_err(fail)?;
    let (ours, theirs) = UnixStream::pair().map_err(fail)?;
    // SAFETY: one thread; the child runs nothing but the holder's loop and never returns.
    match unsafe { libc::fork() } {
        -1 => Err(fail(io::Error::last_os_error())),
        0 => {
            drop(ours);
            hold(door.as_raw_fd(), theirs.as_raw_fd());
            std::process::exit(1)
        }
        _ => Ok(ours.into()),
    }
}

fn listen(port: u32) -> io::Result<OwnedFd> {
    // SAFETY: a sockaddr_vm is plain data; its length is given with it.
    unsafe {
        let door = sys::own(libc::socket(
            libc::AF_VSOCK,
            libc::SOCK_STREAM | libc::SOCK_CLOEXEC,
            0,
        ))?;
        let mut address: libc::sockaddr_vm = mem::zeroed();
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        address.svm_cid = libc::VMADDR_CID_ANY;
        address.svm_port = port;
        let size = mem::size_of_val(&address) as libc::socklen_t;
        sys::check(libc::bind(
            door.as_raw_fd(),
            (&raw const address).cast(),
            size,
        ))?;
        sys::check(libc::listen(door.as_raw_fd(), BACKLOG))?;
        Ok(door)
    }
}

/// What the host's bytes mean: how much of a length is known, how much of its piece is still to come.
#[derive(Default)]
struct Pieces {
    length: [u8; 4],
    known: usize,
    left: usize,
}

impl Pieces {
    /// Give all that is the guest's to `deliver`. Returns false at the host's leave, or when `deliver` does.
    fn feed(&mut self, mut data: &[u8], mut deliver: impl FnMut(&[u8]) -> bool) -> bool {
        while !data.is_empty() {
            if self.left > 0 {
                let (now, rest) = data.split_at(self.left.min(data.len()));
                if !deliver(now) {
                    return false;
                }
                self.left -= now.len();
                data = rest;
                continue;
            }
            self.length[self.known] = data[0];
            self.known += 1;
            data = &data[1..];
            if self.known == self.length.len() {
                self.known = 0;
                self.left = u32::from_le_bytes(self.length) as usize;
                if self.left == 0 {
                    return false;
                }
            }
        }
        true
    }
}

/// Join whoever connects to `door` with guestd's `port`. Returns when guestd is gone.
fn hold(door: RawFd, port: RawFd) {
    let mut piece = vec![0u8; PIECE];
    let mut host: Option<(OwnedFd, Pieces)> = None;
    loop {
        let at = host.as_ref().map_or(-1, |(fd, _)| fd.as_raw_fd());
        let wait = |fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut fds = [wait(door), wait(at), wait(if at < 0 { -1 } else { port })];
        // SAFETY: the array and its length belong together.
        if unsafe { libc::poll(fds.as_mut_ptr(), 3, -1) } < 0 {
            continue; // a signal; nothing else can be wrong with descriptors of ours
        }
        if fds[0].revents != 0 {
            if let Ok(fd) = accept(door) {
                host = Some((fd, Pieces::default()));
            }
        } else if fds[1].revents != 0 {
            let got = take(at, &mut piece);
            let stays = got > 0
                && host
                    .as_mut()
                    .is_some_and(|(_, pieces)| pieces.feed(&piece[..got], |data| put(port, data)));
            if !stays {
                host = None;
            }
        } else if fds[2].revents != 0 {
            let got = take(port, &mut piece);
            if got == 0 {
                return;
            }
            if !put(at, &piece[..got]) {
                host = None; // what it missed, it asks for anew after its next hello
            }
        }
    }
}

fn accept(door: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no address is asked for.
    unsafe {
        sys::own(libc::accept4(
            door,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            libc::SOCK_CLOEXEC,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;
    use std::thread;

    /// A holder behind a listening socket, as a thread: (the socket's path, guestd's end, the thread).
    fn holder(name: &str) -> (PathBuf, UnixStream, thread::JoinHandle<()>) {
        let path = std::env::temp_dir().join(format!("guestd-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let door = UnixListener::bind(&path).unwrap();
        let (guestd, port) = UnixStream::pair().unwrap();
        let holding = thread::spawn(move || hold(door.as_raw_fd(), port.as_raw_fd()));
        (path, guestd, holding)
    }

    fn send(host: &mut UnixStream, data: &[u8]) {
        host.write_all(&(data.len() as u32).to_le_bytes()).unwrap();
        host.write_all(data).unwrap();
    }

    #[test]
    fn nothing_is_lost_between_two_connections() {
        let (path, mut guestd, holding) = holder("rounds");
        let mut seen = Vec::new();
        for round in 0..3u8 {
            let mut host = UnixStream::connect(&path).unwrap();
            send(&mut host, &[round; 100]);
            let mut got = [0u8; 100];
            guestd.read_exact(&mut got).unwrap();
            assert_eq!(got, [round; 100]);
            guestd.write_all(&vec![round; 50_000]).unwrap();
            send(&mut host, &[7; 3]);
            send(&mut host, b"");
            host.read_to_end(&mut seen).unwrap();
            guestd.read_exact(&mut got[..3]).unwrap();
            assert_eq!(got[..3], [7; 3], "what came before the leave was delivered");
        }
        let mut host = UnixStream::connect(&path).unwrap();
        guestd.shutdown(std::net::Shutdown::Write).unwrap();
        holding.join().unwrap();
        let mut rest = Vec::new();
        host.set_read_timeout(Some(std::time::Duration::from_secs(10)))
            .unwrap();
        let _ = host.read_to_end(&mut rest); // the holder's end may close it with an error
        seen.extend(rest);
        let order: Vec<u8> = seen.chunk_by(|a, b| a == b).map(|run| run[0]).collect();
        assert_eq!(order, (0..order.len() as u8).collect::<Vec<_>>());
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn the_newest_connection_counts() {
        let (path, mut guestd, holding) = holder("newest");
        let mut old = UnixStream::connect(&path).unwrap();
        send(&mut old, b"old");
        let mut got = [0u8; 3];
        guestd.read_exact(&mut got).unwrap();
        let mut new = UnixStream::connect(&path).unwrap();
        send(&mut new, b"new");
        guestd.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"new");
        assert_eq!(old.read(&mut [0u8; 1]).unwrap(), 0, "the older is closed");
        drop(guestd);
        holding.join().unwrap();
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn pieces_may_come_cut_anywhere() {
        let mut stream = Vec::new();
        for text in [&b"one"[..], b"a longer one", b"x"] {
            stream.extend((text.len() as u32).to_le_bytes());
            stream.extend(text);
        }
        stream.extend([0u8; 4]);
        for step in 1..stream.len() {
            let (mut pieces, mut out) = (Pieces::default(), Vec::<u8>::new());
            let chunks = stream.chunks(step);
            let last = chunks.len() - 1;
            for (number, chunk) in chunks.enumerate() {
                let goes_on = pieces.feed(chunk, |data| {
                    out.extend(data);
                    true
                });
                assert_eq!(goes_on, number < last);
            }
            assert_eq!(out, b"onea longer onex");
        }
    }
}
