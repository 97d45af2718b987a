//! The matrix: which cases there are.

use super::case::{Bounds, Case, Entry, MaskKind, Placement};
use super::quantised::quantised;
use super::random::Random;
use super::serving::serving;
use crate::attention::HEAD_DIMS;
use crate::attention::QueryOffset;
use crate::attention::{Problem, Shape};
use crate::dtype::DType;
use crate::runtime::device::MlxDevice;

/// How much of the matrix to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// A tenth of it, in which every head dim, dtype, mask kind, layout and feature occurs.
    Quick,
    /// All of it.
    Full,
}

/// Head dims that meet every feature. The others have the same kernels with other constants, and a few cases
/// each.
pub(super) const EVERYWHERE: [usize; 8] = [32, 64, 80, 96, 128, 192, 256, 512];

const DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];
pub(super) const PLACEMENTS: [Placement; 3] = [
    Placement::HeadMajor,
    Placement::SeqMajor,
    Placement::Strided,
];

/// Cases of each (head dim, dtype, mask kind, layout) in the whole matrix.
const ROUNDS: usize = 3;

/// Most products of one case (`B * H * qL * kL * D`), so that the oracle keeps up.
const BUDGET: usize = 6_000_000;

/// Query and key lengths: around the edges of tiles of 8, 16, 32 and 64, either one the longer.
const LENGTHS: [(usize, usize); 30] = [
    (1, 1),
    (1, 2),
    (1, 17),
    (1, 129),
    (2, 300),
    (5, 128),
    (7, 9),
    (8, 8),
    (9, 7),
    (15, 33),
    (16, 16),
    (17, 15),
    (20, 70),
    (31, 65),
    (32, 48),
    (33, 33),
    (40, 128),
    (48, 31),
    (63, 32),
    (64, 64),
    (65, 63),
    (65, 130),
    (70, 20),
    (96, 96),
    (100, 100),
    (127, 40),
    (128, 5),
    (129, 1),
    (140, 64),
    (3, 340),
];

/// Lengths of packed queries and keys.
const PACKED: [(&[u32], &[u32]); 5] = [
    (&[3, 0, 17], &[3, 0, 17]),
    (&[1, 1, 1], &[5, 40, 17]),
    (&[0, 33, 8, 2], &[7, 20, 0, 64]),
    (&[16, 5, 40], &[48, 5, 33]),
    (&[65], &[64]),
];

/// Query heads and key/value heads.
const HEADS: [(usize, usize); 8] = [
    (1, 1),
    (2, 2),
    (2, 1),
    (4, 2),
    (4, 1),
    (3, 1),
    (6, 2),
    (6, 3),
];

pub(super) const fn bounds(
    label: &'static str,
    causal: bool,
    offset: QueryOffset,
    window: Option<usize>,
    window_right: Option<usize>,
) -> Bounds {
    Bounds {
        label,
        causal,
        offset,
        window,
        window_right,
    }
}

pub(super) const TOP_LEFT: QueryOffset = QueryOffset::At(0);
pub(super) const BOTTOM_RIGHT: QueryOffset = QueryOffset::BottomRight;

/// Causal bounds and windows. Negative offsets and far windows leave rows that see nothing.
const BOUNDS: [Bounds; 14] = [
    bounds("full", false, TOP_LEFT, None, None),
    bounds("causal", true, TOP_LEFT, None, None),
    bounds("causal.br", true, BOTTOM_RIGHT, None, None),
    bounds("causal.at5", true, QueryOffset::At(5), None, None),
    bounds("causal.at-3", true, QueryOffset::At(-3), None, None),
    bounds("window1", true, TOP_LEFT, Some(1), None),
    bounds("window7", true, TOP_LEFT, Some(7), None),
    bounds("window17.br", true, BOTTOM_RIGHT, Some(17), None),
    bounds("window80", true, TOP_LEFT, Some(80), None),
    bounds("left33", false, TOP_LEFT, Some(33), None),
    bounds("left6.at60", false, QueryOffset::At(60), Some(6), None),
    bounds("left5.right3", false, BOTTOM_RIGHT, Some(5), Some(3)),
    bounds("right0", false, TOP_LEFT, None, Some(0)),
    bounds("right20", false, TOP_LEFT, None, Some(20)),
];

