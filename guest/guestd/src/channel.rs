//! The channel to the host: frames in, hello, hang-up. One connection at a time; a new hello ends the former one.

use crate::frame::{self, Event, Frame, WINDOW};
use crate::json::{self, obj, Value};
use crate::server::{Server, PROTO};
use crate::{sys, VERSION};

/// Reads of the port in one round: a host that floods must not keep jobs' output from moving.
const READS_PER_ROUND: usize = 16;
/// The number of the request that came with a hello; hosts count their own from 1.
const HELLO_REQUEST: u32 = 0;

impl Server {
    /// The channel is gone: the former connection's streams end, processes live on.
    pub fn hang_up(&mut self) {
        self.conn.reset();
        self.conn.decoder.clear();
        self.streams.clear();
        self.helpers.clear(); // nobody waits for their answers; the children end by themselves
    }

    pub fn read_port(&mut self) {
        for _ in 0..READS_PER_ROUND {
            let Some(port) = &self.conn.port else {
                self.port_readable = false;
                return;
            };
            match sys::read(port.raw(), &mut self.scratch) {
                Ok(0) => {
                    self.port_readable = false;
                    self.port_closed();
                    return;
                }
                Ok(n) => {
                    let mut decoder = std::mem::take(&mut self.conn.decoder);
                    decoder.feed(&self.scratch[..n]);
                    while let Some(event) = decoder.next() {
                        match event {
                            Event::Frame(f) => self.on_frame(&f),
                            Event::Garbage => self.on_garbage(),
                        }
                    }
                    self.conn.decoder = decoder;
                }
                Err(e) => {
                    self.port_readable = false;
                    if !sys::would_block(&e) {
                        self.port_closed();
                    }
                    return;
                }
            }
        }
    }

    /// A virtio port stays open without a host and wakes us when one comes; a socket is done with.
    pub fn port_closed(&mut self) {
        self.hang_up();
        if !self.opts.own_machine {
            self.conn.port = None;
            self.finished |= self.acceptor.is_none();
        }
    }

    /// The byte stream is damaged: nothing of this connection can be trusted any more; only a new hello helps.
    fn on_garbage(&mut self) {
        if self.conn.attached() {
            self.conn.reset();
            self.streams.clear();
            self.helpers.clear();
            self.conn.frame(frame::DESYNC, 0, 0, b"");
        }
    }

    fn on_frame(&mut self, f: &Frame) {
        if f.kind == frame::HELLO {
            self.on_hello(f);
            return;
        }
        if !self.conn.attached() {
            return;
        }
        match f.kind {
            frame::REQUEST => match self.conn.assemble(f.stream, f.flags, f.payload) {
                Ok(Some(body)) => self.on_request(f.stream, &body),
                Ok(None) => {}
                Err(fail) => self.conn.reply(f.stream, Err(fail)),
            },
            frame::DATA => self.on_data(f.stream, f.payload),
            frame::CREDIT => {
                if let (Some(s), Ok(bytes)) =
                    (self.streams.get_mut(&f.stream), f.payload.try_into())
                {
                    s.credit = (s.credit + u32::from_le_bytes(bytes) as usize).min(WINDOW);
                }
            }
            frame::EOF => {
                if let Some(s) = self.streams.get_mut(&f.stream) {
                    s.in_eof = true;
                    self.deliver(f.stream);
                }
            }
            frame::RESET if f.flags & frame::FLAG_LINGER != 0 => self.linger(f.stream),
            frame::RESET => drop(self.streams.remove(&f.stream)),
            frame::PING => self.conn.frame(
                frame::PONG,
                0,
                f.stream,
                &f.payload[..f.payload.len().min(64)],
            ),
            frame::LISTEN => self.conn.listening = f.flags & 1 == 1,
            _ => {} // a newer host's: unknown frames mean nothing here
        }
    }

    /// A hello with a new nonce is a new connection: streams of the former one end. With the same nonce it is the
    /// same host asking again, because its hello met the unfinished frame of an earlier one.
    fn on_hello(&mut self, f: &Frame) {
        let body = json::parse(f.payload).unwrap_or(Value::Null);
        let nonce = body
            .get("nonce")
            .and_then(Value::as_str)
            .unwrap_or_default();
        if nonce.len() != 32 {
            return;
        }
        let fresh = self.conn.nonce.as_deref() != Some(nonce);
        if fresh {
            self.conn.reset();
            self.streams.clear();
            self.helpers.clear();
        }
        if f.flags & frame::FLAG_RETRY != 0 {
            self.conn.pad();
        }
        // Where no folder is given for what a thaw tells, there is no place for a token either.
        let known: &[&str] = match self.opts.run_dir {
            Some(_) => &["sparse", "token", "hello"],
            None => &["sparse"],
        };
        let takes = Value::Arr(known.iter().map(|word| (*word).into()).collect());
        let same = body.get("proto").and_then(Value::as_int) == Some(PROTO);
        let reply = obj([
            ("proto", PROTO.into()),
            ("nonce", nonce.into()),
            ("guestd", VERSION.into()),
            ("boot_id", self.boot_id.as_str().into()),
            (
                "mode",
                if self.opts.own_machine {
                    "machine"
                } else {
                    "process"
                }
                .into(),
            ),
            ("frozen", self.freezer.frozen.into()),
            ("takes", takes),
        ]);
        self.conn.frame(frame::HELLO, 0, 0, reply.text().as_bytes());
        if !same {
            return;
        }
        self.conn.nonce = Some(nonce.to_string());
        if let (true, false, Some(thaw)) = (fresh, self.opts.run_dir.is_none(), body.get("thaw")) {
            self.thaw_with_hello(thaw);
        }
    }

    /// The hello of a restored machine brings its thaw along, so that it wakes once instead of twice. The answer to the hello
    /// does not wait for it, and a repeated hello (the same nonce) thaws nothing again.
    fn thaw_with_hello(&mut self, body: &Value) {
        let _ = self.conn.flush(); // a channel that is gone shows at the end of this round, too
        let outcome = self.thaw(body);
        self.conn.reply(HELLO_REQUEST, outcome);
    }
}
