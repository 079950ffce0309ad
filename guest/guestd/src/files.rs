//! Files for the host: stat, list, read, write by temporary name, remove. Paths are absolute.

use std::fs::{self, File, Metadata, OpenOptions, ReadDir};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::fail::{Fail, Outcome};
use crate::json::{obj, Value};
use crate::streams::{Sink, Source};

pub const MAX_LIST: usize = 10_000;

/// Accept an absolute path without NUL.
pub fn path(text: &str) -> Outcome<PathBuf> {
    if !text.starts_with('/') || text.contains('\0') || text.len() > 4095 {
        return Err(Fail::bad(format!("not an absolute path: {text:?}")));
    }
    Ok(PathBuf::from(text))
}

fn name(p: &Path) -> String {
    p.to_string_lossy().into_owned()
}

fn row(p: &Path, m: &Metadata) -> Value {
    let kind = if m.is_file() {
        "file"
    } else if m.is_dir() {
        "dir"
    } else if m.is_symlink() {
        "symlink"
    } else {
        "other"
    };
    obj([
        ("path", name(p).into()),
        ("kind", kind.into()),
        ("size", (m.size() as i64).into()),
        ("mode", i64::from(m.mode() & 0o7777).into()),
        (
            "mtime_s",
            (m.mtime() as f64 + m.mtime_nsec() as f64 / 1e9).into(),
        ),
    ])
}

pub fn stat(p: &Path) -> Outcome<Value> {
    fs::symlink_metadata(p)
        .map(|m| row(p, &m))
        .map_err(|e| Fail::io(&name(p), &e))
}

/// A folder's rows, one JSON object a line, read as the host takes them.
pub struct ListSource {
    entries: ReadDir,
    left: usize,
    line: Vec<u8>,
    given: usize,
}

pub fn list(p: &Path) -> Outcome<ListSource> {
    let entries = fs::read_dir(p).map_err(|e| Fail::io(&name(p), &e))?;
    Ok(ListSource {
        entries,
        left: MAX_LIST,
        line: Vec::new(),
        given: 0,
    })
}

impl Source for ListSource {
    fn read(&mut self, buf: &mut [u8]) -> Outcome<usize> {
        let mut n = 0;
        while n < buf.len() {
            if self.given == self.line.len() {
                let entry = match self.entries.next() {
                    Some(Ok(entry)) if self.left > 0 => entry,
                    Some(Err(e)) => return Err(Fail::io("listing", &e)),
                    _ => break,
                };
                let Ok(meta) = entry.metadata() else { continue }; // removed meanwhile
                self.left -= 1;
                self.line = row(&entry.path(), &meta).text().into_bytes();
                self.line.push(b'\n');
                self.given = 0;
            }
            let take = (buf.len() - n).min(self.line.len() - self.given);
            buf[n..n + take].copy_from_slice(&self.line[self.given..self.given + take]);
            self.given += take;
            n += take;
        }
        Ok(n)
    }
}

/// A file's bytes; growing past the limit meanwhile is an error, not a cut.
pub struct FileSource {
    file: File,
    left: u64,
}

/// Open a regular file. `O_NONBLOCK`: a fifo must not hold guestd.
pub fn open_read(p: &Path, limit: u64) -> Outcome<(FileSource, u64)> {
    let fail = |e: std::io::Error| Fail::io(&name(p), &e);
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(p)
        .map_err(fail)?;
    let meta = file.metadata().map_err(fail)?;
    if !meta.is_file() {
        return Err(Fail::bad(format!("not a regular file: {}", name(p))));
    }
    if meta.size() > limit {
        return Err(Fail::new(
            "too_large",
            format!(
                "{} has {} bytes, the limit is {limit}",
                name(p),
                meta.size()
            ),
        ));
    }
    Ok((FileSource { file, left: limit }, meta.size()))
}

impl Source for FileSource {
    fn read(&mut self, buf: &mut [u8]) -> Outcome<usize> {
        let n = self.file.read(buf).map_err(|e| Fail::io("reading", &e))?;
        if n as u64 > self.left {
            return Err(Fail::new("too_large", "the file grew over the limit"));
        }
        self.left -= n as u64;
        Ok(n)
    }
}

/// A file being written under a temporary name beside its place.
pub struct FileSink {
    file: File,
    temp: PathBuf,
    target: PathBuf,
    done: bool,
}

/// Start writing; parents are made. The old file stays whole until `finish`.
pub fn open_write(target: &Path, mode: u32, serial: u32) -> Outcome<FileSink> {
    let fail = |e: std::io::Error| Fail::io(&name(target), &e);
    let parent = target.parent().ok_or_else(|| Fail::bad("no file name"))?;
    let base = target
        .file_name()
        .ok_or_else(|| Fail::bad("no file name"))?
        .to_string_lossy();
    if target.is_dir() {
        return Err(Fail::bad(format!("is a folder: {}", name(target))));
    }
    fs::create_dir_all(parent).map_err(fail)?;
    let short: String = base.chars().take(50).collect();
    let temp = parent.join(format!(".{short}.recess-{serial}"));
    // The name can be guessed by whoever owns the folder: what is laid there, or left by a crash, is removed, and the
    // file is ours or nobody's.
    match fs::remove_file(&temp) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(fail(e)),
        _ => {}
    }
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temp)
        .map_err(fail)?;
    let sink = FileSink {
        file,
        temp,
        target: target.to_path_buf(),
        done: false,
    };
    sink.file
        .set_permissions(fs::Permissions::from_mode(mode & 0o7777))
        .map_err(fail)?;
    Ok(sink)
}

