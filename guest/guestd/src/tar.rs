//! Unpack a tar stream below a folder: ustar, pax and GNU long names; files, folders, links. Our own, because the
//! archive may be anybody's: every path is resolved by the kernel with the folder as its root, so that neither ".."
//! nor a link, old or from the archive itself, leads out. Owners are not taken over: all belongs to guestd's user.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use crate::bulk::Writer;
use crate::fail::{Fail, Outcome};
use crate::json::{obj, Value};
use crate::sparse;
use crate::streams::Sink;
use crate::tarfmt::{clean, header, pax, text, Member, BLOCK};
use crate::{sys, walk};

const MAX_META: u64 = 64 * 1024;

/// What the bytes after a header are for.
enum Body {
    None,
    File(Writer, u32, i64),
    Holes(sparse::Writer, u32, i64),
    OldMap(sparse::OldMap, Vec<u8>, Member),
    Meta(u8, Vec<u8>),
    Skip,
}

/// Unpacks as the bytes come; holds one block or one small meta record, never a file.
pub struct TarSink {
    root: OwnedFd,
    block: Vec<u8>,
    body: Body,
    left: u64,
    pad: usize,
    next: Overrides,
    ended: bool,
}

#[derive(Default)]
struct Overrides {
    name: Option<String>,
    link: Option<String>,
    size: Option<u64>,
    mtime: Option<i64>,
    holes: sparse::Said,
}

/// Start unpacking below this folder; it is made if absent.
pub fn open(folder: &Path) -> Outcome<TarSink> {
    let fail = |e: io::Error| Fail::io(&folder.to_string_lossy(), &e);
    fs::create_dir_all(folder).map_err(fail)?;
    let root: OwnedFd = File::open(folder).map_err(fail)?.into();
    let next = Overrides::default();
    Ok(TarSink {
        root,
        block: Vec::new(),
        body: Body::None,
        left: 0,
        pad: 0,
        next,
        ended: false,
    })
}

impl Sink for TarSink {
    fn write(&mut self, mut data: &[u8]) -> Outcome<()> {
        while !data.is_empty() && !self.ended {
            let used = if self.left > 0 {
                let n = data
                    .len()
                    .min(usize::try_from(self.left).unwrap_or(usize::MAX));
                self.body_bytes(&data[..n])?;
                n
            } else if self.pad > 0 {
                let n = data.len().min(self.pad);
                self.pad -= n;
                n
            } else {
                let n = data.len().min(BLOCK - self.block.len());
                self.block.extend_from_slice(&data[..n]);
                if self.block.len() == BLOCK {
                    self.member()?;
                }
                n
            };
            data = &data[used..];
        }
        Ok(())
    }

    fn finish(self: Box<Self>) -> Outcome<Value> {
        if self.left > 0 || !self.block.is_empty() {
            return Err(Fail::bad("tar: the archive is cut short"));
        }
        Ok(obj([]))
    }
}

impl TarSink {
    fn body_bytes(&mut self, data: &[u8]) -> Outcome<()> {
        match &mut self.body {
            Body::File(f, ..) => f.write(data).map_err(|e| Fail::io("tar", &e))?,
            Body::Holes(f, ..) => f.write(data)?,
            Body::Meta(_, buf) | Body::OldMap(_, buf, _) => buf.extend_from_slice(data),
            Body::None | Body::Skip => {}
        }
        self.left -= data.len() as u64;
        if self.left == 0 {
            self.body_done()
        } else {
            Ok(())
        }
    }

    fn body_done(&mut self) -> Outcome<()> {
        match std::mem::replace(&mut self.body, Body::None) {
            Body::File(f, mode, mtime) => f
                .finish()
                .and_then(|f| finish_file(&f, mode, mtime))
                .map_err(|e| Fail::io("tar", &e)),
            Body::Holes(f, mode, mtime) => {
                let file = f.finish()?;
                finish_file(&file, mode, mtime).map_err(|e| Fail::io("tar", &e))
            }
            Body::OldMap(mut map, block, member) => {
                map.block(&block)?;
                self.old_map(map, member)
            }
            Body::Meta(kind, buf) => self.meta(kind, &buf),
            Body::None | Body::Skip => Ok(()),
        }
    }

