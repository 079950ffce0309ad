//! Files with holes in tar archives: GNU's map of where there is data, read (old GNU headers, pax format 1.0) and written
//! (pax 1.0). A disk image of 10 GiB with one of them in use crosses the link as one, and is as small on the other side.
//!
//! A map may be anybody's: its pieces must lie in order inside the file and be as long as what follows, or the archive is
//! refused. What is not in the map is never written, so it costs nothing.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::fail::{Fail, Outcome};
use crate::tarfmt::{number, BLOCK};

/// Pieces that are looked for in one file; what lies behind the last of them is taken as data.
const MAX_PIECES: usize = 4096;
/// What a map may take in an archive: some 10,000 pieces of a large file.
const MAX_MAP: usize = 256 << 10;

/// Where data lies: offset and length.
pub type Piece = (u64, u64);

/// What a pax header says of a file with holes.
#[derive(Default)]
pub struct Said {
    pub major: String,
    pub minor: String,
    pub name: Option<String>,
    pub real: Option<u64>,
    other: bool,
}

impl Said {
    /// Take a record whose key begins with "GNU.sparse."
    pub fn record(&mut self, key: &str, value: String) {
        match key {
            "major" => self.major = value,
            "minor" => self.minor = value,
            "name" => self.name = Some(value),
            "realsize" => self.real = value.parse().ok(),
            _ => self.other = true,
        }
    }

    /// The file's real size; None when the archive says nothing of holes.
    pub fn size(&self) -> Outcome<Option<u64>> {
        match (self.major.as_str(), self.minor.as_str(), self.real) {
            ("", "", None) if !self.other && self.name.is_none() => Ok(None),
            ("1", "0", Some(real)) => Ok(Some(real)),
            _ => Err(Fail::bad(
                "tar: a file with holes, in a format other than GNU's 1.0 or its old one",
            )),
        }
    }
}

/// The map of an old GNU header, which may go on in further blocks.
pub struct OldMap {
    pub pieces: Vec<Piece>,
    pub real: u64,
    pub more: bool,
}

impl OldMap {
    pub fn begin(header: &[u8; BLOCK]) -> Outcome<OldMap> {
        let real = number(&header[483..495]).ok_or_else(|| Fail::bad("tar: bad size"))?;
        let mut map = OldMap {
            pieces: Vec::new(),
            real,
            more: header[482] != 0,
        };
        map.entries(&header[386..482])?;
        Ok(map)
    }

    /// Take one of the blocks that follow.
    pub fn block(&mut self, block: &[u8]) -> Outcome<()> {
        self.entries(&block[..504])?;
        self.more = block[504] != 0;
        Ok(())
    }

    fn entries(&mut self, text: &[u8]) -> Outcome<()> {
        for entry in text.chunks_exact(24).take_while(|e| e[0] != 0) {
            let bad = || Fail::bad("tar: bad map of a file with holes");
            let piece = (number(&entry[..12]), number(&entry[12..]));
            let (Some(offset), Some(length)) = piece else {
                return Err(bad());
            };
            if self.pieces.len() * 24 >= MAX_MAP {
                return Err(bad());
            }
            self.pieces.push((offset, length));
        }
        Ok(())
    }
}

/// A file being written from its pieces. Without a map yet, that is what comes first (format 1.0).
pub struct Writer {
    file: File,
    real: u64,
    left: u64, // of what the archive holds for it
    text: Vec<u8>,
    pieces: Option<std::vec::IntoIter<Piece>>,
    now: Piece,
}

impl Writer {
    /// `size`: how many bytes follow in the archive; `map`: the pieces, if they are known.
    pub fn new(file: File, real: u64, size: u64, map: Option<Vec<Piece>>) -> Outcome<Writer> {
        let mut writer = Writer {
            file,
            real,
            left: size,
            text: Vec::new(),
            pieces: None,
            now: (0, 0),
        };
        if let Some(map) = map {
            writer.begin(map)?;
        }
        Ok(writer)
    }

    fn begin(&mut self, map: Vec<Piece>) -> Outcome<()> {
        let (mut end, mut sum) = (0u64, 0u64);
        for (offset, length) in &map {
            let after = offset.checked_add(*length).filter(|a| *a <= self.real);
            match after {
                Some(after) if *offset >= end => end = after,
                _ => return Err(Fail::bad("tar: the map of a file with holes is wrong")),
            }
            sum += length; // at most `real`, since they are in order
        }
        if sum != self.left {
            return Err(Fail::bad("tar: the map of a file with holes is wrong"));
        }
        self.pieces = Some(map.into_iter());
        Ok(())
    }

