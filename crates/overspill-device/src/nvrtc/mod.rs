//! The run-time compiler: CUDA C++ to machine code, without a GPU or a driver.
//!
//! The library is the one that PyTorch brought (12 or 13), found by [`find`]; it is loaded by
//! absolute path, its builtins first, since the wheels carry no search path. Machine code is kept on
//! disk by [`cache`]. What this module does not do: run anything; see [`crate::cuda::Module`].

pub mod cache;
pub mod find;
pub mod table;
mod usage;

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    path::{Path, PathBuf},
    ptr,
    sync::{Mutex, PoisonError},
};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LOCAL, RTLD_NOW, Symbol};

pub use self::usage::KernelUsage;
use crate::{Error, Result, kernels::Source};

type Program = *mut c_void;
type Status = c_int;

/// The compiler's library, loaded.
pub struct Nvrtc {
    path: PathBuf,
    version: (i32, i32),
    functions: Functions,
    /// Serialises compilations: older libraries share state between programs.
    compiling: Mutex<()>,
    /// Both stay loaded as long as the functions are called.
    _libraries: (Option<Library>, Library),
}

/// Machine code of one source, and what the compiler said of it.
#[derive(Debug, Clone)]
pub struct Compiled {
    /// A cubin.
    pub cubin: Vec<u8>,
    /// What each kernel takes of a multiprocessor.
    pub usage: Vec<KernelUsage>,
}

struct Functions {
    error_string: Symbol<unsafe extern "C" fn(Status) -> *const c_char>,
    version: Symbol<unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status>,
    create: Symbol<
        unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> Status,
    >,
    compile: Symbol<unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status>,
    destroy: Symbol<unsafe extern "C" fn(*mut Program) -> Status>,
    log_bytes: Symbol<unsafe extern "C" fn(Program, *mut usize) -> Status>,
    log: Symbol<unsafe extern "C" fn(Program, *mut c_char) -> Status>,
    cubin_bytes: Symbol<unsafe extern "C" fn(Program, *mut usize) -> Status>,
    cubin: Symbol<unsafe extern "C" fn(Program, *mut c_char) -> Status>,
}

impl Nvrtc {
    /// Loads the compiler from `folder`, or from where PyTorch, a virtual environment or a CUDA
    /// toolkit has it.
    pub fn find(folder: Option<&Path>) -> Result<Self> {
        let candidates = find::candidates(folder);
        for library in &candidates {
            if let Ok(loaded) = Self::load(library) {
                return Ok(loaded);
            }
        }
        Err(unavailable(format!(
            "libnvrtc was not found{}; install torch with CUDA or nvidia-cuda-nvrtc, or set {} to the \
             folder that holds it",
            if candidates.is_empty() { "" } else { " in a state that loads" },
            find::FOLDER_VARIABLE
        )))
    }

    /// Loads one library.
    pub fn load(library: &find::Candidate) -> Result<Self> {
        let open = |path: &Path, flags| {
            // SAFETY: NVIDIA's libraries; their initialisers only set up their own state.
            unsafe { Library::open(Some(path), RTLD_NOW | flags) }
                .map_err(|error| unavailable(error.to_string()))
        };
        let builtins = library.builtins.as_ref().map(|path| open(path, RTLD_GLOBAL)).transpose()?;
        let nvrtc = open(&library.nvrtc, RTLD_LOCAL)?;
        let functions = Functions::of(&nvrtc)?;
        let mut version = (0, 0);
        // SAFETY: writes two integers.
        let status = unsafe { (functions.version)(&raw mut version.0, &raw mut version.1) };
        let loaded = Self {
            path: library.nvrtc.clone(),
            version,
            functions,
            compiling: Mutex::default(),
            _libraries: (builtins, nvrtc),
        };
        loaded.check("nvrtcVersion", status)?;
        Ok(loaded)
    }

