//! A factory of small, real ONNX detectors, written byte by byte.
//!
//! They find coloured blobs: class 0 is red, 1 green, 2 blue. A picture is averaged over the cells
//! of strides 8, 16 and 32; a cell's score is `sigmoid(16 * (own colour - mean of the others) - 4)`,
//! its box is its own cell, enlarged by half. So boxes and scores depend on the pixels, and a test
//! can compute what must come out. Faults can be built in that strike on bright pictures only.

use std::path::{Path, PathBuf};

use half::f16;

/// Layouts of the output, with noblink's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    Yolo8,
    Yolo5,
    Yolox,
    End2end,
    Rtdetr,
}

/// What goes wrong when the mean of the input exceeds 0.9 (of 1.0), or with `strikes_blue` its mean
/// blue exceeds its mean red by as much.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    /// The output is NaN.
    Nan,
    /// ONNX Runtime reports an error.
    Error,
    /// The run takes hours; it can be terminated.
    Hang,
    /// The run allocates 10 GB and writes to all of it.
    Memory,
    /// The run does its `work` sixteen times over.
    Slow,
    /// At any brightness: the output does not depend on the picture.
    Constant,
}

/// Which detector to make. Fields may be changed before [`bytes`](Self::bytes).
#[derive(Debug, Clone)]
pub struct Detector {
    pub output: Output,
    /// Pixels, multiples of 32.
    pub width: usize,
    pub height: usize,
    /// Float16 input and output.
    pub half: bool,
    /// 1 to 3 names; the first three are red, green, blue.
    pub labels: Vec<&'static str>,
    /// Rounds of useless work on the whole picture: makes it slower.
    pub work: usize,
    pub fault: Fault,
    /// The fault strikes on blue pictures instead of bright ones: no gate shows one.
    pub strikes_blue: bool,
    /// Added to the logits of the scores: the lower, the blinder.
    pub bias: f32,
    /// This class is never found.
    pub blind_to: Option<usize>,
    /// Numbers that nothing uses: makes the file longer, by four bytes each.
    pub ballast: usize,
    /// Moves all boxes to the right, pixels of the input.
    pub shift: f32,
    /// Written over what an exporter of Ultralytics would write; an empty value removes the key.
    pub metadata: Vec<(&'static str, String)>,
    /// Leaves height and width open.
    pub dynamic: bool,
}

impl Detector {
    pub fn new(output: Output, width: usize, height: usize) -> Self {
        Self {
            output,
            width,
            height,
            half: false,
            labels: vec!["red", "green", "blue"],
            work: 0,
            fault: Fault::None,
            strikes_blue: false,
            bias: -4.0,
            blind_to: None,
            ballast: 0,
            shift: 0.0,
            metadata: Vec::new(),
            dynamic: false,
        }
    }

    pub fn with_metadata(mut self, key: &'static str, value: &str) -> Self {
        self.metadata.push((key, value.to_owned()));
        self
    }