    pub fn write(&mut self, mut data: &[u8]) -> Outcome<()> {
        while !data.is_empty() {
            let Some(pieces) = &mut self.pieces else {
                data = self.take_map(data)?;
                continue;
            };
            if self.now.1 == 0 {
                self.now = pieces.next().ok_or_else(|| Fail::bad("tar"))?; // the sums agree
                continue;
            }
            let n = data
                .len()
                .min(usize::try_from(self.now.1).unwrap_or(usize::MAX));
            self.file
                .write_all_at(&data[..n], self.now.0)
                .map_err(|e| Fail::io("tar", &e))?;
            self.now = (self.now.0 + n as u64, self.now.1 - n as u64);
            self.left -= n as u64;
            data = &data[n..];
        }
        Ok(())
    }

    /// Gather the map, which fills whole blocks; returns what comes behind.
    fn take_map<'a>(&mut self, data: &'a [u8]) -> Outcome<&'a [u8]> {
        let n = data.len().min(BLOCK - self.text.len() % BLOCK);
        self.text.extend_from_slice(&data[..n]);
        self.left -= n as u64;
        if self.text.len().is_multiple_of(BLOCK) {
            if let Some(map) = parse(&self.text)? {
                self.begin(map)?;
                self.text = Vec::new();
            } else if self.text.len() >= MAX_MAP {
                return Err(Fail::bad("tar: the map of a file with holes is too long"));
            }
        }
        Ok(&data[n..])
    }

    /// The file is whole: what is behind its last piece is a hole.
    pub fn finish(mut self) -> Outcome<File> {
        if self.pieces.is_none() {
            return Err(Fail::bad("tar: a file with holes has no map"));
        }
        let file = &mut self.file;
        file.set_len(self.real).map_err(|e| Fail::io("tar", &e))?;
        Ok(self.file)
    }
}

/// A map of format 1.0: numbers, a line each, the first of them how many pieces there are. None while more must come.
fn parse(text: &[u8]) -> Outcome<Option<Vec<Piece>>> {
    let bad = || Fail::bad("tar: bad map of a file with holes");
    let mut lines = text.split(|c| *c == b'\n');
    lines.next_back(); // what follows the last line feed is not a whole line, or is padding
    let mut numbers = lines.map(|line| {
        let text = std::str::from_utf8(line).ok().filter(|t| t.len() <= 20);
        text.and_then(|t| t.parse::<u64>().ok()).ok_or_else(bad)
    });
    let Some(count) = numbers.next() else {
        return Ok(None);
    };
    let count = count?;
    if count > MAX_MAP as u64 / 4 {
        return Err(bad());
    }
    let mut map = Vec::new();
    for _ in 0..count {
        let (Some(offset), Some(length)) = (numbers.next(), numbers.next()) else {
            return Ok(None);
        };
        map.push((offset?, length?));
    }
    Ok(Some(map))
}

/// Where data lies in a file of this size; None when it has no holes worth a map, or its file system does not say.
pub fn pieces(file: &File, size: u64) -> Option<Vec<Piece>> {
    let mut found: Vec<Piece> = Vec::new();
    let mut at = 0u64;
    while at < size {
        let begin = match seek(file, at, libc::SEEK_DATA) {
            Ok(begin) if begin < size => begin,
            Ok(_) => break,
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => break, // nothing but a hole is left
            Err(_) => return None,
        };
        let end = if found.len() + 1 >= MAX_PIECES {
            size
        } else {
            seek(file, begin, libc::SEEK_HOLE).ok()?.min(size)
        };
        if end <= begin {
            return None; // it changes while we look
        }
        found.push((begin, end - begin));
        at = end;
    }
    if found == [(0, size)] {
        return None;
    }
    if found.last().map_or(0, |(o, l)| o + l) < size {
        found.push((size, 0)); // as GNU tar says that it ends with a hole
    }
    Some(found)
}

fn seek(file: &File, at: u64, whence: libc::c_int) -> io::Result<u64> {
    let at = libc::off_t::try_from(at).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    // SAFETY: plain call on an open descriptor; whoever reads the file gives its own offsets.
    let found = unsafe { libc::lseek(file.as_raw_fd(), at, whence) };
    if found < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(found as u64)
}

