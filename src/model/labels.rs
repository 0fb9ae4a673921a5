//! Labels out of a model's `names` metadata.
//!
//! Ultralytics writes the `str()` of a Python dict (`{0: 'person', 1: "it's"}`) or list, others
//! write JSON. Both are read by one small reader: a JSON object with string keys, a list, a dict
//! with number keys; strings in either quote with either language's escapes.

use crate::text::brief;

/// Most labels of a model.
const LABELS_MAX: usize = 10_000;
/// Longest label in bytes.
const LABEL_BYTES_MAX: usize = 256;

/// Reads labels in the order of their class numbers. The error says what is wrong with the text.
pub fn parse(text: &str) -> Result<Vec<String>, String> {
    let mut reader = Reader { rest: text.trim().chars().collect(), at: 0 };
    let labels = reader.labels()?;
    if reader.at != reader.rest.len() {
        return Err("goes on after its end".into());
    }
    Ok(labels)
}

struct Reader {
    rest: Vec<char>,
    at: usize,
}

impl Reader {
    fn labels(&mut self) -> Result<Vec<String>, String> {
        let close = match self.next() {
            Some('{') => '}',
            Some('[') => ']',
            Some('(') => ')',
            _ => return Err("is neither a dict nor a list".into()),
        };
        let mut labels: Vec<Option<String>> = Vec::new();
        loop {
            self.space();
            if self.eat(close) {
                break;
            }
            let class = if close == '}' { self.key()? } else { labels.len() };
            let label = self.string()?;
            if class >= LABELS_MAX {
                return Err(format!("has a class above {LABELS_MAX}"));
            }
            if labels.len() <= class {
                labels.resize(class + 1, None);
            }
            if labels[class].replace(label).is_some() {
                return Err(format!("names class {class} twice"));
            }
            self.space();
            if !self.eat(',') {
                self.space();
                if self.eat(close) {
                    break;
                }
                return Err(format!("has something unexpected at character {}", self.at));
            }
        }
        labels
            .into_iter()
            .enumerate()
            .map(|(n, label)| label.ok_or(format!("does not name class {n}")))
            .collect()
    }

    /// A class number, bare or (in JSON) as a string, and the colon.
    fn key(&mut self) -> Result<usize, String> {
        let digits = match self.peek() {
            Some('"' | '\'') => self.string()?,
            _ => {
                let from = self.at;
                while self.peek().is_some_and(|c| c.is_ascii_digit()) {
                    self.at += 1;
                }
                self.rest[from..self.at].iter().collect()
            }
        };
        let class = digits
            .parse()
            .map_err(|_| format!("has a class {:?}, no number", brief(&digits, 30)))?;
        self.space();
        if !self.eat(':') {
            return Err(format!("has no colon after class {class}"));
        }
        self.space();
        Ok(class)
    }

    fn string(&mut self) -> Result<String, String> {
        let quote = match self.next() {
            Some(q @ ('"' | '\'')) => q,
            _ => return Err(format!("has no quoted label at character {}", self.at)),
        };
        let mut label = String::new();
        loop {
            match self.next() {
                None => return Err("ends within a label".into()),
                Some(c) if c == quote => break,
                Some('\\') => self.escape(&mut label)?,
                Some(c) => label.push(c),
            }
            if label.len() > LABEL_BYTES_MAX {
                return Err(format!("has a label longer than {LABEL_BYTES_MAX} bytes"));
            }
        }
        Ok(label)
    }

    fn escape(&mut self, label: &mut String) -> Result<(), String> {
        let escape = self.next().ok_or("ends within a label")?;
        let code = match escape {
            'n' => 0x0a,
            't' => 0x09,
            'r' => 0x0d,
            'b' => 0x08,
            'f' => 0x0c,
            'x' => self.hex(2)?,
            'u' => self.hex(4)?,
            'U' => self.hex(8)?,
            other => other as u32,
        };
        // JSON writes what lies beyond 16 bits as two escapes.
        let code = if (0xd800..0xdc00).contains(&code) && self.eat('\\') && self.eat('u') {
            let low = self.hex(4)?;
            0x10000 + ((code - 0xd800) << 10) + (low.wrapping_sub(0xdc00) & 0x3ff)
        } else {
            code
        };
        label.push(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
        Ok(())
    }

    fn hex(&mut self, digits: usize) -> Result<u32, String> {
        let mut code = 0u32;
        for _ in 0..digits {
            let digit = self.next().and_then(|c| c.to_digit(16));
            code = (code << 4) | digit.ok_or("has an escape without its digits")?;
        }
        Ok(code)
    }

    fn space(&mut self) {
        while self.peek().is_some_and(char::is_whitespace) {
            self.at += 1;
        }
    }

    fn peek(&self) -> Option<char> {
        self.rest.get(self.at).copied()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += 1;
        Some(c)
    }

    fn eat(&mut self, wanted: char) -> bool {
        let eaten = self.peek() == Some(wanted);
        self.at += usize::from(eaten);
        eaten
    }
}