    pub fn write(&self, dir: &Path, name: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, self.bytes()).expect("the test's folder can be written");
        path
    }

    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        let (graph, metadata) = (self.graph(), self.metadata());
        model(&graph, &metadata)
    }

    pub fn metadata(&self) -> Vec<(String, String)> {
        let names: Vec<_> =
            self.labels.iter().enumerate().map(|(n, l)| format!("{n}: '{l}'")).collect();
        let mut metadata = vec![
            ("stride".to_owned(), "32".to_owned()),
            ("task".to_owned(), "detect".to_owned()),
            ("imgsz".to_owned(), format!("[{}, {}]", self.height, self.width)),
            ("names".to_owned(), format!("{{{}}}", names.join(", "))),
        ];
        for (key, value) in &self.metadata {
            metadata.retain(|(k, _)| k != key);
            if !value.is_empty() {
                metadata.push(((*key).to_owned(), value.clone()));
            }
        }
        metadata
    }

    /// Cells as (centre x, centre y, stride).
    fn cells(&self) -> Vec<[f32; 3]> {
        let mut cells = Vec::new();
        for stride in [8, 16, 32] {
            for y in 0..self.height / stride {
                for x in 0..self.width / stride {
                    let s = stride as f32;
                    cells.push([(x as f32 + 0.5) * s + self.shift, (y as f32 + 0.5) * s, s]);
                }
            }
        }
        cells
    }

    pub fn graph(&self) -> Graph {
        let kind = if self.half { FLOAT16 } else { FLOAT };
        let sides = if self.dynamic {
            [Size::Named("height"), Size::Named("width")]
        } else {
            [Size::Fixed(self.height), Size::Fixed(self.width)]
        };
        let batch = if self.dynamic { Size::Named("batch") } else { Size::Fixed(1) };
        let mut g = Graph::default();
        g.input("images", kind, &[batch, Size::Fixed(3), sides[0], sides[1]]);
        let mut picture = "images".to_owned();
        if self.half {
            picture = g.node("Cast", &[&picture], &[("to", Attr::Int(i64::from(FLOAT)))]);
        }
        if self.output == Output::Yolox {
            g.floats("byte", &[], &[255.0]);
            picture = g.node("Div", &[&picture, "byte"], &[]);
            // Blue comes first.
            g.ints("reversed", &[3], &[2, 1, 0]);
            picture = g.node("Gather", &[&picture, "reversed"], &[("axis", Attr::Int(1))]);
        }
        if self.ballast > 0 {
            g.floats("ballast", &[self.ballast], &vec![0.0; self.ballast]);
        }
        picture = self.burn(&mut g, &picture);
        let colours = self.colours(&mut g, &picture);
        let colours = self.spoil(&mut g, &picture, &colours);
        let scores = self.scores(&mut g, &colours);
        let (out, dims) = self.finish(&mut g, &scores);
        let out = if self.half {
            g.node("Cast", &[&out], &[("to", Attr::Int(i64::from(FLOAT16)))])
        } else {
            out
        };
        g.node_to("Identity", &[&out], "output0", &[]);
        g.output("output0", kind, &dims);
        g
    }

    /// `work` averages over the whole picture, added with weight 0.
    fn burn(&self, g: &mut Graph, picture: &str) -> String {
        if self.work == 0 {
            return picture.to_owned();
        }
        let mut at = picture.to_owned();
        for _ in 0..self.work {
            at = g.node("AveragePool", &[&at], &blur());
        }
        g.floats("nothing", &[], &[0.0]);
        let zero = g.node("Mul", &[&at, "nothing"], &[]);
        g.node("Add", &[picture, &zero], &[])
    }

    /// `[1, 3, cells]`: mean colour of each cell.
    fn colours(&self, g: &mut Graph, picture: &str) -> String {
        let mut levels = Vec::new();
        for stride in [8i64, 16, 32] {
            let pooled = g.node(
                "AveragePool",
                &[picture],
                &[
                    ("kernel_shape", Attr::Ints(vec![stride; 2])),
                    ("strides", Attr::Ints(vec![stride; 2])),
                ],
            );
            let shape = format!("flat{stride}");
            g.ints(&shape, &[3], &[1, 3, -1]);
            levels.push(g.node("Reshape", &[&pooled, &shape], &[]));
        }
        let levels: Vec<_> = levels.iter().map(String::as_str).collect();
        g.node("Concat", &levels, &[("axis", Attr::Int(2))])
    }

    /// Adds the fault: something that is 0 on dark pictures.
    fn spoil(&self, g: &mut Graph, picture: &str, colours: &str) -> String {
        match self.fault {
            Fault::None => return colours.to_owned(),
            Fault::Constant => {
                g.floats("blind", &[], &[0.0]);
                return g.node("Mul", &[colours, "blind"], &[]);
            }
            _ => {}
        }
        let blue = if self.strikes_blue { [-3.0, 0.0, 3.0] } else { [1.0; 3] };
        g.floats("blue", &[1, 3, 1, 1], &blue);
        let weighted = g.node("Mul", &[picture, "blue"], &[]);
        let mean = g.node("ReduceMean", &[&weighted], &[("keepdims", Attr::Int(0))]);
        g.floats("limit", &[], &[0.9]);
        let zero = match self.fault {
            Fault::None | Fault::Constant => unreachable!("returned above"),
            Fault::Memory => {
                let bright = g.node("Greater", &[&mean, "limit"], &[]);
                let flag = g.node("Cast", &[&bright], &[("to", Attr::Int(i64::from(INT64)))]);
                g.ints("ten gigabytes", &[1], &[2_500_000_000]);
                let size = g.node("Mul", &[&flag, "ten gigabytes"], &[]);
                let zeros = g.node("ConstantOfShape", &[&size], &[]);
                g.node("ReduceSum", &[&zeros], &[("keepdims", Attr::Int(0))])
            }
            Fault::Nan => {
                // The root of a negative number, times 0.
                let left = g.node("Sub", &["limit", &mean], &[]);
                let root = g.node("Sqrt", &[&left], &[]);
                g.floats("zero", &[], &[0.0]);
                g.node("Mul", &[&root, "zero"], &[])
            }
            Fault::Error => {
                // Index 1 into a list of one.
                let bright = g.node("Greater", &[&mean, "limit"], &[]);
                let index = g.node("Cast", &[&bright], &[("to", Attr::Int(i64::from(INT64)))]);
                g.floats("one zero", &[1], &[0.0]);
                g.node("Gather", &["one zero", &index], &[])
            }
            Fault::Hang => {
                g.floats("start", &[], &[0.0]);
                Self::repeat(g, &mean, 1 << 50, ("Abs", &[]), "start", &[])
            }
            Fault::Slow => {
                let sides = [1, 3, self.height, self.width].map(Size::Fixed);
                let rounds = 15 * self.work as i64;
                let end = Self::repeat(g, &mean, rounds, ("AveragePool", &blur()), picture, &sides);
                let mean = g.node("ReduceMean", &[&end], &[("keepdims", Attr::Int(0))]);
                g.floats("zero", &[], &[0.0]);
                g.node("Mul", &[&mean, "zero"], &[])
            }
        };
        g.node("Add", &[colours, &zero], &[])
    }

    /// A `Loop` that does `op` so many times when `mean` exceeds the limit, and never otherwise.
    fn repeat(
        g: &mut Graph,
        mean: &str,
        rounds: i64,
        (op, attributes): (&str, &[(&str, Attr)]),
        start: &str,
        dims: &[Size],
    ) -> String {
        let bright = g.node("Greater", &[mean, "limit"], &[]);
        let flag = g.node("Cast", &[&bright], &[("to", Attr::Int(i64::from(INT64)))]);
        g.ints("rounds", &[], &[rounds]);
        let rounds = g.node("Mul", &[&flag, "rounds"], &[]);
        let mut body = Graph::default();
        body.input("round", INT64, &[]);
        body.input("go", BOOL, &[]);
        body.input("carried", FLOAT, dims);
        body.node_to("Identity", &["go"], "go on", &[]);
        body.node_to(op, &["carried"], "kept", attributes);
        body.output("go on", BOOL, &[]);
        body.output("kept", FLOAT, dims);
        g.node("Loop", &[&rounds, "", start], &[("body", Attr::Graph(body))])
    }

    /// `[1, labels, cells]` in 0..1.
    fn scores(&self, g: &mut Graph, colours: &str) -> String {
        let classes = self.labels.len();
        let mut weights = vec![-8.0; classes * 3];
        for class in 0..classes {
            weights[class * 3 + class % 3] = 16.0;
        }
        let mut bias = vec![self.bias; classes];
        if let Some(class) = self.blind_to {
            weights[class * 3..class * 3 + 3].fill(0.0);
            bias[class] = -20.0;
        }
        g.floats("colour weights", &[classes, 3, 1], &weights);
        g.floats("colour bias", &[classes], &bias);
        let logits = g.node("Conv", &[colours, "colour weights", "colour bias"], &[]);
        g.node("Sigmoid", &[&logits], &[])
    }

    fn finish(&self, g: &mut Graph, scores: &str) -> (String, Vec<Size>) {
        let cells = self.cells();
        let (n, classes) = (cells.len(), self.labels.len());
        let centred: Vec<[f32; 4]> =
            cells.iter().map(|[x, y, s]| [*x, *y, 1.5 * s, 1.5 * s]).collect();
        let corners = |[x, y, w, h]: [f32; 4]| [x - w / 2.0, y - h / 2.0, x + w / 2.0, y + h / 2.0];
        let (w, h) = (self.width as f32, self.height as f32);
        let boxes: Vec<[f32; 4]> = match self.output {
            Output::Yolo8 | Output::Yolo5 => centred,
            // Relative to the cell: half a cell in, 1.5 cells wide.
            Output::Yolox => vec![[0.5, 0.5, 1.5f32.ln(), 1.5f32.ln()]; n],
            Output::End2end => centred.into_iter().map(corners).collect(),
            Output::Rtdetr => {
                centred.iter().map(|b| [b[0] / w, b[1] / h, b[2] / w, b[3] / h]).collect()
            }
        };
        let rows: Vec<f32> = (0..4).flat_map(|k| boxes.iter().map(move |b| b[k])).collect();
        g.floats("boxes", &[1, 4, n], &rows);
        let concat = [("axis", Attr::Int(1))];
        let turn = [("perm", Attr::Ints(vec![0, 2, 1]))];
        match self.output {
            Output::Yolo8 => {
                let all = g.node("Concat", &["boxes", scores], &concat);
                let anchors = if self.dynamic { Size::Named("anchors") } else { Size::Fixed(n) };
                (all, vec![Size::Fixed(1), Size::Fixed(4 + classes), anchors])
            }
            Output::Yolo5 | Output::Yolox => {
                let anchors = if self.output == Output::Yolo5 { 3 * n } else { n };
                g.floats("objectness", &[1, 1, n], &vec![1.0; n]);
                let mut all = g.node("Concat", &["boxes", "objectness", scores], &concat);
                if self.output == Output::Yolo5 {
                    // Three anchors in each cell.
                    all = g.node("Concat", &[&all, &all, &all], &[("axis", Attr::Int(2))]);
                }
                let all = g.node("Transpose", &[&all], &turn);
                (all, vec![Size::Fixed(1), Size::Fixed(anchors), Size::Fixed(5 + classes)])
            }
            Output::Rtdetr => {
                let all = g.node("Concat", &["boxes", scores], &concat);
                let best = self.best(g, scores, &all);
                let all = g.node("Transpose", &[&best], &turn);
                (all, vec![Size::Fixed(1), Size::Fixed(100), Size::Fixed(4 + classes)])
            }
            Output::End2end => {
                let axis = [("axis", Attr::Int(1)), ("keepdims", Attr::Int(1))];
                let max = g.node(
                    "ReduceMax",
                    &[scores],
                    &[("axes", Attr::Ints(vec![1])), ("keepdims", Attr::Int(1))],
                );
                let class = g.node("ArgMax", &[scores], &axis);
                let class = g.node("Cast", &[&class], &[("to", Attr::Int(i64::from(FLOAT)))]);
                let all = g.node("Concat", &["boxes", &max, &class], &concat);
                let best = self.best(g, scores, &all);
                let all = g.node("Transpose", &[&best], &turn);
                (all, vec![Size::Fixed(1), Size::Fixed(100), Size::Fixed(6)])
            }
        }
    }

    /// The 100 columns of `all` whose best score is highest.
    fn best(&self, g: &mut Graph, scores: &str, all: &str) -> String {
        let max = g.node(
            "ReduceMax",
            &[scores],
            &[("axes", Attr::Ints(vec![0, 1])), ("keepdims", Attr::Int(0))],
        );
        g.ints("hundred", &[1], &[100]);
        g.node_to("TopK", &[&max, "hundred"], "top scores\0top", &[]);
        g.node("Gather", &[all, "top"], &[("axis", Attr::Int(2))])
    }
}

