//! Guards that lend a buffer's bytes to the host.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use bytemuck::Pod;

use super::uses::Hold;

/// A buffer's elements, lent for reading by [`MlxBuffer::read`].
///
/// While it lives, a commit that writes the bytes is refused with an error. It keeps the memory alive
/// and can go to another thread.
///
/// [`MlxBuffer::read`]: super::buffer::MlxBuffer::read
#[derive(Debug)]
pub struct ReadGuard<T> {
    ptr: *const T,
    len: usize,
    elements: PhantomData<T>,
    _hold: Hold,
}

/// A buffer's elements, lent for writing by [`MlxBuffer::write`].
///
/// While it lives, a commit that touches the bytes is refused with an error, and so is every other
/// access of the host's. It keeps the memory alive and can go to another thread.
///
/// [`MlxBuffer::write`]: super::buffer::MlxBuffer::write
#[derive(Debug)]
pub struct WriteGuard<T> {
    ptr: *mut T,
    len: usize,
    elements: PhantomData<T>,
    _hold: Hold,
}

impl<T: Pod> ReadGuard<T> {
    /// # Safety
    /// `hold` lends `len` aligned elements at `ptr` for reading.
    pub(super) unsafe fn new(ptr: *const T, len: usize, hold: Hold) -> Self {
        Self {
            ptr,
            len,
            elements: PhantomData,
            _hold: hold,
        }
    }
}

impl<T: Pod> WriteGuard<T> {
    /// # Safety
    /// `hold` lends `len` aligned elements at `ptr` for writing.
    pub(super) unsafe fn new(ptr: *mut T, len: usize, hold: Hold) -> Self {
        Self {
            ptr,
            len,
            elements: PhantomData,
            _hold: hold,
        }
    }
}

// SAFETY: a guard gives what `&[T]` gives, and its hold may be released on any thread.
unsafe impl<T: Sync> Send for ReadGuard<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for ReadGuard<T> {}
// SAFETY: a guard gives what `&mut [T]` gives, and its hold may be released on any thread.
unsafe impl<T: Send> Send for WriteGuard<T> {}
// SAFETY: a shared guard gives what `&[T]` gives.
unsafe impl<T: Sync> Sync for WriteGuard<T> {}

impl<T: Pod> Deref for ReadGuard<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: promised to `new`; the hold lives as long as the guard.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }
}

impl<T: Pod> Deref for WriteGuard<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: promised to `new`; the hold lives as long as the guard.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }
}

impl<T: Pod> DerefMut for WriteGuard<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: promised to `new`; the hold lives as long as the guard, which is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}
