//! Requests of the host, one function an operation. Bodies are JSON objects with "op"; answers go to the request's id.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::doors;
use crate::fail::{Fail, Outcome};
use crate::files;
use crate::helper;
use crate::jobs::{self, Job};
use crate::json::{self, obj, Value};
use crate::ring::Cursor;
use crate::server::{self, Server};
use crate::spawn::{self, Spawn};
use crate::stats;
use crate::streams::End;
use crate::sys::{self, Watched};
use crate::tar;
use crate::tarread;
use crate::thaw;
use crate::VERSION;

const SYNC_MS_MAX: u64 = 60_000;
const FREEZE_MS_MAX: u64 = 60_000;

/// The body of a request, with typed access.
struct Args<'a>(&'a Value);

impl<'a> Args<'a> {
    fn text(&self, key: &str) -> Outcome<&'a str> {
        self.0
            .get(key)
            .and_then(Value::as_str)
            .ok_or_else(|| Fail::bad(format!("{key} is missing or no text")))
    }
    fn text_or(&self, key: &str, default: &'a str) -> &'a str {
        self.0.get(key).and_then(Value::as_str).unwrap_or(default)
    }
    fn number(&self, key: &str, min: i64, max: i64) -> Outcome<i64> {
        let n = self
            .0
            .get(key)
            .and_then(Value::as_int)
            .filter(|n| (min..=max).contains(n));
        n.ok_or_else(|| Fail::bad(format!("{key} is missing or not in {min}..{max}")))
    }
    fn flag(&self, key: &str) -> bool {
        self.0.get(key).and_then(Value::as_bool).unwrap_or(false)
    }
    fn stream(&self) -> Outcome<u32> {
        self.number("stream", 1, i64::from(u32::MAX))
            .map(|n| n as u32)
    }
    /// Absent from what earlier hosts send.
    fn window(&self) -> usize {
        let asked = self.0.get("window").and_then(Value::as_int).unwrap_or(0);
        usize::try_from(asked).unwrap_or(0)
    }
    fn argv(&self) -> Outcome<Vec<String>> {
        let items = self.0.get("argv").and_then(Value::as_arr).unwrap_or(&[]);
        let argv: Option<Vec<String>> = items
            .iter()
            .map(|v| v.as_str().map(str::to_string))
            .collect();
        argv.filter(|a| !a.is_empty() && !a[0].is_empty() && !a.iter().any(|s| s.contains('\0')))
            .ok_or_else(|| Fail::bad("argv is missing or not a list of texts"))
    }
}

/// None: the answer comes later.
type Answer = Outcome<Option<Value>>;

fn done() -> Answer {
    Ok(Some(obj([])))
}

impl Server {
    pub fn on_request(&mut self, id: u32, body: &[u8]) {
        let answer = match json::parse(body) {
            Err(why) => Err(Fail::bad(format!("the request is no JSON: {why}"))),
            Ok(v) => self.operate(id, &Args(&v)),
        };
        match answer {
            Ok(None) => {}
            Ok(Some(v)) => self.conn.reply(id, Ok(v)),
            Err(f) => self.conn.reply(id, Err(f)),
        }
    }

    fn operate(&mut self, id: u32, a: &Args) -> Answer {
        let op = a.text("op")?;
        match op {
            "info" => Ok(Some(self.info())),
            "stats" => Ok(Some(stats::snapshot(self.jobs.groups().len()))),
            "exec" => self.exec(a),
            "attach" => self.attach(a.text("job_id")?, a.stream()?).map(Some),
            "jobs" => Ok(Some(Value::Arr(
                self.jobs.jobs.values().map(Job::row).collect(),
            ))),
            "forget" => self.forget(a.text("job_id")?),
            "signal" => {
                let number = a.number("signal", 1, 64)? as i32;
                self.jobs.get(a.text("job_id")?)?.1.signal(number)?;
                done()
            }
            "resize" => self.resize(a),
            "freeze" => self.freeze(a),
            "unfreeze" => {
                let groups = self.jobs.groups();
                self.freezer.unfreeze(&groups)?;
                done()
            }
            "thaw" => self.thaw(a.0).map(Some),
            "clock" => {
                let now = a.number("wall_ns", 0, i64::MAX)?;
                if self.opts.own_kernel {
                    thaw::set_clock(now)?;
                }
                done()
            }
            "dial" => self.dial(id, a),
            "door" => {
                self.open_socket(&files::path(a.text("path")?)?)?;
                done()
            }
            "seal" => {
                let (path, open) = (files::path(a.text("path")?)?, a.flag("open"));
                self.seal(&path, open).map(Some)
            }
            "stat" | "list" | "read" | "write" | "tar" | "untar" | "remove" => self.file(id, op, a),
            other => Err(Fail::new(
                "unsupported",
                format!("guestd {VERSION} does not know {other:?}"),
            )),
        }
    }

