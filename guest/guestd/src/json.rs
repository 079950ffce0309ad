//! A small, bounded JSON: what request and reply bodies need and nothing more.
//!
//! Depth is capped, input must be UTF-8, numbers are i64 or f64, duplicate keys: the first wins.

const MAX_DEPTH: usize = 16;

#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(String),
    Arr(Vec<Value>),
    Obj(Vec<(String, Value)>),
}

impl Value {
    pub fn get(&self, key: &str) -> Option<&Value> {
        match self {
            Value::Obj(items) => items.iter().find(|(k, _)| k == key).map(|(_, v)| v),
            _ => None,
        }
    }
    pub fn as_str(&self) -> Option<&str> {
        if let Value::Str(s) = self {
            Some(s)
        } else {
            None
        }
    }
    pub fn as_int(&self) -> Option<i64> {
        if let Value::Int(n) = self {
            Some(*n)
        } else {
            None
        }
    }
    pub fn as_bool(&self) -> Option<bool> {
        if let Value::Bool(b) = self {
            Some(*b)
        } else {
            None
        }
    }
    pub fn as_arr(&self) -> Option<&[Value]> {
        if let Value::Arr(a) = self {
            Some(a)
        } else {
            None
        }
    }
    pub fn as_obj(&self) -> Option<&[(String, Value)]> {
        if let Value::Obj(o) = self {
            Some(o)
        } else {
            None
        }
    }

    /// Append the compact text form.
    pub fn write(&self, out: &mut String) {
        match self {
            Value::Null => out.push_str("null"),
            Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
            Value::Int(n) => out.push_str(&n.to_string()),
            Value::Float(x) if x.is_finite() => out.push_str(&format!("{x:?}")),
            Value::Float(_) => out.push_str("null"),
            Value::Str(s) => write_str(s, out),
            Value::Arr(items) => {
                out.push('[');
                for (i, v) in items.iter().enumerate() {
                    if i > 0 {
                        out.push(',');
                    }
                    v.write(out);
                }
                out.push(']');
            }
            Value::Obj(items) => {
                out.push('{');
                for (i, (k, v)) in items.iter().enumerate() {
                    if i > 0 {
                        out.push(',');
                    }
                    write_str(k, out);
                    out.push(':');
                    v.write(out);
                }
                out.push('}');
            }
        }
    }

    pub fn text(&self) -> String {
        let mut out = String::new();
        self.write(&mut out);
        out
    }
}

impl From<&str> for Value {
    fn from(s: &str) -> Self {
        Value::Str(s.to_string())
    }
}
impl From<String> for Value {
    fn from(s: String) -> Self {
        Value::Str(s)
    }
}
impl From<bool> for Value {
    fn from(b: bool) -> Self {
        Value::Bool(b)
    }
}
impl From<i64> for Value {
    fn from(n: i64) -> Self {
        Value::Int(n)
    }
}
impl From<f64> for Value {
    fn from(x: f64) -> Self {
        Value::Float(x)
    }
}

/// Build an object.
pub fn obj<const N: usize>(items: [(&str, Value); N]) -> Value {
    Value::Obj(items.into_iter().map(|(k, v)| (k.to_string(), v)).collect())
}

fn write_str(s: &str, out: &mut String) {
    out.push('"');
    for c in s.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            c if (c as u32) < 0x20 => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
}

/// Parse one value; trailing bytes other than blanks are an error.
pub fn parse(data: &[u8]) -> Result<Value, &'static str> {
    let mut p = Parser { s: data, i: 0 };
    let v = p.value(0)?;
    p.blanks();
    if p.i == data.len() {
        Ok(v)
    } else {
        Err("bytes after the value")
    }
}

struct Parser<'a> {
    s: &'a [u8],
    i: usize,
}

