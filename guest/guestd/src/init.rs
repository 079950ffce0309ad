//! PID 1's first second: file systems, modules, the root, then the port. Runs once, before anything else exists.
//!
//! The initramfs holds this binary as /init and uncompressed modules named one path a line in /modules/order.
//! Root: a read-only image and, above it, an overlay whose upper and work folders live on the writable disk. /root and
//! /home are folders of that disk proper (`home/root`, `home/home`), so that they can follow to another image.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{symlink, DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use crate::fail::Fail;
use crate::{card, sys, vsock};

const DEVICE_WAIT: u32 = 3000; // times 2 ms: virtio devices appear while their modules settle
const ROOT: &str = "/newroot";
const DISK: &str = "/disk";

/// What set-up leaves for the server.
pub struct Ready {
    pub port: OwnedFd,
    /// The file system to sync before a freeze.
    pub disk: OwnedFd,
}

/// Tell the console, in one line. Silence when there is none.
pub fn say(text: &str) {
    if let Ok(mut f) = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open("/dev/console")
    {
        let _ = f.write_all(format!("guestd: {text}\n").as_bytes()); // nobody else to tell
    }
}

/// Set everything up; an error here means that the machine cannot be used.
pub fn run() -> Result<Ready, Fail> {
    base_mounts()?;
    stdio();
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    load_modules();
    let disk = match param(&cmdline, "recess.root") {
        Some(root) => enter_root(root, &cmdline)?,
        None => open_dir("/")?,
    };
    runtime_mounts()?;
    limits();
    loopback_up().map_err(|e| Fail::io("lo", &e))?;
    let plan = param(&cmdline, "recess.net")
        .map(card::Plan::parse)
        .transpose()?;
    if let Some(plan) = &plan {
        card::up(plan)?;
    }
    network_files(&card::resolver(plan.as_ref()));
    identity_files();
    let port = match param(&cmdline, "recess.vsock") {
        Some(number) => vsock::enter(vsock_port(number)?)?,
        None => open_port("recess")?,
    };
    Ok(Ready { port, disk })
}

/// The value of `key=value` on the kernel's command line.
pub fn param<'a>(cmdline: &'a str, key: &str) -> Option<&'a str> {
    cmdline
        .split_ascii_whitespace()
        .find_map(|w| w.strip_prefix(key)?.strip_prefix('='))
        .filter(|v| !v.is_empty())
}

fn mount(src: &str, dst: &str, kind: &str, flags: libc::c_ulong, data: &str) -> Result<(), Fail> {
    let _ = fs::create_dir_all(dst); // on a read-only root it exists already; the mount tells otherwise
    sys::mount(src, dst, kind, flags, data).map_err(|e| Fail::io(&format!("mount {dst}"), &e))
}

fn base_mounts() -> Result<(), Fail> {
    let hard = libc::MS_NOSUID | libc::MS_NOEXEC | libc::MS_NODEV;
    mount("proc", "/proc", "proc", hard, "")?;
    mount("sys", "/sys", "sysfs", hard, "")?;
    mount("dev", "/dev", "devtmpfs", libc::MS_NOSUID, "mode=0755")
}

/// Descriptors 0, 1, 2 must exist, else pipes would take their numbers.
fn stdio() {
    let console = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open("/dev/console");
    if let Ok(f) = console.or_else(|_| OpenOptions::new().read(true).write(true).open("/dev/null"))
    {
        for n in 0..3 {
            // SAFETY: plain dup2; the numbers are nobody's yet.
            unsafe { libc::dup2(f.as_raw_fd(), n) };
        }
        if f.as_raw_fd() <= 2 {
            std::mem::forget(f); // it is one of the three
        }
    }
}

fn load_modules() {
    let Ok(order) = fs::read_to_string("/modules/order") else {
        return;
    };
    for line in order.lines().map(str::trim).filter(|l| !l.is_empty()) {
        let path = if line.starts_with('/') {
            line.to_string()
        } else {
            format!("/modules/{line}")
        };
        let loaded = File::open(&path).and_then(|f| {
            // SAFETY: a valid descriptor and an empty, terminated parameter string.
            let ret =
                unsafe { libc::syscall(libc::SYS_finit_module, f.as_raw_fd(), c"".as_ptr(), 0) };
            sys::check(ret as libc::c_int)
        });
        match loaded {
            Err(e) if e.raw_os_error() != Some(libc::EEXIST) => say(&format!("module {path}: {e}")),
            _ => {}
        }
    }
}

/// Wait for a file to appear, within a bound.
pub fn await_path(path: &str) -> Result<(), Fail> {
    for _ in 0..DEVICE_WAIT {
        if Path::new(path).exists() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(2)); // devtmpfs has no event without a netlink socket
    }
    Err(Fail::new("failed", format!("{path} did not appear")))
}

