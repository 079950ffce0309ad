//! Streams at work: what the host sent goes to its end, what ends hold goes to the host, each within its credit.

use std::collections::VecDeque;

use crate::doors::socket_error;
use crate::fail::{Fail, Outcome};
use crate::frame;
use crate::json::obj;
use crate::ring::Read;
use crate::server::Server;
use crate::streams::{End, Sink, Stream};
use crate::sys::{self, OUT};

const MAX_STREAMS: usize = 512;
/// Unread input thrown away when a socket is closed, in reads of the scratch buffer.
const DISCARDED_READS: usize = 16;

impl Server {
    /// Tell whether `add_stream` would take this number: asked before anything is started for it.
    pub fn check_stream(&self, id: u32) -> Outcome<()> {
        if id == 0 || id & 1 == 0 || self.streams.contains_key(&id) {
            return Err(Fail::bad("not a free odd stream number"));
        }
        if self.streams.len() >= MAX_STREAMS {
            return Err(Fail::new("busy", format!("{MAX_STREAMS} streams are open")));
        }
        Ok(())
    }

    pub fn add_stream(&mut self, id: u32, end: End) -> Outcome<()> {
        self.check_stream(id)?;
        self.streams.insert(id, Stream::new(end));
        Ok(())
    }

    /// Grant what the request asked for beyond the usual window; the host may not know of such windows.
    pub fn widen(&mut self, id: u32, window: usize) {
        if let Some(grant) = self.streams.get_mut(&id).and_then(|s| s.widen(window)) {
            self.conn.frame(frame::CREDIT, 0, id, &grant.to_le_bytes());
        }
    }

    /// End a stream from our side and say why.
    pub fn abort(&mut self, id: u32, why: &Fail) {
        if let Some(s) = self.streams.remove(&id) {
            if let End::Put { request, .. } = s.end {
                self.conn.reply(request, Err(why.clone()));
            } else {
                self.conn.reset_stream(id, why);
            }
        }
    }

    pub fn on_data(&mut self, id: u32, payload: &[u8]) {
        let Some(s) = self.streams.get_mut(&id) else {
            return;
        };
        if s.in_eof || payload.len() > s.may_receive() {
            self.abort(id, &Fail::bad("data beyond the credit or the end of file"));
            return;
        }
        if let (
            End::Put {
                sink: Some(sink), ..
            },
            true,
        ) = (&mut s.end, s.pending.is_empty())
        {
            match sink.write(payload) {
                Ok(()) => self.credit(id, payload.len()),
                Err(fail) => self.abort(id, &fail),
            }
            return;
        }
        s.pending.extend(payload);
        self.deliver(id);
    }

    /// The host closed the stream: deliver what it sent before, take nothing more, then close.
    pub fn linger(&mut self, id: u32) {
        match self.streams.get_mut(&id) {
            Some(s) if matches!(s.end, End::Socket { dialing: None, .. }) => {
                s.in_eof = true;
                s.out_eof = true;
                self.deliver(id);
            }
            _ => drop(self.streams.remove(&id)),
        }
    }

    /// Move what the host sent to where it goes, as far as it goes now.
    pub fn deliver(&mut self, id: u32) {
        let Some(s) = self.streams.get_mut(&id) else {
            return;
        };
        let end = match &mut s.end {
            End::Socket {
                dialing: Some(_), ..
            } => return,
            End::Job { key, .. } => {
                let key = *key;
                self.feed_job(key);
                return;
            }
            End::Socket { w, .. } => drain(&mut s.pending, |b| sys::write(w.raw(), b)),
            End::Put { sink, .. } => match sink {
                Some(sink) => put_all(sink.as_mut(), &mut s.pending),
                None => return,
            },
            End::Get { .. } => Ok(std::mem::take(&mut s.pending).len()),
        };
        match end {
            Ok(n) => self.credit(id, n),
            Err(fail) => {
                self.abort(id, &fail);
                return;
            }
        }
        self.after_delivery(id);
    }

    pub fn credit(&mut self, id: u32, n: usize) {
        let Some(s) = self.streams.get_mut(&id) else {
            return;
        };
        if let (Some(grant), false) = (s.delivered(n), s.in_eof) {
            self.conn.frame(frame::CREDIT, 0, id, &grant.to_le_bytes());
        }
        s.tidy();
    }

    /// Once all is delivered, pass on the end of file.
    fn after_delivery(&mut self, id: u32) {
        let Some(s) = self.streams.get_mut(&id) else {
            return;
        };
        if !s.in_eof || s.in_done || !s.pending.is_empty() {
            return;
        }
        s.in_done = true;
        match &mut s.end {
            End::Socket { w, .. } => {
                // SAFETY: plain call; a peer that is gone makes it fail, which the next read tells.
                unsafe { libc::shutdown(w.raw(), libc::SHUT_WR) };
                if s.out_eof {
                    // Closing with unread input would reset the connection under the peer's last read.
                    for _ in 0..DISCARDED_READS {
                        if sys::read(w.raw(), &mut self.scratch).map_or(true, |n| n == 0) {
                            break;
                        }
                    }
                    self.streams.remove(&id);
                }
            }
            End::Put { sink, request } => {
                let (sink, request) = (sink.take(), *request);
                self.streams.remove(&id);
                if let Some(sink) = sink {
                    let outcome = sink.finish();
                    self.conn.reply(request, outcome);
                }
            }
            End::Job { .. } | End::Get { .. } => {}
        }
    }