impl Sink for FileSink {
    fn write(&mut self, data: &[u8]) -> Outcome<()> {
        self.file
            .write_all(data)
            .map_err(|e| Fail::io(&name(&self.target), &e))
    }

    fn finish(mut self: Box<Self>) -> Outcome<Value> {
        fs::rename(&self.temp, &self.target).map_err(|e| Fail::io(&name(&self.target), &e))?;
        self.done = true;
        Ok(obj([]))
    }
}

impl Drop for FileSink {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_file(&self.temp); // a crash leaves the temporary name too: harmless, hidden
        }
    }
}

/// Remove a file or folder; what is absent is removed already. May take long: run it in a helper.
pub fn remove(p: &Path, recursive: bool) -> Outcome<()> {
    if p.parent().is_none() {
        return Err(Fail::bad("the root folder cannot be removed"));
    }
    let gone = match fs::symlink_metadata(p) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => Err(e),
        Ok(m) if m.is_dir() && recursive => fs::remove_dir_all(p),
        Ok(m) if m.is_dir() => fs::remove_dir(p),
        Ok(_) => fs::remove_file(p),
    };
    match gone {
        Err(e) if e.raw_os_error() == Some(libc::ENOTEMPTY) => {
            Err(Fail::bad(format!("folder not empty: {}", name(p))))
        }
        other => other.map_err(|e| Fail::io(&name(p), &e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(tag: &str) -> PathBuf {
        let p = std::env::temp_dir().join(format!("guestd-files-{tag}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&p);
        fs::create_dir_all(&p).unwrap();
        p
    }

    #[test]
    fn write_is_all_or_nothing() {
        let dir = scratch("write");
        let target = dir.join("deep/er/f");
        let mut sink = Box::new(open_write(&target, 0o640, 0).unwrap());
        sink.write(b"one").unwrap();
        sink.finish().unwrap();
        let mut sink = open_write(&target, 0o644, 1).unwrap();
        sink.write(b"tw").unwrap();
        drop(sink);
        assert_eq!(fs::read_to_string(&target).unwrap(), "one");
        assert_eq!(fs::read_dir(target.parent().unwrap()).unwrap().count(), 1);
        assert_eq!(fs::metadata(&target).unwrap().mode() & 0o7777, 0o640);
        assert_eq!(open_write(&dir, 0o644, 2).err().unwrap().kind, "bad_input");
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn listing_and_removing() {
        let dir = scratch("list");
        for i in 0..300 {
            fs::write(dir.join(format!("f{i}")), "x").unwrap();
        }
        let mut source = list(&dir).unwrap();
        let (mut all, mut buf) = (Vec::new(), [0u8; 777]);
        loop {
            let n = source.read(&mut buf).unwrap();
            if n == 0 {
                break;
            }
            all.extend_from_slice(&buf[..n]);
        }
        let rows: Vec<&[u8]> = all
            .split(|b| *b == b'\n')
            .filter(|l| !l.is_empty())
            .collect();
        assert_eq!(rows.len(), 300);
        assert!(rows
            .iter()
            .all(|r| crate::json::parse(r).unwrap().get("size").unwrap().as_int() == Some(1)));
        assert_eq!(remove(&dir, false).unwrap_err().kind, "bad_input");
        assert_eq!(remove(Path::new("/"), true).unwrap_err().kind, "bad_input");
        remove(&dir, true).unwrap();
        remove(&dir, true).unwrap();
    }

    #[test]
    fn reading_is_bounded_and_regular_only() {
        let dir = scratch("read");
        fs::write(dir.join("f"), vec![1u8; 100]).unwrap();
        assert_eq!(
            open_read(&dir.join("f"), 99).err().unwrap().kind,
            "too_large"
        );
        assert_eq!(open_read(&dir, 99).err().unwrap().kind, "bad_input");
        assert_eq!(
            open_read(&dir.join("g"), 99).err().unwrap().kind,
            "not_found"
        );
        let (mut s, size) = open_read(&dir.join("f"), 100).unwrap();
        assert_eq!(
            (
                size,
                s.read(&mut [0; 64]).unwrap(),
                s.read(&mut [0; 64]).unwrap()
            ),
            (100, 64, 36)
        );
        assert!(path("relative").is_err() && path("/a\0b").is_err() && path("/ok").is_ok());
        fs::remove_dir_all(&dir).unwrap();
    }
}
