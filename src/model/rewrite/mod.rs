//! A graph as ONNX Runtime's CPU provider is quick at it, which finds what the file's own would.
//!
//! Exporters write what a network's Python said; here are the places where that costs the provider
//! a detour ([`softmax`], [`split`], [`concat`], [`filters`]), and where it computes more than it must
//! ([`convolutions`]). A copy of the bytes is changed, when a session is built, and only of bytes that
//! [`scan`](super::onnx::scan) has let through: the file and its digest are untouched. What this can't
//! read is left as it is: ONNX Runtime judges it.

mod concat;
mod convolutions;
mod filters;
mod softmax;
mod split;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};

use self::concat::Parts;
use super::onnx::Scan;
use super::winograd;
use super::wire::{Field, Message, WireError, number, put, put_pieces, varints};

/// Below it, operators mean other things.
const OPSET_MIN: u64 = 13;
/// The axis of channels.
const CHANNELS: u64 = 1;
/// Longest name in a graph that is changed: names that are made of two stay within the scan's limit.
const NAME_BYTES_MAX: usize = 1024;

/// Fields of `ModelProto`, `GraphProto`, `NodeProto`, `AttributeProto`, `TensorProto` and
/// `ValueInfoProto`.
const MODEL_GRAPH: u32 = 7;
const MODEL_OPSET: u32 = 8;
const GRAPH_NODE: u32 = 1;
const GRAPH_INITIALIZER: u32 = 5;
const GRAPH_INPUT: u32 = 11;
const GRAPH_OUTPUT: u32 = 12;
const NODE_INPUT: u32 = 1;
const NODE_OUTPUT: u32 = 2;
const NODE_NAME: u32 = 3;
const NODE_OP: u32 = 4;
const NODE_ATTRIBUTE: u32 = 5;
const NODE_DOMAIN: u32 = 7;
const ATTRIBUTE_NAME: u32 = 1;
const ATTRIBUTE_INT: u32 = 3;
const ATTRIBUTE_TEXT: u32 = 4;
const ATTRIBUTE_TENSOR: u32 = 5;
const ATTRIBUTE_GRAPH: u32 = 6;
const ATTRIBUTE_INTS: u32 = 8;
const ATTRIBUTE_GRAPHS: u32 = 11;
const ATTRIBUTE_TYPE: u32 = 20;
const TENSOR_DIMS: u32 = 1;
const TENSOR_TYPE: u32 = 2;
const TENSOR_INTS: u32 = 7;
const TENSOR_NAME: u32 = 8;
const TENSOR_RAW: u32 = 9;
const VALUE_NAME: u32 = 1;
/// Types of a `TensorProto`'s numbers.
const FLOAT: u64 = 1;
const INT64: u64 = 7;
const FLOAT16: u64 = 10;

/// What stands in a node's place, by its number: fields of the graph; none if it is gone.
type Changes = BTreeMap<usize, Vec<u8>>;

/// A copy of a model in f32 for the CPU provider with so many threads; the model itself where there is
/// nothing to change.
pub fn for_cpu<'a>(model: &'a [u8], scan: &Scan, threads: usize) -> Cow<'a, [u8]> {
    let own = scan.opsets.iter().find(|(domain, _)| is_own(domain.as_bytes()));
    own.and_then(|(_, opset)| changed(model, *opset, threads, winograd::is_quick()))
        .map_or(Cow::Borrowed(model), Cow::Owned)
}

/// `None` where there is nothing to change. `winograd`: whether convolutions are computed that way.
pub(super) fn changed(model: &[u8], opset: u64, threads: usize, winograd: bool) -> Option<Vec<u8>> {
    if opset < OPSET_MIN {
        return None;
    }
    rewrite(model, opset, threads, winograd).ok().flatten()
}