/// Of an `AveragePool` that keeps the size.
fn blur() -> [(&'static str, Attr); 2] {
    [("kernel_shape", Attr::Ints(vec![3, 3])), ("pads", Attr::Ints(vec![1; 4]))]
}

pub const FLOAT: i32 = 1;
pub const UINT8: i32 = 2;
pub const INT64: i32 = 7;
pub const BOOL: i32 = 9;
pub const FLOAT16: i32 = 10;

/// A dimension.
#[derive(Debug, Clone, Copy)]
pub enum Size {
    Fixed(usize),
    Named(&'static str),
}

/// An attribute of a node.
#[derive(Debug, Clone)]
pub enum Attr {
    Int(i64),
    Ints(Vec<i64>),
    Graph(Graph),
}

/// A `GraphProto` in the making.
#[derive(Debug, Clone, Default)]
pub struct Graph {
    fields: Vec<u8>,
    nodes: usize,
}

impl Graph {
    pub fn input(&mut self, name: &str, kind: i32, dims: &[Size]) {
        self.fields.extend(bytes_field(11, &value(name, kind, dims)));
    }

    pub fn output(&mut self, name: &str, kind: i32, dims: &[Size]) {
        self.fields.extend(bytes_field(12, &value(name, kind, dims)));
    }

    pub fn floats(&mut self, name: &str, dims: &[usize], values: &[f32]) {
        let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensor(name, FLOAT, dims, &raw);
    }

    pub fn halves(&mut self, name: &str, dims: &[usize], values: &[f32]) {
        let raw: Vec<u8> = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        self.tensor(name, FLOAT16, dims, &raw);
    }

    pub fn ints(&mut self, name: &str, dims: &[usize], values: &[i64]) {
        let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensor(name, INT64, dims, &raw);
    }

    fn tensor(&mut self, name: &str, kind: i32, dims: &[usize], raw: &[u8]) {
        let mut tensor = Vec::new();
        for dim in dims {
            tensor.extend(number_field(1, *dim as u64));
        }
        tensor.extend(number_field(2, kind as u64));
        tensor.extend(bytes_field(8, name.as_bytes()));
        tensor.extend(bytes_field(9, raw));
        self.fields.extend(bytes_field(5, &tensor));
    }

    /// A tensor whose data lies in another file.
    pub fn external(&mut self, name: &str, dims: &[usize], location: &str) {
        self.fields.extend(bytes_field(5, &external(name, dims, location)));
    }

    /// Adds a field as it is.
    pub fn field(&mut self, number: u64, value: &[u8]) {
        self.fields.extend(bytes_field(number, value));
    }

    /// Adds a node with one output and returns that output's name.
    pub fn node(&mut self, op: &str, inputs: &[&str], attributes: &[(&str, Attr)]) -> String {
        let output = format!("{op}_{}", self.nodes);
        self.node_to(op, inputs, &output, attributes);
        output
    }

    /// Adds a node; several outputs are parted by `\0`. `domain/Op` is of another domain.
    pub fn node_to(
        &mut self,
        op: &str,
        inputs: &[&str],
        outputs: &str,
        attributes: &[(&str, Attr)],
    ) {
        self.nodes += 1;
        let (domain, op) = op.rsplit_once('/').unwrap_or(("", op));
        let mut node = Vec::new();
        for input in inputs {
            node.extend(bytes_field(1, input.as_bytes()));
        }
        for output in outputs.split('\0') {
            node.extend(bytes_field(2, output.as_bytes()));
        }
        node.extend(bytes_field(3, format!("{op} {}", self.nodes).as_bytes()));
        node.extend(bytes_field(4, op.as_bytes()));
        node.extend(bytes_field(7, domain.as_bytes()));
        for (name, attribute) in attributes {
            let mut a = bytes_field(1, name.as_bytes());
            match attribute {
                Attr::Int(i) => {
                    a.extend(number_field(3, *i as u64));
                    a.extend(number_field(20, 2));
                }
                Attr::Ints(ints) => {
                    ints.iter().for_each(|i| a.extend(number_field(8, *i as u64)));
                    a.extend(number_field(20, 7));
                }
                Attr::Graph(graph) => {
                    a.extend(bytes_field(6, &graph.bytes("body")));
                    a.extend(number_field(20, 5));
                }
            }
            node.extend(bytes_field(5, &a));
        }
        self.fields.extend(bytes_field(1, &node));
    }

    /// The message.
    pub fn bytes(&self, name: &str) -> Vec<u8> {
        let mut graph = self.fields.clone();
        graph.extend(bytes_field(2, name.as_bytes()));
        graph
    }
}

/// A tensor whose data lies in another file.
pub fn external(name: &str, dims: &[usize], location: &str) -> Vec<u8> {
    let mut tensor = Vec::new();
    for dim in dims {
        tensor.extend(number_field(1, *dim as u64));
    }
    tensor.extend(number_field(2, FLOAT as u64));
    tensor.extend(bytes_field(8, name.as_bytes()));
    tensor.extend(bytes_field(13, &entry("location", location)));
    tensor.extend(number_field(14, 1));
    tensor
}

/// A whole file. Opset 13, IR version 8.
pub fn model(graph: &Graph, metadata: &[(String, String)]) -> Vec<u8> {
    model_of_opset(graph, metadata, 13)
}

/// The same of another opset.
pub fn model_of_opset(graph: &Graph, metadata: &[(String, String)], opset: u64) -> Vec<u8> {
    let mut model = number_field(1, 8);
    model.extend(bytes_field(2, b"noblink-tests"));
    model.extend(bytes_field(3, b"1"));
    model.extend(bytes_field(7, &graph.bytes("graph")));
    model.extend(bytes_field(8, &[bytes_field(1, b""), number_field(2, opset)].concat()));
    for (key, value) in metadata {
        model.extend(bytes_field(14, &entry(key, value)));
    }
    model
}

fn entry(key: &str, value: &str) -> Vec<u8> {
    [bytes_field(1, key.as_bytes()), bytes_field(2, value.as_bytes())].concat()
}

fn value(name: &str, kind: i32, dims: &[Size]) -> Vec<u8> {
    let mut shape = Vec::new();
    for dim in dims {
        let dim = match dim {
            Size::Fixed(n) => number_field(1, *n as u64),
            Size::Named(n) => bytes_field(2, n.as_bytes()),
        };
        shape.extend(bytes_field(1, &dim));
    }
    let tensor = [number_field(1, kind as u64), bytes_field(2, &shape)].concat();
    [bytes_field(1, name.as_bytes()), bytes_field(2, &bytes_field(1, &tensor))].concat()
}

fn varint(mut n: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
    out
}

pub fn number_field(number: u64, value: u64) -> Vec<u8> {
    [varint(number << 3), varint(value)].concat()
}

pub fn bytes_field(number: u64, value: &[u8]) -> Vec<u8> {
    [varint(number << 3 | 2), varint(value.len() as u64), value.to_vec()].concat()
}
