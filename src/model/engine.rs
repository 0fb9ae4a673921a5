//! A model that runs: session, buffers, and the three steps of a frame.
//!
//! Beside `runtime` and `winograd::operator` the only file that names `ort`. What must be kept in
//! mind about it:
//!
//! * `Session::run` is not thread-safe although ONNX Runtime says so, and takes `&mut self`. The
//!   session lives in a mutex that only the worker takes: [`Model::runner`] is never contended.
//! * Input and output are bound once to tensors of ours: a run copies and allocates nothing large.
//!   Run options with preallocated outputs would not be `Sync`, and a watchdog needs them.
//! * The CPU provider is never registered: doing so turns its arena off. Others fail loudly.
//! * Output tensors and bindings keep a session alive: they are fields in front of it, so that they
//!   go first.

use std::borrow::Cow;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use half::f16;
use half::slice::HalfFloatSliceExt;
use ort::ep::{self, ArbitrarilyConfigurableExecutionProvider as _};
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::builder::{AutoDevicePolicy, SessionBuilder};
use ort::session::{IoBinding, RunOptions, Session};
use ort::value::{DynTensor, Tensor, ValueType};

use super::contract::{Contract, Dtype, Overrides};
use super::file::{Identity, ModelFile};
use super::layout::Layout;
use super::options::Setting;
pub use super::options::{EngineOptions, OpenError};
use super::refusal::{Code, Refusal};
use super::rewrite;
use super::runtime::Runtime;
use crate::config::Provider;
use crate::vision::decode::{self, Candidate, DecodeError};
use crate::vision::letterbox::Geometry;
use crate::vision::nms;
use crate::vision::picture::Picture;
use crate::vision::preprocess::{Plan, PreprocessError, Target};

/// Plans kept: one per size of picture, and cameras have few sizes.
const PLANS_MAX: usize = 16;

/// For how long a pool's thread spins before it sleeps: from one node to the next, not to the next frame.
const SPIN_US: &str = "20";

/// Why a frame failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RunError {
    /// The picture.
    #[error(transparent)]
    Picture(#[from] PreprocessError),
    /// The run.
    #[error("inference failed: {0}")]
    Session(String),
    /// [`Model::terminate`] was called.
    #[error("inference was stopped by the watchdog")]
    Terminated,
    /// The output.
    #[error(transparent)]
    Output(#[from] DecodeError),
}

/// An object in a picture.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Detection {
    /// Index of the label.
    pub class_id: u32,
    /// 0..=1.
    pub score: f32,
    /// Left edge as a fraction of the picture's width, 0..=1.
    pub x1: f32,
    /// Upper edge as a fraction of the picture's height, 0..=1.
    pub y1: f32,
    /// Right edge.
    pub x2: f32,
    /// Lower edge.
    pub y2: f32,
}

/// What counts as an object.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Thresholds {
    /// The score must be strictly greater.
    pub confidence: f32,
    /// Of two boxes of a class that overlap by more, the weaker goes.
    pub iou: f32,
}

/// An open model. Shared as an `Arc`; one thread at a time runs it.
pub struct Model {
    identity: Identity,
    contract: Contract,
    setting: Setting,
    library: String,
    whole: bool,
    state: Mutex<State>,
    options: RunOptions,
    terminated: AtomicBool,
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model").field("identity", &self.identity).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct State {
    input: Input,
    output: Output,
    binding: IoBinding,
    session: Session,
    /// By size of picture; the last one used is at the end.
    plans: Vec<Plan>,
    /// Where the input tensor's picture lies.
    geometry: Option<Geometry>,
    candidates: Vec<Candidate>,
    /// A float16 output, widened.
    wide: Vec<f32>,
}

#[derive(Debug)]
enum Input {
    F32(Tensor<f32>),
    F16(Tensor<f16>),
}

#[derive(Debug)]
enum Output {
    /// Written in place by every run.
    Bound(DynTensor),
    /// Of a shape that only a run tells: copied out of it.
    Copied { shape: [usize; 2], data: Vec<f32> },
}

