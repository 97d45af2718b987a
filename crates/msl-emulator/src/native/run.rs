//! Running a dispatch: threadgroups spread over worker threads.

use std::ptr;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::abi::{self, BUFFERS, Buffer, Counts, Launch, RawFault};
use super::module::Module;
use super::region::Region;
use super::stage::Stage;
use super::{constants, report, validate};
use crate::dispatch::{Counters, Dispatch};
use crate::error::{Error, Result};
use crate::options::DispatchOptions;
use crate::translate::Program;

/// A launch that workers share.
struct Shared<'a>(&'a Launch);
// SAFETY: workers only read the launch; the memory that it points to is theirs for the run, and
// what they do to it is what the kernel does.
unsafe impl Sync for Shared<'_> {}
// SAFETY: as above.
unsafe impl Send for Shared<'_> {}

/// Inline bytes, aligned as device memory is.
struct Inline(Vec<u128>);

impl Inline {
    fn new(bytes: &[u8]) -> Self {
        let words = bytes.chunks(16).map(|chunk| {
            let mut word = [0u8; 16];
            word[..chunk.len()].copy_from_slice(chunk);
            u128::from_ne_bytes(word)
        });
        Self(words.collect())
    }
}

/// Runs it.
///
/// # Safety
/// As `Library::dispatch`.
pub(crate) unsafe fn run(
    program: &Program,
    module: &Module,
    index: usize,
    dispatch: &mut Dispatch<'_>,
    options: &DispatchOptions,
) -> Result<Counters> {
    let kernel = &program.kernels[index];
    let record = &module.kernels()[index];
    validate::grid(kernel, dispatch, &options.limits)?;
    constants::check(kernel, &program.constants, dispatch)?;
    let lock = module.lock.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: the lock is held.
    unsafe { constants::set(module, &program.constants, dispatch) };
    // SAFETY: the lock is held and the constants are set.
    let derived = unsafe { constants::derive(module, &program.derived) }?;
    let sizes = module.argument_sizes(record);
    validate::bindings(program, kernel, sizes, &derived, dispatch)?;
    let arena = validate::arena(
        program,
        module,
        index,
        dispatch,
        &options.limits,
        options.check,
    )?;

    let stage = if options.check {
        // SAFETY: passed on to the caller.
        Some(unsafe { Stage::new(dispatch) }?)
    } else {
        None
    };
    let mut inline = Vec::new();
    let mut buffers = [Buffer {
        ptr: ptr::null_mut(),
        len: 0,
    }; BUFFERS];
    for (&i, binding) in &dispatch.bindings {
        let ptr = match (&stage, &binding.inline) {
            (Some(stage), _) => stage.pointers.get(&i).copied().unwrap_or(ptr::null_mut()),
            (None, Some(bytes)) => {
                inline.push(Inline::new(bytes));
                inline
                    .last_mut()
                    .map_or(ptr::null_mut(), |v| v.0.as_mut_ptr().cast())
            }
            (None, None) => binding.ptr,
        };
        buffers[i as usize] = Buffer {
            ptr,
            len: binding.len as u64,
        };
    }
    let mut arena_offset = [0u32; BUFFERS];
    for &(i, offset) in &arena.arguments {
        arena_offset[i] = offset;
    }
    let launch = Launch {
        entry: record.entry,
        buffers,
        arena_offset,
        groups: dispatch.threadgroups,
        threads: dispatch.threads,
        arena_bytes: arena.bytes,
        checked: u32::from(options.check),
        n_ranges: stage.as_ref().map_or(0, |s| s.ranges.len() as u32),
        n_vars: arena.extents.len() as u32,
        ranges: stage.as_ref().map_or(ptr::null(), |s| s.ranges.as_ptr()),
        vars: arena.extents.as_ptr(),
        module_lo: module.lo,
        module_hi: module.hi,
        shuffle: options.shuffle_seed.map_or(0, |s| s | 1 << 63),
    };

    for (variable, offset) in &arena.variables {
        // SAFETY: the lock is held.
        unsafe { variable.place(*offset) };
    }
    let result = spread(module, &launch, options);
    drop(lock);
    match result? {
        Ok(counts) => {
            if let Some(stage) = &stage {
                // SAFETY: passed on to the caller; the run has ended.
                unsafe { stage.copy_back(dispatch) };
            }
            Ok(counters(&counts))
        }
        Err(fault) => Err(Error::Fault(Box::new(report::describe(
            program, module, kernel, dispatch, &arena, &fault,
        )))),
    }
}

/// Groups in the order of a seed: a step that shares no factor with their number visits each once.
#[derive(Clone, Copy)]
struct Order {
    n: u64,
    step: u64,
    first: u64,
}

