//! A file or folder of the guest as a tar stream, made as the host takes it: ustar, and pax records for what does not fit.
//! Holds one header and the open folders on the way down, never a file. What goes away meanwhile is left out; a file
//! that shrinks is filled up with zeros, one that grows is cut, so that the stream is always whole.

use std::collections::{HashMap, VecDeque};
use std::fs::{self, File, Metadata, OpenOptions, ReadDir};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::fail::{Fail, Outcome};
use crate::sparse;
use crate::streams::Source;
use crate::sys;
use crate::tarfmt::BLOCK;

const MAX_DEPTH: usize = 256; // each is an open folder
const MAX_LINKS: usize = 65_536; // files with several names that are remembered; later ones come as copies
const MAX_OCTAL: u64 = 0o77_777_777_777;

/// What is wanted of a path.
#[derive(Default)]
pub struct Wanted {
    /// A link is read as what it points to.
    pub follow: bool,
    /// Files with holes as GNU's format 1.0 has them: only their data is sent.
    pub sparse: bool,
    pub skip: Vec<PathBuf>,
}

/// A file's bytes that are still to be given: pieces of it, by offset and length.
struct Reading {
    file: File,
    pieces: VecDeque<sparse::Piece>,
}

/// Walks below one path.
pub struct TarSource {
    wanted: Wanted,
    open: Vec<(ReadDir, Vec<u8>)>, // folders on the way down, with their names in the archive
    next: Option<(PathBuf, Vec<u8>)>,
    links: HashMap<(u64, u64), Vec<u8>>,
    ready: Vec<u8>, // headers and padding, given up to `given`
    given: usize,
    file: Option<Reading>,
    pad: usize, // after the file
    ended: bool,
}

/// Read `path` as `name` (empty: what is in the folder, without a name for itself), but for the paths to be skipped.
pub fn open(path: &Path, name: &str, wanted: Wanted) -> Outcome<TarSource> {
    let fail = |e: std::io::Error| Fail::io(&path.to_string_lossy(), &e);
    let real = if wanted.follow {
        fs::canonicalize(path).map_err(fail)?
    } else {
        path.to_path_buf()
    };
    let meta = fs::symlink_metadata(&real).map_err(fail)?;
    if !meta.is_symlink() && sys::made_up(&real).map_err(fail)? {
        return Err(Fail::bad(format!(
            "{} is no file on a disk: the kernel makes it up when it is read, so read it by a command (cat)",
            path.display()
        )));
    }
    if name.is_empty() && !meta.is_dir() {
        return Err(Fail::bad("only a folder can be read without a name"));
    }
    if name.starts_with('/') || name.split('/').any(|p| p == "..") {
        return Err(Fail::bad("not a name for an archive"));
    }
    Ok(TarSource {
        wanted,
        open: Vec::new(),
        next: Some((real, name.as_bytes().to_vec())),
        links: HashMap::new(),
        ready: Vec::new(),
        given: 0,
        file: None,
        pad: 0,
        ended: false,
    })
}

impl TarSource {
    /// Prepare the next member, or the end of the archive.
    fn advance(&mut self) -> Outcome<()> {
        self.ready.clear();
        self.given = 0;
        loop {
            if let Some((path, name)) = self.next.take() {
                if self.member(&path, name)? {
                    return Ok(());
                }
                continue;
            }
            let Some((folder, name)) = self.open.last_mut() else {
                self.ready.resize(2 * BLOCK, 0);
                self.ended = true;
                return Ok(());
            };
            match folder.next() {
                None => {
                    self.open.pop();
                }
                Some(Err(e)) => return Err(Fail::io("listing", &e)),
                Some(Ok(entry)) => {
                    let mut full = name.clone();
                    if !full.is_empty() {
                        full.push(b'/');
                    }
                    full.extend_from_slice(entry.file_name().as_bytes());
                    self.next = Some((entry.path(), full));
                }
            }
        }
    }