/// Mount root and disk, overlay them, move in, free the initramfs. Returns the disk's root folder for syncfs.
fn enter_root(root: &str, cmdline: &str) -> Result<OwnedFd, Fail> {
    await_path(root)?;
    mount(
        root,
        "/image",
        param(cmdline, "recess.rootfs").unwrap_or("erofs"),
        libc::MS_RDONLY,
        "",
    )?;
    match param(cmdline, "recess.disk") {
        Some(disk) => {
            await_path(disk)?;
            mount(
                disk,
                DISK,
                param(cmdline, "recess.diskfs").unwrap_or("ext4"),
                libc::MS_NOATIME,
                "discard",
            )?;
        }
        None => mount("disk", DISK, "tmpfs", 0, "mode=0755")?,
    }
    let disk = open_dir(DISK)?;
    for d in ["upper", "work"] {
        fs::create_dir_all(format!("{DISK}/{d}")).map_err(|e| Fail::io(d, &e))?;
    }
    let data = format!("lowerdir=/image,upperdir={DISK}/upper,workdir={DISK}/work");
    mount("overlay", ROOT, "overlay", 0, &data)?;
    homes().map_err(|e| Fail::io("home folders", &e))?;
    for d in ["dev", "proc", "sys"] {
        mount(
            &format!("/{d}"),
            &format!("{ROOT}/{d}"),
            "",
            libc::MS_MOVE,
            "",
        )?;
    }
    let _ = fs::remove_dir_all("/modules"); // memory given back; what stays only costs a little
    let _ = fs::remove_file("/init");
    let moved = (|| {
        std::env::set_current_dir(ROOT)?;
        sys::mount(".", "/", "", libc::MS_MOVE, "")?;
        std::os::unix::fs::chroot(".")?;
        std::env::set_current_dir("/")
    })();
    moved.map_err(|e: io::Error| Fail::io("moving into the root", &e))?;
    Ok(disk)
}

fn open_dir(path: &str) -> Result<OwnedFd, Fail> {
    let f = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY)
        .open(path);
    f.map(OwnedFd::from).map_err(|e| Fail::io(path, &e))
}

/// Give the homes their place on the disk, filled from the image once. Crash-safe: filled under another name, renamed
/// when whole; a crash in between starts over.
fn homes() -> io::Result<()> {
    let (made, temp) = (format!("{DISK}/home"), format!("{DISK}/home.new"));
    if !Path::new(&made).exists() {
        if Path::new(&temp).exists() {
            fs::remove_dir_all(&temp)?;
        }
        fs::create_dir_all(&temp)?;
        for name in ["root", "home"] {
            let (from, to) = (format!("{ROOT}/{name}"), format!("{temp}/{name}"));
            if Path::new(&from).is_dir() {
                copy_tree(Path::new(&from), Path::new(&to), 0)?;
            } else {
                fs::DirBuilder::new()
                    .mode(if name == "root" { 0o700 } else { 0o755 })
                    .create(&to)?;
            }
        }
        fs::rename(&temp, &made)?;
    }
    for name in ["root", "home"] {
        let at = format!("{ROOT}/{name}");
        let _ = fs::create_dir_all(&at); // the bind mount below tells if it is missing
        sys::mount(&format!("{made}/{name}"), &at, "", libc::MS_BIND, "")?;
    }
    Ok(())
}

/// Copy folders, files and links with mode and owner; anything else (devices, sockets) is left out.
fn copy_tree(from: &Path, to: &Path, depth: usize) -> io::Result<()> {
    let meta = fs::symlink_metadata(from)?;
    if meta.is_symlink() {
        symlink(fs::read_link(from)?, to)?;
        return std::os::unix::fs::lchown(to, Some(meta.uid()), Some(meta.gid()));
    }
    if meta.is_dir() {
        fs::create_dir(to)?;
        if depth < 64 {
            for entry in fs::read_dir(from)? {
                let entry = entry?;
                copy_tree(&entry.path(), &to.join(entry.file_name()), depth + 1)?;
            }
        }
    } else if meta.is_file() {
        fs::copy(from, to)?;
    } else {
        return Ok(());
    }
    std::os::unix::fs::lchown(to, Some(meta.uid()), Some(meta.gid()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(meta.mode() & 0o7777))
}

fn runtime_mounts() -> Result<(), Fail> {
    let ns = libc::MS_NOSUID | libc::MS_NODEV;
    mount(
        "devpts",
        "/dev/pts",
        "devpts",
        libc::MS_NOSUID | libc::MS_NOEXEC,
        "gid=5,mode=620,ptmxmode=666",
    )?;
    mount("shm", "/dev/shm", "tmpfs", ns, "mode=1777")?;
    mount("run", "/run", "tmpfs", ns, "mode=0755")?;
    mount(
        "cgroup",
        "/sys/fs/cgroup",
        "cgroup2",
        ns | libc::MS_NOEXEC,
        "",
    )?;
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        let _ = symlink(target, link); // the kernel may have made them
    }
    clear_tmp();
    Ok(())
}

