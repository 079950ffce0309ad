//! The words of the tar format: header blocks, pax records, numbers, paths. Pure; what they lead to is in `tar`.

use crate::fail::{Fail, Outcome};

pub const BLOCK: usize = 512;
const MAX_DEPTH: usize = 128;

/// One member's header, as the format has it.
#[derive(Debug, PartialEq, Eq)]
pub struct Member {
    pub name: String,
    pub link: String,
    pub size: u64,
    pub mode: u32,
    pub mtime: i64,
    pub kind: u8,
}

/// Parse a header block; None for the zero block that ends an archive.
pub fn header(b: &[u8; BLOCK]) -> Outcome<Option<Member>> {
    if b.iter().all(|x| *x == 0) {
        return Ok(None);
    }
    let sum: u64 = b
        .iter()
        .enumerate()
        .map(|(i, x)| {
            if (148..156).contains(&i) {
                32
            } else {
                u64::from(*x)
            }
        })
        .sum();
    if number(&b[148..156]) != Some(sum) {
        return Err(Fail::bad("tar: bad header checksum"));
    }
    let size = number(&b[124..136]).ok_or_else(|| Fail::bad("tar: bad size"))?;
    let mut name = text(&b[..100])?;
    if &b[257..262] == b"ustar" && b[263] != b' ' && b[345] != 0 {
        name = format!("{}/{name}", text(&b[345..500])?);
    }
    Ok(Some(Member {
        name,
        link: text(&b[157..257])?,
        size,
        mode: number(&b[100..108]).unwrap_or(0o644) as u32 & 0o7777,
        mtime: number(&b[136..148]).unwrap_or(0).min(i64::MAX as u64) as i64,
        kind: b[156],
    }))
}

/// A field that ends at its first zero byte.
pub fn text(b: &[u8]) -> Outcome<String> {
    let end = b.iter().position(|x| *x == 0).unwrap_or(b.len());
    String::from_utf8(b[..end].to_vec()).map_err(|_| Fail::bad("tar: a name is not UTF-8"))
}

/// An octal field, or GNU's base 256 when the top bit is set.
pub fn number(b: &[u8]) -> Option<u64> {
    if b[0] & 0x80 != 0 {
        let (head, tail) = b.split_at(b.len() - 8);
        if head[0] & 0x7F != 0 || head[1..].iter().any(|x| *x != 0) {
            return None;
        }
        return Some(u64::from_be_bytes(tail.try_into().ok()?)).filter(|n| *n <= i64::MAX as u64);
    }
    let s = std::str::from_utf8(b)
        .ok()?
        .trim_matches(|c| c == '\0' || c == ' ');
    if s.is_empty() {
        Some(0)
    } else {
        u64::from_str_radix(s, 8).ok()
    }
}

/// Records of a pax header: "LENGTH KEY=VALUE\n".
pub fn pax(mut b: &[u8]) -> Outcome<Vec<(String, String)>> {
    let bad = || Fail::bad("tar: bad pax header");
    let mut out = Vec::new();
    while !b.is_empty() {
        let space = b
            .iter()
            .position(|c| *c == b' ')
            .filter(|i| *i <= 6)
            .ok_or_else(bad)?;
        let len: usize = std::str::from_utf8(&b[..space])
            .ok()
            .and_then(|s| s.parse().ok())
            .ok_or_else(bad)?;
        if len <= space + 1 || len > b.len() || b[len - 1] != b'\n' {
            return Err(bad());
        }
        if let Ok(record) = std::str::from_utf8(&b[space + 1..len - 1]) {
            let (k, v) = record.split_once('=').ok_or_else(bad)?;
            out.push((k.to_string(), v.to_string()));
        } // values that are no text (extended attributes) mean nothing here
        b = &b[len..];
    }
    Ok(out)
}

/// Clean a member's path: relative, no "..", no empty or "." parts. Empty: the folder itself.
pub fn clean(name: &str) -> Outcome<Vec<&str>> {
    if name.starts_with('/') || name.contains('\0') {
        return Err(Fail::bad(format!("tar: absolute path refused: {name:?}")));
    }
    let parts: Vec<&str> = name
        .split('/')
        .filter(|p| !p.is_empty() && *p != ".")
        .collect();
    if parts.contains(&"..") || parts.len() > MAX_DEPTH || parts.iter().any(|p| p.len() > 255) {
        return Err(Fail::bad(format!("tar: path refused: {name:?}")));
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pax_records_and_numbers() {
        for bad in [
            &b"5 a\n"[..],
            b"x a=b\n",
            b"0 a=b\n",
            b"999 a=b\n",
            b" a=b\n",
            b"6 a=b ",
        ] {
            assert!(pax(bad).is_err(), "{:?}", String::from_utf8_lossy(bad));
        }
        let mut huge = [0u8; 12];
        huge[0] = 0x80;
        huge[4..].copy_from_slice(&u64::MAX.to_be_bytes());
        assert_eq!(number(&huge), None);
        huge[4..].copy_from_slice(&(9u64 << 33).to_be_bytes());
        assert_eq!(number(&huge), Some(9 << 33));
        assert_eq!(pax(b"9 a=b\n").map_err(|f| f.kind), Err("bad_input"));
        assert_eq!(
            pax(b"6 a=b\n").unwrap(),
            vec![("a".to_string(), "b".to_string())]
        );
    }
}
