//! Places that the workload may read and not write: read-only volumes. The kernel refuses, so a program hears of it at once,
//! as it would of a file system that is mounted read-only. The host goes on writing: a folder has a second, writable mount
//! behind it, a file is opened for the moment (it is replaced by another, which a mount over it would not let happen).
//!
//! What is sealed lasts as long as the kernel's memory: over snapshots, not over a boot, after which the host asks anew.
//! The workload's root can undo it, as it can undo anything in its machine; nothing outside depends on it.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::fail::{Fail, Outcome};
use crate::json::{obj, Value};
use crate::server::Server;
use crate::sys;

/// Volumes of one machine at most, and some room.
const MAX_SEALS: usize = 32;

/// One sealed place, and where it is written.
pub struct Seal {
    path: PathBuf,
    behind: PathBuf,
}

impl Server {
    /// Make a folder or file read-only for the workload and answer where the host writes it; again is well. `open`: undo it,
    /// for a file.
    pub fn seal(&mut self, path: &Path, open: bool) -> Outcome<Value> {
        let known = self.seals.iter().position(|s| s.path == path);
        if open {
            if let Some(at) = known {
                lift(&self.seals[at])?;
                self.seals.swap_remove(at);
            }
            return Ok(obj([]));
        }
        let at = match known {
            Some(at) => at,
            None => {
                let seal = self.shut(path)?;
                self.seals.push(seal);
                self.seals.len() - 1
            }
        };
        Ok(obj([(
            "behind",
            self.seals[at].behind.to_string_lossy().into_owned().into(),
        )]))
    }

    fn shut(&mut self, path: &Path) -> Outcome<Seal> {
        let fail = |e: io::Error| Fail::io(&path.to_string_lossy(), &e);
        let (true, Some(run)) = (self.opts.own_machine, &self.opts.run_dir) else {
            return Err(Fail::new("unsupported", "nothing is mounted here"));
        };
        if self.seals.len() >= MAX_SEALS {
            return Err(Fail::bad(format!("over {MAX_SEALS} places are read-only")));
        }
        let meta = fs::symlink_metadata(path).map_err(fail)?;
        if meta.is_file() {
            read_only(path).map_err(unsupported)?;
            return Ok(Seal {
                path: path.to_path_buf(),
                behind: path.to_path_buf(),
            });
        }
        if !meta.is_dir() {
            return Err(Fail::bad(format!(
                "{}: neither a folder nor a file",
                path.display()
            )));
        }
        let private = run.join("behind");
        self.serial = self.serial.wrapping_add(1);
        let behind = private.join(self.serial.to_string());
        fs::create_dir_all(&behind).map_err(fail)?;
        fs::set_permissions(&private, PermissionsExt::from_mode(0o700)).map_err(fail)?;
        bind(path, &behind).map_err(unsupported)?;
        if let Err(e) = read_only(path) {
            sys::unmount(&behind.to_string_lossy()).map_err(fail)?;
            fs::remove_dir(&behind).map_err(fail)?;
            return Err(unsupported(e));
        }
        Ok(Seal {
            path: path.to_path_buf(),
            behind,
        })
    }
}

fn lift(seal: &Seal) -> Outcome<()> {
    if seal.path != seal.behind {
        return Err(Fail::bad("a folder is written behind its seal"));
    }
    match sys::unmount(&seal.path.to_string_lossy()) {
        // The workload's root was first.
        Err(e) if !matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => {
            Err(Fail::io(&seal.path.to_string_lossy(), &e))
        }
        _ => Ok(()),
    }
}

fn bind(from: &Path, to: &Path) -> io::Result<()> {
    let (from, to) = (from.to_string_lossy(), to.to_string_lossy());
    sys::mount(&from, &to, "", libc::MS_BIND, "")
}

fn read_only(path: &Path) -> io::Result<()> {
    bind(path, path)?;
    let name = path.to_string_lossy();
    let flags = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY;
    sys::mount("", &name, "", flags, "").inspect_err(|_| {
        let _ = sys::unmount(&name); // the first error says more
    })
}

fn unsupported(e: io::Error) -> Fail {
    let why = Fail::io("mount", &e).message;
    Fail::new(
        "unsupported",
        format!("this machine's kernel mounts nothing read-only ({why})"),
    )
}
