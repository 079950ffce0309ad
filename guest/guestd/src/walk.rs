//! Opening a folder below a root that links and ".." cannot leave, step by step: for kernels without openat2 (gVisor's).
//!
//! Unlike openat2 this is no match for somebody who swaps folders for links meanwhile; that somebody is inside the same
//! machine, with the same rights, and gains nothing.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use crate::sys;

const MAX_LINKS: usize = 40;

/// Return the folder that `path` means with `root` as "/".
pub fn folder(root: BorrowedFd<'_>, path: &str) -> io::Result<OwnedFd> {
    let mut above: Vec<OwnedFd> = Vec::new(); // from below the root to where we are
    let mut todo: Vec<String> = parts(path);
    let mut links = 0;
    while let Some(name) = todo.pop() {
        if name == ".." {
            above.pop();
            continue;
        }
        let here = above.last().map_or(root.as_raw_fd(), AsRawFd::as_raw_fd);
        let c = sys::cstr(&name)?;
        let flags = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        // SAFETY: the string outlives the call.
        let found = sys::own(unsafe { libc::openat(here, c.as_ptr(), flags) })?;
        let at = PathBuf::from(format!("/proc/self/fd/{here}/{name}"));
        let kind = fs::symlink_metadata(&at)?.file_type();
        if kind.is_dir() {
            above.push(found);
        } else if kind.is_symlink() {
            links += 1;
            if links > MAX_LINKS {
                return Err(io::Error::from_raw_os_error(libc::ELOOP));
            }
            let target = fs::read_link(&at)?.to_string_lossy().into_owned();
            if target.starts_with('/') {
                above.clear();
            }
            todo.extend(parts(&target));
        } else {
            return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
        }
    }
    match above.pop() {
        Some(dir) => Ok(dir),
        None => root.try_clone_to_owned(),
    }
}

/// The steps of a path, the last one first.
fn parts(path: &str) -> Vec<String> {
    let steps = path.split('/').filter(|s| !s.is_empty() && *s != ".");
    steps.rev().map(str::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::{symlink, MetadataExt};

    #[test]
    fn nothing_leads_out_of_the_root() {
        let base = std::env::temp_dir().join(format!("guestd-walk-{}", std::process::id()));
        let _ = fs::remove_dir_all(&base);
        fs::create_dir_all(base.join("root/a/b")).unwrap();
        fs::create_dir_all(base.join("b")).unwrap();
        fs::write(base.join("root/file"), "").unwrap();
        for (link, target) in [
            ("absolute", "/a"),
            ("up", "../../../b"),
            ("inside", "a/../a/b"),
            ("loop", "loop"),
        ] {
            symlink(target, base.join("root").join(link)).unwrap();
        }
        let root = fs::File::open(base.join("root")).unwrap();
        let node = |path: &str| {
            let dir = folder(root.as_fd(), path)?;
            Ok::<u64, io::Error>(fs::File::from(dir).metadata()?.ino())
        };
        let is = |path: &str| fs::metadata(base.join("root").join(path)).unwrap().ino();
        for path in ["", ".", "..", "a/../..", "/"] {
            assert_eq!(node(path).unwrap(), is(""), "{path}");
        }
        assert_eq!(node("absolute/b").unwrap(), is("a/b"));
        assert_eq!(node("inside").unwrap(), is("a/b"));
        assert_eq!(node("up").unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(node("none").unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(
            node("file").unwrap_err().raw_os_error(),
            Some(libc::ENOTDIR)
        );
        assert_eq!(node("loop").unwrap_err().raw_os_error(), Some(libc::ELOOP));
        fs::remove_dir_all(&base).unwrap();
    }
}
