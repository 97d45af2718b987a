//! Problems small enough for miri, which takes the portable kernels and the plain tiles through
//! packing, strips in place, masks, packed sequences and two threads.

use super::harness::{Data, build, shape};
use crate::DType;
use crate::attention::{MaskSpec, Problem, QueryOffset};
use crate::backend::cpu::kernels::blocks::{BLOCK, Elements, Q4_0, Q8_0, Scaled};
use crate::backend::cpu::kernels::portable::Portable;
use crate::backend::cpu::kernels::simd::{Row, Simd};
use crate::backend::cpu::kernels::table;

const DIM: usize = 32;
/// miri takes the first one, whose kernels are the portable one and the plain tiles.
const FLOATS: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

fn floats() -> &'static [DType] {
    if cfg!(miri) { &FLOATS[..1] } else { &FLOATS }
}

#[test]
fn packed_keys_of_every_dtype() {
    for &dtype in floats() {
        let problem = build(
            Problem::builder(dtype, shape(1, (2, 1), (3, 17), DIM))
                .causal(true)
                .query_offset(QueryOffset::BottomRight)
                .lse(true),
        );
        Data::new(problem, 1).check(&format!("{dtype}"));
    }
}

#[test]
fn keys_in_place_for_few_rows() {
    for &dtype in floats() {
        let problem = build(Problem::builder(dtype, shape(1, (1, 1), (1, 17), DIM)).lse(true));
        Data::new(problem, 2).check(&format!("{dtype}"));
    }
}

/// A row of two blocks, at an odd address, ends with its memory.
fn check_blocks<E: Elements>() {
    let bytes: Vec<u8> = (0..=2 * size_of::<Scaled<E>>())
        .map(|i| (i * 37 % 127) as u8)
        .collect();
    let row = bytes[1..].as_ptr().cast::<Scaled<E>>();
    for column in (0..2 * BLOCK).step_by(Portable::LANES) {
        // SAFETY: both blocks are there.
        let (got, block) = unsafe {
            (
                Scaled::load_at(Portable, row, column),
                row.add(column / BLOCK).read_unaligned(),
            )
        };
        for (i, got) in got.into_iter().enumerate() {
            let element = f32::from(block.element(column % BLOCK + i));
            assert_eq!(got, block.scale().to_f32() * element, "{column} + {i}");
        }
    }
    assert_eq!(Scaled::<E>::bytes(33), 2 * size_of::<Scaled<E>>());
}

#[test]
fn keys_in_blocks() {
    check_blocks::<[i8; BLOCK]>();
    check_blocks::<[u8; BLOCK / 2]>();
    assert_eq!([size_of::<Q8_0>(), size_of::<Q4_0>()], [34, 18]);
}

#[test]
fn masks_of_every_dtype() {
    for mask in [DType::BF16, DType::F16, DType::F32, DType::U8] {
        let (rows, keys) = (2, 17);
        let problem = build(
            Problem::builder(DType::F32, shape(1, (1, 1), (rows, keys), DIM))
                .mask(MaskSpec::plane(mask, keys)),
        );
        let mut data = Data::new(problem, 3);
        data.set_mask(|_, i, j| {
            if (i + j) % 3 == 0 {
                f64::NEG_INFINITY
            } else {
                0.0
            }
        });
        data.check(&format!("{mask}"));
    }
}

#[test]
fn two_threads_share_a_head() {
    let problem = build(Problem::builder(DType::BF16, shape(1, (2, 1), (3, 17), DIM)).lse(true));
    let data = Data::new(problem, 4);
    let kernels = table::plain_tiles();
    assert_eq!(data.run_with(kernels, 1), data.run_with(kernels, 2));
}