fn rewrite(
    model: &[u8],
    opset: u64,
    threads: usize,
    winograd: bool,
) -> Result<Option<Vec<u8>>, WireError> {
    let Some(graph) = field(model, MODEL_GRAPH)? else { return Ok(None) };
    let before = Graph::read(graph)?;
    if before.is_half || before.longest > NAME_BYTES_MAX {
        return Ok(None);
    }
    let mut changes = changes(&before, opset, threads);
    let own = winograd && convolutions::take_over(&before, threads, &mut changes);
    if changes.is_empty() {
        return Ok(None);
    }
    let mut nodes = 0..;
    let mut piece = |(number, bytes)| {
        let node = (number == GRAPH_NODE).then(|| nodes.next()).flatten();
        node.and_then(|node| changes.get(&node)).map_or(bytes, Vec::as_slice)
    };
    let changed: Vec<_> =
        raw(graph).map(|field| field.map(&mut piece)).collect::<Result<_, _>>()?;
    // Written once, into memory for all of it: frames pass while a session is built.
    let more = changes.values().map(Vec::len).sum::<usize>() + 64;
    let mut out = Vec::with_capacity(model.len() + more);
    for one in raw(model) {
        match one? {
            (MODEL_GRAPH, _) => put_pieces(&mut out, MODEL_GRAPH, &changed),
            (_, bytes) => out.extend_from_slice(bytes),
        }
    }
    if own {
        put(&mut out, MODEL_OPSET, &own_operators());
    }
    let after = field(&out, MODEL_GRAPH)?.map(Graph::read).transpose()?;
    Ok(after.is_some_and(|after| after.clashes <= before.clashes).then_some(out))
}

fn changes(graph: &Graph<'_>, opset: u64, threads: usize) -> Changes {
    let mut changes = Changes::new();
    softmax::take_apart(graph, opset, &mut changes);
    let block = block();
    let parts = block.map(|block| Parts::of(graph, block)).unwrap_or_default();
    split::before_convolutions(graph, &parts, &mut changes);
    parts.sum_up(graph, &mut changes);
    if block == Some(filters::BLOCK) && threads > 1 {
        filters::set_apart(graph, &mut changes);
    }
    changes
}

/// How many channels the provider's convolutions take together, if they take them in blocks: as many as
/// a register holds.
fn block() -> Option<u64> {
    #[cfg(target_arch = "x86_64")]
    return match is_x86_feature_detected!("avx512f") {
        true => Some(16),
        false => is_x86_feature_detected!("avx2").then_some(8),
    };
    #[cfg(not(target_arch = "x86_64"))]
    None
}

/// An `OperatorSetIdProto` of the nodes that are ours.
fn own_operators() -> Vec<u8> {
    let mut set = Vec::new();
    put(&mut set, 1, winograd::DOMAIN.as_bytes());
    number(&mut set, 2, winograd::VERSION);
    set
}

/// The fields of a message as they stand in it, with their numbers.
fn raw(message: &[u8]) -> impl Iterator<Item = Result<(u32, &[u8]), WireError>> {
    let mut fields = Message::new(message);
    std::iter::from_fn(move || {
        let from = fields.position();
        let field = fields.next()?;
        Some(field.map(|field| (field.number, &message[from..fields.position()])))
    })
}

/// Whether operators of this domain are ONNX's own.
fn is_own(domain: &[u8]) -> bool {
    matches!(domain, b"" | b"ai.onnx")
}

/// The first field of this number: of the kind that stands once.
fn field(message: &[u8], number: u32) -> Result<Option<&[u8]>, WireError> {
    for field in Message::new(message) {
        let field = field?;
        if field.number == number {
            return field.bytes().map(Some);
        }
    }
    Ok(None)
}

/// A field of many numbers, or one of them.
fn read_numbers(field: Field<'_>, numbers: &mut Vec<u64>) -> Result<(), WireError> {
    match field.bytes() {
        Ok(packed) => numbers.extend(varints(packed).collect::<Result<Vec<_>, _>>()?),
        Err(_) => numbers.push(field.varint()?),
    }
    Ok(())
}

