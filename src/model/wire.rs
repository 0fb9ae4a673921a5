//! Protobuf's wire format, as far as ONNX needs it: fields of a message, one by one, read and written.

/// Why bytes are not a protobuf message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A field is longer than what is left.
    #[error("ends in the middle of a field: the file was cut short, or is no ONNX model")]
    Cut,
    /// A number of more than 10 bytes, field 0, or a wire type that nobody uses.
    #[error("is no ONNX model: it is not encoded as one")]
    Encoding,
    /// A field of another kind than ONNX says.
    #[error("is no ONNX model: a field is of the wrong kind")]
    Kind,
    /// A name that is not UTF-8.
    #[error("is no ONNX model: a name in it is not UTF-8")]
    Text,
}

/// A field's payload.
#[derive(Debug, Clone, Copy)]
enum Payload<'a> {
    Number(u64),
    /// The four or eight bytes of a float, an integer of fixed width: nothing here reads them.
    Fixed,
    Bytes(&'a [u8]),
}

/// One field of a message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Field<'a> {
    /// The field's number, at least 1.
    pub(crate) number: u32,
    payload: Payload<'a>,
}

impl<'a> Field<'a> {
    pub(crate) fn varint(self) -> Result<u64, WireError> {
        if let Payload::Number(n) = self.payload { Ok(n) } else { Err(WireError::Kind) }
    }

    pub(crate) fn bytes(self) -> Result<&'a [u8], WireError> {
        if let Payload::Bytes(b) = self.payload { Ok(b) } else { Err(WireError::Kind) }
    }
}

/// Walks the fields of a message; ends at the first error.
#[derive(Debug)]
pub(crate) struct Message<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Message<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Where the next field starts.
    pub(crate) fn position(&self) -> usize {
        self.at
    }

    fn varint(&mut self) -> Result<u64, WireError> {
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            let byte = *self.bytes.get(self.at).ok_or(WireError::Cut)?;
            self.at += 1;
            if shift == 63 && byte > 1 {
                return Err(WireError::Encoding);
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(WireError::Encoding)
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8], WireError> {
        let rest = &self.bytes[self.at..];
        let len = usize::try_from(len).ok().filter(|n| *n <= rest.len()).ok_or(WireError::Cut)?;
        self.at += len;
        Ok(&rest[..len])
    }

    fn field(&mut self) -> Result<Field<'a>, WireError> {
        let tag = self.varint()?;
        let number = u32::try_from(tag >> 3).map_err(|_| WireError::Encoding)?;
        if number == 0 || number >= 1 << 29 {
            return Err(WireError::Encoding);
        }
        let payload = match tag & 7 {
            0 => Payload::Number(self.varint()?),
            1 => self.take(8).map(|_| Payload::Fixed)?,
            2 => {
                let len = self.varint()?;
                Payload::Bytes(self.take(len)?)
            }
            5 => self.take(4).map(|_| Payload::Fixed)?,
            _ => return Err(WireError::Encoding),
        };
        Ok(Field { number, payload })
    }
}

/// The numbers of a packed field.
pub(crate) fn varints(bytes: &[u8]) -> impl Iterator<Item = Result<u64, WireError>> + '_ {
    let mut rest = Message::new(bytes);
    std::iter::from_fn(move || {
        if rest.at == rest.bytes.len() {
            return None;
        }
        let number = rest.varint();
        if number.is_err() {
            rest.at = rest.bytes.len();
        }
        Some(number)
    })
}

impl<'a> Iterator for Message<'a> {
    type Item = Result<Field<'a>, WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at == self.bytes.len() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.at = self.bytes.len();
        }
        Some(field)
    }
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Writes a field that is a number.
pub(crate) fn number(out: &mut Vec<u8>, field: u32, value: u64) {
    varint(out, u64::from(field) << 3);
    varint(out, value);
}

/// Writes a field that is a string, bytes or a message.
pub(crate) fn put(out: &mut Vec<u8>, field: u32, value: &[u8]) {
    put_pieces(out, field, &[value]);
}

/// Writes such a field of a value in pieces.
pub(crate) fn put_pieces(out: &mut Vec<u8>, field: u32, value: &[&[u8]]) {
    varint(out, u64::from(field) << 3 | 2);
    varint(out, value.iter().map(|piece| piece.len() as u64).sum());
    value.iter().for_each(|piece| out.extend_from_slice(piece));
}