impl Model {
    /// Reads, checks, builds and warms up a model.
    ///
    /// # Errors
    /// The model is refused, or the provider can't be used.
    pub fn open(
        runtime: &Arc<Runtime>,
        path: &Path,
        options: &EngineOptions,
        overrides: &Overrides,
    ) -> Result<Self, OpenError> {
        let file = ModelFile::read(path, overrides, &options.custom_op_domains)?;
        Self::build(runtime, &file, options)
    }

    /// Builds a model that was checked already, and warms it up where [`EngineOptions::warm_up`] says so.
    /// The session's threads get the affinity of the calling thread, and the niceness of the process.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn build(
        runtime: &Arc<Runtime>,
        file: &ModelFile,
        options: &EngineOptions,
    ) -> Result<Self, OpenError> {
        let contract = file.contract.clone();
        let (session, whole) = match session(runtime, file, options, true) {
            // Some operators are not the provider's: the CPU takes them, and that is said.
            Err(OpenError::Refused(_)) if options.setting.provider != Provider::Cpu => {
                (session(runtime, file, options, false)?, false)
            }
            session => (session?, true),
        };
        let state =
            State::new(session, &contract).map_err(|e| refused(file, "can't bind it", &e))?;
        let run_options = RunOptions::new().map_err(|e| refused(file, "can't run it", &e))?;
        // What a run would tell is known: the output's shape; and the CPU provider compiles nothing.
        let known = matches!(state.output, Output::Bound(_));
        let warm_up = options.warm_up || !known || options.setting.provider != Provider::Cpu;
        let model = Self {
            identity: file.identity.clone(),
            contract,
            setting: options.setting,
            library: runtime.version().to_owned(),
            whole,
            state: Mutex::new(state),
            options: run_options,
            terminated: AtomicBool::new(false),
        };
        if warm_up {
            model.warm_up()?;
        }
        Ok(model)
    }

    /// Which model it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// How it is used.
    pub fn contract(&self) -> &Contract {
        &self.contract
    }

    /// What its session was built with.
    pub fn setting(&self) -> Setting {
        self.setting
    }

    /// Version of the library that runs it.
    pub fn library(&self) -> &str {
        &self.library
    }

    /// Whether every node runs on the setting's provider; else the CPU has some of them.
    pub fn whole(&self) -> bool {
        self.whole
    }

    /// Stops a run that takes too long, from another thread. ONNX Runtime looks at it between
    /// nodes; the model fails every further run until [`resume`](Self::resume).
    pub fn terminate(&self) {
        self.terminated.store(true, Ordering::Release);
        // It only sets a flag; the hard deadline behind it does not rely on it.
        let _ = self.options.terminate();
    }

    /// Lets it run again.
    pub fn resume(&self) {
        if self.terminated.swap(false, Ordering::AcqRel) {
            let _ = self.options.unterminate();
        }
    }

    /// The three steps of a frame. Held while a frame is worked on, by the worker alone.
    pub fn runner(&self) -> Runner<'_> {
        let state = self.state.lock().expect("a frame that panicked ended the process");
        Runner { model: self, state }
    }

    fn warm_up(&self) -> Result<(), Refusal> {
        let mut runner = self.runner();
        let failed = |why: String| {
            Refusal::new(Code::Run, format!("{}: its first run failed: {why}", self.identity.id))
        };
        runner.run().map_err(|e| failed(e.to_string()))?;
        let found = runner.state.output.shape();
        self.contract.check_run(found).map_err(failed)
    }
}