/// What is asked of a graph.
#[derive(Default)]
struct Graph<'a> {
    nodes: Vec<Node<'a>>,
    /// Weights and the like that nobody else may give, and the values of Constants.
    initializers: HashMap<&'a [u8], Initializer>,
    /// By value the number of the node that it comes out of.
    makers: HashMap<&'a [u8], usize>,
    /// By value how often it is read, the caller included.
    reads: HashMap<&'a [u8], usize>,
    /// There are graphs within this one, which read its values without a word.
    is_nested: bool,
    /// Some of it is computed in half precision, where more steps would round more.
    is_half: bool,
    /// How many values have a name that another one has.
    clashes: usize,
    /// Length of the longest of their names.
    longest: usize,
}

struct Initializer {
    kind: u64,
    dims: Vec<u64>,
    /// Of a list of integers.
    ints: Vec<u64>,
}

impl Initializer {
    /// With its name.
    fn read(tensor: &[u8]) -> Result<(&[u8], Self), WireError> {
        let (mut name, mut raw) = (&b""[..], &b""[..]);
        let mut this = Self { kind: 0, dims: Vec::new(), ints: Vec::new() };
        for field in Message::new(tensor) {
            let field = field?;
            match field.number {
                TENSOR_NAME => name = field.bytes()?,
                TENSOR_TYPE => this.kind = field.varint()?,
                TENSOR_DIMS => read_numbers(field, &mut this.dims)?,
                TENSOR_INTS => read_numbers(field, &mut this.ints)?,
                TENSOR_RAW => raw = field.bytes()?,
                _ => {}
            }
        }
        if this.kind == INT64 && this.dims.len() == 1 && !raw.is_empty() {
            let ints = raw.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
            this.ints = ints.collect();
        }
        Ok((name, this))
    }
}

/// Numbers of a convolution and of the sigmoid in its SiLU.
struct Silu {
    convolution: usize,
    sigmoid: usize,
}

impl<'a> Graph<'a> {
    fn read(graph: &'a [u8]) -> Result<Self, WireError> {
        let mut this = Self::default();
        let (mut inputs, mut names) = (Vec::new(), Vec::new());
        for one in Message::new(graph) {
            let one = one?;
            match one.number {
                GRAPH_NODE => this.node(Node::read(one.bytes()?)?)?,
                GRAPH_INITIALIZER => {
                    let (name, initializer) = Initializer::read(one.bytes()?)?;
                    names.push(name);
                    this.give(name, initializer);
                }
                GRAPH_INPUT => inputs.extend(field(one.bytes()?, VALUE_NAME)?),
                GRAPH_OUTPUT => field(one.bytes()?, VALUE_NAME)?.into_iter().for_each(|name| {
                    *this.reads.entry(name).or_default() += 1;
                }),
                _ => {}
            }
        }
        let outputs = this.nodes.iter().flat_map(|node| &node.outputs);
        names.extend(outputs.chain(&inputs).filter(|name| !name.is_empty()));
        this.longest = names.iter().map(|name| name.len()).max().unwrap_or(0);
        this.clashes = names.len() - names.iter().collect::<HashSet<_>>().len();
        inputs.iter().for_each(|name| {
            this.initializers.remove(name);
        });
        Ok(this)
    }

    fn give(&mut self, name: &'a [u8], initializer: Initializer) {
        self.is_half |= initializer.kind == FLOAT16;
        self.initializers.insert(name, initializer);
    }

    fn node(&mut self, node: Node<'a>) -> Result<(), WireError> {
        self.is_nested |= node.attributes.iter().any(|a| a.holds_graphs);
        let constant = node.attributes.iter().find_map(|a| a.tensor);
        if let (b"Constant", Some(tensor), [output]) = (node.op, constant, &node.outputs[..]) {
            self.give(output, Initializer::read(tensor)?.1);
        }
        for input in &node.inputs {
            *self.reads.entry(input).or_default() += 1;
        }
        self.makers.extend(node.outputs.iter().map(|output| (*output, self.nodes.len())));
        self.nodes.push(node);
        Ok(())
    }

    /// The node of this operator that a value comes out of, and its number.
    fn maker(&self, value: &[u8], op: &[u8]) -> Option<(usize, &Node<'a>)> {
        let at = *self.makers.get(value)?;
        Some((at, &self.nodes[at])).filter(|(_, node)| node.op == op)
    }

