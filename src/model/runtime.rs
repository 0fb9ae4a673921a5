//! ONNX Runtime's library: found, loaded, one environment for the life of the process.
//!
//! Beside `engine` and `winograd::operator` the only file that names `ort`.

use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};

use crossbeam_channel::{Sender, bounded};
use ort::AsPointer;
use ort::environment::{Environment, ThreadManager};
use ort::ep::{self, ExecutionProvider};
use ort::logging::LogLevel;
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};

use crate::affinity;
use crate::config::{Inference, Provider};

/// Where packages install the library, and Intel's build of it.
const SYSTEM_DIRS: [&str; 2] = ["/usr/lib/noblink", "/usr/lib/noblink/openvino"];
/// The same in a checkout.
const CHECKOUT_DIRS: [&str; 2] = ["lib/onnxruntime", "lib/onnxruntime-openvino"];
/// Folders above the program in which `lib/onnxruntime` is looked for: `target/debug/deps` of a
/// checkout is three below it.
const ANCESTORS_MAX: usize = 4;

/// The first version whose threads spin no longer than they are told.
const BOUNDS_SPINNING: [u32; 2] = [1, 26];

/// ORT allows one environment per process, ever: this holds it for good.
static LOADED: Mutex<Option<Arc<Runtime>>> = Mutex::new(None);

/// The loaded library.
#[derive(Debug)]
pub struct Runtime {
    pub(super) environment: Environment,
    pub(super) nursery: Nursery,
    library: PathBuf,
    version: String,
}

/// Why there is no ONNX Runtime.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// Nothing at any of the places.
    #[error(
        "ONNX Runtime's library was not found; looked for libonnxruntime.so* in {}. \
         Run `make build` in the project's folder, or name it: inference.library in the \
         configuration, or ORT_DYLIB_PATH", joined(.0)
    )]
    NotFound(Vec<PathBuf>),
    /// It is there, but does not load.
    #[error("ONNX Runtime's library {} does not load: {reason}", .path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// The loader's, or ONNX Runtime's, own words.
        reason: String,
    },
}

impl RuntimeError {
    /// There is none: what was looked for.
    pub fn missing(library: Option<&Path>) -> Self {
        let places = || [places(0), places(1)].concat();
        Self::NotFound(named(library).map_or_else(places, |path| vec![path]))
    }
}

fn joined(places: &[PathBuf]) -> String {
    places.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
}

impl Runtime {
    /// Loads the library: the one named (a file, or the folder it lies in), else that of
    /// `ORT_DYLIB_PATH`, else `lib/onnxruntime` in a folder above the program (a checkout), else
    /// that in `/usr/lib/noblink`. A process has one: later calls get it whatever they name.
    ///
    /// # Errors
    /// It is nowhere, or does not load.
    pub fn load(library: Option<&Path>) -> Result<Arc<Self>, RuntimeError> {
        let mut loaded = LOADED.lock().expect("loading ONNX Runtime does not panic");
        if let Some(runtime) = &*loaded {
            return Ok(Arc::clone(runtime));
        }
        let path = find(library)?;
        let unusable = |reason: String| RuntimeError::Unusable { path: path.clone(), reason };
        let environment = ort::init_from(&path)
            .map_err(|e| unusable(e.to_string()))?
            .with_name("noblink")
            .with_telemetry(false)
            .build()
            .map_err(|e| unusable(e.to_string()))?;
        share_memory(&environment).map_err(|e| unusable(e.to_string()))?;
        // Below this the library composes messages for every run only to have them filtered.
        environment.set_log_level(LogLevel::Warning);
        let nursery = Nursery::start().map_err(|e| unusable(format!("no thread: {e}")))?;
        let version = version_of(&path);
        let runtime = Arc::new(Self { environment, nursery, library: path, version });
        *loaded = Some(Arc::clone(&runtime));
        Ok(runtime)
    }

    /// The library's file.
    pub fn library(&self) -> &Path {
        &self.library
    }

    /// The providers that the library was built with; whether this box has what they need shows
    /// when a session is built.
    pub fn providers(&self) -> Vec<Provider> {
        let has = |provider: &Provider| match provider {
            Provider::Cpu => true,
            Provider::OpenVino => ep::OpenVINO::is_available().unwrap_or(false),
            Provider::Cuda => ep::CUDA::is_available().unwrap_or(false),
            Provider::TensorRt => ep::TensorRT::is_available().unwrap_or(false),
        };
        Provider::NAMES.into_iter().map(|(_, provider)| provider).filter(has).collect()
    }

    /// The library's version, as its file name says it (`1.32.0`), else `unknown`: `ort` checks
    /// the version but keeps it to itself.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Whether threads can be told for how long they may spin; else it is for milliseconds, or not at all.
    pub(super) fn bounds_spinning(&self) -> bool {
        numbers(&self.version)[..] >= BOUNDS_SPINNING[..]
    }
}

/// Lets all sessions take the memory of their runs from one arena (`engine` tells them to).
///
/// With one of its own a new session has its first two runs fault in every page that they touch: 67
/// and 65 instead of 52 ms for YOLOv8n of 640x640, just after a swap. And two sessions that are there
/// at once, of which one runs, hold it twice: 49 MB.
fn share_memory(environment: &Environment) -> ort::Result<()> {
    let (device, kind) = (AllocationDevice::CPU, AllocatorType::Arena);
    let place = MemoryInfo::new(device, 0, kind, MemoryType::Default)?;
    // As much as is asked for, no power of two: it lives as long as the process.
    let (key, as_requested) = (c"arena_extend_strategy".as_ptr(), 1);
    let mut arena = ptr::null_mut();
    // SAFETY: all pointers are valid for the calls; the environment lives as long as the process, and
    // keeps no pointer to the configuration, which is released once.
    unsafe {
        let status = (ort::api().CreateArenaCfgV2)(&key, &as_requested, 1, &mut arena);
        ort::Error::result_from_status(status)?;
        let env = environment.ptr().cast_mut();
        let status = (ort::api().CreateAndRegisterAllocator)(env, place.ptr(), arena);
        (ort::api().ReleaseArenaCfg)(arena);
        ort::Error::result_from_status(status)
    }
}

