//! The contract as a matrix of cases that any device can run: every head dim, dtype, mask kind and
//! layout, with every feature spread over them. Operands are surrounded by poison (NaN, infinities)
//! wherever a kernel must not read, outputs are poisoned before and watched around, and results are
//! held against the f64 oracle.
//!
//! Each case has a poison form, too ([`run_poisoned`]): K and V hold NaN, infinities and the largest
//! finite numbers in cells that no row sees, rows past a sequence's keys and free slots of pages among them, and in
//! some that only some rows see. A row that sees no such cell must have the bits that it has without them; one that
//! does must not be finite.
//!
//! ```no_run
//! use mlx_flash_attn::verify::{self, Scope};
//! use mlx_flash_attn::{KernelRegistry, MlxDevice};
//!
//! # fn main() -> mlx_flash_attn::Result<()> {
//! let (device, mut registry) = (MlxDevice::new()?, KernelRegistry::new());
//! for case in verify::cases(Scope::Quick, &device) {
//!     let outcome = verify::run(&case, &device, &mut registry)?;
//!     assert!(outcome.ok(), "{}: {:?}", case.name(), outcome.failures);
//! }
//! # Ok(())
//! # }
//! ```

mod blocks;
mod case;
mod cases;
mod data;
mod poison;
mod quantised;
mod random;
mod run;
mod sequences;
mod serving;

pub use case::Case;
pub use cases::{Scope, cases};
pub use data::Data;
pub use poison::Poisoned;
pub use random::Random;
pub use run::{Outcome, run, run_poisoned};

#[cfg(test)]
mod tests {
    use super::case::{MaskKind, Placement};
    use super::sequences::{KeyCounts, PageForm, Sequences};
    use super::*;
    use crate::backend::cpu::CpuOptions;
    use crate::{DType, KernelRegistry, MlxDevice};

    #[test]
    fn random_numbers_are_what_they_are_called() {
        let mut random = Random::new(7);
        let numbers: Vec<f64> = (0..2_000).map(|_| random.normal()).collect();
        let mean = numbers.iter().sum::<f64>() / 2_000.0;
        let variance = numbers.iter().map(|x| x * x).sum::<f64>() / 2_000.0;
        assert!(
            mean.abs() < 0.1 && (0.9..1.1).contains(&variance),
            "{mean} {variance}"
        );
        assert!((0..500).all(|_| random.below(3) < 3 && (0.0..1.0).contains(&random.unit())));
        assert_eq!(random.below(0), 0);
        // The published first outputs of SplitMix64 from seed 1234567.
        let mut known = Random::new(1_234_567);
        assert_eq!(known.bits(), 6_457_827_717_110_365_317);
        assert_eq!(known.bits(), 3_203_168_211_198_807_973);
    }

    /// Tiny cases, small enough for miri: kernels, packing and guard zones as they are.
    #[test]
    fn tiny_cases_pass() {
        let device = MlxDevice::cpu(CpuOptions::default()).unwrap();
        let mut registry = KernelRegistry::new();
        let plain = |dtype| Case::new(32, dtype, (2, 3));
        let cases = [
            plain(DType::BF16),
            Case {
                placement: Placement::Strided,
                mask: MaskKind::PerHead,
                lse: true,
                sinks: true,
                ..plain(DType::F16)
            },
            Case {
                packed: Some((vec![1, 0, 2], vec![2, 1, 0])),
                mask: MaskKind::PlaneBool,
                mask_dtype: DType::U8,
                softcap: Some(2.0),
                alibi: true,
                ..plain(DType::F32)
            },
            Case {
                batch: 2,
                sequences: Sequences {
                    queries: Some(vec![2, 1]),
                    keys: Some(KeyCounts {
                        of_each: vec![3, 1],
                        on_device: true,
                    }),
                    pages: Some(PageForm {
                        size: 2,
                        spare_entries: 1,
                    }),
                },
                ..plain(DType::F16)
            },
        ];
        for case in cases {
            let outcome = run(&case, &device, &mut registry).unwrap();
            assert!(outcome.ok(), "{}: {:?}", case.name(), outcome.failures);
        }
    }
}