    /// The convolution whose SiLU, which alone reads it, comes out of the node of this number.
    fn silu(&self, product: usize) -> Option<Silu> {
        let product = &self.nodes[product];
        let &[one, other] = &product.inputs[..] else { return None };
        let gates = [(one, other), (other, one)].into_iter();
        let mut gates = gates.filter_map(|(gate, x)| self.maker(gate, b"Sigmoid").zip(Some(x)));
        let ((sigmoid, gate), found) = gates.next()?;
        let (convolution, _) = self.maker(found, b"Conv")?;
        let is_alone =
            gate.outputs.iter().all(|gate| self.reads(gate) == 1) && self.reads(found) == 2;
        (product.op == b"Mul" && gate.inputs == [found] && is_alone)
            .then_some(Silu { convolution, sigmoid })
    }

    /// An initializer, by its name or by one that an Identity gives it: exporters keep what is equal once.
    fn weights(&self, mut value: &'a [u8]) -> Option<&Initializer> {
        if let Some((_, identity)) = self.maker(value, b"Identity") {
            value = identity.inputs.first()?;
        }
        self.initializers.get(value)
    }

    /// Whether a value is the same in each run.
    fn is_constant(&self, value: &[u8]) -> bool {
        self.initializers.contains_key(value) || self.maker(value, b"Constant").is_some()
    }

    fn reads(&self, value: &[u8]) -> usize {
        self.reads.get(value).copied().unwrap_or(0)
    }
}

#[derive(Default)]
struct Node<'a> {
    /// Empty for operators that are not ONNX's own.
    op: &'a [u8],
    inputs: Vec<&'a [u8]>,
    outputs: Vec<&'a [u8]>,
    attributes: Vec<Attribute<'a>>,
}

impl<'a> Node<'a> {
    fn read(bytes: &'a [u8]) -> Result<Self, WireError> {
        let mut node = Self::default();
        let mut own = true;
        for field in Message::new(bytes) {
            let field = field?;
            match field.number {
                NODE_INPUT => node.inputs.push(field.bytes()?),
                NODE_OUTPUT => node.outputs.push(field.bytes()?),
                NODE_OP => node.op = field.bytes()?,
                NODE_DOMAIN => own = is_own(field.bytes()?),
                NODE_ATTRIBUTE => node.attributes.push(Attribute::read(field.bytes()?)?),
                _ => {}
            }
        }
        if !own {
            node.op = b"";
        }
        Ok(node)
    }

    fn int(&self, name: &[u8]) -> Option<u64> {
        self.attributes.iter().find(|a| a.name == name)?.int
    }

    /// Whether its axis, which it names, is that of the channels.
    fn is_along_channels(&self) -> bool {
        self.int(b"axis") == Some(CHANNELS)
    }

    fn attribute_bytes(&self) -> Vec<&'a [u8]> {
        self.attributes.iter().map(|a| a.bytes).collect()
    }

    /// Whether it is a convolution whose filters all read all channels; a bias it may have.
    fn is_divisible(&self) -> bool {
        let ungrouped = self.int(b"group").is_none_or(|groups| groups == 1);
        let named = self.inputs.iter().all(|name| !name.is_empty());
        self.op == b"Conv" && ungrouped && named && (2..=3).contains(&self.inputs.len())
    }

    /// Puts two convolutions, of a share of its filters each, in its place. `sizes` and `attributes` are
    /// the other inputs and the attributes of the Split that deals filters and bias out; `parts`: of its
    /// input.
    fn divide(
        &self,
        graph: &mut Vec<u8>,
        shares: &[Vec<u8>; 2],
        sizes: &[&[u8]],
        attributes: &[&[u8]],
        parts: &Parts<'_>,
    ) {
        let (input, weights) = (&self.inputs[..1], &self.inputs[1..]);
        for weight in weights {
            let [one, other] = shares.each_ref().map(|share| beside(share, weight));
            put_node(graph, b"Split", &[&[*weight], sizes].concat(), &[&one, &other], attributes);
        }
        let attributes = self.attribute_bytes();
        for share in shares {
            let own: Vec<_> = weights.iter().map(|weight| beside(share, weight)).collect();
            let own: Vec<_> = own.iter().map(Vec::as_slice).collect();
            parts.put_convolution(graph, &[input, &own].concat(), share, &attributes);
        }
    }
}