    fn file(&mut self, id: u32, op: &str, a: &Args) -> Answer {
        let path = files::path(a.text("path")?)?;
        match op {
            "stat" => files::stat(&path).map(Some),
            "list" => {
                let source = files::list(&path)?;
                self.add_stream(
                    a.stream()?,
                    End::Get {
                        source: Box::new(source),
                    },
                )?;
                done()
            }
            "read" => {
                let limit = a.number("limit", 0, i64::MAX)? as u64;
                let (source, size) = files::open_read(&path, limit)?;
                self.add_stream(
                    a.stream()?,
                    End::Get {
                        source: Box::new(source),
                    },
                )?;
                Ok(Some(obj([("size", (size as i64).into())])))
            }
            "write" => {
                let mode = a.number("mode", 0, 0o7777)? as u32;
                self.serial = self.serial.wrapping_add(1);
                let sink = files::open_write(&path, mode, self.serial)?;
                let stream = a.stream()?;
                self.add_stream(
                    stream,
                    End::Put {
                        sink: Some(Box::new(sink)),
                        request: id,
                    },
                )?;
                self.widen(stream, a.window());
                Ok(None)
            }
            "tar" => {
                let skip = a.0.get("skip").and_then(Value::as_arr).unwrap_or(&[]);
                let skip = skip.iter().filter_map(Value::as_str).map(files::path);
                let skip = skip.collect::<Outcome<Vec<_>>>()?;
                let wanted = tarread::Wanted {
                    follow: a.flag("follow"),
                    sparse: a.flag("sparse"),
                    skip,
                };
                let source = tarread::open(&path, a.text_or("name", ""), wanted)?;
                self.add_stream(
                    a.stream()?,
                    End::Get {
                        source: Box::new(source),
                    },
                )?;
                done()
            }
            "untar" => {
                let sink = tar::open(&path)?;
                let stream = a.stream()?;
                self.add_stream(
                    stream,
                    End::Put {
                        sink: Some(Box::new(sink)),
                        request: id,
                    },
                )?;
                self.widen(stream, a.window());
                Ok(None)
            }
            _ => {
                let recursive = a.flag("recursive");
                let h = helper::start(move || files::remove(&path, recursive))?;
                self.add_helper(id, h);
                Ok(None)
            }
        }
    }

    fn info(&self) -> Value {
        obj([
            ("version", VERSION.into()),
            ("proto", server::PROTO.into()),
            ("boot_id", self.boot_id.as_str().into()),
            ("uptime_s", stats::uptime_s().into()),
            ("hostname", stats::hostname().into()),
            ("frozen", self.freezer.frozen.into()),
            ("freezer", self.freezer.name().into()),
            (
                "mode",
                if self.opts.own_machine {
                    "machine"
                } else {
                    "process"
                }
                .into(),
            ),
            ("pid", i64::from(std::process::id()).into()),
            (
                "proxy_port",
                self.proxy_port.map_or(Value::Null, |p| i64::from(p).into()),
            ),
        ])
    }