/// Builds the session. `whole`: fail rather than leave nodes of another provider to the CPU.
fn session(
    runtime: &Runtime,
    file: &ModelFile,
    options: &EngineOptions,
    whole: bool,
) -> Result<Session, OpenError> {
    let mut builder = configure(runtime, &file.contract, options.setting)
        .map_err(|e| refused(file, "can't be configured", &e))?;
    if let Some(provider) = dispatch(options.setting) {
        let library = runtime.library().display().to_string();
        let registered = builder.with_execution_providers([provider]);
        builder = registered.map_err(|e| {
            let reason = one_line(&e);
            OpenError::Provider { provider: options.setting.provider, library, reason }
        })?;
        if whole {
            builder = builder
                .with_disable_cpu_fallback()
                .map_err(|e| refused(file, "can't be configured", &e.into()))?;
        }
    }
    // Others compile the graph in their own way; in half precision more steps would round more.
    let own = options.setting.provider == Provider::Cpu && file.contract.input.dtype == Dtype::F32;
    let bytes = match own {
        true => rewrite::for_cpu(&file.bytes, &file.scan, options.setting.threads),
        false => Cow::Borrowed(&file.bytes[..]),
    };
    #[cfg(target_arch = "x86_64")]
    if own {
        let registered = super::winograd::operator::register(builder);
        builder = registered.map_err(|e| refused(file, "can't be configured", &e))?;
    }
    let session = builder.commit_from_memory(&bytes);
    Ok(session.map_err(|e| refused(file, "does not load it", &e))?)
}

fn refused(file: &ModelFile, what: &str, error: &ort::Error) -> Refusal {
    let name = &file.identity.id;
    Refusal::new(Code::Session, format!("{name}: ONNX Runtime {what}: {}", one_line(error)))
}

/// The session's options: nothing is left to defaults that change between versions.
fn configure(
    runtime: &Runtime,
    contract: &Contract,
    setting: Setting,
) -> ort::Result<SessionBuilder> {
    // Spinning burns a core between frames, which the decoder needs where there is no other. But from
    // node to node it is a matter of microseconds: to spin so long takes 7 % off YOLOv8n's run.
    let briefly = !setting.spinning && runtime.bounds_spinning();
    let mut builder = Session::builder(&runtime.environment)?
        // The default prefers an NPU where there is one.
        .with_auto_device(AutoDevicePolicy::PreferCPU)?
        .with_intra_threads(setting.threads.max(1))?
        .with_inter_threads(1)?
        .with_intra_op_spinning(setting.spinning || briefly)?
        .with_inter_op_spinning(false)?
        .with_thread_manager(runtime.nursery.clone())?
        .with_env_allocators()?
        .with_log_level(ort::logging::LogLevel::Warning)?;
    if saturates() {
        builder = builder.with_config_entry("session.x64quantprecision", "1")?;
    }
    if briefly {
        builder = builder.with_config_entry("session.intra_op.spin_duration_us", SPIN_US)?;
    }
    for (name, size) in &contract.fixed {
        builder = builder.with_dimension_override(name, *size as i64)?;
    }
    Ok(builder)
}