#[derive(Default)]
struct Attribute<'a> {
    bytes: &'a [u8],
    name: &'a [u8],
    int: Option<u64>,
    ints: Vec<u64>,
    text: &'a [u8],
    tensor: Option<&'a [u8]>,
    holds_graphs: bool,
}

impl<'a> Attribute<'a> {
    fn read(bytes: &'a [u8]) -> Result<Self, WireError> {
        let mut attribute = Self { bytes, ..Self::default() };
        for field in Message::new(bytes) {
            let field = field?;
            match field.number {
                ATTRIBUTE_NAME => attribute.name = field.bytes()?,
                ATTRIBUTE_INT => attribute.int = Some(field.varint()?),
                ATTRIBUTE_TEXT => attribute.text = field.bytes()?,
                ATTRIBUTE_TENSOR => attribute.tensor = Some(field.bytes()?),
                ATTRIBUTE_INTS => read_numbers(field, &mut attribute.ints)?,
                ATTRIBUTE_GRAPH | ATTRIBUTE_GRAPHS => attribute.holds_graphs = true,
                _ => {}
            }
        }
        Ok(attribute)
    }
}

/// Puts a node of ONNX's own operators, named as its first output, into a graph.
fn put_node(
    graph: &mut Vec<u8>,
    op: &[u8],
    inputs: &[&[u8]],
    outputs: &[&[u8]],
    attributes: &[&[u8]],
) {
    put_node_of(graph, b"", op, inputs, outputs, attributes);
}

/// The same of a domain.
fn put_node_of(
    graph: &mut Vec<u8>,
    domain: &[u8],
    op: &[u8],
    inputs: &[&[u8]],
    outputs: &[&[u8]],
    attributes: &[&[u8]],
) {
    let mut node = Vec::new();
    inputs.iter().for_each(|input| put(&mut node, NODE_INPUT, input));
    outputs.iter().for_each(|output| put(&mut node, NODE_OUTPUT, output));
    put(&mut node, NODE_NAME, outputs[0]);
    put(&mut node, NODE_OP, op);
    if !domain.is_empty() {
        put(&mut node, NODE_DOMAIN, domain);
    }
    attributes.iter().for_each(|attribute| put(&mut node, NODE_ATTRIBUTE, attribute));
    put(graph, GRAPH_NODE, &node);
}

/// An `AttributeProto` of one integer.
fn int_attribute(name: &[u8], value: u64) -> Vec<u8> {
    const INT: u64 = 2;
    let mut attribute = Vec::new();
    put(&mut attribute, ATTRIBUTE_NAME, name);
    number(&mut attribute, ATTRIBUTE_INT, value);
    number(&mut attribute, ATTRIBUTE_TYPE, INT);
    attribute
}

/// An `AttributeProto` of several.
fn ints_attribute(name: &[u8], values: &[u64]) -> Vec<u8> {
    const INTS: u64 = 7;
    let mut attribute = Vec::new();
    put(&mut attribute, ATTRIBUTE_NAME, name);
    values.iter().for_each(|value| number(&mut attribute, ATTRIBUTE_INTS, *value));
    number(&mut attribute, ATTRIBUTE_TYPE, INTS);
    attribute
}

/// A `TensorProto` of integers, of one dimension.
fn ints_tensor(name: &[u8], values: &[u64]) -> Vec<u8> {
    let mut tensor = Vec::new();
    number(&mut tensor, TENSOR_DIMS, values.len() as u64);
    number(&mut tensor, TENSOR_TYPE, INT64);
    put(&mut tensor, TENSOR_NAME, name);
    let raw: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    put(&mut tensor, TENSOR_RAW, &raw);
    tensor
}

/// The name of a value that stands beside another.
fn beside(value: &[u8], what: &[u8]) -> Vec<u8> {
    [value, b":", what].concat()
}

#[cfg(test)]
pub(super) mod tests;
