//! NVRTC, NVIDIA's run-time compiler: found, loaded, and asked for images (CUBIN). PTX is never asked
//! for: an older driver refuses a newer compiler's.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use libloading::Library;

use super::search;
use crate::error::{MlxError, Result};

type Program = *mut c_void;

/// The functions that are used, loaded once.
struct Functions {
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    error: unsafe extern "C" fn(c_int) -> *const c_char,
}

/// A loaded compiler.
pub(crate) struct Nvrtc {
    functions: Functions,
    version: (u32, u32),
    /// Architectures that it compiles for, as in 90 for 9.0; empty where it does not say.
    archs: Vec<u32>,
    path: PathBuf,
    /// Kept for as long as its functions.
    _libraries: Vec<Library>,
}

/// An image and what the compiler said.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    pub(crate) cubin: Vec<u8>,
    pub(crate) log: String,
}

impl Nvrtc {
    /// The first compiler whose images a driver for CUDA `newest` (major) takes; any where it is not
    /// known.
    pub(crate) fn find(newest: Option<u32>) -> Result<Self> {
        let variable = |name: &str| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        // Two threads that search at once would only do the same work twice.
        static SEARCH: Mutex<()> = Mutex::new(());
        let _searching = SEARCH.lock();
        let mut tried = Vec::new();
        for path in search::candidates(variable) {
            match Self::open(&path) {
                Ok(nvrtc) if newest.is_some_and(|newest| nvrtc.version.0 > newest) => {
                    let (major, minor) = nvrtc.version;
                    tried.push(format!(
                        "{}: version {major}.{minor} is newer than the driver",
                        path.display()
                    ));
                }
                Ok(nvrtc) => return Ok(nvrtc),
                Err(reason) => tried.push(reason),
            }
        }
        Err(MlxError::DeviceUnavailable {
            device: "cuda".into(),
            reason: format!(
                "no usable NVRTC (CUDA's run-time compiler) was found; `pip install \
                 nvidia-cuda-nvrtc` brings it, and {} names its file ({})",
                search::VARIABLE,
                tried.join("; ")
            ),
        })
    }

