//! A large file on its way in, written past the page cache: pages that only pass through would cost the guest a third of
//! the copy's time, push out what its programs use, and stay in its memory, which is in every snapshot.
//!
//! Whole pieces go straight from an aligned buffer (`O_DIRECT`), what is left at the end the usual way. A file system that
//! cannot do so (tmpfs) says so at the first piece, and is written the usual way.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;

use crate::sys;

/// Smaller files are likely to be read soon.
const FROM_BYTES: u64 = 4 << 20;
const PIECE: usize = 256 << 10;
const ALIGN: usize = 4096;

/// Takes a file's bytes in their order.
pub enum Writer {
    Plain(File),
    Direct(Direct),
}

pub struct Direct {
    file: File,
    buffer: Vec<u8>,
    start: usize, // where in the buffer the aligned part begins
    held: usize,
}

impl Writer {
    /// `size`: how long the file will be.
    pub fn new(file: File, size: u64) -> Writer {
        if size < FROM_BYTES || set_direct(&file, true).is_err() {
            return Writer::Plain(file);
        }
        let buffer = vec![0u8; PIECE + ALIGN];
        let start = buffer.as_ptr().align_offset(ALIGN);
        Writer::Direct(Direct {
            file,
            buffer,
            start,
            held: 0,
        })
    }

    pub fn write(&mut self, data: &[u8]) -> io::Result<()> {
        match self {
            Writer::Plain(file) => file.write_all(data),
            Writer::Direct(direct) => direct.write(data),
        }
    }

    /// Write what is held; the file is whole then.
    pub fn finish(self) -> io::Result<File> {
        match self {
            Writer::Plain(file) => Ok(file),
            Writer::Direct(mut direct) => {
                set_direct(&direct.file, false)?;
                direct.give()?;
                direct.buffer.fill(0); // freed memory of zeros costs a snapshot nothing
                std::hint::black_box(&direct.buffer);
                Ok(direct.file)
            }
        }
    }
}

impl Direct {
    fn write(&mut self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let n = data.len().min(PIECE - self.held);
            let at = self.start + self.held;
            self.buffer[at..at + n].copy_from_slice(&data[..n]);
            self.held += n;
            data = &data[n..];
            if self.held == PIECE {
                self.give()?;
            }
        }
        Ok(())
    }

    fn give(&mut self) -> io::Result<()> {
        let mut rest = &self.buffer[self.start..self.start + self.held];
        while !rest.is_empty() {
            match self.file.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    rest = &rest[n..];
                    if n % ALIGN != 0 {
                        set_direct(&self.file, false)?; // a full disk: what follows is aligned no more
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) && is_direct(&self.file)? => {
                    set_direct(&self.file, false)?;
                }
                Err(e) => return Err(e),
            }
        }
        self.held = 0;
        Ok(())
    }
}

fn flags(file: &File) -> io::Result<libc::c_int> {
    // SAFETY: plain fcntl on a descriptor that is ours.
    sys::check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) })
}

fn is_direct(file: &File) -> io::Result<bool> {
    Ok(flags(file)? & libc::O_DIRECT != 0)
}

fn set_direct(file: &File, on: bool) -> io::Result<()> {
    let now = flags(file)?;
    let wanted = if on {
        now | libc::O_DIRECT
    } else {
        now & !libc::O_DIRECT
    };
    // SAFETY: as above.
    sys::check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, wanted) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::PathBuf;

    fn bytes(n: usize) -> Vec<u8> {
        (0..n).map(|i| (i * 31 + i / 4099) as u8).collect()
    }

    fn written(folder: &str, size: usize, step: usize) {
        let path =
            PathBuf::from(folder).join(format!("guestd-bulk-{}-{size}-{step}", std::process::id()));
        let data = bytes(size);
        let mut writer = Writer::new(File::create(&path).unwrap(), size as u64);
        for piece in data.chunks(step) {
            writer.write(piece).unwrap();
        }
        let file = writer.finish().unwrap();
        assert!(!is_direct(&file).unwrap());
        assert!(fs::read(&path).unwrap() == data, "{folder} {size} {step}");
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn every_length_arrives_whole_on_every_file_system() {
        let large = FROM_BYTES as usize;
        let here = std::env::temp_dir();
        for folder in [here.to_str().unwrap(), "/dev/shm"] {
            for (size, step) in [
                (0, 1),
                (large - 1, 32 << 10),
                (large, 32 << 10),
                (large + 1, 32 << 10),
                (large + PIECE - 1, 1000),
                (large + 5 * ALIGN + 17, PIECE + 3),
            ] {
                written(folder, size, step);
            }
        }
    }

    #[test]
    fn one_that_ends_early_is_written_as_far_as_it_came() {
        let path = std::env::temp_dir().join(format!("guestd-bulk-early-{}", std::process::id()));
        let mut writer = Writer::new(File::create(&path).unwrap(), FROM_BYTES);
        writer.write(b"short").unwrap();
        writer.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"short");
        fs::remove_file(&path).unwrap();
    }
}
