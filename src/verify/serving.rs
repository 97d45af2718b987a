//! Cases of many sequences in one call: a number of keys for each, keys in pages, packed queries over either.

use super::case::{Bounds, Case, MaskKind};
use super::cases::{BOTTOM_RIGHT, EVERYWHERE, PLACEMENTS, TOP_LEFT, bounds, draw, is_trivial};
use super::random::Random;
use super::sequences::{KeyCounts, PageForm, Sequences};
use crate::attention::HEAD_DIMS;
use crate::dtype::DType;

/// Element types of Q and of K and V.
const KINDS: [(DType, DType); 4] = [
    (DType::BF16, DType::BF16),
    (DType::F16, DType::F16),
    (DType::F32, DType::F32),
    (DType::F32, DType::F16),
];

const PAGE_SIZES: [usize; 6] = [1, 2, 16, 64, 256, 1024];

/// Most keys of a sequence.
const MOST_KEYS: usize = 1100;

/// Elements of one head in the largest page that every kind of queries meets.
const WIDE_PAGE: usize = 1024 * 128;

/// Most products of one case.
const BUDGET: usize = 1_000_000;

/// What engines ask for, whose offset follows each sequence's length; half of the cases have those of the other
/// lists.
const BOUNDS: [Bounds; 9] = [
    bounds("full", false, TOP_LEFT, None, None),
    bounds("causal.br", true, BOTTOM_RIGHT, None, None),
    bounds("causal.br", true, BOTTOM_RIGHT, None, None),
    bounds("window17.br", true, BOTTOM_RIGHT, Some(17), None),
    bounds("window2.br", true, BOTTOM_RIGHT, Some(2), None),
    bounds("window80.br", true, BOTTOM_RIGHT, Some(80), None),
    bounds("left40.br", false, BOTTOM_RIGHT, Some(40), None),
    bounds("left5.right3", false, BOTTOM_RIGHT, Some(5), Some(3)),
    bounds("right2.br", false, BOTTOM_RIGHT, None, Some(2)),
];

/// Half of the cases have no mask: most of these forms are used without one.
const MASKS: [MaskKind; 12] = [
    MaskKind::None,
    MaskKind::None,
    MaskKind::None,
    MaskKind::None,
    MaskKind::None,
    MaskKind::None,
    MaskKind::Plane,
    MaskKind::PlaneF32,
    MaskKind::PlaneBool,
    MaskKind::PerHead,
    MaskKind::Broadcast,
    MaskKind::Padding,
];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Queries {
    One,
    /// As many for each sequence.
    Several,
    Packed,
}

/// Who says how many keys a sequence has.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Lengths {
    Host,
    Device,
    /// Nobody: all have kL.
    All,
}

#[derive(Debug, Clone, Copy)]
struct Form {
    queries: Queries,
    lengths: Lengths,
    page_size: Option<usize>,
}

/// Every head dim and pair of element types in every form, or in a few.
pub(super) fn serving() -> Vec<Case> {
    let mut random = Random::new(3);
    let mut all = Vec::new();
    for (d, head_dim) in HEAD_DIMS.into_iter().enumerate() {
        for (t, kind) in KINDS.into_iter().enumerate() {
            // Large pages of wide rows are much memory for few keys: single queries do there.
            let forms = forms(d + t).into_iter().filter(|form| {
                form.queries == Queries::One || form.page_size.unwrap_or(1) * head_dim <= WIDE_PAGE
            });
            if EVERYWHERE.contains(&head_dim) {
                all.extend(forms.map(|form| case(&mut random, head_dim, kind, form)));
            } else {
                let few = forms.skip(t).step_by(6);
                all.extend(few.map(|form| case(&mut random, head_dim, kind, form)));
            }
        }
    }
    all.extend(empty());
    all
}

/// Each page size with each kind of queries, who says the lengths taking turns; dense keys with both.
fn forms(turn: usize) -> Vec<Form> {
    let queries = [Queries::One, Queries::Several, Queries::Packed];
    let lengths = [Lengths::Host, Lengths::Device, Lengths::All];
    let dense = queries.into_iter().flat_map(|queries| {
        let all = (queries == Queries::Packed).then_some(Lengths::All);
        let lengths = [Some(Lengths::Host), Some(Lengths::Device), all];
        lengths.into_iter().flatten().map(move |lengths| Form {
            queries,
            lengths,
            page_size: None,
        })
    });
    let paged = PAGE_SIZES.into_iter().enumerate().flat_map(|(p, size)| {
        queries
            .into_iter()
            .enumerate()
            .map(move |(q, queries)| Form {
                queries,
                lengths: lengths[(p + q + turn) % 3],
                page_size: Some(size),
            })
    });
    dense.chain(paged).collect()
}