    /// Start a job with its streams attached. A known job id attaches to that job instead: a host that lost the
    /// answer may ask again without starting it twice.
    fn exec(&mut self, a: &Args) -> Answer {
        let stream = a.stream()?;
        let wanted = a.text_or("job_id", "");
        if !wanted.is_empty() {
            if !jobs::valid_id(wanted) {
                return Err(Fail::bad(format!("not a job id: {wanted:?}")));
            }
            if self.jobs.find(wanted).is_some() {
                return self.attach(wanted, stream).map(Some);
            }
        }
        if self.freezer.frozen {
            return Err(Fail::new(
                "frozen",
                "the workload is frozen: thaw or unfreeze first",
            ));
        }
        self.check_stream(stream)?; // an answer that is an error must mean that nothing runs
        let what = self.spawn_of(a)?;
        self.jobs.make_room()?;
        let child = spawn::start(&what, self.procs())?;
        let id = if wanted.is_empty() {
            self.jobs.fresh_id()
        } else {
            wanted.to_string()
        };
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0.0, |d| d.as_secs_f64());
        let label: String = a.text_or("label", "").chars().take(200).collect();
        let tty = what.tty.is_some();
        if tty {
            sys::set_nonblocking(child.stdout.as_raw_fd()).map_err(|e| Fail::io("terminal", &e))?;
        }
        self.jobs
            .insert(Job::new(id.clone(), what.argv, label, now, tty, child));
        self.attach(&id, stream).map(Some)
    }

    fn spawn_of(&self, a: &Args) -> Outcome<Spawn> {
        let tty = if a.flag("tty") {
            Some((
                a.number("rows", 1, 9999)? as u16,
                a.number("cols", 1, 9999)? as u16,
            ))
        } else {
            None
        };
        let ids = spawn::who(a.text_or("user", "root"))?;
        let request = thaw::environment(a.0.get("env"))?;
        let env = spawn::environment(
            ids.as_ref(),
            tty.is_some(),
            self.proxy_port,
            &self.env,
            &request,
        );
        let cwd = a.text_or("cwd", "/");
        files::path(cwd)?;
        Ok(Spawn {
            argv: a.argv()?,
            env,
            cwd: cwd.to_string(),
            ids,
            tty,
            stdin: a.flag("stdin"),
        })
    }

    fn attach(&mut self, job_id: &str, stream: u32) -> Outcome<Value> {
        let (key, job) = self.jobs.get(job_id)?;
        let row = job.row();
        self.add_stream(
            stream,
            End::Job {
                key,
                cursor: Cursor::default(),
            },
        )?;
        Ok(row)
    }

    fn forget(&mut self, job_id: &str) -> Answer {
        let (key, job) = self.jobs.get(job_id)?;
        if job.exit_code.is_none() {
            return Err(Fail::new("running", format!("job {job_id} still runs")));
        }
        self.jobs.jobs.remove(&key);
        done()
    }

    fn resize(&mut self, a: &Args) -> Answer {
        let (rows, cols) = (
            a.number("rows", 1, 9999)? as u16,
            a.number("cols", 1, 9999)? as u16,
        );
        let job = self.jobs.get(a.text("job_id")?)?.1;
        match (&job.out[0], job.tty) {
            (Some(w), true) => {
                sys::set_winsize(w.raw(), rows, cols).map_err(|e| Fail::io("resize", &e))?
            }
            (None, true) => {} // ended: no window to fit
            (_, false) => return Err(Fail::bad("the job has no terminal")),
        }
        done()
    }

    /// Sync while the workload still runs, then freeze. After the answer nothing happens until the host speaks.
    fn freeze(&mut self, a: &Args) -> Answer {
        let bound = a.number("timeout_ms", 1, FREEZE_MS_MAX as i64)? as u64;
        let begun = sys::monotonic_ms();
        if let (true, Some(disk)) = (a.flag("sync"), &self.opts.disk) {
            let fd = disk.as_raw_fd();
            helper::run("syncfs", SYNC_MS_MAX.min(bound), move || {
                // SAFETY: plain call on an open descriptor.
                sys::check(unsafe { libc::syncfs(fd) })
                    .map(drop)
                    .map_err(|e| Fail::io("syncfs", &e))
            })?;
        }
        let synced = sys::monotonic_ms();
        let groups = self.jobs.groups();
        self.freezer.freeze(&groups, bound)?;
        self.reap();
        let (sync_ms, freeze_ms) = (synced - begun, sys::monotonic_ms() - synced);
        Ok(Some(obj([
            ("sync_ms", (sync_ms as i64).into()),
            ("freeze_ms", (freeze_ms as i64).into()),
        ])))
    }

    /// Everything of the contract, then unfreeze. On any error the workload stays as it is: frozen after a restore.
    pub fn thaw(&mut self, body: &Value) -> Outcome<Value> {
        let t = thaw::parse(body)?;
        let places = thaw::Places {
            run_dir: self.opts.run_dir.as_deref(),
            hooks: self.opts.hooks.clone(),
            own_machine: self.opts.own_machine,
            own_kernel: self.opts.own_kernel,
        };
        thaw::apply(&t, &places, &mut self.kept)?;
        self.env = t.env;
        let groups = self.jobs.groups();
        self.freezer.unfreeze(&groups)?;
        Ok(obj([]))
    }

    fn dial(&mut self, id: u32, a: &Args) -> Answer {
        if a.0.get("path").is_some() {
            let stream = a.stream()?;
            let fd = doors::dial_unix(&files::path(a.text("path")?)?)?;
            self.add_stream(
                stream,
                End::Socket {
                    w: Watched::new(fd),
                    dialing: None,
                    incoming: false,
                },
            )?;
            return done();
        }
        let port = a.number("port", 1, 65535)? as u16;
        let ip = match a.text_or("host", "127.0.0.1") {
            "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
            text => text
                .parse()
                .map_err(|_| Fail::bad(format!("not an address: {text}")))?,
        };
        let stream = a.stream()?;
        let fd = doors::dial(SocketAddr::new(ip, port))?;
        self.add_stream(
            stream,
            End::Socket {
                w: Watched::new(fd),
                dialing: Some(id),
                incoming: false,
            },
        )?;
        Ok(None)
    }
}
