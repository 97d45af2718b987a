//! Cases whose K and V, or one of them, lie in blocks.

use super::case::{Case, MaskKind, Placement};
use crate::attention::{Format, HEAD_DIMS};
use crate::dtype::DType;

/// Of K and of V.
const FORMATS: [[Format; 2]; 4] = [
    [Format::Q8_0, Format::Q8_0],
    [Format::Q4_0, Format::Q4_0],
    [Format::Q8_0, Format::Q4_0],
    [Format::Q4_0, Format::Q8_0],
];

/// Of Q.
const DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

/// Few and many query rows over keys that fill no tile.
const LENGTHS: [(usize, usize); 6] = [(1, 340), (1, 65), (3, 300), (8, 129), (20, 70), (65, 130)];

/// Every head dim of whole blocks with every element type of Q and kind of mask, which `draw` gives features, with lengths
/// of decode and prefill, and some of the cases of many `sequences`.
pub(super) fn quantised(
    mut draw: impl FnMut(usize, DType, MaskKind) -> Case,
    sequences: impl Iterator<Item = Case>,
) -> Vec<Case> {
    let mut all = Vec::new();
    let dims = HEAD_DIMS.into_iter().filter(|d| whole(*d));
    for (head_dim, dtype) in dims.flat_map(|d| DTYPES.map(|t| (d, t))) {
        for mask in MaskKind::ALL {
            if mask == MaskKind::PlaneF32 && dtype == DType::F32 {
                continue;
            }
            all.push(draw(head_dim, dtype, mask));
        }
        let lengths = LENGTHS.into_iter().skip(all.len() % 2).step_by(2);
        all.extend(lengths.map(|lengths| Case {
            lse: true,
            ..Case::new(head_dim, dtype, lengths)
        }));
    }
    all.extend(
        sequences
            .filter(|c| whole(c.head_dim) && c.kv_dtype == c.dtype)
            .step_by(4),
    );
    for (n, case) in all.iter_mut().enumerate() {
        case.blocks = Some(FORMATS[n % 4]);
        // Gaps of a few elements are no whole blocks.
        case.placement = [Placement::HeadMajor, Placement::SeqMajor][n / 4 % 2];
    }
    all
}

fn whole(head_dim: usize) -> bool {
    FORMATS
        .as_flattened()
        .iter()
        .all(|f| head_dim.is_multiple_of(f.block()))
}
