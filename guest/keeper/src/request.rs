//! The keeper's protocol: one message on the socket is one request, words separated by spaces.
//!
//!   status                         ok pid=N start=T keeper=N keeper_start=T deadline_ms=N|none
//!   kill                           ok                       (the event `dead` follows)
//!   deadline MS|none               ok                       kill the VM MS milliseconds from now
//!   prepare                        ok                       make and touch the buffer of a capture to come
//!   capture private                ok pages=N + descriptor  private pages, of a stopped VM
//!   capture file|file-all          ok pages=N + descriptor  pages that the RAM file holds (file-all: zero ones too)
//!   release                        ok                       drop a prepared buffer
//!   inject COUNT + descriptor      ok                       put pages into the VM's memory
//!   file + descriptor              ok file=N                take a file that pages are mapped from
//!   remap + descriptor             ok                       map runs of those files over the memory (remap.rs)
//!
//!   track BASE any|user [+ fd]     ok way=kernel|user       note every write from now on (track.rs); before it runs
//!   track BASE wait + fd           ok way=kernel at=SEGMENTS + userfaultfd     the same, and the ranges are absent
//!   guard + pipe                   ok                       kill the VM if this closes before it has said anything
//!   guard-process + pidfd          ok                       the same if this process ends before, whoever holds the last pipe
//!   move CONSOLE RECORD + folder   ok                       console and record are files of this folder from now on
//!   tracking                       ok way=WAY base=BASE absent=N     way none: not tracked; N pagers still bring pages
//!   prepare delta|all              ok                       copy while the VM runs; touch what the pause will need
//!   capture delta|all              ok pages=N generation=G  the rest, of a stopped VM
//!   collect                        ok pages=N + descriptor  what was captured, in order
//!   committed G BASE               ok                       capture G is stored as snapshot BASE
//!
//! BASE is a snapshot's name as the server has it, or `-`: the RAM file as it was. `user` asks for a userfaultfd without
//! rights. The descriptor of `track` holds pairs of u32: ranges (first page, count) that differ from the RAM file.
//! The descriptor of `remap` holds runs as four u32 each: first page, count, file number, page in that file; afterwards, or
//! if it fails, the files are let go.
//! SEGMENTS says where the memory is: ADDRESS:FIRST:PAGES (hexadecimal, decimal, decimal), separated by commas.
//!
//! A refused or failed request is answered `err CODE TEXT`; CODE is bad-request, no-space or failed. When the VMM is
//! gone every client gets `dead END REASON`, a newline and the tail of the VMM's output; then the socket closes. When
//! the last pager has brought its last page every client gets `filled`.

/// Greatest length of a request in bytes.
pub const REQUEST_LIMIT: usize = 256;

use crate::track::{Faults, Which};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    Status,
    Kill,
    /// Milliseconds from now, or no deadline.
    Deadline(Option<u64>),
    Prepare,
    CapturePrivate,
    CaptureFile {
        keep_zero: bool,
    },
    Release,
    Inject(usize),
    File,
    Remap,
    Track {
        base: String,
        faults: Faults,
    },
    Tracking,
    Guard,
    GuardProcess,
    Move {
        console: String,
        record: String,
    },
    PrepareTracked(Which),
    CaptureTracked(Which),
    Collect,
    Committed {
        generation: u64,
        base: String,
    },
}

/// Greatest length of a snapshot's name in bytes.
const BASE_LIMIT: usize = 128;
/// Greatest length of a file's name in bytes.
const NAME_LIMIT: usize = 64;
/// A year: more is a mistake, and it keeps the arithmetic far from overflow.
const DEADLINE_LIMIT_MS: u64 = 366 * 86_400_000;