/// Without VNNI the usual kernels cut the sum of two products of int8 and uint8 at 16 bits, and an
/// int8 model misses what it would find elsewhere. With it they are exact, and the others slower.
fn saturates() -> bool {
    #[cfg(target_arch = "x86_64")]
    return !is_x86_feature_detected!("avx512vnni") && !is_x86_feature_detected!("avxvnni");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

fn dispatch(setting: Setting) -> Option<ep::ExecutionProviderDispatch> {
    let provider = match setting.provider {
        Provider::Cpu => return None,
        Provider::OpenVino => {
            let provider = ep::OpenVINO::default()
                .with_device_type("CPU")
                .with_num_threads(setting.threads.max(1));
            // By itself it computes in 32 bits; `precision` knows none of 16 for the CPU.
            let bf16 = r#"{"CPU":{"INFERENCE_PRECISION_HINT":"bf16"}}"#;
            match setting.bf16 {
                true => provider.with_arbitrary_config("load_config", bf16).build(),
                false => provider.build(),
            }
        }
        Provider::Cuda => ep::CUDA::default().build(),
        Provider::TensorRt => ep::TensorRT::default().build(),
    };
    Some(provider.error_on_failure())
}

fn one_line<R>(error: &ort::Error<R>) -> String {
    error.message().split_whitespace().collect::<Vec<_>>().join(" ")
}

impl State {
    fn new(session: Session, contract: &Contract) -> ort::Result<Self> {
        let memory = Allocator::default();
        let shape = [1, 3, contract.input.height, contract.input.width];
        let mut binding = session.create_binding()?;
        let input = match contract.input.dtype {
            Dtype::F32 => Input::F32(Tensor::new(&memory, shape)?),
            Dtype::F16 => Input::F16(Tensor::new(&memory, shape)?),
        };
        let name = &contract.output.name;
        let outlet = session.outputs().iter().find(|o| o.name() == name);
        let known = outlet.and_then(|o| match o.dtype() {
            ValueType::Tensor { ty, shape, .. } if shape.iter().all(|d| *d > 0) => {
                Some((*ty, shape.clone()))
            }
            _ => None,
        });
        let output = match known {
            Some((ty, shape)) => {
                let mut tensor = DynTensor::new(&memory, ty, shape)?;
                binding.bind_output(name, &mut tensor)?;
                Output::Bound(tensor)
            }
            None => {
                let cpu = MemoryInfo::new(
                    AllocationDevice::CPU,
                    0,
                    AllocatorType::Device,
                    MemoryType::Default,
                )?;
                binding.bind_output_to_device(name, &cpu)?;
                Output::Copied { shape: [0; 2], data: Vec::new() }
            }
        };
        let mut state = Self {
            input,
            output,
            binding,
            session,
            plans: Vec::new(),
            geometry: None,
            candidates: Vec::new(),
            wide: Vec::new(),
        };
        state.bind_input(&contract.input.name)?;
        Ok(state)
    }

    fn bind_input(&mut self, name: &str) -> ort::Result<()> {
        match &self.input {
            Input::F32(tensor) => self.binding.bind_input(name, tensor),
            Input::F16(tensor) => self.binding.bind_input(name, tensor),
        }
    }
}

impl Output {
    fn shape(&self) -> [usize; 2] {
        match self {
            Self::Bound(tensor) => last_two(tensor.shape()),
            Self::Copied { shape, .. } => *shape,
        }
    }

    /// The values of the last run; those of a float16 output are widened into `wide`.
    fn data<'a>(&'a self, dtype: Dtype, wide: &'a mut Vec<f32>) -> Result<&'a [f32], RunError> {
        match (self, dtype) {
            (Self::Copied { data, .. }, _) => Ok(data),
            (Self::Bound(tensor), Dtype::F32) => Ok(tensor.try_extract_tensor().map_err(unread)?.1),
            (Self::Bound(tensor), Dtype::F16) => {
                widen(tensor.try_extract_tensor().map_err(unread)?.1, wide);
                Ok(wide)
            }
        }
    }
}

fn last_two(shape: &[i64]) -> [usize; 2] {
    match shape {
        [.., a, b] => [*a as usize, *b as usize],
        _ => [0, 0],
    }
}

/// A frame's three steps, in order: [`preprocess`](Self::preprocess), [`run`](Self::run),
/// [`postprocess`](Self::postprocess).
#[derive(Debug)]
pub struct Runner<'m> {
    model: &'m Model,
    state: MutexGuard<'m, State>,
}

