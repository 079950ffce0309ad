//! The output ring of one job: the newest bytes, each with its channel, readable from many cursors.
//!
//! Allocated as output comes, never ahead; small writes of one channel share a piece. Pure data, no descriptors.

use std::collections::VecDeque;

/// What one job keeps while the machine's jobs together keep little; and what it keeps when they don't.
pub const RING_BYTES: usize = 256 * 1024;
pub const RING_BYTES_TIGHT: usize = 32 * 1024;
pub const ALL_RINGS_BYTES: usize = 8 * 1024 * 1024;
const PIECE: usize = 4096;
const OVERHEAD: usize = 48;

struct Piece {
    channel: u8,
    data: Vec<u8>,
}

#[derive(Default)]
pub struct Ring {
    pieces: VecDeque<Piece>,
    first: u64, // number of the first piece still held
    cost: usize,
}

/// A reader's place. `started` false: it has seen nothing yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cursor {
    piece: u64,
    offset: usize,
}

/// What a reader gets next.
#[derive(Debug, PartialEq, Eq)]
pub enum Read<'a> {
    /// Older output was dropped before this reader saw it.
    Gap,
    Bytes(u8, &'a [u8]),
    End,
}

/// How many bytes a job may keep, given what all jobs keep now.
pub fn cap_for(all_bytes: usize) -> usize {
    if all_bytes < ALL_RINGS_BYTES {
        RING_BYTES
    } else {
        RING_BYTES_TIGHT
    }
}

impl Ring {
    /// Bytes held, the bookkeeping counted too.
    pub fn cost(&self) -> usize {
        self.cost
    }

    /// Keep `data`; drop the oldest pieces over `cap`.
    pub fn push(&mut self, channel: u8, mut data: &[u8], cap: usize) {
        while !data.is_empty() {
            let fits = match self.pieces.back() {
                Some(p) if p.channel == channel && p.data.len() < PIECE => {
                    (PIECE - p.data.len()).min(data.len())
                }
                _ => 0,
            };
            if fits == 0 {
                self.pieces.push_back(Piece {
                    channel,
                    data: Vec::new(),
                });
                self.cost += OVERHEAD;
                continue;
            }
            if let Some(p) = self.pieces.back_mut() {
                p.data.extend_from_slice(&data[..fits]);
            }
            self.cost += fits;
            data = &data[fits..];
        }
        while self.cost > cap && self.pieces.len() > 1 {
            if let Some(p) = self.pieces.pop_front() {
                self.cost -= p.data.len() + OVERHEAD;
                self.first += 1;
            }
        }
    }

    /// Unread bytes behind this cursor, bookkeeping counted.
    pub fn behind(&self, c: Cursor) -> usize {
        let skip = c.piece.saturating_sub(self.first) as usize;
        self.pieces
            .iter()
            .skip(skip)
            .map(|p| p.data.len() + OVERHEAD)
            .sum()
    }

    /// Return at most `limit` bytes of one channel at the cursor and move it.
    pub fn read(&self, c: &mut Cursor, limit: usize) -> Read<'_> {
        if c.piece < self.first {
            *c = Cursor {
                piece: self.first,
                offset: 0,
            };
            return Read::Gap;
        }
        loop {
            let Some(p) = self.pieces.get((c.piece - self.first) as usize) else {
                return Read::End;
            };
            let rest = p.data.get(c.offset..).unwrap_or(&[]);
            if rest.is_empty() {
                if c.piece - self.first + 1 == self.pieces.len() as u64 {
                    return Read::End; // stay: the last piece may still grow
                }
                *c = Cursor {
                    piece: c.piece + 1,
                    offset: 0,
                };
                continue;
            }
            let n = rest.len().min(limit);
            c.offset += n;
            return Read::Bytes(p.channel, &rest[..n]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(r: &Ring, c: &mut Cursor) -> (bool, Vec<(u8, Vec<u8>)>) {
        let (mut gap, mut got): (bool, Vec<(u8, Vec<u8>)>) = (false, Vec::new());
        loop {
            match r.read(c, 1000) {
                Read::End => return (gap, got),
                Read::Gap => gap = true,
                Read::Bytes(ch, b) => match got.last_mut() {
                    Some((last, data)) if *last == ch => data.extend_from_slice(b),
                    _ => got.push((ch, b.to_vec())),
                },
            }
        }
    }

    #[test]
    fn two_readers_and_growth() {
        let mut r = Ring::default();
        let (mut a, mut b) = (Cursor::default(), Cursor::default());
        r.push(1, b"hello ", RING_BYTES);
        assert_eq!(all(&r, &mut a), (false, vec![(1, b"hello ".to_vec())]));
        r.push(1, b"world", RING_BYTES);
        r.push(2, b"err", RING_BYTES);
        assert_eq!(
            all(&r, &mut a),
            (false, vec![(1, b"world".to_vec()), (2, b"err".to_vec())])
        );
        assert_eq!(
            all(&r, &mut b),
            (
                false,
                vec![(1, b"hello world".to_vec()), (2, b"err".to_vec())]
            )
        );
        assert_eq!(r.read(&mut a, 10), Read::End);
    }

    #[test]
    fn drops_the_oldest_and_says_so() {
        let mut r = Ring::default();
        let mut c = Cursor::default();
        for i in 0..1000u32 {
            r.push((i % 2) as u8 + 1, format!("{i:08}").as_bytes(), 4096);
        }
        assert!(r.cost() <= 4096);
        let (gap, got) = all(&r, &mut c);
        assert!(gap);
        assert_eq!(got.last().unwrap().1, b"00000999");
        assert!(got.len() > 50);
        let (gap, got) = all(&r, &mut c);
        assert!(!gap && got.is_empty());
    }

    #[test]
    fn cap_tightens() {
        assert_eq!(cap_for(0), RING_BYTES);
        assert_eq!(cap_for(ALL_RINGS_BYTES), RING_BYTES_TIGHT);
    }

    #[test]
    fn large_write_is_cut_to_the_cap() {
        let mut r = Ring::default();
        r.push(1, &vec![7u8; 1 << 20], RING_BYTES);
        assert!(r.cost() <= RING_BYTES);
        assert!(r.behind(Cursor::default()) <= RING_BYTES);
    }
}