impl Parser<'_> {
    fn peek(&self) -> Option<u8> {
        self.s.get(self.i).copied()
    }
    fn blanks(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.i += 1;
        }
    }
    fn expect(&mut self, c: u8) -> Result<(), &'static str> {
        if self.peek() == Some(c) {
            self.i += 1;
            Ok(())
        } else {
            Err("unexpected byte")
        }
    }
    fn word(&mut self, w: &str, v: Value) -> Result<Value, &'static str> {
        if self.s[self.i..].starts_with(w.as_bytes()) {
            self.i += w.len();
            Ok(v)
        } else {
            Err("unknown word")
        }
    }
    fn value(&mut self, depth: usize) -> Result<Value, &'static str> {
        if depth > MAX_DEPTH {
            return Err("too deep");
        }
        self.blanks();
        match self.peek() {
            Some(b'{') => self.object(depth),
            Some(b'[') => self.array(depth),
            Some(b'"') => Ok(Value::Str(self.string()?)),
            Some(b't') => self.word("true", Value::Bool(true)),
            Some(b'f') => self.word("false", Value::Bool(false)),
            Some(b'n') => self.word("null", Value::Null),
            Some(b'-' | b'0'..=b'9') => self.number(),
            _ => Err("no value"),
        }
    }
    fn object(&mut self, depth: usize) -> Result<Value, &'static str> {
        self.i += 1;
        let mut items = Vec::new();
        self.blanks();
        if self.peek() == Some(b'}') {
            self.i += 1;
            return Ok(Value::Obj(items));
        }
        loop {
            self.blanks();
            let k = self.string()?;
            self.blanks();
            self.expect(b':')?;
            items.push((k, self.value(depth + 1)?));
            self.blanks();
            match self.peek() {
                Some(b',') => self.i += 1,
                _ => break,
            }
        }
        self.expect(b'}')?;
        Ok(Value::Obj(items))
    }
    fn array(&mut self, depth: usize) -> Result<Value, &'static str> {
        self.i += 1;
        let mut items = Vec::new();
        self.blanks();
        if self.peek() == Some(b']') {
            self.i += 1;
            return Ok(Value::Arr(items));
        }
        loop {
            items.push(self.value(depth + 1)?);
            self.blanks();
            match self.peek() {
                Some(b',') => self.i += 1,
                _ => break,
            }
        }
        self.expect(b']')?;
        Ok(Value::Arr(items))
    }
    fn number(&mut self) -> Result<Value, &'static str> {
        let start = self.i;
        while matches!(
            self.peek(),
            Some(b'-' | b'+' | b'.' | b'e' | b'E' | b'0'..=b'9')
        ) {
            self.i += 1;
        }
        let t = std::str::from_utf8(&self.s[start..self.i]).map_err(|_| "number")?;
        if let Ok(n) = t.parse::<i64>() {
            return Ok(Value::Int(n));
        }
        t.parse::<f64>()
            .ok()
            .filter(|x| x.is_finite())
            .map(Value::Float)
            .ok_or("number")
    }
    fn string(&mut self) -> Result<String, &'static str> {
        self.expect(b'"')?;
        let mut out: Vec<u8> = Vec::new();
        loop {
            let start = self.i;
            while !matches!(self.peek(), None | Some(b'"' | b'\\')) {
                self.i += 1;
            }
            out.extend_from_slice(&self.s[start..self.i]);
            match self.peek() {
                None => return Err("string without end"),
                Some(b'"') => {
                    self.i += 1;
                    return String::from_utf8(out).map_err(|_| "not UTF-8");
                }
                _ => {
                    self.i += 1;
                    let c = self.escape()?;
                    out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
                }
            }
        }
    }
    fn escape(&mut self) -> Result<char, &'static str> {
        let c = self.peek().ok_or("escape")?;
        self.i += 1;
        Ok(match c {
            b'n' => '\n',
            b't' => '\t',
            b'r' => '\r',
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'"' | b'\\' | b'/' => char::from(c),
            b'u' => {
                let hi = self.hex4()?;
                if (0xD800..0xDC00).contains(&hi) {
                    self.expect(b'\\')?;
                    self.expect(b'u')?;
                    let lo = self.hex4()?;
                    if !(0xDC00..0xE000).contains(&lo) {
                        return Err("half a surrogate pair");
                    }
                    char::from_u32(0x10000 + ((hi - 0xD800) << 10) + (lo - 0xDC00))
                        .ok_or("escape")?
                } else {
                    char::from_u32(hi).ok_or("half a surrogate pair")?
                }
            }
            _ => return Err("escape"),
        })
    }
    fn hex4(&mut self) -> Result<u32, &'static str> {
        let digits = self.s.get(self.i..self.i + 4).ok_or("escape")?;
        self.i += 4;
        let text = std::str::from_utf8(digits).map_err(|_| "escape")?;
        if !digits.iter().all(u8::is_ascii_hexdigit) {
            return Err("escape");
        }
        u32::from_str_radix(text, 16).map_err(|_| "escape")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let text = r#"{"a":[1,-2,3.5,true,false,null],"b":{"c":"x\n\"\\\u0001é"},"n":1764000000123456789}"#;
        let v = parse(text.as_bytes()).unwrap();
        assert_eq!(v.text(), text);
        assert_eq!(
            v.get("n").unwrap().as_int(),
            Some(1_764_000_000_123_456_789)
        );
        assert_eq!(
            parse(br#""\ud83d\ude00\/""#).unwrap(),
            Value::from("\u{1F600}/")
        );
    }

    #[test]
    fn refuses() {
        for bad in [
            &b""[..],
            b"{",
            b"[1,",
            b"\"abc",
            b"{\"a\" 1}",
            b"1 2",
            b"tru",
            b"\"\\u12\"",
            b"\"\\ud800\"",
            b"\"\xff\"",
            b"\"\\x\"",
            b"-",
            b"1e999",
            b"\"\\u+123\"",
        ] {
            assert!(parse(bad).is_err(), "{:?}", String::from_utf8_lossy(bad));
        }
        assert!(parse("[".repeat(1000).as_bytes()).is_err());
        assert!(parse(format!("{}1{}", "[".repeat(10), "]".repeat(10)).as_bytes()).is_ok());
    }

    #[test]
    fn every_prefix_of_a_document_is_safe() {
        let text = r#"{"a":[1,{"b":"\u00e9\ud83d\ude00"}],"c":-1.5e3}"#.as_bytes();
        for n in 0..text.len() {
            assert!(parse(&text[..n]).is_err());
        }
        assert!(parse(text).is_ok());
    }
}