/// The map as it stands in an archive, in whole blocks.
pub fn text(pieces: &[Piece]) -> Vec<u8> {
    let mut out = format!("{}\n", pieces.len());
    for (offset, length) in pieces {
        out.push_str(&format!("{offset}\n{length}\n"));
    }
    let mut out = out.into_bytes();
    out.resize(out.len().next_multiple_of(BLOCK), 0);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::MetadataExt;
    use std::path::PathBuf;

    fn scratch(tag: &str) -> PathBuf {
        std::env::temp_dir().join(format!("guestd-sparse-{tag}-{}", std::process::id()))
    }

    fn holey(path: &PathBuf, size: u64, data: &[(u64, &[u8])]) -> File {
        let file = File::create_new(path).unwrap();
        file.set_len(size).unwrap();
        for (at, bytes) in data {
            file.write_all_at(bytes, *at).unwrap();
        }
        file.sync_all().unwrap();
        File::open(path).unwrap()
    }

    #[test]
    fn what_is_found_is_written_again_and_stays_small() {
        let (from, to) = (scratch("from"), scratch("to"));
        let _ = (fs::remove_file(&from), fs::remove_file(&to));
        let (size, block) = (64u64 << 20, [7u8; 8192]);
        let file = holey(&from, size, &[(1 << 20, &block), (40 << 20, &block)]);
        let map = pieces(&file, size).unwrap();
        let data: u64 = map.iter().map(|(_, l)| l).sum();
        assert!(data < 1 << 20, "{map:?}");
        assert_eq!(map.last(), Some(&(size, 0)));
        let mut all = text(&map);
        for (offset, length) in &map {
            let mut piece = vec![0u8; *length as usize];
            file.read_exact_at(&mut piece, *offset).unwrap();
            all.extend(piece);
        }
        for step in [1000, 1 << 20] {
            let _ = fs::remove_file(&to);
            let new = File::create_new(&to).unwrap();
            let mut writer = Writer::new(new, size, all.len() as u64, None).unwrap();
            for piece in all.chunks(step) {
                writer.write(piece).unwrap();
            }
            let new = writer.finish().unwrap();
            new.sync_all().unwrap();
            let meta = new.metadata().unwrap();
            assert_eq!(meta.size(), size);
            assert!(meta.blocks() * 512 < 1 << 20);
            assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
        }
        fs::remove_file(&from).unwrap();
        fs::remove_file(&to).unwrap();
    }

    #[test]
    fn a_file_without_holes_has_no_map() {
        let path = scratch("full");
        let _ = fs::remove_file(&path);
        assert_eq!(pieces(&holey(&path, 5000, &[(0, &[1; 5000])]), 5000), None);
        fs::remove_file(&path).unwrap();
    }

    /// As people's own archives have it: GNU tar's usual format, with more pieces than a header holds, and pax.
    #[test]
    fn archives_of_gnu_tar_are_unpacked() {
        use crate::streams::Sink;
        let (from, to) = (scratch("gnu-from"), scratch("gnu-to"));
        for format in ["gnu", "pax"] {
            let _ = (fs::remove_dir_all(&from), fs::remove_dir_all(&to));
            fs::create_dir(&from).unwrap();
            let data: Vec<(u64, &[u8])> = (1..40).map(|n| (n << 20, &b"data"[..])).collect();
            holey(&from.join("disk"), 64 << 20, &data);
            fs::write(from.join("next"), "text").unwrap();
            let archive = std::process::Command::new("tar")
                .args(["-S", "--format", format, "-cf", "-", "-C"])
                .arg(&from)
                .args(["disk", "next"])
                .output()
                .unwrap()
                .stdout;
            assert!(archive.len() < 4 << 20);
            let mut sink = Box::new(crate::tar::open(&to).unwrap());
            for piece in archive.chunks(7777) {
                sink.write(piece).unwrap();
            }
            sink.finish().unwrap();
            let whole = fs::read(to.join("disk")).unwrap();
            assert!(whole == fs::read(from.join("disk")).unwrap(), "{format}");
            assert_eq!(fs::read(to.join("next")).unwrap(), b"text");
        }
        fs::remove_dir_all(&from).unwrap();
        fs::remove_dir_all(&to).unwrap();
    }

    #[test]
    fn maps_that_lie_are_refused() {
        let path = scratch("lies");
        let wrong = |real: u64, size: u64, map: &[Piece]| {
            let _ = fs::remove_file(&path);
            let file = File::create_new(&path).unwrap();
            Writer::new(file, real, size, Some(map.to_vec())).is_err()
        };
        assert!(!wrong(100, 20, &[(0, 10), (50, 10)]));
        assert!(wrong(100, 30, &[(0, 10), (50, 10)]));
        assert!(wrong(100, 20, &[(50, 10), (0, 10)]));
        assert!(wrong(100, 20, &[(95, 20)]));
        assert!(wrong(100, 20, &[(u64::MAX, 20)]));
        for bad in ["x\n", "1\n5\nx\n", "-1\n", "99999999\n"] {
            let mut text = bad.as_bytes().to_vec();
            text.resize(BLOCK, 0);
            assert!(parse(&text).is_err(), "{bad}");
        }
        assert_eq!(parse(b"2\n0\n1\n").unwrap(), None);
        assert_eq!(parse(b"1\n0\n1\n\0\0").unwrap(), Some(vec![(0, 1)]));
        fs::remove_file(&path).unwrap();
    }
}