fn case(
    random: &mut Random,
    head_dim: usize,
    (dtype, kv_dtype): (DType, DType),
    form: Form,
) -> Case {
    let mask = match random.pick(&MASKS) {
        MaskKind::PlaneF32 if dtype == DType::F32 => MaskKind::Plane,
        mask => mask,
    };
    let placement = random.pick(&PLACEMENTS);
    let drawn = draw(random, false, head_dim, dtype, mask, placement);
    // A large page of many heads is much memory for few keys.
    let (mut heads, kv_heads) = match form.page_size {
        Some(size) if size > 64 => random.pick(&[(1, 1), (2, 1), (4, 1)]),
        _ => (drawn.heads, drawn.kv_heads),
    };
    let keys = key_counts(random, form);
    let longest = keys.iter().copied().max().unwrap_or(0);
    let products = heads * head_dim;
    let queries = query_counts(random, form.queries, &keys, BUDGET / products);
    let (key_len, keys) = match form.lengths {
        Lengths::All => (longest, None),
        lengths => {
            let counts = KeyCounts {
                of_each: narrow(&keys),
                on_device: lengths == Lengths::Device,
            };
            (longest + random.pick(&[0, 0, 9]), Some(counts))
        }
    };
    // Of a few elements the naive computation's largest error, which bounds ours, is an accident of the draw.
    while heads * head_dim * queries.iter().sum::<usize>() < 1024 {
        heads *= 2;
    }
    let packed = form.queries == Queries::Packed;
    let mut case = Case {
        kv_dtype,
        batch: queries.len(),
        heads,
        kv_heads,
        query_len: if packed { 0 } else { queries[0] },
        key_len,
        packed: None,
        sequences: Sequences {
            queries: packed.then(|| narrow(&queries)),
            keys,
            pages: form.page_size.map(|size| PageForm {
                size,
                spare_entries: random.below(2),
            }),
        },
        bounds: match random.below(2) {
            0 => drawn.bounds,
            _ => random.pick(&BOUNDS),
        },
        ..drawn
    };
    if is_trivial(&case) {
        case.bounds = random.pick(&BOUNDS);
    }
    case
}

/// Lengths around the edges of pages and tiles; now and then all are alike.
fn key_counts(random: &mut Random, form: Form) -> Vec<usize> {
    let size = form.page_size.unwrap_or(64);
    let lengths = [0, 1, size - 1, size, size + 1, 2 * size + 3, 17, 70, 129];
    let batch = match size {
        ..=64 => random.pick(&[1, 2, 3, 4]),
        _ => random.pick(&[1, 2]),
    };
    let mut keys: Vec<usize> = (0..batch)
        .map(|_| random.pick(&lengths).min(MOST_KEYS))
        .collect();
    // One sequence at least has a page that is full and one that is not, and most rows see several keys.
    keys[random.below(batch)] = (size + 5).max(20);
    if form.lengths == Lengths::All || random.below(6) == 0 {
        let longest = keys.iter().copied().max().unwrap_or(0);
        keys.fill(longest);
    }
    keys
}

/// Queries of each sequence: at most so many pairs with its keys.
fn query_counts(random: &mut Random, queries: Queries, keys: &[usize], pairs: usize) -> Vec<usize> {
    let mut counts: Vec<usize> = match queries {
        Queries::One => vec![1; keys.len()],
        Queries::Several => vec![random.pick(&[2, 5, 9, 17, 33, 65]); keys.len()],
        // A chunk of a prompt, tokens, and a sequence that has no part in the step.
        Queries::Packed => {
            let chunks = [40, 1, 0, 1, 20, 3];
            let first = random.below(chunks.len());
            let turns = (first..).map(|i| chunks[i % chunks.len()]);
            turns.take(keys.len()).collect()
        }
    };
    let all = |counts: &[usize]| counts.iter().zip(keys).map(|(q, k)| q * k).sum::<usize>();
    while all(&counts) > pairs && counts.iter().any(|n| *n > 1) {
        counts.iter_mut().for_each(|n| *n = n.div_ceil(2));
    }
    if counts.iter().all(|n| *n == 0) {
        counts.fill(1);
    }
    counts
}

fn narrow(lengths: &[usize]) -> Vec<u32> {
    let narrow = |n: &usize| u32::try_from(*n).unwrap_or(u32::MAX);
    lengths.iter().map(narrow).collect()
}

/// Sequences without keys, without queries, and none at all.
fn empty() -> Vec<Case> {
    let lengths: [(&[u32], &[u32], usize); 4] = [
        (&[2, 2], &[0, 0], 6),
        (&[2, 2], &[0, 0], 0),
        (&[0, 0], &[5, 0], 6),
        (&[], &[], 6),
    ];
    let each = lengths.into_iter().flat_map(|of| {
        let pages = [None, Some(4)];
        pages
            .into_iter()
            .flat_map(move |p| [(of, p, true), (of, p, false)])
    });
    each.enumerate()
        .map(|(n, ((queries, keys, key_len), size, on_device))| Case {
            batch: queries.len(),
            key_len,
            sequences: Sequences {
                queries: Some(queries.to_vec()),
                keys: Some(KeyCounts {
                    of_each: keys.to_vec(),
                    on_device,
                }),
                pages: size.map(|size| PageForm {
                    size,
                    spare_entries: 0,
                }),
            },
            bounds: BOUNDS[n % 3],
            sinks: n % 2 == 0,
            lse: true,
            ..Case::new(64, KINDS[n % 4].0, (0, 0))
        })
        .collect()
}
