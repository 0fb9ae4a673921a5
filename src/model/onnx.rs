//! What an ONNX file says about itself, read by ourselves before ONNX Runtime sees a byte.
//!
//! A bounded walk over the protobuf of `onnx.proto3`: nothing is copied but names and metadata,
//! every count and depth has a limit, and no input makes it panic (`tests/model.rs` cuts a model at
//! every byte). It answers what the contract needs (inputs, outputs, metadata) and what the
//! structure gate refuses (data outside of the file, compiled blobs, foreign operators).

use super::wire::{self, Field, Message, WireError};
use crate::text::brief;

/// Largest file: protobuf's own limit.
pub const FILE_BYTES_MAX: u64 = 2 << 30;
/// Graphs within graphs (`If`, `Loop`).
const DEPTH_MAX: usize = 16;
/// Nodes, initializers, values and functions together.
const PARTS_MAX: usize = 1_000_000;
const METADATA_MAX: usize = 256;
const METADATA_BYTES_MAX: usize = 1 << 20;
const NAME_BYTES_MAX: usize = 4096;
const VALUES_MAX: usize = 64;
const DIMS_MAX: usize = 8;
const OPSETS_MAX: usize = 64;
/// Elements of a tensor: 2 GiB of floats. A sparse one is made dense when it is loaded.
const ELEMENTS_MAX: u64 = 1 << 29;
/// Highest field number of `ModelProto`; anything above was not written by an ONNX exporter.
const MODEL_FIELD_MAX: u32 = 26;

/// One dimension of a tensor.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(untagged)]
pub enum Dim {
    /// Known.
    Fixed(u64),
    /// Free, with the exporter's name for it (`batch`, `height`).
    Named(String),
    /// Free, without a name.
    Unknown,
}

/// An input or output of the graph.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Value {
    /// As the session knows it.
    pub name: String,
    /// `TensorProto.DataType`: 1 = float, 10 = float16; 0 when it is no tensor.
    pub data_type: i32,
    /// `None` when the file gives no shape.
    pub dims: Option<Vec<Dim>>,
}

/// Everything that [`scan`] finds.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Scan {
    /// Version of the file format.
    pub ir_version: u64,
    /// The exporter.
    pub producer: String,
    /// The exporter's version.
    pub producer_version: String,
    /// Operator sets: domain (`""` is ONNX's own) and version.
    pub opsets: Vec<(String, u64)>,
    /// `metadata_props`, in the file's order.
    pub metadata: Vec<(String, String)>,
    /// Inputs that a caller must give: initializers left out.
    pub inputs: Vec<Value>,
    /// Outputs.
    pub outputs: Vec<Value>,
    /// Domains of the nodes' operators other than `""`, each once.
    pub op_domains: Vec<String>,
    /// Name of the first tensor whose data lies in another file.
    pub external_data: Option<String>,
    /// The graph holds a blob compiled for one device (`EPContext`).
    pub ep_context: bool,
    /// Nodes, those in subgraphs and functions included.
    pub nodes: usize,
    /// Bytes of the weights.
    pub initializer_bytes: u64,
}

impl Scan {
    /// The value of a metadata key.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }
}

/// Why the bytes are not an ONNX model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScanError {
    /// Not the protobuf encoding, or it ends in the middle.
    #[error("{0}")]
    Wire(#[from] WireError),
    /// Larger than [`FILE_BYTES_MAX`].
    #[error("is {0} bytes long; ONNX files end at 2 GiB")]
    TooLarge(u64),
    /// One of the limits.
    #[error("has more than {limit} {what}")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How much is allowed.
        limit: usize,
    },
    /// A tensor that claims to be larger than its data, or than anything.
    #[error("says that its tensor {name:?} has {elements} elements, but holds data for {held}")]
    TensorSize {
        /// The tensor.
        name: String,
        /// By its dimensions; the greatest number when they overflow.
        elements: u64,
        /// By its bytes, at most.
        held: u64,
    },
    /// A field that must stand once stands twice: readers disagree about which one counts.
    #[error("holds its {0} twice")]
    Twice(&'static str),
    /// A part that every model has is missing: the file was cut, or is no model.
    #[error("has no {0}: the file was cut short, or is no ONNX model")]
    Missing(&'static str),
    /// Bytes behind the model that no ONNX exporter writes.
    #[error("goes on after the model's end (byte {0}) with bytes that are not ONNX")]
    Trailing(usize),
}

/// Reads an ONNX file.
///
/// # Errors
/// The bytes are no ONNX model, or exceed a limit. The error completes "the file …".
pub fn scan(bytes: &[u8]) -> Result<Scan, ScanError> {
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(ScanError::TooLarge(bytes.len() as u64));
    }
    let mut walk = Walk::default();
    walk.model(bytes)?;
    Ok(walk.scan)
}

