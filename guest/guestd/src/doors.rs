//! Sockets: the two doors the workload knocks at, connections the host dials, hosts that connect in process mode.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use crate::fail::{Fail, Outcome};
use crate::frame;
use crate::json::{obj, Value};
use crate::server::Server;
use crate::streams::{End, Stream};
use crate::sys::{self, Watched};

const BACKLOG: i32 = 128;

/// A listening socket whose connections become streams to the host.
pub struct Listener {
    pub w: Watched,
    service: &'static str,
    unix: bool,
}

impl Server {
    /// Open the two doors for the workload. Connections wait in the backlog until a host listens.
    pub fn open_doors(&mut self) -> Outcome<()> {
        if let Some(port) = self.opts.proxy_port {
            let listener = TcpListener::bind(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
            let listener = listener.map_err(|e| Fail::io("proxy port", &e))?;
            self.proxy_port = listener.local_addr().ok().map(|a| a.port());
            self.add_listener(listener.into(), "proxy", false)?;
        }
        if let Some(run) = &self.opts.run_dir {
            let fail = |e: std::io::Error| Fail::io("session.sock", &e);
            std::fs::create_dir_all(run).map_err(fail)?;
            let path = run.join("session.sock");
            let _ = std::fs::remove_file(&path); // an earlier run's; bind tells if it could not be removed
            let listener = UnixListener::bind(&path).map_err(fail)?;
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o666)).map_err(fail)?;
            self.add_listener(listener.into(), "session", true)?;
        }
        Ok(())
    }

    fn add_listener(&mut self, fd: OwnedFd, service: &'static str, unix: bool) -> Outcome<()> {
        // SAFETY: plain call; raises the backlog that std set.
        sys::check(unsafe { libc::listen(fd.as_raw_fd(), BACKLOG) })
            .map_err(|e| Fail::io(service, &e))?;
        sys::set_nonblocking(fd.as_raw_fd()).map_err(|e| Fail::io(service, &e))?;
        self.listeners.push(Listener {
            w: Watched::new(fd),
            service,
            unix,
        });
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
        let meta = if l.unix { peer(&fd) } else { obj([]) };
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

/// Who connected to the unix socket.
fn peer(fd: &OwnedFd) -> Value {
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
    obj([
        ("pid", i64::from(cred.pid).into()),
        ("uid", i64::from(cred.uid).into()),
    ])
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
