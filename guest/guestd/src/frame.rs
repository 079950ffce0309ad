//! Frames of the guest protocol: encoding, and a decoder that survives cut and damaged input.
//!
//! Layout (little endian), see docs/internals/guest-protocol.md:
//!   0 magic "RcG1" | 4 type u8 | 5 flags u8 | 6 length u16 | 8 stream u32 | 12 CRC-32 of bytes 4..12 and the payload
//! Zero bytes between frames are padding. Anything else that is no valid frame is garbage; it is skipped byte by
//! byte and reported once per run, so that whoever owns the connection can give it up instead of losing data silently.

use crate::crc::crc32;

pub const MAGIC: [u8; 4] = *b"RcG1";
pub const HEADER_LEN: usize = 16;
pub const MAX_PAYLOAD: usize = 32 * 1024;
/// Credit a stream starts with in each direction, in payload bytes; outstanding credit never exceeds it.
pub const WINDOW: usize = 64 * 1024;
/// What a host may ask for on a stream whose end takes everything at once (`write`, `untar`).
pub const WINDOW_MAX: usize = 256 * 1024;
/// A request or reply may span frames (flag MORE); together they are at most this long.
pub const MAX_BODY: usize = 256 * 1024;
/// Zero bytes that complete any frame an earlier connection may have left unfinished.
pub const PAD_LEN: usize = HEADER_LEN + MAX_PAYLOAD;

pub const HELLO: u8 = 1;
pub const REQUEST: u8 = 2;
pub const REPLY: u8 = 3;
pub const OPEN: u8 = 4;
pub const DATA: u8 = 5;
pub const CREDIT: u8 = 6;
pub const EOF: u8 = 7;
pub const RESET: u8 = 8;
pub const EXIT: u8 = 9;
pub const PING: u8 = 10;
pub const PONG: u8 = 11;
pub const LISTEN: u8 = 12;
pub const DESYNC: u8 = 13;

/// On HELLO: the earlier try stayed unanswered, pad the reply. On REQUEST and REPLY: the body goes on.
pub const FLAG_RETRY: u8 = 1;
pub const FLAG_MORE: u8 = 1;
/// On RESET by the host: deliver first what it sent before.
pub const FLAG_LINGER: u8 = 1;

/// One frame, borrowing the decoder's buffer.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: &'a [u8],
}

/// What the decoder found next.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    Frame(Frame<'a>),
    /// Bytes were skipped that are neither a frame nor padding.
    Garbage,
}

/// The header of a frame with this payload. The payload must not be longer than `MAX_PAYLOAD`.
pub fn header(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> [u8; HEADER_LEN] {
    debug_assert!(payload.len() <= MAX_PAYLOAD);
    let mut h = [0u8; HEADER_LEN];
    h[..4].copy_from_slice(&MAGIC);
    h[4] = kind;
    h[5] = flags;
    h[6..8].copy_from_slice(&(payload.len() as u16).to_le_bytes());
    h[8..12].copy_from_slice(&stream.to_le_bytes());
    let crc = crc32(crc32(0, &h[4..12]), payload);
    h[12..16].copy_from_slice(&crc.to_le_bytes());
    h
}

/// Turns bytes into frames. Holds at most one unfinished frame and what was fed last.
#[derive(Default)]
pub struct Decoder {
    buf: Vec<u8>,
    pos: usize,
    in_garbage: bool,
}

enum Look {
    NeedMore,
    Bad,
    Frame(usize),
}

impl Decoder {
    /// Add received bytes. Feed at most `MAX_PAYLOAD` at a time and drain with `next` in between.
    pub fn feed(&mut self, data: &[u8]) {
        if self.pos > 0 {
            self.buf.drain(..self.pos);
            self.pos = 0;
        }
        self.buf.extend_from_slice(data);
    }

    /// Forget everything, as when the peer hung up.
    pub fn clear(&mut self) {
        self.buf.clear();
        self.pos = 0;
        self.in_garbage = false;
    }

    /// Return the next frame or notice of garbage, None when more bytes are needed.
    pub fn next(&mut self) -> Option<Event<'_>> {
        loop {
            let rest = self.buf.get(self.pos..).unwrap_or(&[]);
            let zeros = rest.iter().take_while(|b| **b == 0).count();
            if zeros > 0 {
                self.pos += zeros;
                continue;
            }
            match look(rest) {
                Look::NeedMore => return None,
                Look::Frame(total) => {
                    let start = self.pos;
                    self.pos += total;
                    self.in_garbage = false;
                    let b = &self.buf[start..start + total];
                    return Some(Event::Frame(Frame {
                        kind: b[4],
                        flags: b[5],
                        stream: u32::from_le_bytes([b[8], b[9], b[10], b[11]]),
                        payload: &b[HEADER_LEN..],
                    }));
                }
                Look::Bad => {
                    let skip = rest[1..]
                        .iter()
                        .take_while(|b| **b != MAGIC[0] && **b != 0)
                        .count()
                        + 1;
                    self.pos += skip;
                    if !self.in_garbage {
                        self.in_garbage = true;
                        return Some(Event::Garbage);
                    }
                }
            }
        }
    }
}