#[derive(Default)]
struct Walk {
    scan: Scan,
    parts: usize,
}

impl Walk {
    fn model(&mut self, bytes: &[u8]) -> Result<(), ScanError> {
        let mut message = Message::new(bytes);
        let mut graph = false;
        loop {
            let at = message.position();
            let field = match message.next() {
                None => break,
                Some(Ok(field)) if field.number <= MODEL_FIELD_MAX => field,
                // What comes before was a whole model: the rest does not belong to it.
                Some(_) if graph && !self.scan.opsets.is_empty() => {
                    return Err(ScanError::Trailing(at));
                }
                Some(Err(e)) => return Err(e.into()),
                Some(Ok(_)) => return Err(ScanError::Missing("graph")),
            };
            match field.number {
                1 => self.scan.ir_version = field.varint()?,
                2 => self.scan.producer = name(field)?,
                3 => self.scan.producer_version = name(field)?,
                7 if graph => return Err(ScanError::Twice("graph")),
                7 => {
                    graph = true;
                    self.graph(field.bytes()?, 0)?;
                }
                8 => {
                    self.scan.opsets.push(opset(field.bytes()?)?);
                    limit("operator sets", self.scan.opsets.len(), OPSETS_MAX)?;
                }
                14 => {
                    let entry = entry(field.bytes()?)?;
                    limit("metadata entries", self.scan.metadata.len() + 1, METADATA_MAX)?;
                    self.scan.metadata.push(entry);
                }
                20 => {
                    for field in Message::new(field.bytes()?) {
                        let field = field?;
                        if matches!(field.number, 1 | 2) {
                            self.nested(field.bytes()?, 1)?;
                        }
                    }
                }
                25 => self.function(field.bytes()?)?,
                _ => {}
            }
        }
        if !graph {
            return Err(ScanError::Missing("graph"));
        }
        if self.scan.opsets.is_empty() {
            return Err(ScanError::Missing("operator set"));
        }
        Ok(())
    }

    /// The main graph, whose inputs and outputs are the model's.
    fn graph(&mut self, bytes: &[u8], depth: usize) -> Result<(), ScanError> {
        let (mut inputs, mut outputs, mut initializers) = (Vec::new(), Vec::new(), Vec::new());
        for field in Message::new(bytes) {
            let field = field?;
            match field.number {
                5 => initializers.push(tensor_name(field.bytes()?)?),
                // The values of a sparse initializer carry its name.
                15 => {
                    for field in Message::new(field.bytes()?) {
                        let field = field?;
                        if field.number == 1 {
                            initializers.push(tensor_name(field.bytes()?)?);
                        }
                    }
                }
                11 => {
                    // Exporters before IR version 4 list every weight as an input.
                    limit("inputs", inputs.len() + 1, PARTS_MAX)?;
                    inputs.push(value(field.bytes()?)?);
                }
                12 => {
                    limit("outputs", outputs.len() + 1, VALUES_MAX)?;
                    outputs.push(value(field.bytes()?)?);
                }
                _ => {}
            }
        }
        self.nested(bytes, depth)?;
        initializers.sort_unstable();
        inputs.retain(|v: &Value| initializers.binary_search(&v.name.as_bytes()).is_err());
        limit("inputs", inputs.len(), VALUES_MAX)?;
        (self.scan.inputs, self.scan.outputs) = (inputs, outputs);
        Ok(())
    }