    fn meta(&mut self, kind: u8, buf: &[u8]) -> Outcome<()> {
        match kind {
            b'L' => self.next.name = Some(text(buf)?),
            b'K' => self.next.link = Some(text(buf)?),
            b'x' => {
                for (k, v) in pax(buf)? {
                    match k.as_str() {
                        "path" => self.next.name = Some(v),
                        "linkpath" => self.next.link = Some(v),
                        "size" => {
                            self.next.size =
                                Some(v.parse().map_err(|_| Fail::bad("tar: bad size"))?)
                        }
                        "mtime" => {
                            self.next.mtime = v.split('.').next().and_then(|s| s.parse().ok())
                        }
                        _ => {
                            if let Some(rest) = k.strip_prefix("GNU.sparse.") {
                                self.next.holes.record(rest, v);
                            }
                        }
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The map of an old GNU header is whole, or goes on in the next block.
    fn old_map(&mut self, map: sparse::OldMap, member: Member) -> Outcome<()> {
        if map.more {
            self.begin(Body::OldMap(map, Vec::new(), member), BLOCK as u64);
            return Ok(());
        }
        self.holes(&member, map.real, Some(map.pieces))
    }

    /// Make a file that is written from its pieces.
    fn holes(&mut self, m: &Member, real: u64, map: Option<Vec<sparse::Piece>>) -> Outcome<()> {
        let (dir, name) = self.place(&m.name)?;
        let file = create(&dir, &name, m.mode).map_err(|e| Fail::io(&m.name, &e))?;
        let writer = sparse::Writer::new(file, real, m.size, map)?;
        self.begin(Body::Holes(writer, m.mode, m.mtime), m.size);
        if m.size == 0 {
            self.body_done()
        } else {
            Ok(())
        }
    }

    /// A header is complete: make what it names and get ready for its body.
    fn member(&mut self) -> Outcome<()> {
        let block = std::mem::take(&mut self.block);
        let block: &[u8; BLOCK] = block.as_slice().try_into().map_err(|_| Fail::bad("tar"))?;
        let Some(mut m) = header(block)? else {
            self.ended = true;
            return Ok(());
        };
        if matches!(m.kind, b'x' | b'g' | b'L' | b'K') {
            if m.size > MAX_META {
                return Err(Fail::bad("tar: a meta record is too long"));
            }
            self.begin(Body::Meta(m.kind, Vec::new()), m.size);
            return if m.size == 0 {
                self.body_done()
            } else {
                Ok(())
            };
        }
        let over = std::mem::take(&mut self.next);
        m.name = over.name.unwrap_or(m.name);
        m.link = over.link.unwrap_or(m.link);
        m.size = over.size.unwrap_or(m.size);
        m.mtime = over.mtime.unwrap_or(m.mtime);
        if let (b'0' | 0, Some(real)) = (m.kind, over.holes.size()?) {
            m.name = over.holes.name.unwrap_or(m.name);
            return self.holes(&m, real, None);
        }
        if m.kind == b'S' {
            return self.old_map(sparse::OldMap::begin(block)?, m);
        }
        let size = if matches!(m.kind, b'0' | 0 | b'7') {
            m.size
        } else {
            0
        };
        let body = self.make(&m).map_err(|e| Fail {
            message: format!("tar: {}", e.message),
            ..e
        })?;
        self.begin(body, size);
        if size == 0 {
            self.body_done()
        } else {
            Ok(())
        }
    }

    fn begin(&mut self, body: Body, size: u64) {
        self.body = body;
        self.left = size;
        self.pad = ((BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64) as usize;
    }

    /// The folder that a member goes into, made if absent, and its name there.
    fn place(&self, path: &str) -> Outcome<(OwnedFd, CString)> {
        let parts = clean(path)?;
        let fail = |e: io::Error| Fail::io(path, &e);
        let (last, parents) = parts
            .split_last()
            .ok_or_else(|| Fail::bad("a member without a name"))?;
        let dir = self.parent(parents).map_err(fail)?;
        Ok((dir, sys::cstr(last).map_err(fail)?))
    }

    fn make(&self, m: &Member) -> Outcome<Body> {
        if m.kind == b'5' && clean(&m.name)?.is_empty() {
            return Ok(Body::Skip);
        }
        let fail = |e: io::Error| Fail::io(&m.name, &e);
        let (dir, name) = self.place(&m.name)?;
        match m.kind {
            // A trailing slash is the old way to say folder.
            b'0' | 0 | b'7' if !m.name.ends_with('/') => {
                let file = create(&dir, &name, m.mode).map_err(fail)?;
                return Ok(Body::File(Writer::new(file, m.size), m.mode, m.mtime));
            }
            b'0' | 0 | b'7' | b'5' => folder(&dir, &name, m.mode).map_err(fail)?,
            b'2' => {
                let target = sys::cstr(&m.link).map_err(fail)?;
                replace(&dir, &name).map_err(fail)?;
                // SAFETY: strings outlive the call.
                let ret =
                    unsafe { libc::symlinkat(target.as_ptr(), dir.as_raw_fd(), name.as_ptr()) };
                sys::check(ret).map_err(fail)?;
            }
            b'1' => self.hard_link(&m.link, &dir, &name)?,
            other => {
                return Err(Fail::bad(format!(
                    "{}: members of type {:?} are refused",
                    m.name,
                    char::from(other)
                )))
            }
        }
        Ok(Body::Skip)
    }

    fn hard_link(&self, target: &str, dir: &OwnedFd, name: &CString) -> Outcome<()> {
        let fail = |e: io::Error| Fail::io(target, &e);
        let parts = clean(target)?;
        let (last, parents) = parts
            .split_last()
            .ok_or_else(|| Fail::bad("a link to nothing"))?;
        let from = self.resolve(&parents.join("/")).map_err(fail)?;
        let old = sys::cstr(last).map_err(fail)?;
        replace(dir, name).map_err(fail)?;
        // SAFETY: strings outlive the call; no flag, so a link is linked itself, not followed.
        let ret = unsafe {
            libc::linkat(
                from.as_raw_fd(),
                old.as_ptr(),
                dir.as_raw_fd(),
                name.as_ptr(),
                0,
            )
        };
        sys::check(ret).map(drop).map_err(fail)
    }

    /// Open a folder below the root; the kernel treats the root as "/" for links and "..".
    fn resolve(&self, path: &str) -> io::Result<OwnedFd> {
        match self.resolve_at_once(path) {
            Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => {
                walk::folder(self.root.as_fd(), path)
            }
            other => other,
        }
    }

    fn resolve_at_once(&self, path: &str) -> io::Result<OwnedFd> {
        let p = sys::cstr(if path.is_empty() { "." } else { path })?;
        // SAFETY: open_how is plain data and valid when zeroed; all pointers outlive the call.
        unsafe {
            let mut how: libc::open_how = std::mem::zeroed();
            how.flags = (libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC) as u64;
            how.resolve = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS;
            let size = size_of::<libc::open_how>();
            let fd = libc::syscall(
                libc::SYS_openat2,
                self.root.as_raw_fd(),
                p.as_ptr(),
                &how,
                size,
            );
            sys::own(fd as libc::c_int)
        }
    }

    /// The folder a member goes into; missing ones are made.
    fn parent(&self, parents: &[&str]) -> io::Result<OwnedFd> {
        match self.resolve(&parents.join("/")) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        let mut dir = self.resolve("")?;
        for i in 0..parents.len() {
            dir = match self.resolve(&parents[..=i].join("/")) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    let name = sys::cstr(parents[i])?;
                    // SAFETY: the string outlives the call.
                    sys::check(unsafe { libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), 0o755) })?;
                    self.resolve(&parents[..=i].join("/"))?
                }
                other => other?,
            };
        }
        Ok(dir)
    }
}

/// Remove what has this name, unless it is a folder: then the next call fails and tells.
fn replace(dir: &OwnedFd, name: &CString) -> io::Result<()> {
    // SAFETY: the string outlives the call.
    match sys::check(unsafe { libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), 0) }) {
        Err(e) if !matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EISDIR)) => Err(e),
        _ => Ok(()),
    }
}