    fn open(path: &Path) -> std::result::Result<Self, String> {
        // SAFETY: these are NVIDIA's own libraries, by name or from the places where they are
        // installed, or what the user names; their initialisers have no requirements.
        let load = |path: &Path| unsafe { Library::new(path) };
        let mut libraries: Vec<Library> = search::builtins_beside(path)
            .iter()
            .filter_map(|path| load(path).ok())
            .collect();
        let library = load(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let missing = |e: libloading::Error| format!("{}: {e}", path.display());
        /// A function of the library.
        ///
        /// # Safety
        /// `T` is the type that the library's header declares for `name`.
        unsafe fn get<T: Copy>(
            library: &Library,
            name: &str,
        ) -> std::result::Result<T, libloading::Error> {
            // SAFETY: promised by the caller.
            unsafe { library.get::<T>(name.as_bytes()) }.map(|symbol| *symbol)
        }
        type Version = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;
        type ArchCount = unsafe extern "C" fn(*mut c_int) -> c_int;
        // SAFETY: the types are those of nvrtc.h, which has not changed them since CUDA 11.2.
        let (functions, version, archs) = unsafe {
            let functions = Functions {
                create: get(&library, "nvrtcCreateProgram").map_err(missing)?,
                compile: get(&library, "nvrtcCompileProgram").map_err(missing)?,
                log_size: get(&library, "nvrtcGetProgramLogSize").map_err(missing)?,
                log: get(&library, "nvrtcGetProgramLog").map_err(missing)?,
                cubin_size: get(&library, "nvrtcGetCUBINSize").map_err(missing)?,
                cubin: get(&library, "nvrtcGetCUBIN").map_err(missing)?,
                destroy: get(&library, "nvrtcDestroyProgram").map_err(missing)?,
                error: get(&library, "nvrtcGetErrorString").map_err(missing)?,
            };
            let version: Version = get(&library, "nvrtcVersion").map_err(missing)?;
            let count: Option<ArchCount> = get(&library, "nvrtcGetNumSupportedArchs").ok();
            let list: Option<ArchCount> = get(&library, "nvrtcGetSupportedArchs").ok();
            (functions, version, count.zip(list))
        };
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both point to integers.
        if unsafe { version(&mut major, &mut minor) } != 0 || major < 12 {
            return Err(format!(
                "{}: version {major}.{minor} is older than 12.0",
                path.display()
            ));
        }
        let mut known = Vec::new();
        if let Some((count, list)) = archs {
            let mut n = 0;
            // SAFETY: `n` is an integer, and the list gets as many as `count` says.
            unsafe {
                if count(&mut n) == 0 {
                    known = vec![0; usize::try_from(n).unwrap_or(0)];
                    if list(known.as_mut_ptr()) != 0 {
                        known.clear();
                    }
                }
            }
        }
        libraries.push(library);
        Ok(Self {
            functions,
            version: (major.unsigned_abs(), minor.unsigned_abs()),
            archs: known.into_iter().map(c_int::unsigned_abs).collect(),
            path: path.into(),
            _libraries: libraries,
        })
    }

    /// Major and minor version.
    pub(crate) fn version(&self) -> (u32, u32) {
        self.version
    }

    /// Where it was found.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The architectures that it says it compiles for, as in 90 for 9.0.
    pub(super) fn archs(&self) -> &[u32] {
        &self.archs
    }

    /// Compiles a text to an image.
    pub(super) fn compile(&self, name: &str, source: &str, options: &[String]) -> Result<Image> {
        let failed = |message: String| MlxError::ShaderCompilationError {
            name: name.into(),
            message,
        };
        let c_string =
            |text: &str| CString::new(text).map_err(|_| failed("a text with a zero byte".into()));
        let text = c_string(source)?;
        let file = c_string("mlx_flash_attn.cu")?;
        let options = options
            .iter()
            .map(|option| c_string(option))
            .collect::<Result<Vec<_>>>()?;
        let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let count = c_int::try_from(pointers.len()).map_err(|e| failed(e.to_string()))?;

        let f = &self.functions;
        let mut program = Handle {
            program: std::ptr::null_mut(),
            destroy: f.destroy,
        };
        // SAFETY: the strings end in zero and outlive the call; there are no headers.
        let status = unsafe {
            (f.create)(
                &mut program.program,
                text.as_ptr(),
                file.as_ptr(),
                0,
                std::ptr::null(),
                std::ptr::null(),
            )
        };
        if status != 0 {
            return Err(failed(self.message(status)));
        }
        // SAFETY: the program is there, and `pointers` are `count` strings that outlive the call.
        let status = unsafe { (f.compile)(program.program, count, pointers.as_ptr()) };
        let log = self.bytes(&program, f.log_size, f.log);
        let log = String::from_utf8_lossy(&log)
            .trim_end_matches('\0')
            .trim()
            .to_string();
        if status != 0 {
            return Err(failed(format!("{}: {log}", self.message(status))));
        }
        let cubin = self.bytes(&program, f.cubin_size, f.cubin);
        if cubin.is_empty() {
            return Err(failed("the compiler gave no image".into()));
        }
        Ok(Image { cubin, log })
    }

    fn message(&self, status: c_int) -> String {
        // SAFETY: the function takes any status and returns a static string.
        let text = unsafe { (self.functions.error)(status) };
        if text.is_null() {
            return format!("NVRTC status {status}");
        }
        // SAFETY: not null, ends in zero, static.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into()
    }

    /// What a pair of functions gives: a size, then as many bytes. Empty where it gives nothing.
    fn bytes(
        &self,
        program: &Handle,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        get: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Vec<u8> {
        let mut len = 0;
        // SAFETY: the program is there and `len` is an integer.
        if unsafe { size(program.program, &mut len) } != 0 {
            return Vec::new();
        }
        let mut bytes = vec![0u8; len];
        // SAFETY: there is room for as many bytes as it said.
        if unsafe { get(program.program, bytes.as_mut_ptr().cast()) } != 0 {
            return Vec::new();
        }
        bytes
    }
}

/// A program, destroyed when dropped.
struct Handle {
    program: Program,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
}

impl Drop for Handle {
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: made by `create`, destroyed once.
            unsafe { (self.destroy)(&mut self.program) };
        }
    }
}
