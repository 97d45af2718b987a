//! Copies of bound memory for checked runs, each far from everything else, with shadow memory.

use std::collections::BTreeMap;
use std::ptr;

use super::abi::Range;
use crate::dispatch::{Binding, Dispatch};
use crate::error::{Error, Result};

/// Untouchable bytes on either side of a copy, at least.
const GUARD: usize = 1 << 20;
const PAGE: usize = 64 << 10;

struct Mapping {
    base: *mut u8,
    len: usize,
}

impl Mapping {
    fn new(len: usize, protection: i32) -> Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_NORESERVE;
        let len = len.max(1).next_multiple_of(PAGE);
        // SAFETY: a fresh anonymous mapping, at an address that the system chooses.
        let base = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(Error::io("checked memory", std::io::Error::last_os_error()));
        }
        Ok(Self {
            base: base.cast(),
            len,
        })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nothing points into it after the run.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

/// A copy: where it came from, where it is.
struct Copy {
    from: usize,
    len: usize,
    at: *mut u8,
    shadow: *mut u64,
    _mappings: Vec<Mapping>,
}

/// The copies of a dispatch.
pub(crate) struct Stage {
    copies: Vec<Copy>,
    /// Where each buffer index points.
    pub(crate) pointers: BTreeMap<u32, *mut u8>,
    pub(crate) ranges: Vec<Range>,
}

/// Start and end of what is bound, as addresses.
fn span(b: &Binding<'_>) -> (usize, usize) {
    let start = b
        .inline
        .as_ref()
        .map_or(b.ptr.addr(), |v| v.as_ptr().addr());
    (start, start + b.len)
}

fn source(b: &Binding<'_>) -> *const u8 {
    b.inline.as_ref().map_or(b.ptr.cast_const(), |v| v.as_ptr())
}

impl Stage {
    /// Copies what is bound; bindings that overlap share one copy.
    ///
    /// # Safety
    /// Bound memory is valid, as `Library::dispatch` demands.
    pub(crate) unsafe fn new(dispatch: &Dispatch<'_>) -> Result<Self> {
        let mut spans: Vec<(usize, usize, bool)> = dispatch
            .bindings
            .values()
            .map(|b| {
                let (lo, hi) = span(b);
                (lo, hi, b.writable)
            })
            .collect();
        spans.sort_unstable();
        let mut joined: Vec<(usize, usize, bool)> = Vec::new();
        for (lo, hi, writable) in spans {
            match joined.last_mut() {
                Some(last) if lo < last.1 => *last = (last.0, last.1.max(hi), last.2 | writable),
                _ => joined.push((lo, hi, writable)),
            }
        }
        let mut stage = Self {
            copies: Vec::new(),
            pointers: BTreeMap::new(),
            ranges: Vec::new(),
        };
        for (lo, hi, writable) in joined {
            stage.copies.push(reserve(lo, hi - lo, writable)?);
        }
        for (&index, binding) in &dispatch.bindings {
            let (lo, hi) = span(binding);
            let Some(copy) = stage
                .copies
                .iter()
                .find(|c| lo >= c.from && hi <= c.from + c.len)
            else {
                continue;
            };
            let at = copy.at.wrapping_add(lo - copy.from);
            // SAFETY: the binding is valid for reads; its place in the copy has room for it.
            unsafe { ptr::copy_nonoverlapping(source(binding), at, binding.len) };
            let shadow = if copy.shadow.is_null() {
                copy.shadow
            } else {
                copy.shadow.wrapping_add(2 * (lo - copy.from))
            };
            stage.pointers.insert(index, at);
            stage.ranges.push(Range {
                lo: at,
                hi: at.wrapping_add(binding.len),
                shadow,
                index,
                writable: u32::from(binding.writable),
            });
        }
        Ok(stage)
    }

    /// Brings what may have been written back.
    ///
    /// # Safety
    /// As for `new`, and the run has ended.
    pub(crate) unsafe fn copy_back(&self, dispatch: &Dispatch<'_>) {
        for (index, binding) in dispatch.bindings.iter().filter(|(_, b)| b.writable) {
            if let Some(&at) = self.pointers.get(index) {
                // SAFETY: the binding is valid for writes, its copy for reads of as many bytes.
                unsafe { ptr::copy_nonoverlapping(at.cast_const(), binding.ptr, binding.len) };
            }
        }
    }
}

fn reserve(from: usize, len: usize, writable: bool) -> Result<Copy> {
    // The address keeps its place in a page, so that what was aligned stays so.
    let skew = from % 4096;
    let guard = (GUARD + len).next_multiple_of(PAGE);
    let room = (skew + len).max(1).next_multiple_of(PAGE);
    let mapping = Mapping::new(2 * guard + room, libc::PROT_NONE)?;
    let usable = mapping.base.wrapping_add(guard);
    // SAFETY: these pages lie inside the mapping above.
    let rc = unsafe { libc::mprotect(usable.cast(), room, libc::PROT_READ | libc::PROT_WRITE) };
    if rc != 0 {
        return Err(Error::io("checked memory", std::io::Error::last_os_error()));
    }
    let at = usable.wrapping_add(skew);
    let mut mappings = vec![mapping];
    let mut shadow = ptr::null_mut();
    if writable {
        let bytes = len
            .checked_mul(16)
            .ok_or_else(|| Error::Unsupported("a binding too large to check".into()))?;
        let stamps = Mapping::new(bytes, libc::PROT_READ | libc::PROT_WRITE)?;
        shadow = stamps.base.cast();
        mappings.push(stamps);
    }
    Ok(Copy {
        from,
        len,
        at,
        shadow,
        _mappings: mappings,
    })
}
