//! guestd in a process sandbox (gVisor): no virtio port, no kernel of its own to seed or set the clock of.
//!
//! A sandbox has no channel to the host that survives a checkpoint; what does survive is everything inside. So the
//! channel is cut in two. A child, the holder, keeps one end of a socket pair for ever, the other is guestd's port; to
//! guestd it is what a virtio port is to it in a VM. The host comes and goes through `guestd --relay`, started in the
//! sandbox by the runtime, which joins its standard input and output to the holder's socket.
//!
//! Nothing is lost when a relay goes in order: at the end of its input it says so to the holder, the holder sends what
//! it still has in hand and closes, and the relay ends once all that is written out. While nobody is there the holder
//! reads nothing, so guestd's output waits where it is.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use crate::fail::{Fail, Outcome};
use crate::sys;

const RUN: &str = "/run/recess";
const OWN: &str = "/run/recess/guestd";
const DOOR: &str = "/run/recess/host.sock";
const DOOR_WAIT_MS: u64 = 10_000;
const PIECE: usize = 64 * 1024;

/// Move guestd itself into the sandbox's memory (its file on the host may be another at the next restore), start the
/// holder, and return guestd's end of the channel.
pub fn enter() -> Outcome<OwnedFd> {
    settle().map_err(|e| Fail::io("moving into the sandbox", &e))?;
    small_proc().map_err(|e| Fail::io("/proc", &e))?;
    let fail = |e: io::Error| Fail::io("host.sock", &e);
    let _ = fs::remove_file(DOOR); // bind tells if an old one could not be removed
    let door = UnixListener::bind(DOOR).map_err(fail)?;
    fs::set_permissions(DOOR, PermissionsExt::from_mode(0o600)).map_err(fail)?;
    let (ours, theirs) = UnixStream::pair().map_err(fail)?;
    // SAFETY: one thread; the child runs nothing but the holder's loop and never returns.
    match unsafe { libc::fork() } {
        -1 => Err(fail(io::Error::last_os_error())),
        0 => {
            drop(ours);
            hold(&door, &theirs);
            std::process::exit(1)
        }
        _ => Ok(ours.into()),
    }
}

fn settle() -> io::Result<()> {
    if fs::read_link("/proc/self/exe").is_ok_and(|p| p == Path::new(OWN)) {
        return Ok(());
    }
    fs::create_dir_all(RUN)?;
    fs::copy("/proc/self/exe", OWN)?;
    fs::set_permissions(OWN, PermissionsExt::from_mode(0o755))?;
    use std::os::unix::process::CommandExt;
    Err(std::process::Command::new(OWN)
        .args(std::env::args_os().skip(1))
        .exec())
}

/// Mount /proc anew with a short memory. gVisor keeps the folders of processes that have ended, 80 KB each, up to a
/// thousand by default; all of them would be in every snapshot, and lengthen its standstill (a hundred commands: 1.3 s
/// instead of 0.2).
fn small_proc() -> io::Result<()> {
    let hard = libc::MS_NOSUID | libc::MS_NOEXEC | libc::MS_NODEV;
    sys::mount("proc", "/proc", "proc", hard, "dentry_cache_limit=16")
}

/// One relay after the other, the newest first in line once the former has ended. Returns when guestd is gone.
fn hold(door: &UnixListener, port: &UnixStream) {
    while let Ok((relay, _)) = door.accept() {
        if !join(relay.as_raw_fd(), relay.as_raw_fd(), port.as_raw_fd(), true) {
            return;
        }
    }
}

/// The relay's whole life: standard input and output against the holder.
pub fn relay() -> Outcome<()> {
    let door = reach(DOOR).map_err(|e| Fail::io(DOOR, &e))?;
    join(0, 1, door.as_raw_fd(), false);
    Ok(())
}

/// Connect; a sandbox that has just been started may not have its door yet.
fn reach(path: &str) -> io::Result<UnixStream> {
    let until = sys::monotonic_ms() + DOOR_WAIT_MS;
    loop {
        match UnixStream::connect(path) {
            Err(e) if early(&e) && sys::monotonic_ms() < until => {
                std::thread::sleep(std::time::Duration::from_millis(2)); // bounded; a file that appears is no event
            }
            result => return result,
        }
    }
}

