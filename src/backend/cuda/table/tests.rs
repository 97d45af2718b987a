//! What the table must hold: which kernels serve what, and within which limits.

use super::*;

fn needs(dtype: DType, head_dim: usize, features: u16) -> Needs {
    Needs {
        dtype,
        kv_dtype: dtype,
        head_dim,
        mask: (features & MASK != 0).then_some(dtype),
        features,
    }
}

#[test]
fn every_dtype_and_head_dim_has_a_kernel_that_fits_any_gpu() {
    // Shared memory of a threadblock (CUDA programming guide, compute capabilities).
    for (gpu, most) in [
        (Capability::OLDEST, 163),
        (Capability(8, 6), 99),
        (Capability::HOPPER, 227),
        (Capability(12, 0), 99),
    ] {
        for spec in every_spec(gpu) {
            assert!(spec.shared as usize <= most * 1024, "{}", spec.name());
            assert!(spec.threads <= 1024 && spec.threads.is_multiple_of(32));
        }
        for (dtype, head_dim) in [DType::BF16, DType::F16, DType::F32]
            .into_iter()
            .flat_map(|t| HEAD_DIMS.map(|d| (t, d)))
        {
            let last = attention(needs(dtype, head_dim, ANY), gpu).last().unwrap();
            assert_eq!(last.rows, usize::MAX, "{dtype} {head_dim}");
        }
    }
}

/// Head dims that the Hopper kernels serve.
const HOPPER_DIMS: [usize; 8] = [32, 64, 80, 96, 128, 192, 256, 512];

#[test]
fn hopper_alone_has_its_own_kernels_and_has_them_for_all_but_some_sequences() {
    let own = |gpu, needs| attention(needs, gpu).any(Row::maps);
    for (dtype, head_dim) in [DType::BF16, DType::F16]
        .into_iter()
        .flat_map(|t| HEAD_DIMS.map(|d| (t, d)))
    {
        for features in (0..=ANY).filter(|f| f & CLASSES == 0 || f & MASK != 0) {
            let needs = needs(dtype, head_dim, features);
            let masked = needs.has(SEQUENCES) && needs.has(MASK);
            let left_out = masked || needs.has(PAGED | LENGTHS) && head_dim == 512;
            assert!(!own(Capability(8, 9), needs) && !own(Capability(10, 0), needs));
            let wanted = HOPPER_DIMS.contains(&head_dim) && !left_out;
            assert_eq!(own(Capability::HOPPER, needs), wanted, "{needs:?}");
        }
    }
    assert!(!own(Capability::HOPPER, needs(DType::F32, 64, 0)));
}

/// Tile classes skip tiles and change nothing else, so they may not change the tile.
#[test]
fn masks_have_the_same_keys_in_a_tile_with_classes_and_without() {
    for (gpu, head_dim) in [Capability::OLDEST, Capability::HOPPER]
        .into_iter()
        .flat_map(|gpu| HEAD_DIMS.map(|d| (gpu, d)))
    {
        for features in 0..=BOUNDS {
            let tiles = |features| {
                let rows = attention(needs(DType::BF16, head_dim, features), gpu);
                // The rest may differ.
                let mut tiles: Vec<_> = rows.map(|row| (row.rows, row.bn)).collect();
                tiles.dedup();
                tiles
            };
            let (with, without) = (features | MASK | CLASSES, features | MASK);
            assert_eq!(tiles(with), tiles(without), "{head_dim} {features}");
        }
    }
}

#[test]
fn tiles_hold_whole_class_tiles_or_are_parts_of_one() {
    for row in ATTENTION {
        for d in row.dims.iter().copied() {
            let class = crate::attention::class_tile(d);
            assert!(
                row.bm.is_multiple_of(class.bq) || class.bq.is_multiple_of(row.bm),
                "{row:?} {d}"
            );
            assert!(
                row.bn.is_multiple_of(class.bk) || class.bk.is_multiple_of(row.bn),
                "{row:?} {d}"
            );
        }
    }
}

#[test]
fn warps_share_a_tile_in_parts_that_the_instructions_take() {
    for row in ATTENTION {
        let (high, across, keys) = match row.text {
            Text::Portable { high, across } => (high, across, row.bn / across),
            Text::Few { across, .. } => (row.bm / 16, across, row.bn),
            _ => continue,
        };
        assert!(row.bm.is_multiple_of(16 * high), "{row:?}");
        assert!(keys == 8 || keys.is_multiple_of(16), "{row:?}");
        // Of the swizzle, whose period is 64 columns, a warp's share begins at the start.
        let columns = |d: &usize| match d.next_multiple_of(16) / across {
            n if across > 1 && d.is_multiple_of(64) => n.is_multiple_of(64),
            n => n.is_multiple_of(16),
        };
        assert!(row.dims.iter().all(columns), "{row:?}");
    }
}

#[test]
fn names_of_architectures_go_both_ways() {
    for (gpu, arch) in [
        (Capability(9, 0), "sm_90a"),
        (Capability(8, 6), "sm_86"),
        (Capability(12, 0), "sm_120"),
    ] {
        assert_eq!(gpu.arch(), arch);
        assert_eq!(Capability::of_arch(arch), Some(gpu));
    }
    for none in ["", "sm_", "sm_9", "90", "sm_ab"] {
        assert_eq!(Capability::of_arch(none), None, "{none}");
    }
}
