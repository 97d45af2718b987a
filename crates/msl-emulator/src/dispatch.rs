//! A dispatch: kernel, constants, bindings and grid; and what it counts.

use std::collections::BTreeMap;
use std::marker::PhantomData;

/// The value of a function constant.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Constant {
    /// For `bool`.
    Bool(bool),
    /// For signed integers.
    Int(i32),
    /// For unsigned integers.
    Uint(u32),
    /// For `float` and `half`.
    Float(f32),
}

macro_rules! constant_from {
    ($($ty:ty => $variant:ident),*) => {$(
        impl From<$ty> for Constant {
            fn from(value: $ty) -> Self {
                Self::$variant(value)
            }
        }
    )*};
}
constant_from!(bool => Bool, i32 => Int, u32 => Uint, f32 => Float);

/// Memory bound to a buffer index.
#[derive(Debug)]
pub struct Binding<'a> {
    pub(crate) ptr: *mut u8,
    pub(crate) len: usize,
    pub(crate) writable: bool,
    pub(crate) inline: Option<Vec<u8>>,
    memory: PhantomData<&'a mut [u8]>,
}

impl<'a> Binding<'a> {
    /// Memory that the kernel may only read.
    #[must_use]
    pub fn read_only(bytes: &'a [u8]) -> Self {
        Self {
            writable: false,
            ..Self::raw(bytes.as_ptr().cast_mut(), bytes.len(), false)
        }
    }

    /// Memory that the kernel may read and write.
    #[must_use]
    pub fn read_write(bytes: &'a mut [u8]) -> Self {
        Self::raw(bytes.as_mut_ptr(), bytes.len(), true)
    }

    /// Memory given by address. [`Library::dispatch`](crate::Library::dispatch) says what it must be.
    #[must_use]
    pub fn raw(ptr: *mut u8, len: usize, writable: bool) -> Self {
        Self {
            ptr,
            len,
            writable,
            inline: None,
            memory: PhantomData,
        }
    }

    /// A copy of a few bytes, as `setBytes`: at most 4096.
    #[must_use]
    pub fn bytes(bytes: impl Into<Vec<u8>>) -> Self {
        let inline = bytes.into();
        Self {
            ptr: std::ptr::null_mut(),
            len: inline.len(),
            writable: false,
            inline: Some(inline),
            memory: PhantomData,
        }
    }
}

/// One dispatch of a kernel.
#[derive(Debug)]
pub struct Dispatch<'a> {
    pub(crate) kernel: String,
    pub(crate) constants: BTreeMap<u32, Constant>,
    pub(crate) bindings: BTreeMap<u32, Binding<'a>>,
    pub(crate) threadgroup_memory: BTreeMap<u32, usize>,
    pub(crate) threadgroups: [u32; 3],
    pub(crate) threads: [u32; 3],
}

impl<'a> Dispatch<'a> {
    /// A dispatch of `kernel` with one threadgroup of one thread and nothing bound.
    #[must_use]
    pub fn new(kernel: impl Into<String>) -> Self {
        Self {
            kernel: kernel.into(),
            constants: BTreeMap::new(),
            bindings: BTreeMap::new(),
            threadgroup_memory: BTreeMap::new(),
            threadgroups: [1; 3],
            threads: [1; 3],
        }
    }

    /// Sets function constant `index`.
    #[must_use]
    pub fn constant(mut self, index: u32, value: impl Into<Constant>) -> Self {
        self.constants.insert(index, value.into());
        self
    }

    /// Binds memory to `[[buffer(index)]]`.
    #[must_use]
    pub fn bind(mut self, index: u32, binding: Binding<'a>) -> Self {
        self.bindings.insert(index, binding);
        self
    }

    /// Copies bytes for `[[buffer(index)]]`, as `setBytes`.
    #[must_use]
    pub fn bytes(self, index: u32, bytes: impl Into<Vec<u8>>) -> Self {
        self.bind(index, Binding::bytes(bytes))
    }

    /// Gives `[[threadgroup(index)]]` its length in bytes.
    #[must_use]
    pub fn threadgroup_memory(mut self, index: u32, bytes: usize) -> Self {
        self.threadgroup_memory.insert(index, bytes);
        self
    }

    /// Sets the grid, in threadgroups.
    #[must_use]
    pub fn threadgroups(mut self, count: [u32; 3]) -> Self {
        self.threadgroups = count;
        self
    }

    /// Sets the size of a threadgroup, in threads.
    #[must_use]
    pub fn threads(mut self, count: [u32; 3]) -> Self {
        self.threads = count;
        self
    }
}

/// What a dispatch did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// 8x8x8 matrix multiplies, one for each simdgroup operation.
    pub matrix_multiplies: u64,
    /// Threadgroup barriers, one for each that a threadgroup passed.
    pub threadgroup_barriers: u64,
    /// Simdgroup barriers, one for each that a simdgroup passed.
    pub simdgroup_barriers: u64,
    /// Bytes read from device and constant memory (checked runs only).
    pub device_bytes_read: u64,
    /// Bytes written to device memory (checked runs only).
    pub device_bytes_written: u64,
    /// Bytes read from threadgroup memory (checked runs only).
    pub threadgroup_bytes_read: u64,
    /// Bytes written to threadgroup memory (checked runs only).
    pub threadgroup_bytes_written: u64,
    /// Values of `exp2` computed.
    pub exp2_calls: u64,
}
