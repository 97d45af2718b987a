//! A loaded program.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::abi::{self, ConstantRecord, KernelRecord, Table, ThreadgroupRecord};
use crate::error::{Error, Result};

/// A shared object with its table. Its function constants are globals: `lock` is held by whoever
/// runs it.
pub(crate) struct Module {
    table: &'static Table,
    pub(crate) path: PathBuf,
    pub(crate) lock: Mutex<()>,
    /// Its addresses.
    pub(crate) lo: u64,
    pub(crate) hi: u64,
    // Last, so that nothing above outlives it.
    _library: libloading::Library,
}

// SAFETY: the table and what it points to do not change after loading, but for function constants
// and arena offsets, which are written under `lock` only.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

/// A threadgroup variable of a kernel.
#[derive(Clone, Copy)]
pub(crate) struct Variable {
    pub(crate) site: u32,
    pub(crate) bytes: u32,
    pub(crate) align: u32,
    record: *mut ThreadgroupRecord,
}

impl Variable {
    /// Places it in the arena.
    ///
    /// # Safety
    /// The module's lock is held.
    pub(crate) unsafe fn place(&self, offset: u32) {
        // SAFETY: the record lives as long as its module; the lock makes this the only access.
        unsafe { (*self.record).offset = offset };
    }
}

/// Loads the program at `path`, once for the whole process: two copies would share their globals.
pub(crate) fn load(path: &Path, checked: bool) -> Result<Arc<Module>> {
    static LOADED: Mutex<Option<HashMap<PathBuf, Weak<Module>>>> = Mutex::new(None);
    let mut guard = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let loaded = guard.get_or_insert_with(HashMap::new);
    if let Some(module) = loaded.get(path).and_then(Weak::upgrade) {
        return Ok(module);
    }
    let module = Arc::new(open(path, checked)?);
    loaded.retain(|_, m| m.strong_count() > 0);
    loaded.insert(path.to_owned(), Arc::downgrade(&module));
    Ok(module)
}

fn open(path: &Path, checked: bool) -> Result<Module> {
    let load = |e: libloading::Error| Error::Load(e.to_string());
    // SAFETY: this crate compiled the object from text that the caller vouches for; its
    // initializers only build a list.
    let library = unsafe { libloading::Library::new(path) }.map_err(load)?;
    // SAFETY: the symbol is a `Table`, as its first field is about to confirm.
    let table = unsafe { library.get::<*const Table>(b"msl_table\0") }.map_err(load)?;
    let table = std::ptr::from_ref(&*table).cast::<*const Table>();
    // SAFETY: `get` gives the address of the symbol, read here as a pointer to the table itself.
    let table: &'static Table = unsafe { &**table };
    if table.abi != abi::VERSION || (table.checked != 0) != checked {
        return Err(Error::Load(format!(
            "{} is of another version; remove it",
            path.display()
        )));
    }
    let (lo, hi) = extent(std::ptr::from_ref(table).addr() as u64)?;
    Ok(Module {
        table,
        path: path.to_owned(),
        lock: Mutex::new(()),
        lo,
        hi,
        _library: library,
    })
}

/// The addresses of the object that holds `inside`.
#[cfg(target_os = "linux")]
fn extent(inside: u64) -> Result<(u64, u64)> {
    struct Search {
        inside: u64,
        found: Option<(u64, u64)>,
    }
    unsafe extern "C" fn visit(
        info: *mut libc::dl_phdr_info,
        _: usize,
        data: *mut std::ffi::c_void,
    ) -> i32 {
        // SAFETY: the loader passes a valid description, and `data` is the search below.
        let (info, search) = unsafe { (&*info, &mut *data.cast::<Search>()) };
        if info.dlpi_phnum == 0 {
            return 0;
        }
        // SAFETY: the loader's description has this many headers.
        let headers =
            unsafe { std::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)) };
        let loads = headers.iter().filter(|h| h.p_type == libc::PT_LOAD);
        let ends = loads.map(|h| {
            (
                info.dlpi_addr + h.p_vaddr,
                info.dlpi_addr + h.p_vaddr + h.p_memsz,
            )
        });
        let (lo, hi) = ends.fold((u64::MAX, 0), |(lo, hi), (a, b)| (lo.min(a), hi.max(b)));
        if (lo..hi).contains(&search.inside) {
            search.found = Some((lo, hi));
            return 1;
        }
        0
    }
    let mut search = Search {
        inside,
        found: None,
    };
    // SAFETY: `visit` reads what the loader gives and writes the search, which outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut search).cast()) };
    search
        .found
        .ok_or_else(|| Error::Load("the loader does not know the program".into()))
}

/// Elsewhere the size is not to be had: constants lie within a few megabytes of the table.
#[cfg(not(target_os = "linux"))]
fn extent(inside: u64) -> Result<(u64, u64)> {
    Ok((inside.saturating_sub(4 << 20), inside + (4 << 20)))
}

impl Module {
    pub(crate) fn table(&self) -> &Table {
        self.table
    }

    pub(crate) fn kernels(&self) -> &[KernelRecord] {
        // SAFETY: the table has this many records, for as long as the object is loaded.
        unsafe { std::slice::from_raw_parts(self.table.kernels, self.table.n_kernels as usize) }
    }

    pub(crate) fn constants(&self) -> &[ConstantRecord] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.table.constants, self.table.n_constants as usize) }
    }

    /// The globals computed from function constants.
    pub(crate) fn derived(&self) -> &[ConstantRecord] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.table.derived, self.table.n_derived as usize) }
    }

    /// Bytes that each argument refers to: 0 for pointers and values.
    pub(crate) fn argument_sizes(&self, kernel: &KernelRecord) -> &[u32] {
        // SAFETY: the record has a size for each argument, for as long as the object is loaded.
        unsafe { std::slice::from_raw_parts(kernel.arg_sizes, kernel.n_args as usize) }
    }

    /// Threadgroup variables of a kernel, in the order of the text.
    pub(crate) fn variables(&self, kernel: &KernelRecord) -> Vec<Variable> {
        let mut out = Vec::new();
        // SAFETY: the list is built when the object is loaded, and never changes after.
        let mut next = unsafe { *self.table.threadgroup };
        while !next.is_null() {
            // SAFETY: a record of the list; only its offset is ever written, and it is not read here.
            let (key, site, bytes, align, following) = unsafe {
                (
                    (*next).key,
                    (*next).site,
                    (*next).bytes,
                    (*next).align,
                    (*next).next,
                )
            };
            if key == kernel.key {
                out.push(Variable {
                    site,
                    bytes,
                    align,
                    record: next,
                });
            }
            next = following;
        }
        out.sort_by_key(|v| v.site);
        out
    }
}
