//! The threads of a call: the one that asks, and some of a pool.

use std::sync::atomic::{AtomicUsize, Ordering};

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
    /// a small call is over before a sleeping thread has woken.
    pub(super) fn for_each(self, count: usize, body: impl Fn(usize) + Sync) {
        let workers = self.threads.min(count);
        if workers <= 1 {
            (0..count).for_each(body);
            return;
        }
        let next = AtomicUsize::new(0);
        let work = || {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= count {
                    return;
                }
                body(i);
            }
        };
        match self.pool {
            Some(pool) => pool.in_place_scope(|scope| share(scope, workers, &work)),
            None => rayon::in_place_scope(|scope| share(scope, workers, &work)),
        }
    }
}

fn share<'s>(scope: &rayon::Scope<'s>, workers: usize, work: &'s (impl Fn() + Sync)) {
    for _ in 1..workers {
        scope.spawn(|_| work());
    }
    work();
}
