//! The threads of a call: the one that asks, and some of a pool.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::flush::flushed;

/// How often the asking thread looks whether the others are done before it sleeps: some tens of
/// microseconds.
const SPINS: usize = 1000;

/// An address that threads share.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shared<T>(pub(super) *mut T);
// SAFETY: an address; whoever uses it keeps to parts of its own, or only reads.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(super) fn get(self) -> *mut T {
        self.0
    }
}

/// Threads that work on a call together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Team<'p> {
    /// Where the others come from: rayon's current pool when not given.
    pub(crate) pool: Option<&'p rayon::ThreadPool>,
    /// How many there are, the asking one included; at least 1.
    pub(crate) threads: usize,
}

impl Team<'_> {
    /// Runs `body` for `0..count`, in this order as threads come free. The asking thread works too:
    /// a small call is over before a sleeping thread has woken. Subnormal results are flushed in `body`
    /// and nowhere else: what a thread does while it waits is not of this call.
    pub(super) fn for_each(self, count: usize, body: impl Fn(usize) + Sync) {
        let workers = self.threads.min(count);
        if workers <= 1 {
            flushed(|| (0..count).for_each(body));
            return;
        }
        let next = AtomicUsize::new(0);
        let work = || {
            flushed(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= count {
                        return;
                    }
                    body(i);
                }
            })
        };
        let running = AtomicUsize::new(workers - 1);
        match self.pool {
            Some(pool) => pool.in_place_scope(|scope| share(scope, &running, &work)),
            None => rayon::in_place_scope(|scope| share(scope, &running, &work)),
        }
    }
}

/// Runs `work` here and on as many other threads as `running` tells.
fn share<'s>(scope: &rayon::Scope<'s>, running: &'s AtomicUsize, work: &'s (impl Fn() + Sync)) {
    for _ in 0..running.load(Ordering::Relaxed) {
        scope.spawn(|_| {
            work();
            running.fetch_sub(1, Ordering::Release);
        });
    }
    work();
    // The others are at their last piece: waking from sleep would take longer.
    for _ in 0..SPINS {
        if running.load(Ordering::Acquire) == 0 {
            return;
        }
        std::hint::spin_loop();
    }
}