    /// Nodes and weights of any graph.
    fn nested(&mut self, bytes: &[u8], depth: usize) -> Result<(), ScanError> {
        limit("graphs within graphs", depth, DEPTH_MAX)?;
        for field in Message::new(bytes) {
            let field = field?;
            match field.number {
                1 => self.node(field.bytes()?, depth)?,
                5 => self.tensor(field.bytes()?)?,
                15 => self.sparse(field.bytes()?)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn node(&mut self, bytes: &[u8], depth: usize) -> Result<(), ScanError> {
        self.part()?;
        self.scan.nodes += 1;
        let (mut op, mut domain) = (String::new(), String::new());
        for field in Message::new(bytes) {
            let field = field?;
            match field.number {
                4 => op = name(field)?,
                7 => domain = name(field)?,
                5 => self.attribute(field.bytes()?, depth)?,
                _ => {}
            }
        }
        self.scan.ep_context |= op == "EPContext";
        if !matches!(domain.as_str(), "" | "ai.onnx") && !self.scan.op_domains.contains(&domain) {
            limit("operator domains", self.scan.op_domains.len() + 1, OPSETS_MAX)?;
            self.scan.op_domains.push(domain);
        }
        Ok(())
    }

    fn attribute(&mut self, bytes: &[u8], depth: usize) -> Result<(), ScanError> {
        for field in Message::new(bytes) {
            let field = field?;
            match field.number {
                5 | 10 => self.tensor(field.bytes()?)?,
                6 | 11 => self.nested(field.bytes()?, depth + 1)?,
                22 | 23 => self.sparse(field.bytes()?)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn function(&mut self, bytes: &[u8]) -> Result<(), ScanError> {
        self.part()?;
        for field in Message::new(bytes) {
            let field = field?;
            match field.number {
                7 => self.node(field.bytes()?, 1)?,
                11 => self.attribute(field.bytes()?, 1)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn sparse(&mut self, bytes: &[u8]) -> Result<(), ScanError> {
        let mut dims = Dims::default();
        for field in Message::new(bytes) {
            let field = field?;
            match field.number {
                1 | 2 => self.tensor(field.bytes()?)?,
                3 => dims.read(field)?,
                _ => {}
            }
        }
        if dims.elements() > ELEMENTS_MAX {
            let (elements, held) = (dims.elements(), ELEMENTS_MAX);
            return Err(ScanError::TensorSize { name: "of sparse values".into(), elements, held });
        }
        Ok(())
    }

    fn tensor(&mut self, bytes: &[u8]) -> Result<(), ScanError> {
        self.part()?;
        let mut elsewhere = false;
        let mut dims = Dims::default();
        let (mut data_type, mut held, mut raw) = (0, 0u64, None);
        for field in Message::new(bytes) {
            let field = field?;
            match field.number {
                1 => dims.read(field)?,
                2 => data_type = field.varint()?,
                9 => raw = Some(field.bytes()?.len() as u64),
                // The typed arrays; single numbers may stand unpacked, strings may be empty.
                4..=7 | 10 | 11 => held += field.bytes().map_or(8, |b| b.len().max(1) as u64),
                13 => elsewhere = true,
                14 => elsewhere |= field.varint()? == 1,
                _ => {}
            }
        }
        self.scan.initializer_bytes += held + raw.unwrap_or(0);
        if elsewhere {
            if self.scan.external_data.is_none() {
                self.scan.external_data = Some(shown_name(bytes)?);
            }
            return Ok(());
        }
        // Two elements of 4 bits may lie in one byte, of a typed array as of raw data.
        let held = match raw {
            Some(raw) => raw * 2 / half_bytes(data_type),
            None => held * 2,
        };
        let elements = dims.elements();
        if elements > held || elements > ELEMENTS_MAX {
            let name = shown_name(bytes)?;
            return Err(ScanError::TensorSize { name, elements, held: held.min(ELEMENTS_MAX) });
        }
        Ok(())
    }

    fn part(&mut self) -> Result<(), ScanError> {
        self.parts += 1;
        limit("nodes and tensors", self.parts, PARTS_MAX)
    }
}

/// The product of a tensor's dimensions, taken with care.
#[derive(Default)]
struct Dims {
    product: Option<u64>,
    overflow: bool,
}

impl Dims {
    /// One dimension, or several packed.
    fn read(&mut self, field: Field<'_>) -> Result<(), ScanError> {
        match field.bytes() {
            Ok(packed) => wire::varints(packed).try_for_each(|n| n.map(|n| self.times(n)))?,
            Err(_) => self.times(field.varint()?),
        }
        Ok(())
    }

    fn times(&mut self, n: u64) {
        let product = self.product.unwrap_or(1).checked_mul(n);
        self.overflow |= product.is_none();
        self.product = product;
    }

    /// A tensor without dimensions is one number, or none at all where it holds no data.
    fn elements(&self) -> u64 {
        if self.overflow { u64::MAX } else { self.product.unwrap_or(0) }
    }
}

/// Half bytes of an element, by `TensorProto.DataType`; 1 for what we do not know.
fn half_bytes(data_type: u64) -> u64 {
    match data_type {
        1 | 6 | 12 => 8,
        2 | 3 | 9 | 17..=20 => 2,
        4 | 5 | 10 | 16 => 4,
        7 | 11 | 13 | 14 => 16,
        15 => 32,
        _ => 1,
    }
}

fn limit(what: &'static str, found: usize, limit: usize) -> Result<(), ScanError> {
    if found > limit { Err(ScanError::TooMany { what, limit }) } else { Ok(()) }
}

fn text(field: Field<'_>, what: &'static str, max: usize) -> Result<String, ScanError> {
    let bytes = field.bytes()?;
    limit(what, bytes.len(), max)?;
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| WireError::Text.into())
}

fn name(field: Field<'_>) -> Result<String, ScanError> {
    text(field, "bytes in a name", NAME_BYTES_MAX)
}

fn tensor_name(bytes: &[u8]) -> Result<&[u8], ScanError> {
    let mut found: &[u8] = b"";
    for field in Message::new(bytes) {
        let field = field?;
        if field.number == 8 {
            found = field.bytes()?;
        }
    }
    limit("bytes in a name", found.len(), NAME_BYTES_MAX)?;
    Ok(found)
}

/// A tensor's name for messages.
fn shown_name(bytes: &[u8]) -> Result<String, ScanError> {
    Ok(brief(&String::from_utf8_lossy(tensor_name(bytes)?), 60))
}

fn opset(bytes: &[u8]) -> Result<(String, u64), ScanError> {
    let (mut domain, mut version) = (String::new(), 0);
    for field in Message::new(bytes) {
        let field = field?;
        match field.number {
            1 => domain = name(field)?,
            2 => version = field.varint()?,
            _ => {}
        }
    }
    Ok((domain, version))
}

fn entry(bytes: &[u8]) -> Result<(String, String), ScanError> {
    let (mut key, mut value) = (String::new(), String::new());
    for field in Message::new(bytes) {
        let field = field?;
        match field.number {
            1 => key = name(field)?,
            2 => value = text(field, "bytes in a metadata value", METADATA_BYTES_MAX)?,
            _ => {}
        }
    }
    Ok((key, value))
}

/// A `ValueInfoProto`: name, and of its type the element type and the shape.
fn value(bytes: &[u8]) -> Result<Value, ScanError> {
    let mut value = Value { name: String::new(), data_type: 0, dims: None };
    let mut typed = false;
    for field in Message::new(bytes) {
        let field = field?;
        match field.number {
            1 => value.name = name(field)?,
            2 if typed => return Err(ScanError::Twice("type of a value")),
            2 => {
                typed = true;
                // TypeProto.tensor_type = 1; sequences, maps and optionals stay type 0.
                for field in Message::new(field.bytes()?) {
                    let field = field?;
                    if field.number == 1 {
                        tensor_type(field.bytes()?, &mut value)?;
                    }
                }
            }
            _ => {}
        }
    }
    Ok(value)
}

fn tensor_type(bytes: &[u8], value: &mut Value) -> Result<(), ScanError> {
    for field in Message::new(bytes) {
        let field = field?;
        match field.number {
            1 => value.data_type = i32::try_from(field.varint()?).unwrap_or(0),
            2 if value.dims.is_some() => return Err(ScanError::Twice("shape of a value")),
            2 => {
                let mut dims = Vec::new();
                for field in Message::new(field.bytes()?) {
                    let field = field?;
                    if field.number == 1 {
                        limit("dimensions", dims.len() + 1, DIMS_MAX)?;
                        dims.push(dim(field.bytes()?)?);
                    }
                }
                value.dims = Some(dims);
            }
            _ => {}
        }
    }
    Ok(())
}

fn dim(bytes: &[u8]) -> Result<Dim, ScanError> {
    let mut dim = Dim::Unknown;
    for field in Message::new(bytes) {
        let field = field?;
        match field.number {
            // A negative number stands for "unknown" in some exporters' files.
            1 => {
                dim = i64::try_from(field.varint()?).map_or(Dim::Unknown, |n| Dim::Fixed(n as u64))
            }
            2 => {
                let name = name(field)?;
                dim = if name.is_empty() { Dim::Unknown } else { Dim::Named(name) };
            }
            _ => {}
        }
    }
    Ok(dim)
}