fn create(dir: &OwnedFd, name: &CString, mode: u32) -> io::Result<File> {
    replace(dir, name)?;
    let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    // SAFETY: the string outlives the call.
    let fd = unsafe { libc::openat(dir.as_raw_fd(), name.as_ptr(), flags, mode & 0o700) };
    sys::own(fd).map(File::from)
}

fn folder(dir: &OwnedFd, name: &CString, mode: u32) -> io::Result<()> {
    // SAFETY: the strings outlive the calls.
    unsafe {
        match sys::check(libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), mode)) {
            Ok(_) => sys::check(libc::fchmodat(dir.as_raw_fd(), name.as_ptr(), mode, 0)).map(drop),
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {
                let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC; // a link to a folder is as good
                sys::own(libc::openat(dir.as_raw_fd(), name.as_ptr(), flags)).map(drop)
            }
            Err(e) => Err(e),
        }
    }
}

fn finish_file(f: &File, mode: u32, mtime: i64) -> io::Result<()> {
    let times = [
        libc::timespec {
            tv_sec: 0,
            tv_nsec: libc::UTIME_OMIT,
        },
        libc::timespec {
            tv_sec: mtime,
            tv_nsec: 0,
        },
    ];
    // SAFETY: the array outlives the call.
    unsafe {
        sys::check(libc::fchmod(f.as_raw_fd(), mode))?;
        sys::check(libc::futimens(f.as_raw_fd(), times.as_ptr()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{symlink, PermissionsExt};
    use std::path::PathBuf;

    /// A member as tar writes it.
    fn member(name: &str, kind: u8, link: &str, data: &[u8]) -> Vec<u8> {
        let mut b = [0u8; BLOCK];
        b[..name.len()].copy_from_slice(name.as_bytes());
        b[100..107].copy_from_slice(b"0000750");
        b[124..135].copy_from_slice(format!("{:011o}", data.len()).as_bytes());
        b[136..147].copy_from_slice(format!("{:011o}", 1_700_000_000).as_bytes());
        b[156] = kind;
        b[157..157 + link.len()].copy_from_slice(link.as_bytes());
        b[257..262].copy_from_slice(b"ustar");
        b[263..265].copy_from_slice(b"00");
        seal(&mut b);
        let mut out = b.to_vec();
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(BLOCK), 0);
        out
    }

    fn seal(b: &mut [u8; BLOCK]) {
        b[148..156].copy_from_slice(b"        ");
        let sum: u32 = b.iter().map(|x| u32::from(*x)).sum();
        b[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }

    fn pax_record(key: &str, value: &str) -> Vec<u8> {
        let rest = format!(" {key}={value}\n");
        let len = (1..)
            .find(|n: &usize| n.to_string().len() + rest.len() == *n)
            .unwrap();
        format!("{len}{rest}").into_bytes()
    }

    fn scratch(tag: &str) -> PathBuf {
        let p = std::env::temp_dir().join(format!("guestd-tar-{tag}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&p);
        fs::create_dir_all(&p).unwrap();
        p
    }

    fn unpack(dir: &Path, parts: &[Vec<u8>], step: usize) -> Outcome<()> {
        let mut all = parts.concat();
        all.extend_from_slice(&[0u8; 1024]);
        let mut sink = Box::new(open(dir)?);
        for piece in all.chunks(step) {
            sink.write(piece)?;
        }
        sink.finish().map(drop)
    }

    #[test]
    fn unpacks_files_folders_links_and_long_names() {
        let long = format!("{}/{}/file", "d".repeat(90), "e".repeat(90));
        let parts = [
            member("./", b'5', "", b""),
            member("a/", b'5', "", b""),
            member("a/f", b'0', "", b"hello"),
            member("deep/er/g", 0, "", &vec![7u8; 1300]),
            member("l", b'2', "a/f", b""),
            member("h", b'1', "a/f", b""),
            member(
                "x",
                b'x',
                "",
                &[
                    pax_record("path", &long),
                    pax_record("mtime", "1600000000.5"),
                ]
                .concat(),
            ),
            member("short", b'0', "", b"long"),
            member("././@LongLink", b'L', "", format!("{long}2\0").as_bytes()),
            member("short", b'0', "", b"gnu"),
        ];
        for step in [1, 511, 4096] {
            let dir = scratch(&format!("ok{step}"));
            unpack(&dir, &parts, step).unwrap();
            assert_eq!(fs::read_to_string(dir.join("l")).unwrap(), "hello");
            assert_eq!(fs::read_to_string(dir.join("h")).unwrap(), "hello");
            assert_eq!(fs::read(dir.join("deep/er/g")).unwrap(), vec![7u8; 1300]);
            assert_eq!(fs::read_to_string(dir.join(&long)).unwrap(), "long");
            assert_eq!(
                fs::read_to_string(dir.join(format!("{long}2"))).unwrap(),
                "gnu"
            );
            assert_eq!(
                fs::metadata(dir.join("a/f")).unwrap().permissions().mode() & 0o7777,
                0o750
            );
            unpack(&dir, &parts, step).unwrap(); // over itself
            fs::remove_dir_all(&dir).unwrap();
        }
    }

    #[test]
    fn nothing_leads_out() {
        let base = scratch("out");
        let dir = base.join("in");
        let outside = base.join("secret");
        fs::write(&outside, "old").unwrap();
        for name in ["../secret", "/etc/x", "a/../../secret", "..", ""] {
            assert_eq!(
                unpack(&dir, &[member(name, b'0', "", b"new")], 512)
                    .unwrap_err()
                    .kind,
                "bad_input",
                "{name}"
            );
        }
        let through = [
            member("up", b'2', "..", b""),
            member("up/secret", b'0', "", b"new"),
        ];
        unpack(&dir, &through, 512).unwrap();
        assert_eq!(fs::read_to_string(&outside).unwrap(), "old");
        assert_eq!(fs::read_to_string(dir.join("secret")).unwrap(), "new");
        symlink(&base, dir.join("old-link")).unwrap();
        assert!(unpack(&dir, &[member("old-link/secret", b'0', "", b"new")], 512).is_err());
        assert_eq!(fs::read_to_string(&outside).unwrap(), "old");
        let hard = [member("h", b'1', "old-link/../../secret", b"")];
        assert_eq!(unpack(&dir, &hard, 512).unwrap_err().kind, "bad_input");
        // A file that is a link is replaced, never written through.
        symlink(&outside, dir.join("f")).unwrap();
        unpack(&dir, &[member("f", b'0', "", b"new")], 512).unwrap();
        assert_eq!(fs::read_to_string(&outside).unwrap(), "old");
        fs::remove_dir_all(&base).unwrap();
    }

    #[test]
    fn damaged_and_unwanted_archives_are_refused() {
        let dir = scratch("bad");
        let mut flipped = member("f", b'0', "", b"data");
        flipped[0] ^= 1;
        assert!(unpack(&dir, &[flipped], 512).is_err());
        assert!(unpack(&dir, &[member("dev", b'3', "", b"")], 512).is_err());
        assert!(unpack(&dir, &[member("x", b'x', "", b"99 path=a\n")], 512).is_err());
        let mut sink = Box::new(open(&dir).unwrap());
        sink.write(&member("cut", b'0', "", &[1; 2000])[..1500])
            .unwrap();
        assert_eq!(sink.finish().unwrap_err().kind, "bad_input");
        fs::remove_dir_all(&dir).unwrap();
    }
}
