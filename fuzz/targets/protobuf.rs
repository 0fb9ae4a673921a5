//! Mutations of protobuf messages that stay messages: bytes changed at random break the lengths
//! around them, and nothing gets past the first field.

/// A field: its number, and what it holds.
#[derive(Clone)]
enum Field {
    /// Wire types 0, 1 and 5, as they are written.
    Plain(u64, Vec<u8>),
    Bytes(u64, Vec<u8>),
    Message(u64, Vec<Field>),
}

/// Changes one field of a message, if `data` is one; `leaf` changes a text, `seed` chooses.
pub fn mutate(data: &[u8], seed: u32, leaf: &mut dyn FnMut(&mut Vec<u8>)) -> Option<Vec<u8>> {
    let mut fields = read(data, 0)?;
    let mut choice = u64::from(seed) | 1 << 32;
    change(&mut fields, &mut choice, leaf);
    let mut bytes = Vec::with_capacity(data.len() + 64);
    fields.iter().for_each(|field| write(field, &mut bytes));
    Some(bytes)
}

/// A number below `below`, out of what is left of the choice.
fn pick(choice: &mut u64, below: usize) -> usize {
    // Knuth's multiplicative congruence.
    *choice =
        choice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*choice >> 33) as usize % below.max(1)
}

fn change(fields: &mut Vec<Field>, choice: &mut u64, leaf: &mut dyn FnMut(&mut Vec<u8>)) {
    if fields.is_empty() {
        return fields.push(Field::Plain(8, vec![pick(choice, 128) as u8]));
    }
    let at = pick(choice, fields.len());
    if let Field::Message(_, inner) = &mut fields[at]
        && pick(choice, 8) != 0
    {
        return change(inner, choice, leaf);
    }
    match pick(choice, 8) {
        0 => drop(fields.remove(at)),
        1 => fields.insert(at, fields[at].clone()),
        2 => {
            let other = pick(choice, fields.len());
            fields.swap(at, other);
        }
        3 => {
            let tag = (pick(choice, 26) as u64 + 1) << 3;
            let (Field::Plain(old, _) | Field::Bytes(old, _) | Field::Message(old, _)) =
                &mut fields[at];
            *old = tag | (*old & 7);
        }
        4 => {
            let number = 1u64 << pick(choice, 64);
            let mut bytes = Vec::new();
            varint(number.wrapping_sub(pick(choice, 3) as u64), &mut bytes);
            fields[at] = Field::Plain((pick(choice, 26) as u64 + 1) << 3, bytes);
        }
        _ => match &mut fields[at] {
            Field::Bytes(_, bytes) => leaf(bytes),
            Field::Plain(_, bytes) => {
                if let Some(first) = bytes.first_mut() {
                    *first = (*first & 0x80) | pick(choice, 128) as u8;
                }
            }
            Field::Message(_, inner) => change(inner, choice, leaf),
        },
    }
}

fn read(data: &[u8], depth: usize) -> Option<Vec<Field>> {
    let mut fields = Vec::new();
    let mut rest = data;
    while !rest.is_empty() {
        let tag = take_varint(&mut rest)?;
        let field = match tag & 7 {
            0 => {
                let start = rest;
                take_varint(&mut rest)?;
                Field::Plain(tag, start[..start.len() - rest.len()].to_vec())
            }
            1 => Field::Plain(tag, take(&mut rest, 8)?.to_vec()),
            5 => Field::Plain(tag, take(&mut rest, 4)?.to_vec()),
            2 => {
                let length = take_varint(&mut rest)?;
                let inside = take(&mut rest, length)?;
                // Texts look like messages at times: it is only a guess.
                match read(inside, depth + 1).filter(|f| depth < 12 && !f.is_empty()) {
                    Some(fields) => Field::Message(tag, fields),
                    None => Field::Bytes(tag, inside.to_vec()),
                }
            }
            _ => return None,
        };
        if tag >> 3 == 0 {
            return None;
        }
        fields.push(field);
    }
    Some(fields)
}

fn take<'a>(rest: &mut &'a [u8], length: u64) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(usize::try_from(length).ok()?)?;
    *rest = left;
    Some(taken)
}

fn take_varint(rest: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let byte = take(rest, 1)?[0];
        number |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

fn write(field: &Field, to: &mut Vec<u8>) {
    match field {
        Field::Plain(tag, bytes) => {
            varint(*tag, to);
            to.extend_from_slice(bytes);
        }
        Field::Bytes(tag, bytes) => {
            varint(*tag, to);
            varint(bytes.len() as u64, to);
            to.extend_from_slice(bytes);
        }
        Field::Message(tag, fields) => {
            let mut inside = Vec::new();
            fields.iter().for_each(|field| write(field, &mut inside));
            write(&Field::Bytes(*tag, inside), to);
        }
    }
}

fn varint(mut number: u64, to: &mut Vec<u8>) {
    while number >= 0x80 {
        to.push(number as u8 | 0x80);
        number >>= 7;
    }
    to.push(number as u8);
}