/// The cases of `scope` that this device's row of the variant table serves.
pub fn cases(scope: Scope, device: &MlxDevice) -> Vec<Case> {
    let half_keys = takes_half_keys(device);
    let mut all = Vec::new();
    grid(scope, half_keys, &mut all);
    let extra = [edges(), masks(), long(), decode(), wide(), empty()].concat();
    let one_in = |n| match scope {
        Scope::Quick => n,
        Scope::Full => 1,
    };
    // Prime to the lists' own periods.
    all.extend(extra.into_iter().step_by(one_in(11)));
    all.extend(few().into_iter().step_by(one_in(4)));
    all.extend(serving().into_iter().step_by(one_in(11)));
    all.extend(many_rows().into_iter().step_by(one_in(5)));
    all.extend(blocks().into_iter().step_by(one_in(13)));
    all.retain(|case| is_served(case, device));
    all
}

/// Whether the device takes f16 keys and values under f32 queries.
fn takes_half_keys(device: &MlxDevice) -> bool {
    let shape = Shape {
        batch: 1,
        heads: 1,
        kv_heads: 1,
        query_len: 1,
        key_len: 1,
        qk_dim: 64,
        v_dim: 64,
    };
    let problem = Problem::builder(DType::F32, shape)
        .kv_dtype(DType::F16)
        .build();
    problem.is_ok_and(|problem| device.supports(&problem).is_ok())
}

fn is_served(case: &Case, device: &MlxDevice) -> bool {
    match case.entry {
        // The decode kernels take any head dim.
        Entry::Decode => true,
        // A case that is no problem is run, and fails.
        _ => case
            .problem()
            .map_or(true, |problem| device.supports(&problem).is_ok()),
    }
}

/// Every head dim x dtype x mask kind x layout; the features are drawn for each.
fn grid(scope: Scope, half_keys: bool, all: &mut Vec<Case>) {
    let mut random = Random::new(1);
    for (d, head_dim) in EVERYWHERE.into_iter().enumerate() {
        for (t, dtype) in DTYPES.into_iter().enumerate() {
            for (m, mask) in MaskKind::ALL.into_iter().enumerate() {
                if mask == MaskKind::PlaneF32 && dtype == DType::F32 {
                    continue;
                }
                for (l, placement) in PLACEMENTS.into_iter().enumerate() {
                    for round in 0..ROUNDS {
                        // Drawn in either scope, so that a case has the same features in both.
                        let mut case =
                            draw(&mut random, half_keys, head_dim, dtype, mask, placement);
                        // Some cases in which no row sees two keys are wanted, but few.
                        for _ in 0..2 {
                            if is_trivial(&case) {
                                case =
                                    draw(&mut random, half_keys, head_dim, dtype, mask, placement);
                            }
                        }
                        let in_quick = round == 0 && l == (d + t + m) % PLACEMENTS.len();
                        if scope == Scope::Full || in_quick {
                            all.push(case);
                        }
                    }
                }
            }
        }
    }
}

pub(super) fn draw(
    random: &mut Random,
    half_keys: bool,
    head_dim: usize,
    dtype: DType,
    mask: MaskKind,
    placement: Placement,
) -> Case {
    let one_in = |random: &mut Random, n: usize| random.below(n) == 0;
    let (heads, kv_heads) = random.pick(&HEADS);
    let batch = random.pick(&[1, 1, 2, 3]);
    let packed = one_in(random, 6).then(|| random.pick(&PACKED));
    let fits = |(q, k): &(usize, usize)| batch * heads * q * k * head_dim <= BUDGET;
    let fitting: Vec<_> = LENGTHS.into_iter().filter(fits).collect();
    let softcap = random.pick(&[None, None, None, Some(1.5), Some(5.0), Some(20.0)]);
    let mask_dtype = match mask {
        MaskKind::None | MaskKind::Plane => dtype,
        MaskKind::PlaneF32 => DType::F32,
        MaskKind::PlaneBool => DType::U8,
        MaskKind::PerHead | MaskKind::Broadcast | MaskKind::Padding => {
            random.pick(&[dtype, DType::U8, DType::F32])
        }
    };
    let half_keys = half_keys && dtype == DType::F32 && one_in(random, 6);
    Case {
        kv_dtype: if half_keys { DType::F16 } else { dtype },
        batch,
        heads,
        kv_heads,
        packed: packed.map(|(q, k)| (q.to_vec(), k.to_vec())),
        placement,
        mask,
        mask_dtype,
        bounds: random.pick(&BOUNDS),
        softcap,
        sinks: one_in(random, 4),
        alibi: one_in(random, 5),
        lse: one_in(random, 2),
        gain: random.pick(&[1.0, 1.0, 1.5, 2.0]),
        ..Case::new(head_dim, dtype, random.pick(&fitting))
    }
}

