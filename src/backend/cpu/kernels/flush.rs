//! Results too small for a normal number become zero while a kernel runs: a processor takes tens of
//! cycles for each subnormal, and probabilities far below the largest are subnormal by the thousand.
//! Operands keep their values where the processor tells the two apart (x86-64); on aarch64 subnormal
//! operands count as zero too.

/// Runs `body` with subnormal results flushed to zero, rounding to nearest and no trap, whatever the
/// caller's own state is, which is back afterwards, also after a panic.
pub(super) fn flushed<R>(body: impl FnOnce() -> R) -> R {
    let _state = State::set();
    apart(body)
}

/// The compiler takes the state for the usual one, and may move arithmetic over a change to it: not
/// over a call.
#[inline(never)]
fn apart<R>(body: impl FnOnce() -> R) -> R {
    body()
}

/// This thread's control register as the caller had it.
struct State(control::Register);

impl State {
    fn set() -> Self {
        let before = control::read();
        control::write(control::FLUSHING);
        Self(before)
    }
}

impl Drop for State {
    fn drop(&mut self) {
        control::write(self.0);
    }
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
pub(super) mod control {
    use std::arch::asm;

    pub(in super::super) type Register = u32;

    /// MXCSR with flush-to-zero (bit 15) and every exception masked (bits 7 to 12).
    pub(super) const FLUSHING: Register = 0x9f80;

    /// MXCSR.
    pub(in super::super) fn read() -> Register {
        let mut mxcsr: Register = 0;
        // SAFETY: writes four bytes to a local.
        unsafe {
            asm!("stmxcsr [{}]", in(reg) &raw mut mxcsr, options(nostack, preserves_flags));
        }
        mxcsr
    }

    pub(in super::super) fn write(mxcsr: Register) {
        // SAFETY: both values that come here are ones that the register takes: `FLUSHING`, and what
        // it held. It stays changed for calls that the compiler cannot see into alone.
        unsafe {
            asm!("ldmxcsr [{}]", in(reg) &raw const mxcsr, options(nostack));
        }
    }
}

#[cfg(all(target_arch = "aarch64", not(miri)))]
pub(super) mod control {
    use std::arch::asm;

    pub(in super::super) type Register = u64;

    /// FPCR with flush-to-zero (bit 24).
    pub(super) const FLUSHING: Register = 1 << 24;

    /// FPCR.
    pub(in super::super) fn read() -> Register {
        let fpcr: Register;
        // SAFETY: reads a register.
        unsafe { asm!("mrs {}, fpcr", out(reg) fpcr, options(nomem, nostack, preserves_flags)) };
        fpcr
    }

    pub(in super::super) fn write(fpcr: Register) {
        // SAFETY: both values that come here are ones that the register takes: `FLUSHING`, and what
        // it held. It stays changed for calls that the compiler cannot see into alone.
        unsafe { asm!("msr fpcr, {}", in(reg) fpcr, options(nostack)) };
    }
}

/// Nothing to set.
#[cfg(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), not(miri))))]
pub(super) mod control {
    pub(in super::super) type Register = ();
    pub(super) const FLUSHING: Register = ();
    pub(in super::super) fn read() -> Register {}
    pub(in super::super) fn write(_: Register) {}
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::super::Team;
    use super::control::{FLUSHING, Register, read, write};
    use super::flushed;

    #[test]
    fn the_callers_state_is_back_after_it_also_after_a_panic() {
        let before = read();
        flushed(|| assert_eq!(read(), FLUSHING));
        assert_eq!(read(), before);
        let result = catch_unwind(|| flushed(|| panic!("in a kernel")));
        assert!(result.is_err());
        assert_eq!(read(), before);
    }

    /// Not only the usual state: a caller may flush by itself, or look at the flags of exceptions.
    #[test]
    fn a_state_of_the_callers_own_is_back_after_it() {
        let usual = read();
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        let own: Register = (usual | 0x8040) & !0x3f | 0x4;
        #[cfg(all(target_arch = "aarch64", not(miri)))]
        let own: Register = usual | 1 << 24;
        #[cfg(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), not(miri))))]
        let own: Register = usual;
        write(own);
        flushed(|| {
            std::hint::black_box(std::hint::black_box(1.0f32) / std::hint::black_box(3.0));
        });
        let after = read();
        write(usual);
        assert_eq!(after, own);
    }

    #[test]
    fn a_teams_threads_flush_in_the_body_and_nowhere_else() {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(3)
            .build()
            .unwrap();
        let states = || {
            let mut states = pool.broadcast(|_| read());
            states.push(read());
            states
        };
        let before = states();
        let team = Team {
            pool: Some(&pool),
            threads: 4,
        };
        for _ in 0..if cfg!(miri) { 2 } else { 20 } {
            team.for_each(64, |_| assert_eq!(read(), FLUSHING));
            assert_eq!(states(), before);
            let panics = catch_unwind(AssertUnwindSafe(|| {
                team.for_each(64, |i| assert!(i % 7 != 3, "in a kernel"));
            }));
            assert!(panics.is_err());
            assert_eq!(states(), before);
        }
    }
}