impl Runner<'_> {
    /// Writes a picture into the input tensor.
    ///
    /// # Errors
    /// A plane of the picture is too short.
    pub fn preprocess(&mut self, picture: &Picture<'_>) -> Result<(), RunError> {
        let wanted = &self.model.contract.input;
        let State { input, plans, geometry, .. } = &mut *self.state;
        let size = (picture.width, picture.height);
        match plans.iter().position(|p| p.geometry().source == size) {
            Some(at) => {
                let last = plans.len() - 1;
                plans.swap(at, last);
            }
            None => {
                if plans.len() == PLANS_MAX {
                    plans.remove(0);
                }
                let place = Geometry::new(wanted.fit, size, (wanted.width, wanted.height));
                plans.push(Plan::new(place, wanted.order, wanted.scale));
            }
        }
        let plan = plans.last_mut().expect("one was pushed or found");
        let mut target = match input {
            Input::F32(tensor) => Target::F32(tensor.extract_tensor_mut().1),
            Input::F16(tensor) => Target::F16(tensor.extract_tensor_mut().1),
        };
        if geometry.as_ref() != Some(plan.geometry()) {
            plan.write_bars(&mut target);
            *geometry = Some(*plan.geometry());
        }
        Ok(plan.write(picture, &mut target)?)
    }

    /// Runs the model on what [`preprocess`](Self::preprocess) wrote.
    ///
    /// # Errors
    /// ONNX Runtime fails, or the watchdog stopped it.
    pub fn run(&mut self) -> Result<(), RunError> {
        let model = self.model;
        let state = &mut *self.state;
        let result = (|| {
            // Elsewhere than on the CPU the data is copied to the device when it is bound.
            if model.setting.provider != Provider::Cpu {
                state.bind_input(&model.contract.input.name)?;
            }
            let outputs = state.session.run_binding_with_options(&state.binding, &model.options)?;
            if let Output::Copied { shape, data } = &mut state.output {
                let value = &outputs[0];
                let dims = match model.contract.output.dtype {
                    Dtype::F32 => {
                        let (dims, values) = value.try_extract_tensor::<f32>()?;
                        data.clear();
                        data.extend_from_slice(values);
                        dims
                    }
                    Dtype::F16 => {
                        let (dims, values) = value.try_extract_tensor::<f16>()?;
                        widen(values, data);
                        dims
                    }
                };
                *shape = last_two(dims);
            }
            Ok(())
        })();
        result.map_err(|e: ort::Error| {
            if model.terminated.load(Ordering::Acquire) {
                RunError::Terminated
            } else {
                RunError::Session(one_line(&e))
            }
        })
    }

    /// Reads the output: `out` is cleared and filled, best first.
    ///
    /// # Errors
    /// The output holds NaN or infinity, or a class without a label.
    ///
    /// # Panics
    /// If nothing was ever preprocessed.
    pub fn postprocess(
        &mut self,
        thresholds: &Thresholds,
        out: &mut Vec<Detection>,
    ) -> Result<(), RunError> {
        out.clear();
        let contract = &self.model.contract;
        let State { output, candidates, wide, geometry, .. } = &mut *self.state;
        let [_, columns] = output.shape();
        let data = output.data(contract.output.dtype, wide)?;
        candidates.clear();
        if !data.is_empty() {
            read(contract, data, columns, thresholds, candidates)?;
        }
        let geometry = geometry.as_ref().expect("postprocess follows preprocess");
        out.extend(candidates.iter().map(|c| {
            let [x1, y1, x2, y2] = geometry.to_source(c.corners);
            Detection { class_id: c.class, score: c.score, x1, y1, x2, y2 }
        }));
        Ok(())
    }

    /// The output of the last run as it is: rows of [`Contract::output`], none of them read.
    ///
    /// # Errors
    /// ONNX Runtime does not hand it out.
    pub fn raw(&mut self) -> Result<&[f32], RunError> {
        let State { output, wide, .. } = &mut *self.state;
        output.data(self.model.contract.output.dtype, wide)
    }
}

/// Decodes and, where the layout wants it, suppresses. `columns` is the output's last dimension.
fn read(
    contract: &Contract,
    data: &[f32],
    columns: usize,
    thresholds: &Thresholds,
    out: &mut Vec<Candidate>,
) -> Result<(), DecodeError> {
    let confidence = thresholds.confidence;
    let input = (contract.input.width, contract.input.height);
    let labels = contract.labels.len();
    match contract.layout {
        Layout::Yolo8 => decode::yolo8(data, columns, confidence, out)?,
        Layout::Yolo5 => decode::yolo5(data, columns, confidence, out)?,
        Layout::Yolox => decode::yolox(data, columns, input, confidence, out)?,
        Layout::End2end => return decode::end2end(data, labels, confidence, out),
        Layout::Rtdetr if contract.ranked => {
            return decode::rtdetr_ranked(data, labels, input, confidence, out);
        }
        Layout::Rtdetr => return decode::rtdetr(data, columns, input, confidence, out),
    }
    nms::suppress(out, thresholds.iou);
    Ok(())
}

fn widen(from: &[f16], to: &mut Vec<f32>) {
    to.resize(from.len(), 0.0);
    from.convert_to_f32_slice(to);
}

fn unread(e: ort::Error) -> RunError {
    RunError::Session(one_line(&e))
}
