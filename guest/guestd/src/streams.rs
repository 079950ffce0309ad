//! One stream: its credit both ways and what it ends in.

use std::collections::VecDeque;

use crate::fail::Outcome;
use crate::frame::{WINDOW, WINDOW_MAX};
use crate::json::Value;
use crate::ring::Cursor;
use crate::sys::Watched;

/// Takes what the host sends, until its end of file.
pub trait Sink {
    fn write(&mut self, data: &[u8]) -> Outcome<()>;
    /// All has come: make it visible. Dropped without this, a sink leaves nothing half-made.
    fn finish(self: Box<Self>) -> Outcome<Value>;
}

/// Gives what the host reads; 0 is the end.
pub trait Source {
    fn read(&mut self, buf: &mut [u8]) -> Outcome<usize>;
}

/// Where a stream ends in the guest.
pub enum End {
    /// A TCP or unix connection; `dialing` holds the request to answer once it is connected.
    Socket {
        w: Watched,
        dialing: Option<u32>,
        incoming: bool,
    },
    /// Output of a job's ring, and its stdin.
    Job {
        key: u32,
        cursor: Cursor,
    },
    /// A file or archive on its way in; the request is answered when it is whole.
    Put {
        sink: Option<Box<dyn Sink>>,
        request: u32,
    },
    Get {
        source: Box<dyn Source>,
    },
}

pub struct Stream {
    /// Bytes we may still send.
    pub credit: usize,
    /// Bytes that came and are not yet delivered; never more than the window.
    pub pending: VecDeque<u8>,
    /// Delivered bytes for which the host has no new credit yet.
    owed: usize,
    /// Credit that the host has at most.
    window: usize,
    pub in_eof: bool,
    pub in_done: bool,
    pub out_eof: bool,
    pub end: End,
}

impl Stream {
    pub fn new(end: End) -> Self {
        let pending = VecDeque::new();
        Stream {
            credit: WINDOW,
            pending,
            owed: 0,
            window: WINDOW,
            in_eof: false,
            in_done: false,
            out_eof: false,
            end,
        }
    }

    /// Bytes are delivered: returns the credit to grant once it is worth a frame.
    pub fn delivered(&mut self, n: usize) -> Option<u32> {
        self.owed += n;
        if self.owed < self.window / 4 {
            return None;
        }
        Some(std::mem::take(&mut self.owed) as u32)
    }

    /// Room for what the host still may send, by its credit.
    pub fn may_receive(&self) -> usize {
        self.window - (self.pending.len() + self.owed).min(self.window)
    }

    /// Let the host send more ahead; returns the credit to grant for it. Only for an end that takes everything at once: what
    /// waits is in no buffer of ours.
    pub fn widen(&mut self, window: usize) -> Option<u32> {
        let more = window.clamp(WINDOW, WINDOW_MAX).saturating_sub(self.window);
        self.window += more;
        (more > 0).then_some(more as u32)
    }

    /// Give up the buffer's memory when it is empty.
    pub fn tidy(&mut self) {
        if self.pending.is_empty() && self.pending.capacity() > 0 {
            self.pending = VecDeque::new();
        }
    }

    /// Is this a reader of that job?
    pub fn is_of(&self, job: u32) -> bool {
        matches!(&self.end, End::Job { key, .. } if *key == job)
    }
}