/// K and V in blocks, with features drawn as for the grid.
fn blocks() -> Vec<Case> {
    let mut random = Random::new(5);
    let drawn = |head_dim, dtype, mask| {
        let mut draw = || {
            let placement = Placement::HeadMajor;
            draw(&mut random, false, head_dim, dtype, mask, placement)
        };
        let first = draw();
        if is_trivial(&first) { draw() } else { first }
    };
    quantised(drawn, serving().into_iter())
}

/// Whether causal bound and windows alone leave every row at most one key, though not by design.
pub(super) fn is_trivial(case: &Case) -> bool {
    case.bounds.window != Some(1)
        && case.problem().is_ok_and(|problem| {
            (0..problem.shape().batch).all(|b| {
                let s = problem.sequence(b);
                (0..s.query_len).all(|i| s.visibility.keys(i as i64, s.key_len).len() < 2)
            })
        })
}

/// Every head dim and dtype with lengths around the edges of tiles.
fn edges() -> Vec<Case> {
    let edge = [7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65];
    let mut random = Random::new(2);
    let each = EVERYWHERE
        .into_iter()
        .flat_map(|d| DTYPES.map(|t| (d, t)))
        .flat_map(|pair| (0..6).map(move |i| (pair, i)));
    each.map(|((head_dim, dtype), i)| Case {
        heads: 1,
        placement: PLACEMENTS[i % 3],
        bounds: BOUNDS[i % 3],
        lse: i % 2 == 0,
        ..Case::new(head_dim, dtype, (random.pick(&edge), random.pick(&edge)))
    })
    .collect()
}

/// Every head dim and dtype with tile classes from the device's own pre-pass, over a mask of the
/// host's and over masks that the device fills.
fn masks() -> Vec<Case> {
    let offset = bounds("at9.w20", true, QueryOffset::At(9), Some(20), None);
    let built = [
        None,
        Some(bounds("causal", true, TOP_LEFT, None, None)),
        Some(bounds("window24", false, TOP_LEFT, Some(24), None)),
        Some(offset),
    ];
    let each = EVERYWHERE
        .into_iter()
        .flat_map(|d| DTYPES.map(|t| (d, t)))
        .flat_map(|pair| [0, 1, 2, 3, 4].map(|i| (pair, i)));
    each.map(|((head_dim, dtype), i)| Case {
        mask: MaskKind::Plane,
        mask_dtype: DType::BF16,
        built: built[i % 4],
        // The last one tries the fill alone.
        tile_classes: i != 4,
        batch: 1 + i % 2,
        placement: PLACEMENTS[i % 3],
        bounds: BOUNDS[[0, 0, 1, 6, 0][i]],
        sinks: i == 2,
        ..Case::new(
            head_dim,
            dtype,
            [(65, 130), (100, 100), (33, 70), (80, 64), (40, 128)][i],
        )
    })
    .collect()
}

/// Longer than any tile and any split of the keys.
fn long() -> Vec<Case> {
    let each = EVERYWHERE.into_iter().flat_map(|d| DTYPES.map(|t| (d, t)));
    each.enumerate()
        .map(|(i, (head_dim, dtype))| {
            let lengths = [(5, 1030), (310, 50), (24, 520)][i % 3];
            Case {
                heads: 1,
                bounds: BOUNDS[[0, 1, 2, 8][i % 4]],
                placement: PLACEMENTS[i % 3],
                gain: 2.0,
                lse: true,
                ..Case::new(head_dim, dtype, lengths)
            }
        })
        .collect()
}

/// The decode entry, K and V in f32 and f16.
fn decode() -> Vec<Case> {
    let each = EVERYWHERE
        .into_iter()
        .flat_map(|d| [DType::F32, DType::F16].map(|t| (d, t)))
        .flat_map(|pair| [0, 1, 2].map(|i| (pair, i)));
    each.enumerate()
        .map(|(n, ((head_dim, kv_dtype), i))| {
            let (heads, kv_heads) = HEADS[n % HEADS.len()];
            let last = [
                bounds("full", false, BOTTOM_RIGHT, None, None),
                bounds("left1.br", false, BOTTOM_RIGHT, Some(1), None),
                bounds("left40.br", false, BOTTOM_RIGHT, Some(40), None),
            ];
            Case {
                entry: Entry::Decode,
                kv_dtype,
                heads,
                kv_heads,
                bounds: last[n % 3],
                softcap: [None, Some(2.0)][n % 2],
                ..Case::new(head_dim, DType::F32, (1, [1, 33, 200][i]))
            }
        })
        .collect()
}

