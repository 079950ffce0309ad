//! What a machine learns when it wakes: randomness, time, identity, generation. Fail closed: the first error ends the
//! thaw and the workload stays frozen (docs/internals/clones.md).

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::fail::{Fail, Outcome};
use crate::json::Value;
use crate::sys;

const HOOK_MS: u64 = 5000;
const ALL_HOOKS_MS: u64 = 8000;
/// The longest identity file that is looked at; what stands behind it in /etc/hosts is dropped.
const MAX_FILE: usize = 64 * 1024;

/// A parsed, validated thaw request.
#[derive(Debug, PartialEq, Eq)]
pub struct Thaw {
    pub wall_ns: i64,
    pub entropy: [u8; 32],
    pub generation: String,
    pub epoch: i64,
    pub hostname: String,
    pub machine_id: String,
    pub env: Vec<(String, String)>,
    /// What the machine proves itself with from now on; none: what it has stays.
    pub token: Option<String>,
}

/// Where identity goes. In process mode the host's own identity is never touched.
pub struct Places<'a> {
    pub run_dir: Option<&'a Path>,
    pub hooks: PathBuf,
    pub own_machine: bool,
    pub own_kernel: bool,
}

fn hex(text: &str) -> Option<[u8; 32]> {
    let bytes = text.as_bytes();
    if bytes.len() != 64 || !bytes.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let mut out = [0u8; 32];
    for (i, o) in out.iter_mut().enumerate() {
        *o = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    Some(out)
}

fn is_hostname(s: &str) -> bool {
    (1..=63).contains(&s.len())
        && s.bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.')
}

fn is_token(s: &str) -> bool {
    (1..=128).contains(&s.len())
        && s.bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// Check names and values of an environment: no NUL, no newline (the file is line based), no "=" in names.
pub fn environment(v: Option<&Value>) -> Outcome<Vec<(String, String)>> {
    let Some(v) = v else { return Ok(Vec::new()) };
    let items = v
        .as_obj()
        .ok_or_else(|| Fail::bad("env is not an object"))?;
    items
        .iter()
        .map(|(k, v)| match v.as_str() {
            Some(s) if !k.is_empty() && !k.contains(['=', '\0', '\n']) && !s.contains('\0') => {
                Ok((k.clone(), s.to_string()))
            }
            _ => Err(Fail::bad(format!("not an environment variable: {k:?}"))),
        })
        .collect()
}

/// Read a request's body.
pub fn parse(v: &Value) -> Outcome<Thaw> {
    let text = |key: &str| v.get(key).and_then(Value::as_str).map(str::to_string);
    let number = |key: &str| v.get(key).and_then(Value::as_int).filter(|n| *n >= 0);
    let bad = |key: &str| Fail::bad(format!("thaw: {key} is missing or wrong"));
    let machine_id =
        text("machine_id").filter(|s| s.len() == 32 && s.bytes().all(|b| b.is_ascii_hexdigit()));
    let env = environment(v.get("env"))?;
    if env.iter().any(|(_, v)| v.contains('\n')) {
        return Err(bad("env"));
    }
    let token = match v.get("token") {
        None => None,
        Some(v) => {
            let plain = v.as_str().filter(|s| is_token(s));
            Some(plain.ok_or_else(|| bad("token"))?.to_string())
        }
    };
    Ok(Thaw {
        wall_ns: number("wall_ns").ok_or_else(|| bad("wall_ns"))?,
        entropy: text("entropy")
            .and_then(|s| hex(&s))
            .ok_or_else(|| bad("entropy"))?,
        generation: text("generation")
            .filter(|s| is_token(s))
            .ok_or_else(|| bad("generation"))?,
        epoch: number("epoch").ok_or_else(|| bad("epoch"))?,
        hostname: text("hostname")
            .filter(|s| is_hostname(s))
            .ok_or_else(|| bad("hostname"))?,
        machine_id: machine_id.ok_or_else(|| bad("machine_id"))?,
        env,
        token,
    })
}

/// The files that every thaw touches, opened at the first one and kept: a fork's first milliseconds run on a cold
/// machine, where each path that the kernel walks costs more than the write behind it.
#[derive(Default)]
pub struct Kept {
    files: BTreeMap<PathBuf, File>,
    urandom: Option<File>,
}

/// Do everything but unfreeze, in the order of the contract: nothing of the workload runs before the last step.
pub fn apply(t: &Thaw, places: &Places, kept: &mut Kept) -> Outcome<()> {
    if places.own_kernel {
        kept.reseed(&t.entropy)?;
        set_clock(t.wall_ns)?;
    }
    if places.own_machine {
        kept.identity(t)?;
    }
    if let Some(run) = places.run_dir {
        kept.rewrite(&run.join("generation"), &format!("{}\n", t.generation))?;
        kept.rewrite(&run.join("epoch"), &format!("{}\n", t.epoch))?;
        let lines: String = t.env.iter().map(|(k, v)| format!("{k}={v}\n")).collect();
        kept.rewrite(&run.join("env"), &lines)?;
        if let Some(token) = &t.token {
            kept.rewrite(&run.join("token"), token)?;
        }
    }
    run_hooks(&places.hooks, t)
}

impl Kept {
    /// Mix in the host's bytes, credit them, and make every generator derive new state from them now.
    fn reseed(&mut self, entropy: &[u8; 32]) -> Outcome<()> {
        #[repr(C)]
        struct PoolInfo {
            entropy_count: libc::c_int,
            buf_size: libc::c_int,
            buf: [u8; 32],
        }
        const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
        const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
        let fail = |e: std::io::Error| Fail::io("reseeding /dev/urandom", &e);
        if self.urandom.is_none() {
            let opened = OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/urandom");
            self.urandom = Some(opened.map_err(fail)?);
        }
        let fd = self.urandom.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let info = PoolInfo {
            entropy_count: 256,
            buf_size: 32,
            buf: *entropy,
        };
        // SAFETY: the struct has the layout of rand_pool_info with 32 bytes and outlives the call.
        unsafe {
            sys::check(libc::ioctl(fd, RNDADDENTROPY as _, &info)).map_err(fail)?;
            sys::check(libc::ioctl(fd, RNDRESEEDCRNG as _)).map_err(fail)?;
        }
        Ok(())
    }

    fn identity(&mut self, t: &Thaw) -> Outcome<()> {
        // SAFETY: pointer and length of a live string.
        let ret = unsafe { libc::sethostname(t.hostname.as_ptr().cast(), t.hostname.len()) };
        sys::check(ret).map_err(|e| Fail::io("setting the hostname", &e))?;
        self.rewrite(Path::new("/etc/hostname"), &format!("{}\n", t.hostname))?;
        self.renew(Path::new("/etc/hosts"), |old| hosts(old, &t.hostname))?;
        self.rewrite(Path::new("/etc/machine-id"), &format!("{}\n", t.machine_id))
    }

    fn rewrite(&mut self, path: &Path, text: &str) -> Outcome<()> {
        self.renew(path, |_| text.to_string())
    }

    /// Write in place, and only what differs: nobody reads while the workload is frozen, the files of /etc are mounts
    /// of their own (see init), and a temporary name and a rename on the disk would cost a fork more than all the rest
    /// of its thaw. A file that was removed meanwhile is made again.
    fn renew(&mut self, path: &Path, change: impl FnOnce(&str) -> String) -> Outcome<()> {
        let fail = |e: std::io::Error| Fail::io(&path.display().to_string(), &e);
        let file = self.file(path).map_err(fail)?;
        let mut old = Vec::new();
        let mut piece = [0u8; 1024];
        while old.len() < MAX_FILE {
            match file.read_at(&mut piece, old.len() as u64).map_err(fail)? {
                0 => break,
                n => old.extend_from_slice(&piece[..n]),
            }
        }
        let new = change(&String::from_utf8_lossy(&old));
        if new.as_bytes() != old {
            file.write_all_at(new.as_bytes(), 0).map_err(fail)?;
            if new.len() < old.len() || old.len() >= MAX_FILE {
                file.set_len(new.len() as u64).map_err(fail)?;
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &Path) -> std::io::Result<&File> {
        let gone = |f: &File| f.metadata().is_ok_and(|m| nlink(&m) == 0);
        if self.files.get(path).is_none_or(gone) {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)?;
            self.files.insert(path.to_path_buf(), file);
        }
        self.files
            .get(path)
            .ok_or_else(|| std::io::Error::other("not kept"))
    }
}

fn nlink(m: &fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::nlink(m)
}

pub fn set_clock(wall_ns: i64) -> Outcome<()> {
    let ts = libc::timespec {
        tv_sec: wall_ns / 1_000_000_000,
        tv_nsec: wall_ns % 1_000_000_000,
    };
    // SAFETY: the struct outlives the call.
    let ret = unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &ts) };
    sys::check(ret)
        .map(drop)
        .map_err(|e| Fail::io("setting the clock", &e))
}

/// The hosts file with our own line renewed; what the user added stays.
pub fn hosts(old: &str, hostname: &str) -> String {
    let kept = old.lines().filter(|l| !l.starts_with("127.0.1.1"));
    let mut out: String = kept.map(|l| format!("{l}\n")).collect();
    if !old.lines().any(|l| l.starts_with("127.0.0.1")) {
        out.push_str("127.0.0.1 localhost\n");
    }
    out.push_str(&format!("127.0.1.1 {hostname}\n"));
    out
}

/// Run the executables of the hooks folder in order of name. They are outside of the frozen cgroup.
fn run_hooks(dir: &Path, t: &Thaw) -> Outcome<()> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Ok(());
    };
    let mut hooks: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    hooks.sort();
    let all = sys::monotonic_ms() + ALL_HOOKS_MS;
    for hook in hooks {
        let runnable =
            fs::metadata(&hook).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
        if runnable {
            run_hook(
                &hook,
                t,
                HOOK_MS.min(all.saturating_sub(sys::monotonic_ms())),
            )?;
        }
    }
    Ok(())
}

