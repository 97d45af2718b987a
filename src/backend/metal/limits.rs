//! What a GPU must offer, and what a built kernel must allow.

use super::bindings::{Constants, constant};
use super::table::{self, APPLE_THREADGROUP_BYTES};
use crate::backend::Limits;

/// Lanes of a simdgroup, which the kernels count on.
const WIDTH: u64 = 32;

/// What decides whether a GPU can run the kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Caps {
    /// Apple silicon since M1 and A14: simdgroup matrices.
    pub(crate) apple7: bool,
    /// The system compiles version 3.1 of the Metal language, which has bfloat.
    pub(crate) language_3_1: bool,
    /// CPU and GPU share their memory.
    pub(crate) unified_memory: bool,
    /// Most threadgroup memory, in bytes.
    pub(crate) threadgroup_bytes: u64,
}

impl Caps {
    /// Why the kernels cannot run, if they cannot.
    pub(crate) fn missing(&self) -> Option<String> {
        let needed = APPLE_THREADGROUP_BYTES as u64;
        if !self.apple7 || !self.unified_memory {
            Some("needs an Apple GPU of family 7 or later (M1, A14): simdgroup matrices and unified memory".into())
        } else if !self.language_3_1 {
            Some("needs macOS 14, iOS 17 or later: version 3.1 of the Metal language".into())
        } else if self.threadgroup_bytes < needed {
            Some(format!(
                "needs {needed} bytes of threadgroup memory, the GPU has {}",
                self.threadgroup_bytes
            ))
        } else {
            None
        }
    }
}

/// Threads of a threadgroup that a kernel of the variant table is dispatched with.
fn threads(kernel: &str, constants: &Constants) -> Option<u64> {
    let row = table::by_name(kernel)?;
    let simdgroups = match constants.int(constant::NSG) {
        Some(n) if row.head_dim == 512 => u64::try_from(n).ok()?,
        _ => row.simdgroups as u64,
    };
    Some(WIDTH * simdgroups)
}

/// Why a built kernel cannot be dispatched as planned, if it cannot.
pub(crate) fn violation(kernel: &str, constants: &Constants, limits: &Limits) -> Option<String> {
    let ours = table::by_name(kernel).is_some();
    let bytes = limits.static_threadgroup_bytes;
    if bytes > APPLE_THREADGROUP_BYTES as u64 {
        return Some(format!(
            "uses {bytes} bytes of threadgroup memory, {APPLE_THREADGROUP_BYTES} are allowed"
        ));
    }
    if ours && limits.thread_execution_width != WIDTH {
        return Some(format!(
            "needs simdgroups of {WIDTH} threads, this GPU's have {}",
            limits.thread_execution_width
        ));
    }
    match threads(kernel, constants) {
        Some(needed) if limits.max_threads < needed => Some(format!(
            "needs {needed} threads in a threadgroup, its registers leave room for {} on this GPU",
            limits.max_threads
        )),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const M1: Caps = Caps {
        apple7: true,
        language_3_1: true,
        unified_memory: true,
        threadgroup_bytes: 32_768,
    };

    #[test]
    fn each_lack_is_named() {
        assert_eq!(M1.missing(), None);
        let lacks = |caps: Caps, what: &str| {
            let reason = caps.missing().unwrap();
            assert!(reason.contains(what), "{reason}");
        };
        lacks(
            Caps {
                apple7: false,
                ..M1
            },
            "family 7",
        );
        lacks(
            Caps {
                unified_memory: false,
                ..M1
            },
            "unified memory",
        );
        lacks(
            Caps {
                language_3_1: false,
                ..M1
            },
            "macOS 14",
        );
        lacks(
            Caps {
                threadgroup_bytes: 16_384,
                ..M1
            },
            "the GPU has 16384",
        );
    }

    const FINE: Limits = Limits {
        thread_execution_width: 32,
        max_threads: 1024,
        static_threadgroup_bytes: 28_672,
    };

    #[test]
    fn a_pipeline_with_too_few_threads_is_refused_for_the_simdgroups_asked() {
        let kernel = "flash_attn_prefill_bf16_d512";
        let nsg = |n| Constants::new(&[], &[(constant::NSG, n)]);
        let tight = Limits {
            max_threads: 224,
            ..FINE
        };
        assert_eq!(violation(kernel, &nsg(8), &FINE), None);
        let reason = violation(kernel, &nsg(8), &tight).unwrap();
        assert!(reason.contains("256") && reason.contains("224"), "{reason}");
        assert!(violation(kernel, &Constants::default(), &tight).is_some());
        assert_eq!(violation(kernel, &nsg(4), &tight), None);
    }

    #[test]
    fn width_and_threadgroup_memory_are_checked() {
        let kernel = "flash_attn_prefill_f16_d64";
        let wide = Limits {
            thread_execution_width: 64,
            ..FINE
        };
        let large = Limits {
            static_threadgroup_bytes: 32_784,
            ..FINE
        };
        let none = Constants::default();
        assert!(violation(kernel, &none, &wide).unwrap().contains("64"));
        assert_eq!(violation("theirs", &none, &wide), None);
        for kernel in [kernel, "theirs"] {
            let reason = violation(kernel, &none, &large).unwrap();
            assert!(reason.contains("32784"), "{reason}");
        }
    }
}