impl Order {
    fn new(n: u64, seed: Option<u64>) -> Self {
        fn gcd(a: u64, b: u64) -> u64 {
            if b == 0 { a } else { gcd(b, a % b) }
        }
        let Some(seed) = seed.filter(|_| n > 1) else {
            return Self {
                n,
                step: 1,
                first: 0,
            };
        };
        let mut step = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) % n;
        while gcd(step.max(1), n) != 1 || step == 0 {
            step = (step + 1) % n;
        }
        Self {
            n,
            step,
            first: seed % n,
        }
    }

    fn group(self, i: u64) -> u64 {
        let wide = u128::from(i) * u128::from(self.step) + u128::from(self.first);
        (wide % u128::from(self.n)) as u64
    }
}

type Outcome = std::result::Result<Counts, RawFault>;

fn spread(module: &Module, launch: &Launch, options: &DispatchOptions) -> Result<Outcome> {
    let groups = launch.groups.iter().map(|&n| u64::from(n)).product::<u64>();
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let wanted = if options.threads == 0 {
        cores()
    } else {
        options.threads
    };
    let workers = wanted
        .min(usize::try_from(groups).unwrap_or(usize::MAX))
        .max(1);
    let fibers = launch
        .threads
        .iter()
        .map(|&n| n as usize)
        .product::<usize>();
    let mut regions = (0..workers)
        .map(|_| Region::take(fibers))
        .collect::<Result<Vec<_>>>()?;

    let order = Order::new(groups, options.shuffle_seed);
    let next = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let shared = Shared(launch);
    let work = |region: &mut Region| -> Outcome {
        let shared = &shared;
        let worker = region.worker();
        // SAFETY: the counts lie in the worker's memory, which this thread alone uses.
        let counts = unsafe { (module.table().counts)(worker) };
        // SAFETY: as above.
        unsafe { *counts = Counts::default() };
        while !stop.load(Ordering::Relaxed) {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= groups {
                break;
            }
            // SAFETY: the launch is complete and outlives the run, the worker has a stack for each
            // thread, and the caller vouches for the kernel and what is bound.
            if unsafe { (module.table().run)(worker, shared.0, order.group(i)) } != 0 {
                stop.store(true, Ordering::Relaxed);
                // SAFETY: the fault lies in the worker's memory.
                return Err(unsafe { *(module.table().fault)(worker) });
            }
        }
        // SAFETY: as above.
        Ok(unsafe { *counts })
    };
    let outcomes: Vec<Option<Outcome>> = if workers == 1 {
        vec![Some(work(&mut regions[0]))]
    } else {
        std::thread::scope(|s| {
            let work = &work;
            let handles: Vec<_> = regions
                .iter_mut()
                .map(|r| s.spawn(move || work(r)))
                .collect();
            handles.into_iter().map(|h| h.join().ok()).collect()
        })
    };
    for region in regions {
        region.put_back();
    }
    let mut total = Counts::default();
    let mut fault: Option<RawFault> = None;
    for outcome in outcomes {
        match outcome {
            Some(Ok(counts)) => add(&mut total, &counts),
            Some(Err(f)) => {
                let earlier = |a: &RawFault, b: &RawFault| {
                    let place = |g: [u32; 3]| [g[2], g[1], g[0]];
                    place(a.group) < place(b.group)
                };
                if fault.as_ref().is_none_or(|old| earlier(&f, old)) {
                    fault = Some(f);
                }
            }
            None => return Err(Error::Load("a worker thread panicked".into())),
        }
    }
    Ok(fault.map_or(Ok(total), Err))
}

fn add(total: &mut Counts, c: &Counts) {
    let abi::Counts {
        multiplies,
        threadgroup_barriers,
        simdgroup_barriers,
        device_read,
        device_written,
        threadgroup_read,
        threadgroup_written,
        exp2,
    } = c;
    total.multiplies += multiplies;
    total.threadgroup_barriers += threadgroup_barriers;
    total.simdgroup_barriers += simdgroup_barriers;
    total.device_read += device_read;
    total.device_written += device_written;
    total.threadgroup_read += threadgroup_read;
    total.threadgroup_written += threadgroup_written;
    total.exp2 += exp2;
}

fn counters(c: &Counts) -> Counters {
    Counters {
        matrix_multiplies: c.multiplies,
        threadgroup_barriers: c.threadgroup_barriers,
        simdgroup_barriers: c.simdgroup_barriers,
        device_bytes_read: c.device_read,
        device_bytes_written: c.device_written,
        threadgroup_bytes_read: c.threadgroup_read,
        threadgroup_bytes_written: c.threadgroup_written,
        exp2_calls: c.exp2,
    }
}

#[cfg(test)]
mod tests {
    use super::Order;

    #[test]
    fn every_group_is_visited_once() {
        for n in [1u64, 2, 7, 12, 100] {
            for seed in [None, Some(1), Some(77)] {
                let order = Order::new(n, seed);
                let mut seen: Vec<u64> = (0..n).map(|i| order.group(i)).collect();
                seen.sort_unstable();
                assert_eq!(seen, (0..n).collect::<Vec<_>>());
            }
        }
    }
}