fn early(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

/// Copy host -> guest and guest -> host until the host's side has ended. As the holder (`keeps`) the guest's side stays:
/// the end of the host's input ends the join. As the relay that end is passed on, and the join ends when the guest's side
/// has closed in answer. Returns whether the guest's side is still there.
fn join(host_in: RawFd, host_out: RawFd, guest: RawFd, keeps: bool) -> bool {
    let mut piece = vec![0u8; PIECE];
    let mut host_open = true;
    loop {
        let mut fds = [
            libc::pollfd {
                fd: if host_open { host_in } else { -1 },
                events: libc::POLLIN,
                revents: 0,
            },
            libc::pollfd {
                fd: guest,
                events: libc::POLLIN,
                revents: 0,
            },
        ];
        // SAFETY: the array and its length belong together.
        let n = unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
        if n < 0 {
            continue; // a signal; nothing else can be wrong with two descriptors of ours
        }
        if fds[0].revents != 0 {
            let got = take(host_in, &mut piece);
            if got == 0 || !put(guest, &piece[..got]) {
                if keeps {
                    return true;
                }
                host_open = false;
                // SAFETY: plain call on an open descriptor.
                unsafe { libc::shutdown(guest, libc::SHUT_WR) };
            }
        } else if fds[1].revents != 0 {
            let got = take(guest, &mut piece);
            if got == 0 {
                return false;
            }
            if !put(host_out, &piece[..got]) {
                return keeps; // the host is gone without a word: what it missed, it asks for anew after its next hello
            }
        }
    }
}

/// Read once; 0 at the end and on any error. Waits on a descriptor that does not.
pub fn take(fd: RawFd, piece: &mut [u8]) -> usize {
    loop {
        match sys::read(fd, piece) {
            Err(e) if sys::would_block(&e) => wait_for(fd, libc::POLLIN),
            result => return result.unwrap_or(0),
        }
    }
}

/// Write all of it; false when the other side is gone. Waits on a descriptor that does not: a relay's standard output is
/// such a one, since gVisor makes the host's file non-blocking for the input and then takes that for a wish of the output.
pub fn put(fd: RawFd, mut data: &[u8]) -> bool {
    while !data.is_empty() {
        match sys::write(fd, data) {
            Ok(n) => data = &data[n..],
            Err(e) if sys::would_block(&e) => wait_for(fd, libc::POLLOUT),
            Err(_) => return false,
        }
    }
    true
}

/// Return when the descriptor is ready, or has ended or failed, which the next call on it tells.
fn wait_for(fd: RawFd, events: libc::c_short) {
    let mut one = libc::pollfd {
        fd,
        events,
        revents: 0,
    };
    // SAFETY: one valid entry.
    unsafe { libc::poll(&raw mut one, 1, -1) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::Shutdown;
    use std::thread;

    /// A holder with a relay before it, as threads: returns (host's end, the two threads).
    fn chain(
        port: UnixStream,
    ) -> (
        UnixStream,
        thread::JoinHandle<bool>,
        thread::JoinHandle<bool>,
    ) {
        let (host, relay_io) = UnixStream::pair().unwrap();
        let (relay, held) = UnixStream::pair().unwrap();
        let holder =
            thread::spawn(move || join(held.as_raw_fd(), held.as_raw_fd(), port.as_raw_fd(), true));
        let relaying = thread::spawn(move || {
            let io = relay_io.as_raw_fd();
            join(io, io, relay.as_raw_fd(), false)
        });
        (host, holder, relaying)
    }

    #[test]
    fn nothing_is_lost_between_two_relays() {
        let (mut guestd, port) = UnixStream::pair().unwrap();
        let mut seen = Vec::new();
        for round in 0..3u8 {
            let (mut host, holder, relaying) = chain(port.try_clone().unwrap());
            host.write_all(&[round; 100]).unwrap();
            let mut got = [0u8; 100];
            guestd.read_exact(&mut got).unwrap();
            assert_eq!(got, [round; 100]);
            guestd.write_all(&vec![round; 50_000]).unwrap();
            host.shutdown(Shutdown::Write).unwrap();
            let mut rest = Vec::new();
            host.read_to_end(&mut rest).unwrap();
            assert!(holder.join().unwrap(), "guestd is still there");
            relaying.join().unwrap();
            seen.extend(rest);
        }
        // What no relay took waited in the socket.
        guestd.shutdown(Shutdown::Write).unwrap();
        let mut port = port;
        port.read_to_end(&mut seen).unwrap();
        let wanted: Vec<u8> = (0..3u8).flat_map(|round| vec![round; 50_000]).collect();
        assert_eq!(seen, wanted);
    }

    #[test]
    fn a_host_that_reads_late_misses_nothing() {
        let (mut guestd, port) = UnixStream::pair().unwrap();
        let (host, relay_io) = UnixStream::pair().unwrap();
        relay_io.set_nonblocking(true).unwrap(); // as gVisor does
        let (relay, held) = UnixStream::pair().unwrap();
        let holder =
            thread::spawn(move || join(held.as_raw_fd(), held.as_raw_fd(), port.as_raw_fd(), true));
        let relaying = thread::spawn(move || {
            let io = relay_io.as_raw_fd();
            join(io, io, relay.as_raw_fd(), false)
        });
        let all = vec![7u8; 4 << 20]; // more than all buffers on the way
        let writing = thread::spawn(move || guestd.write_all(&all).map(|()| guestd));
        let mut got = vec![0u8; 4 << 20];
        (&host).read_exact(&mut got).unwrap();
        assert!(got.iter().all(|byte| *byte == 7));
        let guestd = writing.join().unwrap().unwrap();
        host.shutdown(Shutdown::Write).unwrap();
        assert!(holder.join().unwrap());
        relaying.join().unwrap();
        drop(guestd);
    }

    #[test]
    fn the_end_of_guestd_ends_the_chain() {
        let (guestd, port) = UnixStream::pair().unwrap();
        let (mut host, holder, relaying) = chain(port);
        drop(guestd);
        assert!(!holder.join().unwrap());
        relaying.join().unwrap();
        assert_eq!(host.read(&mut [0u8; 1]).unwrap(), 0);
    }
}
