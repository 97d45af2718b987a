//! What the host and a compiled program share. Mirrors `shim/abi.h`, field by field.

use std::ffi::{c_char, c_void};

pub(crate) const VERSION: u32 = 2;
pub(crate) const BUFFERS: usize = 31;
pub(crate) const REGION: usize = 512 << 20;
pub(crate) const STACKS: usize = 64 << 20;
pub(crate) const STACK: usize = 256 << 10;
pub(crate) const GUARD: usize = 64 << 10;
pub(crate) const ARENA: u32 = 128 << 10;

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Buffer {
    pub(crate) ptr: *mut u8,
    pub(crate) len: u64,
}

#[repr(C)]
pub(crate) struct Range {
    pub(crate) lo: *mut u8,
    pub(crate) hi: *mut u8,
    pub(crate) shadow: *mut u64,
    pub(crate) index: u32,
    pub(crate) writable: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ArenaVar {
    pub(crate) lo: u32,
    pub(crate) hi: u32,
}

#[repr(C)]
pub(crate) struct Launch {
    pub(crate) entry: Option<unsafe extern "C" fn()>,
    pub(crate) buffers: [Buffer; BUFFERS],
    pub(crate) arena_offset: [u32; BUFFERS],
    pub(crate) groups: [u32; 3],
    pub(crate) threads: [u32; 3],
    pub(crate) arena_bytes: u32,
    pub(crate) checked: u32,
    pub(crate) n_ranges: u32,
    pub(crate) n_vars: u32,
    pub(crate) ranges: *const Range,
    pub(crate) vars: *const ArenaVar,
    pub(crate) module_lo: u64,
    pub(crate) module_hi: u64,
    pub(crate) shuffle: u64,
}

pub(crate) mod fault {
    pub(crate) const OUT_OF_BOUNDS: u32 = 1;
    pub(crate) const READ_ONLY: u32 = 2;
    pub(crate) const ARENA_BOUNDS: u32 = 3;
    pub(crate) const RACE: u32 = 4;
    pub(crate) const DEVICE_RACE: u32 = 5;
    pub(crate) const UNWRITTEN: u32 = 6;
    pub(crate) const MISALIGNED: u32 = 7;
    pub(crate) const OTHER_STACK: u32 = 8;
    pub(crate) const DIVERGENCE: u32 = 9;
    pub(crate) const STALE: u32 = 11;
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct RawFault {
    pub(crate) kind: u32,
    pub(crate) write: u32,
    pub(crate) group: [u32; 3],
    pub(crate) thread: u32,
    pub(crate) other_thread: u32,
    pub(crate) other_group: u32,
    pub(crate) op: u32,
    pub(crate) other_op: u32,
    pub(crate) line: u32,
    pub(crate) other_line: u32,
    pub(crate) index: u32,
    pub(crate) size: u32,
    pub(crate) offset: i64,
    pub(crate) pc: u64,
    pub(crate) other_pc: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Counts {
    pub(crate) multiplies: u64,
    pub(crate) threadgroup_barriers: u64,
    pub(crate) simdgroup_barriers: u64,
    pub(crate) device_read: u64,
    pub(crate) device_written: u64,
    pub(crate) threadgroup_read: u64,
    pub(crate) threadgroup_written: u64,
    pub(crate) exp2: u64,
}

#[repr(C)]
pub(crate) struct KernelRecord {
    pub(crate) name: *const c_char,
    pub(crate) key: *const c_void,
    pub(crate) entry: Option<unsafe extern "C" fn()>,
    pub(crate) arg_sizes: *const u32,
    pub(crate) n_args: u32,
    pub(crate) max_threads: u32,
}

#[repr(C)]
pub(crate) struct ConstantRecord {
    pub(crate) index: u32,
    pub(crate) size: u32,
    pub(crate) value: *mut u8,
    pub(crate) defined: *mut bool,
}

#[repr(C)]
pub(crate) struct ThreadgroupRecord {
    pub(crate) key: *const c_void,
    pub(crate) site: u32,
    pub(crate) bytes: u32,
    pub(crate) align: u32,
    pub(crate) offset: u32,
    pub(crate) next: *mut ThreadgroupRecord,
}

#[repr(C)]
pub(crate) struct Table {
    pub(crate) abi: u32,
    pub(crate) checked: u32,
    pub(crate) kernels: *const KernelRecord,
    pub(crate) n_kernels: u64,
    pub(crate) constants: *const ConstantRecord,
    pub(crate) n_constants: u64,
    pub(crate) derived: *const ConstantRecord,
    pub(crate) n_derived: u64,
    pub(crate) threadgroup: *const *mut ThreadgroupRecord,
    pub(crate) derive: unsafe extern "C" fn(*mut c_void),
    pub(crate) run: unsafe extern "C" fn(*mut c_void, *const Launch, u64) -> u32,
    pub(crate) fault: unsafe extern "C" fn(*mut c_void) -> *mut RawFault,
    pub(crate) counts: unsafe extern "C" fn(*mut c_void) -> *mut Counts,
}