fn run_hook(hook: &Path, t: &Thaw, bound_ms: u64) -> Outcome<()> {
    let name = hook.display().to_string();
    let mut cmd = Command::new(hook);
    cmd.env_clear().env(
        "PATH",
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    );
    cmd.envs(t.env.iter().map(|(k, v)| (k, v)));
    cmd.env("RECESS_GENERATION", &t.generation)
        .env("RECESS_EPOCH", t.epoch.to_string());
    cmd.stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .current_dir("/");
    // SAFETY: guestd has one thread, so the child of fork may do anything the parent could.
    unsafe { cmd.pre_exec(sys::reset_signals) };
    let mut child = cmd.spawn().map_err(|e| Fail::io(&name, &e))?;
    let pid = child.id() as i32;
    // SAFETY: our own child, not yet reaped.
    let pidfd = sys::own(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } as i32);
    let pidfd = match pidfd {
        Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => None, // gVisor's kernel
        other => Some(other.map_err(|e| Fail::io(&name, &e))?),
    };
    let deadline = sys::monotonic_ms() + bound_ms;
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            let verdict = Fail::new("failed", format!("thaw hook {name}: {status}"));
            return if status.success() {
                Ok(())
            } else {
                Err(verdict)
            };
        }
        let left = deadline.saturating_sub(sys::monotonic_ms());
        if left == 0 {
            let _ = sys::kill_group(pid, libc::SIGKILL); // its end is awaited next
            let _ = child.wait();
            return Err(Fail::new(
                "timeout",
                format!("thaw hook {name} took longer than {bound_ms} ms"),
            ));
        }
        match &pidfd {
            Some(fd) => {
                sys::poll_one(fd.as_raw_fd(), libc::POLLIN, left as i32)
                    .map_err(|e| Fail::io(&name, &e))?;
            }
            // Without a descriptor the end is no event (SIGCHLD is the server's): look again each millisecond.
            None => std::thread::sleep(std::time::Duration::from_millis(1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json;

    fn put(path: &Path, text: &str, mode: u32) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn request(change: &str, to: &str) -> Outcome<Thaw> {
        let text = format!(
            r#"{{"wall_ns":1764000000123456789,"entropy":"{}","generation":"gen_1","epoch":3,"hostname":"dev-1",
            "machine_id":"{}","env":{{"A":"b c"}}}}"#,
            "ab".repeat(32),
            "0f".repeat(16)
        );
        parse(&json::parse(text.replace(change, to).as_bytes()).unwrap())
    }

    #[test]
    fn parses_and_refuses() {
        let t = request("", "").unwrap();
        assert_eq!(
            (t.wall_ns, t.epoch, t.entropy),
            (1_764_000_000_123_456_789, 3, [0xAB; 32])
        );
        assert_eq!(t.env, vec![("A".to_string(), "b c".to_string())]);
        assert_eq!(t.token, None);
        let t = request("\"epoch\":3", "\"epoch\":3,\"token\":\"rcm_1\"").unwrap();
        assert_eq!(t.token.as_deref(), Some("rcm_1"));
        for (change, to) in [
            ("gen_1", "a b"),
            ("dev-1", "a/b"),
            ("\"epoch\":3", "\"epoch\":-3"),
            ("abab", "ab"),
            ("0f0f", "0f0g"),
            ("b c", "b\\nc"),
            ("\"A\"", "\"A=\""),
            ("\"epoch\":3", "\"epoch\":3,\"token\":\"a b\""),
            ("\"epoch\":3", "\"epoch\":3,\"token\":\"\""),
            ("\"epoch\":3", "\"epoch\":3,\"token\":7"),
        ] {
            assert_eq!(
                request(change, to).unwrap_err().kind,
                "bad_input",
                "{change} -> {to}"
            );
        }
    }

    #[test]
    fn hosts_keeps_what_the_user_added() {
        let once = hosts("127.0.0.1 localhost\n10.0.0.7 db\n127.0.1.1 old\n", "new");
        assert_eq!(once, "127.0.0.1 localhost\n10.0.0.7 db\n127.0.1.1 new\n");
        assert_eq!(hosts(&once, "new"), once);
        assert_eq!(hosts("", "n"), "127.0.0.1 localhost\n127.0.1.1 n\n");
    }

    #[test]
    fn kept_files_shrink_grow_and_come_back() {
        let dir = std::env::temp_dir().join(format!("guestd-kept-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("name");
        let mut kept = Kept::default();
        for text in ["long-name\n", "n\n", "n\n", "", "longer-than-before\n"] {
            kept.rewrite(&path, text).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        fs::write(&path, "a user wrote something much longer here\n").unwrap();
        kept.rewrite(&path, "x\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "x\n");
        fs::remove_file(&path).unwrap();
        kept.rewrite(&path, "back\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "back\n");
        fs::write(&path, "q".repeat(2 * MAX_FILE)).unwrap();
        kept.rewrite(&path, "cut\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "cut\n");
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn hooks_run_in_order_and_fail_closed() {
        let dir = std::env::temp_dir().join(format!("guestd-hooks-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("run")).unwrap();
        let out = dir.join("out");
        let hooks = dir.join("hooks");
        let script = |name: &str, body: &str| {
            put(&hooks.join(name), &format!("#!/bin/sh\n{body}\n"), 0o755);
        };
        script(
            "10-a",
            &format!("echo a $A $RECESS_EPOCH >> {}", out.display()),
        );
        script("20-b", &format!("echo b >> {}", out.display()));
        put(&hooks.join("30-not"), "not executable", 0o644);
        let run = dir.join("run");
        let places = Places {
            run_dir: Some(&run),
            hooks: hooks.clone(),
            own_machine: false,
            own_kernel: false,
        };
        let t = request("", "").unwrap();
        let mut kept = Kept::default();
        apply(&t, &places, &mut kept).unwrap();
        assert_eq!(fs::read_to_string(&out).unwrap(), "a b c 3\nb\n");
        assert_eq!(fs::read_to_string(run.join("epoch")).unwrap(), "3\n");
        assert_eq!(fs::read_to_string(run.join("env")).unwrap(), "A=b c\n");
        script("15-bad", "exit 3");
        assert_eq!(apply(&t, &places, &mut kept).unwrap_err().kind, "failed");
        script("20-slow", "sleep 60");
        assert_eq!(
            run_hook(&hooks.join("20-slow"), &t, 50).unwrap_err().kind,
            "timeout"
        );
        fs::remove_dir_all(&dir).unwrap();
    }
}