pub fn parse(message: &[u8]) -> Result<Request, &'static str> {
    let text = std::str::from_utf8(message).map_err(|_| "not text")?;
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    match words[..] {
        ["status"] => Ok(Request::Status),
        ["kill"] => Ok(Request::Kill),
        ["deadline", "none"] => Ok(Request::Deadline(None)),
        ["deadline", ms] => match ms.parse() {
            Ok(ms) if ms <= DEADLINE_LIMIT_MS => Ok(Request::Deadline(Some(ms))),
            _ => Err("not a number of milliseconds"),
        },
        ["prepare"] => Ok(Request::Prepare),
        ["capture", "private"] => Ok(Request::CapturePrivate),
        ["capture", "file"] => Ok(Request::CaptureFile { keep_zero: false }),
        ["capture", "file-all"] => Ok(Request::CaptureFile { keep_zero: true }),
        ["release"] => Ok(Request::Release),
        ["inject", count] => count
            .parse()
            .map(Request::Inject)
            .map_err(|_| "not a number of pages"),
        ["file"] => Ok(Request::File),
        ["remap"] => Ok(Request::Remap),
        ["track", base, faults] => Ok(Request::Track {
            base: base_name(base)?,
            faults: match faults {
                "any" => Faults::Any,
                "user" => Faults::User,
                "wait" => Faults::Wait,
                _ => return Err("no such faults"),
            },
        }),
        ["guard"] => Ok(Request::Guard),
        ["guard-process"] => Ok(Request::GuardProcess),
        ["move", console, record] => Ok(Request::Move {
            console: file_name(console)?,
            record: file_name(record)?,
        }),
        ["tracking"] => Ok(Request::Tracking),
        ["prepare", which] => Ok(Request::PrepareTracked(parse_which(which)?)),
        ["capture", which] => Ok(Request::CaptureTracked(parse_which(which)?)),
        ["collect"] => Ok(Request::Collect),
        ["committed", generation, base] => Ok(Request::Committed {
            generation: generation.parse().map_err(|_| "not a generation")?,
            base: base_name(base)?,
        }),
        _ => Err("no such request"),
    }
}

fn parse_which(word: &str) -> Result<Which, &'static str> {
    match word {
        "delta" => Ok(Which::Delta),
        "all" => Ok(Which::All),
        _ => Err("no such pages"),
    }
}

pub fn file_name(word: &str) -> Result<String, &'static str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    let length = 1..=NAME_LIMIT;
    if length.contains(&word.len()) && word.chars().all(plain) && !word.starts_with('.') {
        Ok(word.to_string())
    } else {
        Err("not a plain file name")
    }
}

fn base_name(word: &str) -> Result<String, &'static str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if word.len() <= BASE_LIMIT && word.chars().all(plain) {
        Ok(word.to_string())
    } else {
        Err("not a snapshot's name")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_is_understood() {
        assert_eq!(parse(b"status"), Ok(Request::Status));
        assert_eq!(parse(b"deadline 1500\n"), Ok(Request::Deadline(Some(1500))));
        assert_eq!(parse(b"deadline none"), Ok(Request::Deadline(None)));
        assert_eq!(
            parse(b"capture file-all"),
            Ok(Request::CaptureFile { keep_zero: true })
        );
        assert_eq!(parse(b"inject 12"), Ok(Request::Inject(12)));
        assert_eq!(parse(b"file"), Ok(Request::File));
        assert_eq!(parse(b"remap"), Ok(Request::Remap));
        assert_eq!(parse(b"guard"), Ok(Request::Guard));
        assert_eq!(parse(b"guard-process"), Ok(Request::GuardProcess));
        let moved = Request::Move {
            console: "console.log".to_string(),
            record: "vmm.end".to_string(),
        };
        assert_eq!(parse(b"move console.log vmm.end"), Ok(moved));
        let track = Request::Track {
            base: "snp_1".to_string(),
            faults: Faults::User,
        };
        assert_eq!(parse(b"track snp_1 user"), Ok(track));
        assert_eq!(
            parse(b"prepare all"),
            Ok(Request::PrepareTracked(Which::All))
        );
        assert_eq!(
            parse(b"capture delta"),
            Ok(Request::CaptureTracked(Which::Delta))
        );
        let committed = Request::Committed {
            generation: 3,
            base: "-".to_string(),
        };
        assert_eq!(parse(b"committed 3 -"), Ok(committed));
    }

    #[test]
    fn nonsense_is_refused() {
        for message in [
            &b"deadline -1"[..],
            b"deadline 99999999999999999",
            b"inject",
            b"capture",
            b"capture some",
            b"track",
            b"track a/b any",
            b"committed x y",
            b"move console.log",
            b"move ../console vmm.end",
            b"move console.log .hidden",
            b"\xff",
            b"",
        ] {
            assert!(parse(message).is_err(), "{message:?}");
        }
    }
}