/// /tmp is on the disk (memory is dearer) and starts empty, as on any machine that boots.
fn clear_tmp() {
    let _ = fs::create_dir_all("/tmp"); // exists in every usual image
    let _ = fs::set_permissions("/tmp", fs::Permissions::from_mode(0o1777)); // best effort on odd images
    let Ok(entries) = fs::read_dir("/tmp") else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let is_dir = entry.file_type().is_ok_and(|t| t.is_dir());
        let _ = if is_dir {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        }; // old rubbish may stay
    }
}

fn limits() {
    let files = libc::rlimit {
        rlim_cur: 4096,
        rlim_max: 524_288,
    };
    // SAFETY: plain call. A refusal leaves the kernel's defaults.
    unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &files) };
    let _ = fs::write("/proc/self/oom_score_adj", "-1000"); // jobs set their own, higher
}

fn loopback_up() -> io::Result<()> {
    let (s, mut req) = sys::interface("lo")?;
    req.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request is plain data and outlives the call.
    sys::check(unsafe { libc::ioctl(s.as_raw_fd(), libc::SIOCSIFFLAGS, &req) }).map(drop)
}

fn network_files(resolver: &str) {
    let _ = fs::create_dir_all("/etc"); // an image without /etc is odd but bootable
    let _ = fs::remove_file("/etc/resolv.conf"); // often a link into /run
    for (path, text) in [
        ("/etc/resolv.conf", resolver),
        ("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
    ] {
        if let Err(e) = fs::write(path, text) {
            say(&format!("{path}: {e}"));
        }
    }
}

/// What differs between two machines of one template lies in memory, mounted over the image's files as Docker does it:
/// a thaw rewrites it in place, and the disk stays equal to the template's.
fn identity_files() {
    const HOME: &str = "/run/recess/etc";
    let _ = fs::create_dir_all(HOME); // a failure shows below, file by file
    for name in ["hostname", "hosts", "machine-id"] {
        let (own, target) = (format!("{HOME}/{name}"), format!("/etc/{name}"));
        let text = fs::read(&target).unwrap_or_default(); // an image may lack it
        let mounted = fs::write(&own, &text)
            .and_then(|()| {
                if fs::metadata(&target).is_err() {
                    fs::write(&target, &text)?;
                }
                sys::mount(&own, &target, "", libc::MS_BIND, "")
            })
            .err();
        if let Some(e) = mounted {
            say(&format!("{target}: {e}"));
        }
    }
}

/// Find the virtio port of this name and open it.
fn open_port(name: &str) -> Result<OwnedFd, Fail> {
    for _ in 0..DEVICE_WAIT {
        if let Some(device) = find_port(name) {
            await_path(&device)?;
            let f = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&device);
            return f.map(OwnedFd::from).map_err(|e| Fail::io(&device, &e));
        }
        std::thread::sleep(Duration::from_millis(2)); // see await_path
    }
    Err(Fail::new("failed", format!("no virtio port named {name}")))
}

fn vsock_port(number: &str) -> Result<u32, Fail> {
    let wrong = || Fail::new("failed", format!("no vsock port: {number}"));
    number.parse().map_err(|_| wrong())
}

fn find_port(name: &str) -> Option<String> {
    fs::read_dir("/sys/class/virtio-ports")
        .ok()?
        .flatten()
        .find_map(|entry| {
            let text = fs::read_to_string(entry.path().join("name")).ok()?;
            (text.trim() == name).then(|| format!("/dev/{}", entry.file_name().to_string_lossy()))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_words() {
        let line = "console=ttyS0 quiet recess.root=/dev/vda recess.rootfs=erofs recess.disk=";
        assert_eq!(param(line, "recess.root"), Some("/dev/vda"));
        assert_eq!(param(line, "recess.rootfs"), Some("erofs"));
        assert_eq!(param(line, "recess.disk"), None);
        assert_eq!(param(line, "quiet"), None);
    }

    #[test]
    fn trees_are_copied_whole() {
        let base = std::env::temp_dir().join(format!("guestd-copy-{}", std::process::id()));
        let _ = fs::remove_dir_all(&base);
        fs::create_dir_all(base.join("a/b")).unwrap();
        fs::write(base.join("a/b/f"), "text").unwrap();
        fs::set_permissions(base.join("a/b/f"), fs::Permissions::from_mode(0o640)).unwrap();
        symlink("b/f", base.join("a/l")).unwrap();
        copy_tree(&base.join("a"), &base.join("c"), 0).unwrap();
        assert_eq!(fs::read_to_string(base.join("c/l")).unwrap(), "text");
        assert_eq!(
            fs::metadata(base.join("c/b/f")).unwrap().mode() & 0o7777,
            0o640
        );
        fs::remove_dir_all(&base).unwrap();
    }
}
