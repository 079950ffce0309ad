//! The connection to the host: what is to be sent, what half-arrived, and whose connection it is.

use std::collections::VecDeque;
use std::io;

use crate::fail::{Fail, Outcome};
use crate::frame::{self, Decoder, MAX_BODY, MAX_PAYLOAD, PAD_LEN};
use crate::json::{obj, Value};
use crate::sys::{self, Watched};

/// Streams stop producing when this much waits for the host; replies may exceed it by what the host asked for.
const HIGH_WATER: usize = 128 * 1024;

#[derive(Default)]
pub struct Conn {
    pub port: Option<Watched>,
    pub decoder: Decoder,
    /// The host's nonce once it has said hello: only then is anything sent or accepted.
    pub nonce: Option<String>,
    /// The host takes streams that the guest opens.
    pub listening: bool,
    out: VecDeque<u8>,
    partial: Option<(u32, Vec<u8>)>,
}

impl Conn {
    pub fn attached(&self) -> bool {
        self.nonce.is_some()
    }

    /// Forget the former connection's state; the port stays.
    pub fn reset(&mut self) {
        self.nonce = None;
        self.listening = false;
        self.out = VecDeque::new();
        self.partial = None;
    }

    /// Bytes that streams may still queue.
    pub fn room(&self) -> usize {
        HIGH_WATER.saturating_sub(self.out.len() + frame::HEADER_LEN)
    }

    pub fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        self.out.extend(frame::header(kind, flags, stream, payload));
        self.out.extend(payload);
    }

    pub fn pad(&mut self) {
        self.out.extend(std::iter::repeat_n(0u8, PAD_LEN));
    }

    /// Answer a request, in as many frames as it takes.
    pub fn reply(&mut self, request: u32, outcome: Outcome<Value>) {
        let mut text = match outcome {
            Ok(v) => obj([("ok", v)]).text(),
            Err(f) => obj([("error", error_body(&f))]).text(),
        };
        if text.len() > MAX_BODY {
            text = obj([(
                "error",
                error_body(&Fail::new("failed", "the answer is too long")),
            )])
            .text();
        }
        let mut rest = text.as_bytes();
        while rest.len() > MAX_PAYLOAD {
            let (head, tail) = rest.split_at(MAX_PAYLOAD);
            self.frame(frame::REPLY, frame::FLAG_MORE, request, head);
            rest = tail;
        }
        self.frame(frame::REPLY, 0, request, rest);
    }

    pub fn reset_stream(&mut self, stream: u32, why: &Fail) {
        self.frame(frame::RESET, 0, stream, error_body(why).text().as_bytes());
    }

    /// Collect a request's frames; returns the whole body with its last one. Only one request may be unfinished.
    pub fn assemble(
        &mut self,
        request: u32,
        flags: u8,
        payload: &[u8],
    ) -> Outcome<Option<Vec<u8>>> {
        let mut body = match self.partial.take() {
            Some((id, body)) if id == request => body,
            Some(_) => return Err(Fail::bad("two unfinished requests")),
            None => Vec::new(),
        };
        if body.len() + payload.len() > MAX_BODY {
            return Err(Fail::bad(format!(
                "the request is longer than {MAX_BODY} bytes"
            )));
        }
        body.extend_from_slice(payload);
        if flags & frame::FLAG_MORE != 0 {
            self.partial = Some((request, body));
            return Ok(None);
        }
        Ok(Some(body))
    }

    /// Write what the port takes. Ok(true): all is sent. Errors mean that the channel is gone.
    pub fn flush(&mut self) -> io::Result<bool> {
        let Some(port) = &self.port else {
            return Ok(true);
        };
        while !self.out.is_empty() {
            let n = match sys::write(port.raw(), self.out.as_slices().0) {
                Ok(n) => n,
                Err(e) if sys::would_block(&e) => return Ok(false),
                Err(e) => return Err(e),
            };
            self.out.drain(..n);
        }
        if self.out.capacity() > 2 * HIGH_WATER {
            self.out = VecDeque::new(); // one large answer must not stay in every snapshot
        }
        Ok(true)
    }
}

fn error_body(f: &Fail) -> Value {
    let message: String = f.message.chars().take(2000).collect();
    obj([("kind", f.kind.into()), ("message", message.into())])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_assembled_and_bounded() {
        let mut c = Conn::default();
        assert_eq!(c.assemble(1, frame::FLAG_MORE, b"ab").unwrap(), None);
        assert_eq!(c.assemble(1, 0, b"cd").unwrap(), Some(b"abcd".to_vec()));
        assert_eq!(c.assemble(2, frame::FLAG_MORE, b"ab").unwrap(), None);
        assert!(c.assemble(3, 0, b"x").is_err());
        let big = vec![0u8; MAX_PAYLOAD];
        for _ in 0..MAX_BODY / MAX_PAYLOAD {
            assert_eq!(c.assemble(4, frame::FLAG_MORE, &big).unwrap(), None);
        }
        assert!(c.assemble(4, frame::FLAG_MORE, b"x").is_err());
    }

    #[test]
    fn long_replies_are_cut_into_frames() {
        let mut c = Conn::default();
        c.reply(9, Ok(Value::from("x".repeat(100_000))));
        let bytes: Vec<u8> = c.out.iter().copied().collect();
        let mut d = Decoder::default();
        d.feed(&bytes);
        let (mut body, mut last) = (Vec::new(), 1);
        while let Some(frame::Event::Frame(f)) = d.next() {
            body.extend_from_slice(f.payload);
            last = f.flags;
        }
        assert_eq!((body.len(), last), (100_000 + r#"{"ok":""}"#.len(), 0));
    }
}
