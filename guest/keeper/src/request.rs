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
//!
//! A refused or failed request is answered `err CODE TEXT`; CODE is bad-request, no-space or failed. When the VMM is
//! gone every client gets `dead END REASON`, a newline and the tail of the VMM's output; then the socket closes.

/// Greatest length of a request in bytes.
pub const REQUEST_LIMIT: usize = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
}

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
        _ => Err("no such request"),
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
    }

    #[test]
    fn nonsense_is_refused() {
        for message in [
            &b"deadline -1"[..],
            b"deadline 99999999999999999",
            b"inject",
            b"capture",
            b"\xff",
            b"",
        ] {
            assert!(parse(message).is_err(), "{message:?}");
        }
    }
}