/// Starts the threads of sessions' pools.
///
/// A thread inherits its maker's niceness, and may not go below it again. Sessions are built at a
/// low priority, so that the cameras don't feel it, but must run at the service's own: their threads
/// are therefore made by a thread of that niceness.
#[derive(Debug, Clone)]
pub(super) struct Nursery {
    births: Sender<Birth>,
}

/// A thread to start, and where its handle goes.
type Birth = (Box<dyn FnOnce() + Send>, Sender<std::io::Result<JoinHandle<()>>>);

impl Nursery {
    /// It lives as long as the process, as the library does.
    fn start() -> std::io::Result<Self> {
        let (births, wanted) = bounded::<Birth>(0);
        Builder::new().name("nursery".into()).spawn(move || {
            for (work, parent) in wanted {
                let _ = parent.send(Builder::new().name("infer-pool".into()).spawn(work));
            }
        })?;
        Ok(Self { births })
    }
}

impl ThreadManager for Nursery {
    type Thread = JoinHandle<()>;

    /// The thread runs on the cores of the one that builds the session.
    fn create(&self, work: impl FnOnce() + Send + 'static) -> ort::Result<JoinHandle<()>> {
        let cores = affinity::allowed();
        let work = move || {
            // They are cores that this process may use: the builder runs on them.
            let _ = affinity::pin(&cores);
            work();
        };
        let (parent, born) = bounded(1);
        let sent = self.births.send((Box::new(work), parent)).is_ok();
        let thread = born.recv().ok().filter(|_| sent);
        let thread = thread.ok_or_else(|| ort::Error::new("the nursery is gone"))?;
        thread.map_err(|e| ort::Error::new(format!("the system has no thread: {e}")))
    }

    fn join(thread: JoinHandle<()>) -> ort::Result<()> {
        // One that panicked has said so.
        let _ = thread.join();
        Ok(())
    }
}

/// The file that is asked for: by the configuration, else by `ORT_DYLIB_PATH`.
pub fn named(library: Option<&Path>) -> Option<PathBuf> {
    let environment = || std::env::var_os("ORT_DYLIB_PATH").filter(|path| !path.is_empty());
    library.map(Path::to_owned).or_else(|| environment().map(PathBuf::from))
}

/// The libraries that models may run in here: the one named, else ONNX Runtime's own build and
/// behind it Intel's, as far as they are installed.
pub fn installed(library: Option<&Path>) -> Vec<PathBuf> {
    match named(library) {
        Some(_) => find(library).into_iter().collect(),
        None => [plain(), openvino()].into_iter().flatten().collect(),
    }
}

/// The library to load when nothing is known of this box: the one named, else that which has the
/// provider. `auto` takes Intel's build on Intel's processors: its CPU provider is the reference
/// there, and the way from it to OpenVINO needs no restart.
pub fn library_for(inference: &Inference) -> Option<PathBuf> {
    let wants_openvino = match inference.provider {
        Some(provider) => provider == Provider::OpenVino,
        None => crate::host::is_intel(),
    };
    named(inference.library.as_deref()).or_else(|| openvino().filter(|_| wants_openvino))
}

fn find(library: Option<&Path>) -> Result<PathBuf, RuntimeError> {
    if let Some(path) = named(library) {
        // A file that is named is taken or complained about, never passed over.
        let found = if path.is_dir() { newest(&path) } else { Some(path.clone()) };
        return found
            .filter(|p| p.exists())
            .and_then(|p| std::path::absolute(p).ok())
            .ok_or(RuntimeError::NotFound(vec![path]));
    }
    plain().ok_or_else(|| RuntimeError::NotFound(places(0)))
}

fn plain() -> Option<PathBuf> {
    places(0).iter().find_map(|dir| newest(dir))
}

fn openvino() -> Option<PathBuf> {
    places(1).iter().find_map(|dir| newest(dir))
}

/// Where a build is looked for; 0 = ONNX Runtime's own, 1 = Intel's.
fn places(build: usize) -> Vec<PathBuf> {
    let program = std::env::current_exe().unwrap_or_default();
    let checkouts = program.ancestors().skip(1).take(ANCESTORS_MAX);
    checkouts.map(|dir| dir.join(CHECKOUT_DIRS[build])).chain([SYSTEM_DIRS[build].into()]).collect()
}

/// `libonnxruntime.so` in a folder, else the one with the highest version behind it.
fn newest(dir: &Path) -> Option<PathBuf> {
    let plain = dir.join("libonnxruntime.so");
    if plain.exists() {
        return Some(plain);
    }
    std::fs::read_dir(dir)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("libonnxruntime.so.")
        })
        .max_by_key(|path| numbers(&version_of(path)))
}

/// A version, to be compared.
fn numbers(version: &str) -> Vec<u32> {
    version.split('.').filter_map(|n| n.parse().ok()).collect()
}

/// A library's version, as its file name says it.
pub fn version_of(library: &Path) -> String {
    let file = library.canonicalize().unwrap_or_else(|_| library.to_owned());
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    name.split_once(".so.").map_or("unknown", |(_, version)| version).to_owned()
}
