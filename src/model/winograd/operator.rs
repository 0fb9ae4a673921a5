//! The nodes, as ONNX Runtime computes them: one of its custom operators.
//!
//! `ort` makes values of its own of a kernel's inputs and outputs, on the heap, where a frame shall
//! allocate nothing of ours: they are taken by ONNX Runtime's own interface.

use std::ffi::c_void;
use std::ptr;

use ort::AsPointer;
use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorDomain, OperatorInput, OperatorOutput,
    ShapeInferenceContext,
};
use ort::session::builder::SessionBuilder;
use ort::sys::{OrtKernelContext, OrtValue};
use ort::value::{Shape, TensorElementType, TensorValueType, ValueType};

use super::avx2::{self, Output};
use super::filters::Filters;
use super::tiles::{Grid, block_size};
use super::{ACTIVATION, Activation, DOMAIN, OPERATOR, THREADS, VERSION, is_possible};

/// Lets a session have such nodes.
pub(in super::super) fn register(builder: SessionBuilder) -> ort::Result<SessionBuilder> {
    Ok(builder.with_operators(OperatorDomain::new(DOMAIN)?.add(Winograd)?)?)
}

struct Winograd;

impl Operator for Winograd {
    type Kernel<'attr> = Convolution;

    fn name(&self) -> &str {
        OPERATOR
    }

    fn versions(&self) -> std::ops::RangeInclusive<u32> {
        VERSION as u32..=VERSION as u32
    }

    /// As those of a Conv.
    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        let float = TensorElementType::Float32;
        [
            OperatorInput::required(float),
            OperatorInput::required(float),
            OperatorInput::optional(float),
        ]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    /// Says nothing where a dimension has neither size nor name: ONNX Runtime would take that for a size
    /// of -1. It asks again when it knows more, and a run goes by what is there.
    fn infer_shape(&self, context: &mut ShapeInferenceContext) -> ort::Result<()> {
        let inputs = context.inputs();
        let filters = inputs.get(1).and_then(ValueType::tensor_shape);
        let filters = filters.and_then(|shape| shape.first().copied()).filter(|count| *count > 0);
        if let Some(ValueType::Tensor { ty, shape, dimension_symbols: names }) = inputs.first()
            && let (&[pictures, _, height, width], Some(filters)) = (&shape[..], filters)
            && let [pictures_name, _, height_name, width_name] = &names[..]
        {
            let sizes = [pictures, filters, height, width];
            let names = [pictures_name, "", height_name, width_name];
            if sizes.iter().zip(names).all(|(size, name)| *size >= 0 || !name.is_empty()) {
                let dimension_symbols = names.into_iter().map(str::to_owned).collect();
                let shape = Shape::new(sizes);
                context.set_output(0, &ValueType::Tensor { ty: *ty, shape, dimension_symbols })?;
            }
        }
        Ok(())
    }

    fn create_kernel<'attr>(&self, context: &KernelContext<'attr>) -> ort::Result<Convolution> {
        let wrong = |what: &str| ort::Error::new(format!("{OPERATOR}: {what}"));
        let activation = match context.get::<i64>(ACTIVATION) {
            Some(0) => Activation::None,
            Some(1) => Activation::Relu,
            Some(2) => Activation::Silu,
            other => return Err(wrong(&format!("{ACTIVATION} = {other:?}; 0, 1 or 2"))),
        };
        let threads = context.get::<i64>(THREADS).and_then(|threads| usize::try_from(threads).ok());
        let threads = threads.filter(|threads| (1..=1024).contains(threads));
        let threads = threads.ok_or_else(|| wrong(&format!("no {THREADS} of 1 to 1024")))?;
        let constant = |n| context.constant_input::<TensorValueType<f32>>(n);
        let weights = constant(1)?;
        let (shape, weights) = weights.extract_tensor();
        let [filters, channels, 3, 3] = shape[..] else {
            return Err(wrong(&format!("weights of {shape:?}, not N x M x 3 x 3")));
        };
        let [filters, channels] = [filters, channels].map(|n| usize::try_from(n).unwrap_or(0));
        if filters == 0 || channels == 0 {
            return Err(wrong(&format!("weights of {shape:?}, which are none")));
        }
        let bias = if inputs(context)? == 3 { Some(constant(2)?) } else { None };
        let bias = bias.as_ref().map_or(&[][..], |bias| bias.extract_tensor().1);
        if ![0, filters].contains(&bias.len()) {
            return Err(wrong(&format!("a bias of {} for {filters} filters", bias.len())));
        }
        if !is_possible() {
            return Err(wrong("this machine has no AVX2 and FMA"));
        }
        Ok(Convolution { filters: Filters::new(weights, bias, channels, activation), threads })
    }
}

