//! Sockets: the doors the workload knocks at, connections the host dials, hosts that connect in process mode.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;

use crate::fail::{Fail, Outcome};
use crate::frame;
use crate::json::{obj, Value};
use crate::server::Server;
use crate::streams::{End, Stream};
use crate::sys::{self, Watched};

const BACKLOG: i32 = 128;
/// Doors that the host asks for, at most.
const MAX_SOCKETS: usize = 16;
/// The room for a path, with the zero at its end (unix(7)).
const SUN_PATH: usize = 108;

/// A listening socket whose connections become streams to the host.
pub struct Listener {
    pub w: Watched,
    service: &'static str,
    unix: bool,
    /// Where a door is that the host asked for.
    path: Option<String>,
}

impl Server {
    /// Open the two doors for the workload. Connections wait in the backlog until a host listens.
    pub fn open_doors(&mut self) -> Outcome<()> {
        if let Some(port) = self.opts.proxy_port {
            let listener = TcpListener::bind(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
            let listener = listener.map_err(|e| Fail::io("proxy port", &e))?;
            self.proxy_port = listener.local_addr().ok().map(|a| a.port());
            self.listen_at(listener.into(), "proxy", false, None)?;
        }
        if let Some(run) = &self.opts.run_dir {
            let fail = |e: std::io::Error| Fail::io("session.sock", &e);
            std::fs::create_dir_all(run).map_err(fail)?;
            let path = run.join("session.sock");
            let _ = std::fs::remove_file(&path); // an earlier run's; bind tells if it could not be removed
            let listener = bind_for_all(&path)?;
            self.listen_at(listener.into(), "session", true, None)?;
        }
        Ok(())
    }

    /// Open a door at this path, anybody's in the machine; one that is there already is opened anew, so that a call may be
    /// repeated after a boot that lost it, or after its file was removed.
    pub fn open_socket(&mut self, path: &Path) -> Outcome<()> {
        let name = path.to_string_lossy().into_owned();
        check_length(path)?;
        let known = |l: &Listener| l.path.as_ref() == Some(&name);
        let asked = self.listeners.iter().filter(|l| l.path.is_some());
        if asked.count() >= MAX_SOCKETS && !self.listeners.iter().any(known) {
            return Err(Fail::bad(format!("over {MAX_SOCKETS} sockets are open")));
        }
        let fail = |e: std::io::Error| Fail::io(&name, &e);
        match std::fs::symlink_metadata(path) {
            Ok(meta) if meta.file_type().is_socket() => std::fs::remove_file(path).map_err(fail)?,
            Ok(_) => return Err(Fail::bad(format!("{name} is there and is no socket"))),
            Err(_) => {}
        }
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(fail)?;
        }
        let listener = bind_for_all(path)?;
        self.listen_at(listener.into(), "socket", true, Some(name))
    }

    fn listen_at(
        &mut self,
        fd: OwnedFd,
        service: &'static str,
        unix: bool,
        path: Option<String>,
    ) -> Outcome<()> {
        // SAFETY: plain call; raises the backlog that std set.
        sys::check(unsafe { libc::listen(fd.as_raw_fd(), BACKLOG) })
            .map_err(|e| Fail::io(service, &e))?;
        sys::set_nonblocking(fd.as_raw_fd()).map_err(|e| Fail::io(service, &e))?;
        let listener = Listener {
            w: Watched::new(fd),
            service,
            unix,
            path,
        };
        // In its place: events are told by the number in this list.
        let same = |l: &&mut Listener| l.path.is_some() && l.path == listener.path;
        match self.listeners.iter_mut().find(same) {
            Some(old) => *old = listener,
            None => self.listeners.push(listener),
        }
        Ok(())
    }

    pub fn on_accept_host(&mut self) {
        let Some(acceptor) = &self.acceptor else {
            return;
        };
        // SAFETY: no address is asked for.
        let fd = unsafe {
            libc::accept4(
                acceptor.raw(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                libc::SOCK_CLOEXEC,
            )
        };
        if let Ok(fd) = sys::own(fd) {
            if self.set_port(fd).is_err() {
                self.conn.port = None;
            }
        }
    }

    pub fn on_accept(&mut self, index: usize) {
        let Some(l) = self.listeners.get(index) else {
            return;
        };
        let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: no address is asked for.
        let fd =
            unsafe { libc::accept4(l.w.raw(), std::ptr::null_mut(), std::ptr::null_mut(), flags) };
        let Ok(fd) = sys::own(fd) else { return };
        let meta = if l.unix {
            peer(&fd, l.path.as_deref())
        } else {
            obj([])
        };
        let body = obj([("service", l.service.into()), ("meta", meta)]);
        let id = self.next_open;
        self.next_open = self.next_open.checked_add(2).unwrap_or(2);
        self.streams.insert(
            id,
            Stream::new(End::Socket {
                w: Watched::new(fd),
                dialing: None,
                incoming: true,
            }),
        );
        self.conn.frame(frame::OPEN, 0, id, body.text().as_bytes());
    }
}

/// How a connection attempt ended.
pub fn socket_error(fd: i32) -> Outcome<()> {
    let mut code: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: pointer and length describe the int.
    unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_ERROR,
            (&raw mut code).cast(),
            &mut len,
        )
    };
    if code == 0 {
        Ok(())
    } else {
        Err(Fail::io("dial", &std::io::Error::from_raw_os_error(code)))
    }
}