    /// Write one member's header; false when there is nothing to write.
    fn member(&mut self, path: &Path, name: Vec<u8>) -> Outcome<bool> {
        let Ok(meta) = fs::symlink_metadata(path) else {
            return Ok(false); // gone meanwhile
        };
        if self.wanted.skip.iter().any(|p| p == path) {
            return Ok(false);
        }
        if meta.is_dir() {
            return self.folder(path, name, &meta);
        }
        if meta.is_symlink() {
            let Ok(target) = fs::read_link(path) else {
                return Ok(false);
            };
            self.header(&name, b'2', 0, target.as_os_str().as_bytes(), &meta);
            return Ok(true);
        }
        if meta.file_type().is_fifo() {
            self.header(&name, b'6', 0, b"", &meta);
            return Ok(true);
        }
        if !meta.is_file() {
            return Ok(false); // sockets and devices mean nothing elsewhere
        }
        let inode = (meta.dev(), meta.ino());
        if meta.nlink() > 1 {
            if let Some(first) = self.links.get(&inode).cloned() {
                self.header(&name, b'1', 0, &first, &meta);
                return Ok(true);
            }
        }
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_NOFOLLOW)
            .open(path);
        let file = match opened {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(Fail::io(&path.to_string_lossy(), &e)),
        };
        if meta.nlink() > 1 && self.links.len() < MAX_LINKS {
            self.links.insert(inode, name.clone());
        }
        let looks = self.wanted.sparse && meta.blocks() * 512 < meta.size();
        let map = looks.then(|| sparse::pieces(&file, meta.size())).flatten();
        let pieces = match map {
            None => {
                self.header(&name, b'0', meta.size(), b"", &meta);
                vec![(0, meta.size())]
            }
            Some(map) => {
                self.holes(&name, &map, &meta);
                map
            }
        };
        let sum: u64 = pieces.iter().map(|(_, length)| length).sum();
        self.pad = (BLOCK - (sum % BLOCK as u64) as usize) % BLOCK;
        self.file = Some(Reading {
            file,
            pieces: pieces.into(),
        });
        Ok(true)
    }

    /// The header of a file with holes, and its map.
    fn holes(&mut self, name: &[u8], map: &[sparse::Piece], meta: &Metadata) {
        let mut records = Vec::new();
        let size = meta.size().to_string();
        for (key, value) in [
            ("GNU.sparse.major", b"1".as_slice()),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", name),
            ("GNU.sparse.realsize", size.as_bytes()),
        ] {
            record(&mut records, key, value);
        }
        let text = sparse::text(map);
        let data: u64 = map.iter().map(|(_, length)| length).sum();
        self.described(records, name, b'0', text.len() as u64 + data, b"", meta);
        self.ready.extend_from_slice(&text);
    }

    fn folder(&mut self, path: &Path, name: Vec<u8>, meta: &Metadata) -> Outcome<bool> {
        if self.open.len() >= MAX_DEPTH {
            return Err(Fail::bad("the folders are nested too deeply"));
        }
        let entries = match fs::read_dir(path) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(Fail::io(&path.to_string_lossy(), &e)),
        };
        let mut shown = name.clone();
        shown.extend_from_slice(if name.is_empty() { b"./" } else { b"/" });
        self.header(&shown, b'5', 0, b"", meta);
        self.open.push((entries, name));
        Ok(true)
    }

    fn header(&mut self, name: &[u8], kind: u8, size: u64, link: &[u8], meta: &Metadata) {
        self.described(Vec::new(), name, kind, size, link, meta);
    }

    /// A header behind the pax records that it needs.
    fn described(
        &mut self,
        mut records: Vec<u8>,
        name: &[u8],
        kind: u8,
        size: u64,
        link: &[u8],
        meta: &Metadata,
    ) {
        if name.len() > 100 {
            record(&mut records, "path", name);
        }
        if link.len() > 100 {
            record(&mut records, "linkpath", link);
        }
        for (key, value) in [
            ("size", size),
            ("uid", meta.uid().into()),
            ("gid", meta.gid().into()),
        ] {
            if value
                > if key == "size" {
                    MAX_OCTAL
                } else {
                    0o7_777_777
                }
            {
                record(&mut records, key, value.to_string().as_bytes());
            }
        }
        if !records.is_empty() {
            let about = block(b"pax", b'x', records.len() as u64, b"", 0o644, (0, 0), 0);
            self.ready.extend_from_slice(&about);
            self.ready.extend_from_slice(&records);
            self.ready
                .resize(self.ready.len().next_multiple_of(BLOCK), 0);
        }
        let owner = (meta.uid(), meta.gid());
        let mtime = meta.mtime().max(0) as u64;
        let mode = meta.mode() & 0o7777;
        let b = block(name, kind, size, link, mode, owner, mtime);
        self.ready.extend_from_slice(&b);
    }
}

/// A pax record: its length counts itself.
fn record(out: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    out.extend_from_slice(format!("{length} {key}=").as_bytes());
    out.extend_from_slice(value);
    out.push(b'\n');
}