/// How many inputs a node has. `ort` reads their names as well, which need not be text.
fn inputs(context: &KernelContext<'_>) -> ort::Result<usize> {
    let mut count = 0;
    // SAFETY: the pointers are valid for the call.
    unsafe { checked((ort::api().KernelInfo_GetInputCount)(context.ptr(), &mut count))? };
    Ok(count)
}

/// A node. It is made on machines with AVX2 and FMA only.
struct Convolution {
    filters: Filters,
    threads: usize,
}

impl Kernel for Convolution {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let context = context.ptr().cast_mut();
        // SAFETY: the context is this call's.
        let (input, shape) = unsafe { input(context)? };
        let [pictures, channels, height, width] = shape.map(|n| usize::try_from(n).unwrap_or(0));
        let filters = &self.filters;
        if channels != filters.channels {
            let of = filters.channels;
            return Err(ort::Error::new(format!("{OPERATOR}: {shape:?} has not {of} channels")));
        }
        let output_shape = [shape[0], filters.count as i64, shape[2], shape[3]];
        // SAFETY: as above; it is the only call for the output.
        let output = unsafe { output(context, &output_shape)? };
        let grid = Grid { height, width };
        if pictures == 0 || grid.area() == 0 {
            return Ok(());
        }
        let size = block_size(grid, channels, self.threads);
        let blocks = grid.tiles().div_ceil(size);
        let numbers = channels * grid.area();
        // SAFETY: a tensor of these dimensions, which nobody writes meanwhile.
        let input = unsafe { std::slice::from_raw_parts(input, pictures * numbers) };
        let work = |n: usize| {
            let (picture, block) = (n / blocks, n % blocks);
            let tiles = block * size..grid.tiles().min((block + 1) * size);
            let input = &input[picture * numbers..][..numbers];
            // SAFETY: the output has so many numbers and outlives the call, and each block has its own of
            // them; the instructions were looked for when the kernel was made.
            unsafe {
                let output = output.after(picture * filters.count * grid.area());
                avx2::block(filters, input, grid, tiles, output);
            }
        };
        // SAFETY: as above.
        unsafe { share(context, pictures * blocks, &work) }
    }
}

/// The node's first input, and its dimensions.
///
/// # Safety
/// The context is one of a call that goes on.
unsafe fn input(context: *mut OrtKernelContext) -> ort::Result<(*const f32, [i64; 4])> {
    let (mut value, mut about) = (ptr::null::<OrtValue>(), ptr::null_mut());
    let (mut shape, mut rank) = ([0; 4], 0);
    let api = ort::api();
    // SAFETY: the pointers are valid for the calls; `shape` is filled only if it has as many dimensions;
    // what is made is released once.
    unsafe {
        checked((api.KernelContext_GetInput)(context, 0, &mut value))?;
        checked((api.GetTensorTypeAndShape)(value, &mut about))?;
        let mut read = checked((api.GetDimensionsCount)(about, &mut rank));
        if read.is_ok() && rank == shape.len() {
            read = checked((api.GetDimensions)(about, shape.as_mut_ptr(), rank));
        }
        (api.ReleaseTensorTypeAndShapeInfo)(about);
        read?;
        if rank != shape.len() {
            let message = format!("{OPERATOR}: an input of {rank} dimensions, not 4");
            return Err(ort::Error::new(message));
        }
        Ok((numbers(value.cast_mut())?, shape))
    }
}

/// The node's output, of these dimensions.
///
/// # Safety
/// The context is one of a call that goes on.
unsafe fn output(context: *mut OrtKernelContext, shape: &[i64; 4]) -> ort::Result<Output> {
    let mut value = ptr::null_mut();
    // SAFETY: the pointers are valid for the call.
    unsafe {
        let api = ort::api();
        let (dims, rank) = (shape.as_ptr(), shape.len());
        checked((api.KernelContext_GetOutput)(context, 0, dims, rank, &mut value))?;
        Ok(Output::at(numbers(value)?))
    }
}

