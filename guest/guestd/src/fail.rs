//! The one error type that crosses the wire: a kind the host maps to its own typed errors, and one line for people.

use std::io;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fail {
    pub kind: &'static str,
    pub message: String,
}

pub type Outcome<T> = Result<T, Fail>;

impl Fail {
    pub fn new(kind: &'static str, message: impl Into<String>) -> Self {
        Fail {
            kind,
            message: message.into(),
        }
    }

    pub fn bad(message: impl Into<String>) -> Self {
        Fail::new("bad_input", message)
    }

    /// Judge a system error: `what` names the thing it happened to.
    pub fn io(what: &str, e: &io::Error) -> Self {
        let kind = match e.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => "not_found",
            Some(libc::ENOSPC | libc::EDQUOT) => "no_space",
            Some(libc::EINVAL | libc::EISDIR | libc::ENAMETOOLONG | libc::ELOOP | libc::EXDEV) => {
                "bad_input"
            }
            Some(libc::EACCES | libc::EPERM | libc::EROFS) => "refused",
            Some(libc::ECONNREFUSED | libc::ENETUNREACH | libc::EHOSTUNREACH) => "unreachable",
            _ => "failed",
        };
        let text = match e.raw_os_error() {
            Some(n) => strerror(n),
            None => e.to_string(),
        };
        Fail::new(kind, format!("{what}: {text}"))
    }
}

/// The system's own words for an errno, without the number that std appends.
fn strerror(n: i32) -> String {
    let text = io::Error::from_raw_os_error(n).to_string();
    match text.find(" (os error") {
        Some(at) => text[..at].to_string(),
        None => text,
    }
}