fn block(
    name: &[u8],
    kind: u8,
    size: u64,
    link: &[u8],
    mode: u32,
    owner: (u32, u32),
    mtime: u64,
) -> [u8; BLOCK] {
    let mut b = [0u8; BLOCK];
    let n = name.len().min(100);
    b[..n].copy_from_slice(&name[..n]);
    octal(&mut b[100..108], u64::from(mode));
    octal(&mut b[108..116], u64::from(owner.0).min(0o7_777_777));
    octal(&mut b[116..124], u64::from(owner.1).min(0o7_777_777));
    octal(&mut b[124..136], size.min(MAX_OCTAL));
    octal(&mut b[136..148], mtime.min(MAX_OCTAL));
    b[156] = kind;
    let n = link.len().min(100);
    b[157..157 + n].copy_from_slice(&link[..n]);
    b[257..263].copy_from_slice(b"ustar\0");
    b[263..265].copy_from_slice(b"00");
    b[148..156].copy_from_slice(b"        ");
    let sum: u32 = b.iter().map(|x| u32::from(*x)).sum();
    b[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    b
}

fn octal(field: &mut [u8], value: u64) {
    let digits = field.len() - 1;
    field[..digits].copy_from_slice(format!("{value:0digits$o}").as_bytes());
}

impl Source for TarSource {
    fn read(&mut self, buf: &mut [u8]) -> Outcome<usize> {
        let mut n = 0;
        while n < buf.len() {
            if self.given < self.ready.len() {
                let take = (buf.len() - n).min(self.ready.len() - self.given);
                buf[n..n + take].copy_from_slice(&self.ready[self.given..self.given + take]);
                self.given += take;
                n += take;
            } else if let Some(reading) = &mut self.file {
                match reading.read(&mut buf[n..])? {
                    Some(got) => n += got,
                    None => {
                        self.file = None;
                        self.ready.clear();
                        self.ready.resize(self.pad, 0);
                        self.given = 0;
                    }
                }
            } else if self.ended {
                break;
            } else {
                self.advance()?;
            }
        }
        Ok(n)
    }
}

impl Reading {
    /// Read on; None at the end of the last piece.
    fn read(&mut self, buf: &mut [u8]) -> Outcome<Option<usize>> {
        while self.pieces.front().is_some_and(|piece| piece.1 == 0) {
            self.pieces.pop_front();
        }
        let Some((offset, left)) = self.pieces.front_mut() else {
            return Ok(None);
        };
        let want = buf.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
        let mut got = self
            .file
            .read_at(&mut buf[..want], *offset)
            .map_err(|e| Fail::io("reading", &e))?;
        if got == 0 {
            buf[..want].fill(0); // it has shrunk
            got = want;
        }
        *offset += got as u64;
        *left -= got as u64;
        Ok(Some(got))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::streams::Sink;
    use crate::tar;
    use std::os::unix::fs::{symlink, PermissionsExt};

    fn scratch(tag: &str) -> PathBuf {
        let p = std::env::temp_dir().join(format!("guestd-tarread-{tag}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&p);
        fs::create_dir_all(&p).unwrap();
        p
    }

    fn skipping(path: &Path) -> Wanted {
        Wanted {
            skip: vec![path.to_path_buf()],
            ..Wanted::default()
        }
    }

    fn all(mut source: TarSource, step: usize) -> Vec<u8> {
        let (mut out, mut buf) = (Vec::new(), vec![0u8; step]);
        loop {
            let n = source.read(&mut buf).unwrap();
            if n == 0 {
                return out;
            }
            out.extend_from_slice(&buf[..n]);
        }
    }

    #[test]
    fn what_is_read_unpacks_to_the_same() {
        let base = scratch("same");
        let from = base.join("from");
        let deep = from.join("d".repeat(120)).join("e".repeat(120));
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("f"), vec![7u8; 1300]).unwrap();
        fs::write(from.join("a"), "hello").unwrap();
        fs::write(from.join("empty"), "").unwrap();
        fs::set_permissions(from.join("a"), fs::Permissions::from_mode(0o640)).unwrap();
        fs::hard_link(from.join("a"), from.join("b")).unwrap();
        symlink("a", from.join("l")).unwrap();
        symlink("x".repeat(150), from.join("long")).unwrap();
        fs::create_dir(from.join("skipped")).unwrap();
        for step in [1, 511, 65536] {
            let to = base.join(format!("to{step}"));
            fs::create_dir(&to).unwrap();
            let archive = all(
                open(&from, "new", skipping(&from.join("skipped"))).unwrap(),
                step,
            );
            assert_eq!(archive.len() % BLOCK, 0);
            let mut sink = Box::new(tar::open(&to).unwrap());
            sink.write(&archive).unwrap();
            sink.finish().unwrap();
            let to = to.join("new");
            assert_eq!(fs::read_to_string(to.join("l")).unwrap(), "hello");
            assert_eq!(fs::read_to_string(to.join("b")).unwrap(), "hello");
            assert_eq!(fs::metadata(to.join("a")).unwrap().nlink(), 2);
            assert_eq!(
                fs::metadata(to.join("a")).unwrap().permissions().mode() & 0o7777,
                0o640
            );
            assert_eq!(
                fs::read_link(to.join("long")).unwrap().as_os_str().len(),
                150
            );
            assert_eq!(fs::read(to.join("empty")).unwrap().len(), 0);
            let below = to.join("d".repeat(120)).join("e".repeat(120)).join("f");
            assert_eq!(fs::read(below).unwrap(), vec![7u8; 1300]);
            assert!(!to.join("skipped").exists());
        }
        fs::remove_dir_all(&base).unwrap();
    }

    #[test]
    fn a_file_with_holes_crosses_as_its_data() {
        let base = scratch("holes");
        let from = base.join("from");
        fs::create_dir(&from).unwrap();
        let file = File::create_new(from.join("disk")).unwrap();
        file.set_len(100 << 20).unwrap();
        file.write_all_at(&[9u8; 5000], 50 << 20).unwrap();
        file.sync_all().unwrap();
        fs::write(from.join("plain"), "text").unwrap();
        for (sparse, most) in [(true, 1 << 20), (false, 200 << 20)] {
            let wanted = Wanted {
                sparse,
                ..Wanted::default()
            };
            let archive = all(open(&from, "new", wanted).unwrap(), 60_000);
            assert!(archive.len().is_multiple_of(BLOCK) && archive.len() < most);
            let to = base.join(format!("to-{sparse}"));
            fs::create_dir(&to).unwrap();
            let mut sink = Box::new(tar::open(&to).unwrap());
            for piece in archive.chunks(33_333) {
                sink.write(piece).unwrap();
            }
            sink.finish().unwrap();
            assert_eq!(fs::read_to_string(to.join("new/plain")).unwrap(), "text");
            let disk = File::open(to.join("new/disk")).unwrap();
            assert_eq!(disk.metadata().unwrap().size(), 100 << 20);
            let mut piece = [0u8; 5000];
            disk.read_exact_at(&mut piece, 50 << 20).unwrap();
            assert_eq!(piece, [9u8; 5000]);
            if sparse {
                assert!(disk.metadata().unwrap().blocks() * 512 < 1 << 20);
            }
        }
        fs::remove_dir_all(&base).unwrap();
    }

    #[test]
    fn what_the_kernel_makes_up_is_refused() {
        for path in ["/proc/cpuinfo", "/proc", "/sys"] {
            let refused = open(Path::new(path), "n", Wanted::default()).err().unwrap();
            assert!(refused.message.contains("by a command"), "{path}");
        }
        let followed = Wanted {
            follow: true,
            ..Wanted::default()
        };
        let base = scratch("made-up");
        symlink("/proc/version", base.join("l")).unwrap();
        assert!(open(&base.join("l"), "n", followed).is_err());
        assert!(open(&base.join("l"), "n", Wanted::default()).is_ok());
        fs::remove_dir_all(&base).unwrap();
    }

    #[test]
    fn one_file_a_link_and_names_that_are_refused() {
        let base = scratch("one");
        fs::write(base.join("f"), "x").unwrap();
        symlink("f", base.join("l")).unwrap();
        let kind = |follow| {
            let wanted = Wanted {
                follow,
                ..Wanted::default()
            };
            all(open(&base.join("l"), "n", wanted).unwrap(), 4096)[156]
        };
        assert_eq!((kind(false), kind(true)), (b'2', b'0'));
        for (path, name) in [("f", ""), ("f", "/abs"), ("f", "a/../b")] {
            assert!(
                open(&base.join(path), name, Wanted::default()).is_err(),
                "{name}"
            );
        }
        assert_eq!(
            open(&base.join("none"), "n", Wanted::default())
                .err()
                .unwrap()
                .kind,
            "not_found"
        );
        let content = all(open(&base, "", Wanted::default()).unwrap(), 4096);
        assert_eq!(&content[..2], b"./");
        fs::remove_dir_all(&base).unwrap();
    }

    #[test]
    fn a_file_that_shrinks_leaves_the_archive_whole() {
        let base = scratch("shrinks");
        fs::write(base.join("f"), vec![1u8; 5000]).unwrap();
        let mut source = open(&base.join("f"), "f", Wanted::default()).unwrap();
        let mut buf = [0u8; BLOCK];
        source.read(&mut buf).unwrap();
        fs::write(base.join("f"), "short").unwrap();
        assert_eq!(all(source, 777).len(), 5120 + 2 * BLOCK);
        fs::remove_dir_all(&base).unwrap();
    }
}