/// Judge the bytes at a place where a frame should start.
fn look(rest: &[u8]) -> Look {
    let n = rest.len().min(4);
    if rest[..n] != MAGIC[..n] {
        return Look::Bad;
    }
    if rest.len() < HEADER_LEN {
        return Look::NeedMore;
    }
    let length = usize::from(u16::from_le_bytes([rest[6], rest[7]]));
    if length > MAX_PAYLOAD {
        return Look::Bad;
    }
    let total = HEADER_LEN + length;
    if rest.len() < total {
        return Look::NeedMore;
    }
    let want = u32::from_le_bytes([rest[12], rest[13], rest[14], rest[15]]);
    if crc32(crc32(0, &rest[4..12]), &rest[HEADER_LEN..total]) != want {
        return Look::Bad;
    }
    Look::Frame(total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::{self, Value};

    fn unhex(s: &str) -> Vec<u8> {
        (0..s.len() / 2)
            .map(|i| u8::from_str_radix(&s[2 * i..2 * i + 2], 16).unwrap())
            .collect()
    }

    fn vectors() -> Value {
        json::parse(include_bytes!("../../vectors/frames.json")).unwrap()
    }

    fn int(v: &Value, key: &str) -> i64 {
        v.get(key).and_then(Value::as_int).unwrap()
    }

    #[test]
    fn shared_vectors_encode_and_decode() {
        let v = vectors();
        let frames = v.get("frames").unwrap().as_arr().unwrap();
        assert!(frames.len() >= 10);
        for f in frames {
            let payload = unhex(f.get("payload").unwrap().as_str().unwrap());
            let bytes = unhex(f.get("bytes").unwrap().as_str().unwrap());
            let (kind, flags, stream) = (
                int(f, "type") as u8,
                int(f, "flags") as u8,
                int(f, "stream") as u32,
            );
            let mut made = header(kind, flags, stream, &payload).to_vec();
            made.extend_from_slice(&payload);
            assert_eq!(made, bytes);
            let mut d = Decoder::default();
            d.feed(&bytes);
            assert_eq!(
                d.next(),
                Some(Event::Frame(Frame {
                    kind,
                    flags,
                    stream,
                    payload: &payload
                }))
            );
            assert_eq!(d.next(), None);
        }
    }

    #[test]
    fn shared_vectors_resync() {
        let v = vectors();
        for case in v.get("resync").unwrap().as_arr().unwrap() {
            let input = unhex(case.get("input").unwrap().as_str().unwrap());
            let want: Vec<String> = case
                .get("events")
                .unwrap()
                .as_arr()
                .unwrap()
                .iter()
                .map(|e| e.as_str().unwrap().to_string())
                .collect();
            for step in [1usize, 7, 64, 4096] {
                let mut d = Decoder::default();
                let mut got = Vec::new();
                for piece in input.chunks(step) {
                    d.feed(piece);
                    while let Some(e) = d.next() {
                        got.push(match e {
                            Event::Garbage => "garbage".to_string(),
                            Event::Frame(f) => format!("frame:{}:{}", f.kind, f.stream),
                        });
                    }
                }
                assert_eq!(got, want, "case {:?} step {step}", case.get("name"));
            }
        }
    }

    #[test]
    fn random_bytes_never_panic_and_stay_bounded() {
        let mut seed = 0x1234_5678_9ABC_DEF0_u64;
        let mut d = Decoder::default();
        for round in 0..2000 {
            let piece: Vec<u8> = (0..97)
                .map(|_| {
                    seed ^= seed << 13;
                    seed ^= seed >> 7;
                    seed ^= seed << 17;
                    if round % 3 == 0 {
                        MAGIC[(seed % 4) as usize]
                    } else {
                        seed as u8
                    }
                })
                .collect();
            d.feed(&piece);
            while d.next().is_some() {}
            assert!(d.buf.len() <= PAD_LEN + 97);
        }
    }
}