/// # Safety
/// The value is a tensor.
unsafe fn numbers(value: *mut OrtValue) -> ort::Result<*mut f32> {
    let mut numbers = ptr::null_mut();
    // SAFETY: the pointers are valid for the call.
    unsafe { checked((ort::api().GetTensorMutableData)(value, &mut numbers))? };
    Ok(numbers.cast())
}

/// Does so many pieces of work on the session's threads, each as soon as one is free.
///
/// # Safety
/// The context is one of a call that goes on.
unsafe fn share<W: Fn(usize) + Sync>(
    context: *mut OrtKernelContext,
    pieces: usize,
    work: &W,
) -> ort::Result<()> {
    extern "C" fn one<W: Fn(usize) + Sync>(work: *mut c_void, piece: usize) {
        // SAFETY: it is the `work` below, which lives until all pieces are done.
        unsafe { (*work.cast::<W>())(piece) }
    }
    let data = ptr::from_ref(work).cast_mut().cast();
    // SAFETY: it returns when all pieces are done.
    unsafe {
        let each = ort::api().KernelContext_ParallelFor;
        checked(each(context, one::<W>, pieces, pieces, data))
    }
}

/// # Safety
/// The status is one that ONNX Runtime has just returned.
unsafe fn checked(status: ort::sys::OrtStatusPtr) -> ort::Result<()> {
    // SAFETY: as the caller's.
    unsafe { ort::Error::result_from_status(status) }
}

#[cfg(test)]
pub(in super::super) mod tests {
    use ort::session::Session;
    use ort::value::Tensor;

    use super::super::super::rewrite;
    use super::super::super::runtime::Runtime;
    use super::*;

    #[test]
    fn a_session_finds_what_it_finds_without_such_nodes() {
        if !is_possible() {
            // Such a machine never has them.
            return;
        }
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/models/plates-v1.onnx");
        let plain = std::fs::read(file).expect("the model");
        let changed = rewrite::changed(&plain, 17, 2, true).expect("it has convolutions");
        let ours = changed.windows(OPERATOR.len()).filter(|name| name == &OPERATOR.as_bytes());
        assert!(ours.count() > 10, "it has many");
        // A picture with edges in it.
        let pictures: Vec<_> = (0..3u32 << 20)
            .map(|n| ((n / 7) ^ (n / 640)) % 251)
            .map(|n| n as f32 / 251.0)
            .collect();
        assert_alike(&run(&plain, None, &pictures), &run(&changed, None, &pictures));
    }

    #[test]
    fn a_size_that_is_not_known_is_left_open() {
        if !is_possible() {
            return;
        }
        // A way down and up again, which meets what was not: the sizes of both must agree.
        let plain = rewrite::tests::open_model();
        let changed = rewrite::changed(&plain, 17, 2, true).expect("it has a convolution");
        let pictures: Vec<_> = (0..24 * 16 * 16).map(|n| (n % 13) as f32 / 13.0).collect();
        let shape = Some([1, 24, 16, 16]);
        assert_alike(&run(&plain, shape, &pictures), &run(&changed, shape, &pictures));
    }

    /// What a session finds in the first numbers that make an input.
    pub(in super::super::super) fn run(
        model: &[u8],
        shape: Option<[i64; 4]>,
        pictures: &[f32],
    ) -> Vec<f32> {
        let runtime = Runtime::load(None).expect("ONNX Runtime");
        let builder = Session::builder(&runtime.environment).expect("a builder");
        let builder = builder.with_intra_threads(2).expect("threads");
        let mut session =
            register(builder).expect("the operator").commit_from_memory(model).expect("a session");
        let own = session.inputs()[0].dtype().tensor_shape().expect("a tensor").to_vec();
        let shape = shape.map_or(own, Vec::from);
        let count = shape.iter().product::<i64>() as usize;
        let input = Tensor::from_array((shape, pictures[..count].to_vec())).expect("an input");
        let outputs = session.run(ort::inputs![input]).expect("a run");
        outputs[0].try_extract_tensor::<f32>().expect("numbers").1.to_vec()
    }

    pub(in super::super::super) fn assert_alike(wanted: &[f32], found: &[f32]) {
        assert_eq!(found.len(), wanted.len());
        let largest = wanted.iter().fold(0.0f32, |most, number| most.max(number.abs()));
        for (n, (found, wanted)) in found.iter().zip(wanted).enumerate() {
            let off = (found - wanted).abs();
            assert!(off < 1e-4 * largest, "number {n}: {found}, not {wanted}");
        }
    }
}