/// More query rows than kernels for few of them take, in f32, whose kernels for few take the most: 512.
fn many_rows() -> Vec<Case> {
    let each = HEAD_DIMS
        .into_iter()
        .flat_map(|d| [DType::F32, DType::F16].map(|kv_dtype| (d, kv_dtype)));
    each.enumerate()
        .map(|(i, (head_dim, kv_dtype))| Case {
            kv_dtype,
            heads: 1,
            placement: PLACEMENTS[i % 3],
            bounds: BOUNDS[[0, 1, 2, 8][i % 4]],
            mask: [MaskKind::None, MaskKind::PlaneBool, MaskKind::None][i % 3],
            mask_dtype: DType::U8,
            sinks: i % 4 == 3,
            lse: true,
            gain: 2.0,
            ..Case::new(head_dim, DType::F32, (550, 70))
        })
        .collect()
}

/// The head dims that are not [`EVERYWHERE`]: without and with what changes a score, with keys that are split,
/// and decode.
fn few() -> Vec<Case> {
    let others = HEAD_DIMS.into_iter().filter(|d| !EVERYWHERE.contains(d));
    others
        .flat_map(|head_dim| {
            let prefill = DTYPES.into_iter().flat_map(move |dtype| {
                // Many elements, so that the naive computation's largest error, which bounds ours, is no
                // accident of the draw.
                let plain = Case {
                    heads: 6,
                    kv_heads: 3,
                    placement: Placement::SeqMajor,
                    lse: true,
                    ..Case::new(head_dim, dtype, (65, 130))
                };
                let full = Case {
                    heads: 4,
                    kv_heads: 2,
                    placement: Placement::Strided,
                    mask: MaskKind::PerHead,
                    mask_dtype: dtype,
                    bounds: BOUNDS[7],
                    softcap: Some(5.0),
                    sinks: true,
                    alibi: true,
                    ..Case::new(head_dim, dtype, (33, 70))
                };
                let long = Case {
                    heads: 6,
                    kv_heads: 6,
                    bounds: BOUNDS[2],
                    gain: 2.0,
                    ..Case::new(head_dim, dtype, (5, 1030))
                };
                [plain, full, long]
            });
            let decode = [DType::F32, DType::F16].map(|kv_dtype| Case {
                entry: Entry::Decode,
                kv_dtype,
                bounds: bounds("left40.br", false, BOTTOM_RIGHT, Some(40), None),
                ..Case::new(head_dim, DType::F32, (1, 200))
            });
            prefill.chain(decode)
        })
        .collect()
}

/// Work without batches, queries or keys, dense and packed.
fn empty() -> Vec<Case> {
    let sizes = [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0)];
    let dense = sizes.map(|(batch, query_len, key_len)| Case {
        batch,
        ..Case::new(64, DType::BF16, (query_len, key_len))
    });
    let lengths: [(&[u32], &[u32]); 3] = [(&[0, 0], &[3, 0]), (&[3, 0, 5], &[0, 0, 0]), (&[], &[])];
    let packed = lengths.map(|(q, k)| Case {
        packed: Some((q.to_vec(), k.to_vec())),
        ..Case::new(128, DType::F32, (0, 0))
    });
    let all = dense.into_iter().chain(packed);
    all.flat_map(|plain| {
        let full = Case {
            mask: MaskKind::PlaneF32,
            mask_dtype: DType::F32,
            placement: Placement::Strided,
            bounds: BOUNDS[2],
            sinks: true,
            alibi: true,
            softcap: Some(2.0),
            ..plain.clone()
        };
        // Quick takes one in eleven of all extra cases: at least one of these.
        [plain, full].map(|case| Case { lse: true, ..case })
    })
    .collect()
}

/// The entry for head dim 512, with 4 and 8 simdgroups.
fn wide() -> Vec<Case> {
    let dtypes = [DType::BF16, DType::F16].into_iter();
    let each = dtypes.flat_map(|t| [4, 8].map(|nsg| (t, nsg)));
    each.flat_map(|(dtype, nsg)| {
        let plain = Case {
            entry: Entry::D512 { nsg },
            bounds: BOUNDS[1],
            ..Case::new(512, dtype, (33, 70))
        };
        let masked = Case {
            mask: MaskKind::Plane,
            tile_classes: dtype == DType::BF16,
            ..plain.clone()
        };
        [plain, masked]
    })
    .collect()
}
