//! A bounded file of what a VM says: the newest bytes win, so that a guest that floods its console fills no disk.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use crate::sys;

const CHUNK: usize = 65536;

/// A pipe from the VMM and the file that it is drained into.
pub struct Tail {
    pub pipe: OwnedFd,
    file: File,
    size: u64,
    limit: u64,
}

impl Tail {
    /// `limit` is the file's greatest size in bytes; when it is reached the newest half is kept.
    pub fn new(pipe: OwnedFd, path: &Path, limit: u64) -> io::Result<Tail> {
        sys::set_nonblocking(&pipe)?;
        Ok(Tail {
            pipe,
            file: new_file(path)?,
            size: 0,
            limit,
        })
    }

    /// Move what is there now. Returns false at the end of the pipe. A full disk loses words, never the VM.
    pub fn drain(&mut self) -> bool {
        let mut buffer = [0u8; CHUNK];
        loop {
            match sys::read_now(&self.pipe, &mut buffer) {
                Ok(Some(0)) | Err(_) => return false,
                Ok(None) => return true,
                Ok(Some(count)) => {
                    let _ = self.append(&buffer[..count]);
                    if count < CHUNK {
                        return true;
                    }
                }
            }
        }
    }

    /// Go on in another file, which begins with what this one holds.
    pub fn move_to(&mut self, path: &Path) -> io::Result<()> {
        let so_far = self.last(self.limit as usize)?;
        let mut file = new_file(path)?;
        file.write_all(&so_far)?;
        (self.file, self.size) = (file, so_far.len() as u64);
        Ok(())
    }

    fn append(&mut self, data: &[u8]) -> io::Result<()> {
        if self.size + data.len() as u64 > self.limit {
            let kept = self.last((self.limit / 2) as usize)?;
            self.file.seek(SeekFrom::Start(0))?;
            self.file.write_all(&kept)?;
            self.file.set_len(kept.len() as u64)?;
            self.size = kept.len() as u64;
        }
        self.file.seek(SeekFrom::Start(self.size))?;
        self.file.write_all(data)?;
        self.size += data.len() as u64;
        Ok(())
    }

    /// The last `limit` bytes.
    pub fn last(&mut self, limit: usize) -> io::Result<Vec<u8>> {
        let from = self.size.saturating_sub(limit as u64);
        self.file.seek(SeekFrom::Start(from))?;
        let mut out = vec![0; (self.size - from) as usize];
        self.file.read_exact(&mut out)?;
        Ok(out)
    }
}

fn new_file(path: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn keeps_the_newest_and_stays_small() {
        let path = std::env::temp_dir().join(format!("keeper-tail-{}", std::process::id()));
        let (read, write) = sys::pipe().unwrap();
        let mut tail = Tail::new(read, &path, 100_000).unwrap();
        let mut pipe = File::from(write);
        for round in 0..40u8 {
            pipe.write_all(&vec![round; 10_000]).unwrap();
            assert!(tail.drain());
        }
        assert!(std::fs::metadata(&path).unwrap().len() <= 100_000);
        assert_eq!(tail.last(10_000).unwrap(), vec![39; 10_000]);
        let moved = path.with_extension("moved");
        tail.move_to(&moved).unwrap();
        pipe.write_all(&[40; 5]).unwrap();
        assert!(tail.drain());
        let held = std::fs::read(&moved).unwrap();
        assert_eq!(held[held.len() - 6..], [39, 40, 40, 40, 40, 40]);
        std::fs::remove_file(&moved).unwrap();
        drop(pipe);
        // A child that another test forks holds the pipe for a moment, too: the end comes when it has closed it.
        let mut end = libc::pollfd {
            fd: tail.pipe.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid entry.
        assert_eq!(unsafe { libc::poll(&raw mut end, 1, 10_000) }, 1);
        assert!(!tail.drain());
        std::fs::remove_file(&path).unwrap();
    }
}
