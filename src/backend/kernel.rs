//! Kernels of devices that run texts, and dispatches of them.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use super::access::Accesses;
use super::memory::Memory;
use crate::attention::Problem;

/// Values of function constants, sorted by index; what is left out counts as false or 0.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Constants {
    bools: Vec<(usize, bool)>,
    ints: Vec<(usize, i32)>,
}

impl Constants {
    /// Constants in any order; a later value of one index replaces an earlier one. A bool that is
    /// false is the same as one that is left out.
    pub fn new(bools: &[(usize, bool)], ints: &[(usize, i32)]) -> Self {
        fn sorted<T: Copy>(values: &[(usize, T)]) -> Vec<(usize, T)> {
            let mut sorted = values.to_vec();
            // Stable, so that the last value of an index comes last; that one is kept.
            sorted.sort_by_key(|(index, _)| *index);
            sorted.reverse();
            sorted.dedup_by_key(|(index, _)| *index);
            sorted.reverse();
            sorted
        }
        let mut bools = sorted(bools);
        bools.retain(|(_, value)| *value);
        Self {
            bools,
            ints: sorted(ints),
        }
    }

    /// Value of a bool constant; false when left out.
    pub fn bool(&self, index: usize) -> bool {
        self.bools.iter().any(|(i, value)| *i == index && *value)
    }

    /// Value of an int constant, if given.
    pub fn int(&self, index: usize) -> Option<i32> {
        self.ints
            .iter()
            .find(|(i, _)| *i == index)
            .map(|(_, value)| *value)
    }

    /// The bool constants that are true, by index.
    pub fn bools(&self) -> &[(usize, bool)] {
        &self.bools
    }

    /// The int constants, by index.
    pub fn ints(&self) -> &[(usize, i32)] {
        &self.ints
    }
}

/// What a built kernel allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) thread_execution_width: u64,
    pub(crate) max_threads: u64,
    pub(crate) static_threadgroup_bytes: u64,
}

/// A kernel with its constants, built for one device.
// Devices that run texts read it.
#[cfg_attr(
    not(any(feature = "emulator", all(feature = "metal", target_vendor = "apple"))),
    allow(dead_code)
)]
pub(crate) struct Kernel {
    pub(crate) name: String,
    pub(crate) constants: Constants,
    pub(crate) limits: Limits,
    pub(crate) accesses: Accesses,
    /// Whether the text is not this crate's: nothing is known of what it does with what is bound.
    pub(crate) foreign: bool,
    /// The backend's own.
    pub(crate) state: Box<dyn Any + Send + Sync>,
}

impl Kernel {
    #[allow(dead_code)] // Devices that run texts build kernels.
    pub(crate) fn new(
        name: &str,
        constants: &Constants,
        limits: Limits,
        accesses: Accesses,
        state: impl Any + Send + Sync,
    ) -> Self {
        Self::with_state(name, constants, limits, accesses, Box::new(state))
    }

    pub(crate) fn with_state(
        name: &str,
        constants: &Constants,
        limits: Limits,
        accesses: Accesses,
        state: Box<dyn Any + Send + Sync>,
    ) -> Self {
        Self {
            name: name.into(),
            constants: constants.clone(),
            limits,
            accesses,
            foreign: false,
            state,
        }
    }

    /// A kernel of a text that is not this crate's.
    #[allow(dead_code)] // Not every device runs texts.
    pub(crate) fn into_foreign(mut self) -> Self {
        self.foreign = true;
        self.accesses = Accesses::UNKNOWN;
        self
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel")
            .field("name", &self.name)
            .field("constants", &self.constants)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// What is bound at an index.
#[derive(Debug, Clone)]
// Devices that run texts read it.
#[cfg_attr(
    not(any(feature = "emulator", all(feature = "metal", target_vendor = "apple"))),
    allow(dead_code)
)]
pub(crate) enum Arg {
    /// Part of a device's memory, inside its bounds.
    Memory {
        memory: Arc<dyn Memory>,
        offset: usize,
        len: usize,
    },
    /// Bytes copied into the command.
    Bytes(Arc<[u8]>),
}

/// One kernel over one grid: a caller's own text, or what the Metal family makes of a task.
#[derive(Debug, Clone)]
// Devices that run texts read it.
#[cfg_attr(
    not(any(feature = "emulator", all(feature = "metal", target_vendor = "apple"))),
    allow(dead_code)
)]
pub(crate) struct Dispatch {
    pub(crate) kernel: Arc<Kernel>,
    pub(crate) args: Vec<(usize, Arg)>,
    pub(crate) grid: [u64; 3],
    pub(crate) threadgroup: [u64; 3],
    /// The attention that it computes, if that is what it does.
    pub(crate) problem: Option<Arc<Problem>>,
}

#[cfg(test)]
mod tests {
    use super::Constants;

    #[test]
    fn false_is_the_same_as_left_out() {
        let c = Constants::new(&[(300, false), (200, true), (301, true), (301, false)], &[]);
        assert_eq!(c, Constants::new(&[(200, true)], &[]));
        assert_eq!(c.bools(), [(200, true)]);
        assert!(c.bool(200) && !c.bool(301) && !c.bool(7));
    }

    #[test]
    fn order_does_not_count_and_the_last_value_does() {
        let c = Constants::new(&[], &[(401, 16), (400, 32), (401, 64)]);
        assert_eq!(c, Constants::new(&[], &[(400, 32), (401, 64)]));
        assert_eq!((c.int(401), c.int(322)), (Some(64), None));
    }
}