    /// Where the library is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Major and minor version.
    #[must_use]
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Options that `source` is compiled with for a compute capability (90 is an H200's).
    #[must_use]
    pub fn options(&self, source: &Source, compute_capability: u32) -> Vec<String> {
        let mut options = vec![
            format!("--gpu-architecture=sm_{compute_capability}"),
            "--std=c++17".to_owned(),
            "--ptxas-options=-v".to_owned(),
        ];
        options.extend(source.options.iter().map(|&option| option.to_owned()));
        options
    }

    /// Compiles `source` to machine code of a compute capability.
    ///
    /// # Errors
    /// [`Error::Compile`] with the compiler's log.
    pub fn compile(&self, source: &Source, compute_capability: u32) -> Result<Compiled> {
        let _one_at_a_time = self.compiling.lock().unwrap_or_else(PoisonError::into_inner);
        let text = c_string(source.text)?;
        let name = c_string(source.name)?;
        let options = self.options(source, compute_capability);
        let options: Vec<CString> = options.iter().map(|o| c_string(o)).collect::<Result<_>>()?;
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let mut program = Handle { functions: &self.functions, raw: ptr::null_mut() };
        // SAFETY: both strings end with a null; no headers are passed.
        let status = unsafe {
            (self.functions.create)(
                &raw mut program.raw,
                text.as_ptr(),
                name.as_ptr(),
                0,
                ptr::null(),
                ptr::null(),
            )
        };
        self.check("nvrtcCreateProgram", status)?;
        let count = c_int::try_from(options.len()).unwrap_or(c_int::MAX);
        // SAFETY: the program lives; `count` strings that end with a null.
        let status = unsafe { (self.functions.compile)(program.raw, count, options.as_ptr()) };
        let log = String::from_utf8_lossy(&self.bytes(
            "nvrtcGetProgramLog",
            &program,
            &self.functions.log_bytes,
            &self.functions.log,
        )?)
        .trim_end_matches('\0')
        .to_owned();
        if status != 0 {
            return Err(Error::Compile { source_name: source.name, compute_capability, log });
        }
        let cubin =
            self.bytes("nvrtcGetCUBIN", &program, &self.functions.cubin_bytes, &self.functions.cubin)?;
        Ok(Compiled { cubin, usage: usage::parse(&log) })
    }

    fn bytes(
        &self,
        call: &'static str,
        program: &Handle<'_>,
        size: &Symbol<unsafe extern "C" fn(Program, *mut usize) -> Status>,
        get: &Symbol<unsafe extern "C" fn(Program, *mut c_char) -> Status>,
    ) -> Result<Vec<u8>> {
        let mut length = 0;
        // SAFETY: the program lives; writes one integer.
        self.check(call, unsafe { size(program.raw, &raw mut length) })?;
        let mut bytes = vec![0u8; length];
        // SAFETY: the buffer has the length that the library has just asked for.
        self.check(call, unsafe { get(program.raw, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }

    fn check(&self, call: &'static str, status: Status) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: returns a string of the library's own for every number.
        let message = unsafe { CStr::from_ptr((self.functions.error_string)(status)) };
        Err(Error::Driver { call, code: status, message: message.to_string_lossy().into_owned() })
    }
}

impl Functions {
    fn of(library: &Library) -> Result<Self> {
        macro_rules! symbol {
            ($name:literal) => {
                // SAFETY: the field's type is the signature that NVRTC 11.1 and later document.
                unsafe { library.get(concat!($name, "\0").as_bytes()) }
                    .map_err(|error| unavailable(error.to_string()))?
            };
        }
        Ok(Self {
            error_string: symbol!("nvrtcGetErrorString"),
            version: symbol!("nvrtcVersion"),
            create: symbol!("nvrtcCreateProgram"),
            compile: symbol!("nvrtcCompileProgram"),
            destroy: symbol!("nvrtcDestroyProgram"),
            log_bytes: symbol!("nvrtcGetProgramLogSize"),
            log: symbol!("nvrtcGetProgramLog"),
            cubin_bytes: symbol!("nvrtcGetCUBINSize"),
            cubin: symbol!("nvrtcGetCUBIN"),
        })
    }
}

/// A program, destroyed when dropped.
struct Handle<'a> {
    functions: &'a Functions,
    raw: Program,
}

impl Drop for Handle<'_> {
    fn drop(&mut self) {
        if !self.raw.is_null() {
            // SAFETY: created once, destroyed once.
            let _ = unsafe { (self.functions.destroy)(&raw mut self.raw) };
        }
    }
}

fn unavailable(reason: String) -> Error {
    Error::Unavailable { backend: "nvrtc", reason }
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| unavailable("a source or an option contains a null byte".to_owned()))
}
