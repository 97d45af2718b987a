//! Memory of a worker: its state, then the stacks of its fibers. Aligned to its size, so that a
//! stack pointer finds its worker; kept for the next dispatch.

use std::ffi::c_void;
use std::ptr::{self, NonNull};
use std::sync::{Mutex, PoisonError};

use super::abi::{GUARD, REGION, STACK, STACKS};
use crate::error::{Error, Result};

pub(crate) struct Region {
    base: NonNull<c_void>,
    /// Stacks that can be used so far.
    stacks: usize,
}

// SAFETY: a region is plain memory of its own; whoever holds it is its only user.
unsafe impl Send for Region {}

static IDLE: Mutex<Vec<Region>> = Mutex::new(Vec::new());

fn system() -> Error {
    Error::io("worker memory", std::io::Error::last_os_error())
}

impl Region {
    /// Takes an idle region, or reserves one, with `stacks` stacks ready.
    pub(crate) fn take(stacks: usize) -> Result<Self> {
        let idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut region = match idle {
            Some(region) => region,
            None => Self::reserve()?,
        };
        region.prepare(stacks)?;
        Ok(region)
    }

    /// Gives it back for others.
    pub(crate) fn put_back(self) {
        IDLE.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(self);
    }

    fn reserve() -> Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_NORESERVE;
        // SAFETY: a fresh anonymous mapping, at an address that the system chooses.
        let wide =
            unsafe { libc::mmap(ptr::null_mut(), 2 * REGION, libc::PROT_NONE, flags, -1, 0) };
        if wide == libc::MAP_FAILED {
            return Err(system());
        }
        let start = wide.addr();
        let base = start.next_multiple_of(REGION);
        let before = base - start;
        // SAFETY: both ends lie in the mapping above, outside of the part that is kept; the state at
        // the start of that part is made usable.
        let ok = unsafe {
            if before > 0 {
                libc::munmap(wide, before);
            }
            libc::munmap(wide.byte_add(before + REGION), REGION - before);
            libc::mprotect(
                wide.byte_add(before),
                STACKS,
                libc::PROT_READ | libc::PROT_WRITE,
            ) == 0
        };
        let kept = wide.wrapping_byte_add(before);
        match NonNull::new(kept) {
            Some(base) if ok => Ok(Self { base, stacks: 0 }),
            _ => Err(system()),
        }
    }

    fn prepare(&mut self, stacks: usize) -> Result<()> {
        while self.stacks < stacks {
            let low = STACKS + self.stacks * STACK + GUARD;
            // SAFETY: this stack lies in the region, past its guard.
            let rc = unsafe {
                libc::mprotect(
                    self.base.as_ptr().byte_add(low),
                    STACK - GUARD,
                    libc::PROT_READ | libc::PROT_WRITE,
                )
            };
            if rc != 0 {
                return Err(system());
            }
            self.stacks += 1;
        }
        Ok(())
    }

    pub(crate) fn worker(&self) -> *mut c_void {
        self.base.as_ptr()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the region was mapped by `reserve`, and nothing points into it any more.
        unsafe { libc::munmap(self.base.as_ptr(), REGION) };
    }
}