    pub fn on_socket(&mut self, id: u32, mask: u32) {
        let Some(s) = self.streams.get_mut(&id) else {
            return;
        };
        if let End::Socket { w, dialing, .. } = &mut s.end {
            if let Some(request) = *dialing {
                let outcome = socket_error(w.raw());
                *dialing = None;
                if outcome.is_err() {
                    self.streams.remove(&id);
                }
                self.conn.reply(request, outcome.map(|()| obj([])));
            }
        }
        if mask & OUT != 0 {
            self.deliver(id);
        }
        self.read_socket(id);
    }

    fn read_socket(&mut self, id: u32) {
        let room = self.conn.room();
        let Some(s) = self.streams.get_mut(&id) else {
            return;
        };
        let End::Socket {
            w, dialing: None, ..
        } = &s.end
        else {
            return;
        };
        let want = s.credit.min(room).min(self.scratch.len());
        if want == 0 || s.out_eof || self.freezer.frozen {
            return;
        }
        match sys::read(w.raw(), &mut self.scratch[..want]) {
            Ok(0) => {
                s.out_eof = true;
                self.conn.frame(frame::EOF, 0, id, b"");
                if s.in_done {
                    self.streams.remove(&id);
                }
            }
            Ok(n) => {
                s.credit -= n;
                self.conn.frame(frame::DATA, 0, id, &self.scratch[..n]);
            }
            Err(e) if sys::would_block(&e) => {}
            Err(e) => self.abort(id, &Fail::io("connection", &e)),
        }
    }

    /// Move sources and rings towards the host until credit, room or data end; returns whether anything moved.
    pub fn pump(&mut self) -> bool {
        let ids: Vec<u32> = self.streams.keys().copied().collect();
        let mut moved = false;
        for id in ids {
            moved |= self.pump_one(id);
        }
        moved
    }

    fn pump_one(&mut self, id: u32) -> bool {
        let room = self.conn.room();
        let Some(s) = self.streams.get_mut(&id) else {
            return false;
        };
        let want = s.credit.min(room).min(self.scratch.len());
        match &mut s.end {
            End::Get { source } if want > 0 && !s.out_eof => {
                match source.read(&mut self.scratch[..want]) {
                    Ok(0) => {
                        self.conn.frame(frame::EOF, 0, id, b"");
                        self.streams.remove(&id);
                    }
                    Ok(n) => {
                        s.credit -= n;
                        self.conn.frame(frame::DATA, 0, id, &self.scratch[..n]);
                    }
                    Err(fail) => self.abort(id, &fail),
                }
            }
            End::Job { key, cursor } if want > 0 => {
                let Some(job) = self.jobs.jobs.get(key) else {
                    self.abort(id, &Fail::new("no_job", "the job was forgotten"));
                    return true;
                };
                match job.ring.read(cursor, want) {
                    Read::Gap => self.conn.frame(frame::DATA, 0, id, b""),
                    Read::Bytes(channel, data) => {
                        s.credit -= data.len();
                        self.conn.frame(frame::DATA, channel, id, data);
                    }
                    Read::End => {
                        let (Some(code), true) = (job.exit_code, job.settled) else {
                            return false;
                        };
                        let body = obj([("exit_code", i64::from(code).into())]).text();
                        self.conn.frame(frame::EXIT, 0, id, body.as_bytes());
                        self.streams.remove(&id);
                    }
                }
            }
            _ => return false,
        }
        true
    }

    pub fn move_all(&mut self) {
        loop {
            self.settle_jobs();
            let moved = self.pump();
            match self.conn.flush() {
                Ok(true) if moved => {}
                Ok(_) => return,
                Err(_) => {
                    self.port_closed();
                    return;
                }
            }
        }
    }
}

/// Write as much as goes; returns how much went.
pub fn drain(
    pending: &mut VecDeque<u8>,
    mut write: impl FnMut(&[u8]) -> std::io::Result<usize>,
) -> Outcome<usize> {
    let mut total = 0;
    while !pending.is_empty() {
        match write(pending.as_slices().0) {
            Ok(n) => {
                pending.drain(..n);
                total += n;
            }
            Err(e) if sys::would_block(&e) => break,
            Err(e) => return Err(Fail::io("connection", &e)),
        }
    }
    Ok(total)
}

fn put_all(sink: &mut dyn Sink, pending: &mut VecDeque<u8>) -> Outcome<usize> {
    let n = pending.len();
    let (a, b) = pending.as_slices();
    sink.write(a)?;
    sink.write(b)?;
    pending.clear();
    Ok(n)
}