fn check_length(path: &Path) -> Outcome<()> {
    if path.as_os_str().len() >= SUN_PATH {
        return Err(Fail::bad("the path is too long for a socket"));
    }
    Ok(())
}

/// A listener at this path that every user of the machine may connect to.
fn bind_for_all(path: &Path) -> Outcome<UnixListener> {
    let fail = |e: std::io::Error| Fail::io(&path.to_string_lossy(), &e);
    let listener = UnixListener::bind(path).map_err(fail)?;
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o666)).map_err(fail)?;
    Ok(listener)
}

/// Who connected to the unix socket, and to which one of those that the host asked for.
fn peer(fd: &OwnedFd, path: Option<&str>) -> Value {
    let mut cred = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: pointer and length describe the struct.
    unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut cred).cast(),
            &mut len,
        )
    };
    let pid = ("pid", i64::from(cred.pid).into());
    let uid = ("uid", i64::from(cred.uid).into());
    match path {
        None => obj([pid, uid]),
        Some(path) => obj([pid, uid, ("path", path.into())]),
    }
}

/// A unix socket connected to this path. Never waits: a listener whose backlog is full is as good as none.
pub fn dial_unix(path: &Path) -> Outcome<OwnedFd> {
    let fail = |e: std::io::Error| Fail::io(&format!("dial {}", path.display()), &e);
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    check_length(path)?;
    // SAFETY: the address struct is zeroed, filled within its bounds and outlives the call.
    unsafe {
        let mut sa: libc::sockaddr_un = std::mem::zeroed();
        let name = path.as_os_str().as_bytes();
        for (to, from) in sa.sun_path.iter_mut().zip(name) {
            *to = *from as libc::c_char;
        }
        sa.sun_family = libc::AF_UNIX as u16;
        let fd = sys::own(libc::socket(libc::AF_UNIX, kind, 0)).map_err(fail)?;
        sys::check(libc::connect(
            fd.as_raw_fd(),
            (&raw const sa).cast(),
            size_of_val(&sa) as u32,
        ))
        .map_err(fail)?;
        Ok(fd)
    }
}

/// A stream socket of this family, non-blocking, on its way to the address.
pub fn dial(addr: SocketAddr) -> Outcome<OwnedFd> {
    let fail = |e: std::io::Error| Fail::io(&format!("dial {addr}"), &e);
    let family = if addr.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: address structs are filled fully and outlive the calls.
    unsafe {
        let fd = sys::own(libc::socket(family, kind, 0)).map_err(fail)?;
        let ret = match addr {
            SocketAddr::V4(a) => {
                let mut sa: libc::sockaddr_in = std::mem::zeroed();
                sa.sin_family = libc::AF_INET as u16;
                sa.sin_port = a.port().to_be();
                sa.sin_addr.s_addr = u32::from_ne_bytes(a.ip().octets());
                libc::connect(
                    fd.as_raw_fd(),
                    (&raw const sa).cast(),
                    size_of_val(&sa) as u32,
                )
            }
            SocketAddr::V6(a) => {
                let mut sa: libc::sockaddr_in6 = std::mem::zeroed();
                sa.sin6_family = libc::AF_INET6 as u16;
                sa.sin6_port = a.port().to_be();
                sa.sin6_addr.s6_addr = a.ip().octets();
                libc::connect(
                    fd.as_raw_fd(),
                    (&raw const sa).cast(),
                    size_of_val(&sa) as u32,
                )
            }
        };
        match sys::check(ret) {
            Err(e) if e.raw_os_error() != Some(libc::EINPROGRESS) => Err(fail(e)),
            _ => Ok(fd),
        }
    }
}

/// Take a descriptor number that the parent left open for us.
pub fn inherit(fd: i32) -> Outcome<OwnedFd> {
    // SAFETY: only queries; ownership is taken below once it is known to be open.
    sys::check(unsafe { libc::fcntl(fd, libc::F_GETFD) })
        .map_err(|e| Fail::io("--serve-fd", &e))?;
    // SAFETY: the number was given to us by the parent for this purpose and is used once.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
