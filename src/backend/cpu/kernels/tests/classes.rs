//! Tile classes that say something else than the mask.

use super::harness::{Data, Random, build, everywhere, shape};
use crate::DType;
use crate::attention::mask::TileClass;
use crate::attention::{MaskSpec, Problem};

/// The classes decide: 0 hides exactly its tile, 2 adds no mask exactly there, 1 adds it.
#[test]
fn classes_are_obeyed_tile_by_tile() {
    let classes = [TileClass::Skip, TileClass::Mixed, TileClass::Free].map(|c| c as u8);
    for (n, dim) in crate::attention::HEAD_DIMS.into_iter().enumerate() {
        let dtype = [DType::BF16, DType::F16, DType::F32][n % 3];
        for dtype in [dtype, DType::BF16] {
            let (ql, kl) = (41, 300);
            let builder = Problem::builder(dtype, shape(1, (2, 1), (ql, kl), dim))
                .mask(MaskSpec::plane(DType::F32, kl))
                .lse(true);
            let mut random = Random::new(dim as u64);
            let tile = crate::attention::class_tile(dim);
            let (nq, nk) = tile.count(ql, kl);
            // Mostly runs of one class, now and then a single tile.
            let given: Vec<u8> = (0..nq * nk)
                .map(|_| classes[random.below(3) as usize])
                .collect();
            let cells: Vec<f64> = (0..ql * kl)
                .map(|_| match random.below(3) {
                    0 => f64::NEG_INFINITY,
                    _ => 4.0 * random.normal(),
                })
                .collect();
            let mut obeyed = Data::new(build(builder.clone()), 7);
            obeyed.set_mask(|_, i, j| match given[i / tile.bq * nk + j / tile.bk] {
                0 => f64::NEG_INFINITY,
                2 => 0.0,
                _ => cells[i * kl + j],
            });
            let mut classed = obeyed.with_problem(build(builder.tile_classes(true)));
            classed.set_mask(|_, i, j| cells[i * kl + j]);
            classed.set_classes(given);
            for (name, kernels) in everywhere(dtype) {
                assert!(
                    classed.run_with(kernels, 1) == obeyed.run_with(kernels, 1),
                    "{name} {dtype} D {dim}"
                );
            }
            obeyed.check(&format!("{dtype} D {dim}"));
        }
    }
}
