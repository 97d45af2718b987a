//! Hidden keys whose K or V is NaN, infinite or as large as numbers go: rows that do not see them keep
//! their bits, by every family of kernels, and rows that do get them.

use mlx_flash_attn::attention::HEAD_DIMS;
use mlx_flash_attn::attention::{MaskSpec, Problem, ProblemBuilder, QueryOffset};
use mlx_flash_attn::ops::Operands;
use mlx_flash_attn::{DType, MlxDevice};

use crate::common::{
    Qkv, attend, classify, download, output, round, shape, tiles, to_bytes, upload,
};
use crate::{BF16, cuda};

/// Who sees which key, in the words of the builder and in plain ones.
#[derive(Clone, Copy)]
struct Form {
    name: &'static str,
    build: fn(ProblemBuilder) -> ProblemBuilder,
    /// Whether query `i` of `ql` sees key `j` of `kl` by position.
    sees: fn(i64, i64, i64, i64) -> bool,
    mask: Option<DType>,
    classes: bool,
}

const FULL: Form = Form {
    name: "full",
    build: |b| b,
    sees: |_, _, _, _| true,
    mask: None,
    classes: false,
};
const CAUSAL: Form = Form {
    name: "causal",
    build: |b| b.causal(true).query_offset(QueryOffset::BottomRight),
    sees: |i, j, ql, kl| j <= i + kl - ql,
    ..FULL
};
const WINDOW: Form = Form {
    name: "window",
    build: |b| {
        b.window(20)
            .window_right(3)
            .query_offset(QueryOffset::BottomRight)
    },
    sees: |i, j, ql, kl| (i + kl - ql - 19..=i + kl - ql + 3).contains(&j),
    ..FULL
};
const CAPPED: Form = Form {
    name: "softcap and ALiBi",
    build: |b| {
        let b = b.causal(true).query_offset(QueryOffset::BottomRight);
        b.softcap(3.0).alibi(true)
    },
    ..CAUSAL
};

const fn masked(form: Form, dtype: DType) -> Form {
    Form {
        mask: Some(dtype),
        ..form
    }
}

const FORMS: [Form; 10] = [
    CAUSAL,
    WINDOW,
    CAPPED,
    masked(FULL, BF16),
    masked(FULL, DType::F16),
    masked(FULL, DType::F32),
    masked(FULL, DType::U8),
    masked(CAUSAL, DType::U8),
    masked(CAPPED, BF16),
    Form {
        classes: true,
        ..masked(CAUSAL, BF16)
    },
];

/// How the family of kernels is met: rows and keys, and a scale.
#[derive(Clone, Copy)]
struct Family {
    name: &'static str,
    dtypes: &'static [DType],
    lengths: (usize, usize),
    build: fn(ProblemBuilder) -> ProblemBuilder,
}

const HALVES: &[DType] = &[BF16, DType::F16];
const FAMILIES: [Family; 5] = [
    Family {
        name: "Hopper's, where there are such",
        dtypes: HALVES,
        lengths: (201, 300),
        build: |b| b,
    },
    Family {
        name: "portable",
        dtypes: HALVES,
        lengths: (77, 150),
        // A scale that Hopper's own do not take.
        build: |b| b.scale(1.5),
    },
    Family {
        name: "few rows",
        dtypes: HALVES,
        lengths: (5, 150),
        build: |b| b,
    },
    Family {
        name: "few rows, keys in parts",
        dtypes: HALVES,
        lengths: (3, 2_500),
        build: |b| b,
    },
    Family {
        name: "f32",
        dtypes: &[DType::F32],
        lengths: (45, 150),
        build: |b| b,
    },
];

const KINDS: [f32; 5] = [
    f32::NAN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::MAX,
    f32::MIN,
];

/// One of [`KINDS`] as `dtype` holds it: its own largest numbers.
fn kind(n: usize, dtype: DType) -> f32 {
    let x = KINDS[n % KINDS.len()];
    match dtype {
        DType::F16 if x.is_finite() => 65_504.0f32.copysign(x),
        BF16 if x.is_finite() => f32::from_bits(0x7f7f_0000).copysign(x),
        _ => x,
    }
}

struct Case {
    form: Form,
    data: Qkv,
    problem: Problem,
    what: String,
}

impl Case {
    fn new(family: Family, form: Form, dtype: DType, dim: usize) -> Self {
        let data = Qkv::new(5 + dim as u64, dtype, shape([1, 2, 1], family.lengths, dim));
        let mut builder = (form.build)((family.build)(data.builder())).lse(true);
        if let Some(dtype) = form.mask {
            builder = builder.mask(MaskSpec::plane(dtype, family.lengths.1));
        }
        Self {
            problem: builder.tile_classes(form.classes).build().unwrap(),
            what: format!("{}, {}, {dtype} d{dim}", family.name, form.name),
            form,
            data,
        }
    }

    /// The mask's cells: some keys are hidden from all rows, some rows see nothing, whole class tiles
    /// are hidden or free, and the rest is mixed.
    fn cell(&self, i: usize, j: usize) -> f32 {
        let kl = self.data.shape.key_len;
        let hidden = j % 11 == 5 || i % 40 == 39 || (j > kl / 2 && i.is_multiple_of(3));
        let hidden = hidden || (i / 64 + j / 64) % 3 == 2;
        if hidden { f32::NEG_INFINITY } else { 0.0 }
    }

    fn sees(&self, i: usize, j: usize) -> bool {
        let s = self.data.shape;
        let [qi, kj, ql, kl] = [i, j, s.query_len, s.key_len].map(|n| n as i64);
        (self.form.sees)(qi, kj, ql, kl) && (self.form.mask.is_none() || self.cell(i, j) == 0.0)
    }

    fn run(&self, device: &MlxDevice, data: &Qkv) -> (Vec<f32>, Vec<f32>) {
        let s = self.data.shape;
        let [q, k, v, out] = data.buffers(device);
        let slopes = upload(device, &[0.3, 0.01], DType::F32, &[2]);
        let lse = output(device, s.heads * s.query_len, DType::F32);
        let mask = self.form.mask.map(|dtype| {
            let cells = (0..s.query_len * s.key_len).map(|c| {
                let cell = self.cell(c / s.key_len, c % s.key_len);
                if dtype == DType::U8 {
                    f32::from(u8::from(cell == 0.0))
                } else {
                    cell
                }
            });
            let cells: Vec<f32> = cells.collect();
            upload(device, &cells, dtype, &[s.query_len, s.key_len])
        });
        let classes = mask.as_ref().filter(|_| self.form.classes).map(|mask| {
            let [ql, kl, dim] = [s.query_len, s.key_len, s.qk_dim].map(|n| n as u32);
            classify(device, mask, &tiles(ql, kl, dim))
        });
        let operands = Operands {
            mask: mask.as_ref(),
            tile_classes: classes.as_ref(),
            alibi_slopes: Some(&slopes).filter(|_| self.problem.has_alibi()),
            lse: Some(&lse),
            ..Operands::new(&q, &k, &v, &out)
        };
        attend(device, &self.problem, &operands);
        (download(&out), download(&lse))
    }

    /// Keys that no row sees, and three that not every row sees.
    fn poisoned_keys(&self) -> Vec<usize> {
        let s = self.data.shape;
        let seers = |j: &usize| (0..s.query_len).filter(|i| self.sees(*i, *j)).count();
        let all: Vec<usize> = (0..s.key_len).collect();
        let (unseen, seen): (Vec<_>, Vec<_>) = all.iter().partition(|j| seers(j) == 0);
        let some: Vec<_> = seen
            .into_iter()
            .filter(|j| seers(j) < s.query_len)
            .collect();
        let n = some.len();
        let three = [n / 4, n / 2, n.saturating_sub(1)];
        let three = three.into_iter().filter_map(|at| some.get(at).copied());
        let mut keys: Vec<usize> = unseen.into_iter().chain(three).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// What is wrong where K, V or both are poisoned.
    fn faults(&self, device: &MlxDevice, in_k: bool, in_v: bool) -> Vec<String> {
        let s = self.data.shape;
        let (dim, dtype) = (s.qk_dim, self.data.dtype);
        let keys = self.poisoned_keys();
        // Column c of V is poisoned in every third key, so that most columns have but one kind.
        let v_at = |n: usize, c: usize| in_v && (c + n).is_multiple_of(3);
        let mut data = Qkv {
            q: self.data.q.clone(),
            k: self.data.k.clone(),
            v: self.data.v.clone(),
            ..self.data
        };
        for (n, j) in keys.iter().enumerate() {
            for c in 0..dim {
                if in_k && (n.is_multiple_of(2) || c == n % dim) {
                    data.k[j * dim + c] = kind(n, dtype);
                }
                if v_at(n, c) {
                    data.v[j * dim + c] = kind(n, dtype);
                }
            }
        }
        let (want, want_lse) = self.run(device, &self.data);
        let (got, got_lse) = self.run(device, &data);
        let mut faults = Vec::new();
        for row in 0..s.heads * s.query_len {
            let i = row % s.query_len;
            let met: Vec<usize> = (0..keys.len()).filter(|n| self.sees(i, keys[*n])).collect();
            let (got, want) = (&got[row * dim..][..dim], &want[row * dim..][..dim]);
            let blind = (0..s.key_len).all(|j| !self.sees(i, j));
            let mut fault = |what: String| {
                if faults.len() < 5 {
                    faults.push(format!(
                        "{}, K {in_k} V {in_v}: row {row}: {what}",
                        self.what
                    ));
                }
            };
            if blind && (got.iter().any(|x| *x != 0.0) || got_lse[row] != f32::NEG_INFINITY) {
                fault(format!(
                    "without keys: {:?}, lse {}",
                    &got[..4],
                    got_lse[row]
                ));
            }
            if met.is_empty() {
                let same = to_bytes(got, DType::F32) == to_bytes(want, DType::F32);
                if !same || got_lse[row].to_bits() != want_lse[row].to_bits() {
                    fault(format!("other bits: {:?} for {:?}", &got[..4], &want[..4]));
                }
                continue;
            }
            if in_k {
                let nan = |n: &usize| kind(*n, dtype).is_nan();
                if met.iter().any(nan) && !(got.iter().all(|x| x.is_nan()) && got_lse[row].is_nan())
                {
                    fault(format!(
                        "sees NaN in K: {:?}, lse {}",
                        &got[..4],
                        got_lse[row]
                    ));
                }
                continue;
            }
            for c in 0..dim {
                let of_column = met.iter().filter(|n| v_at(**n, c));
                let kinds: Vec<f32> = of_column.map(|n| kind(*n, dtype)).collect();
                let sum = kinds.iter().filter(|x| !x.is_finite()).sum::<f32>();
                let right = match kinds[..] {
                    [] => got[c].to_bits() == want[c].to_bits(),
                    _ if sum.is_nan() => got[c].is_nan(),
                    _ if sum.is_infinite() => got[c] == sum,
                    _ => true,
                };
                if !right {
                    fault(format!(
                        "column {c}: {} for {} and {kinds:?}",
                        got[c], want[c]
                    ));
                }
            }
        }
        faults
    }
}

#[test]
fn hidden_keys_add_nothing_whatever_bits_they_hold() {
    let Some(device) = cuda() else { return };
    let mut cases = Vec::new();
    for family in FAMILIES {
        for (n, dim) in HEAD_DIMS.into_iter().enumerate() {
            for (m, form) in FORMS.into_iter().enumerate() {
                let dtype = family.dtypes[(n + m) % family.dtypes.len()];
                cases.push(Case::new(family, form, dtype, dim));
            }
        }
    }
    device
        .cuda_warm_up(cases.iter().map(|case| &case.problem))
        .unwrap();
    let mut faults = Vec::new();
    for case in &cases {
        for (in_k, in_v) in [(false, true), (true, false), (true, true)] {
            faults.extend(case.faults(&device, in_k, in_v));
        }
    }
    let count = faults.len();
    faults.truncate(60);
    assert!(faults.is_empty(), "{count}: {faults:#?}");
}

/// A sequence's NaN reaches neither its own rows that do not see it nor another sequence.
#[test]
fn hidden_keys_of_packed_sequences_add_nothing() {
    let Some(device) = cuda() else { return };
    let (cu_q, cu_k) = ([0u32, 130, 261], [0u32, 200, 431]);
    for (n, dim) in HEAD_DIMS.into_iter().enumerate() {
        let dtype = HALVES[n % 2];
        let mut data = Qkv::new(3, dtype, shape([1, 2, 1], (261, 431), dim));
        let problem = Problem::varlen(dtype, 2, 1, dim, &cu_q, &cu_k)
            .causal(true)
            .query_offset(QueryOffset::BottomRight)
            .build()
            .unwrap();
        let (_, want) = data.run(&device, &problem);
        // Key 150 of the first sequence is at position 150; row i stands at i + 70.
        for x in [&mut data.k, &mut data.v] {
            x[150 * dim..151 * dim].fill(f32::NAN);
        }
        let (_, got) = data.run(&device, &problem);
        for (row, (got, want)) in got.chunks(dim).zip(want.chunks(dim)).enumerate() {
            let i = row / 2; // rows of two heads are neighbours
            if (80..130).contains(&i) {
                assert!(got.iter().all(|x| x.is_nan()), "{dtype} d{dim} row {row}");
            } else {
                assert!(got == want, "{dtype} d{dim} row {row}");
            }
        }
    }
}

/// Scores that overflow take a run of their own: rows beside them keep their bits.
#[test]
fn rows_beside_one_that_overflows_keep_their_bits() {
    let Some(device) = cuda() else { return };
    for (dtype, dim) in HALVES.iter().flat_map(|t| HEAD_DIMS.map(|d| (*t, d))) {
        let mut data = Qkv::new(9, dtype, shape([1, 2, 1], (300, 700), dim));
        let problem = data.builder().build().unwrap();
        let (_, want) = data.run(&device, &problem);
        let row = 21 * dim..22 * dim;
        data.q[row.clone()]
            .iter_mut()
            .for_each(|x| *x = round(*x * 300.0, dtype));
        let (_, got) = data.run(&device, &problem);
        assert!(
            got[row.clone()].iter().all(|x| x.is_finite()),
            "{dtype} d{dim}"
        );
        assert!(got[row.clone()] != want[row.clone()], "{dtype} d{dim}");
        assert!(got[..row.start] == want[..row.start], "{dtype} d{dim}");
        assert!(got[row.end..] == want[row.end..], "{dtype} d{dim}");
    }
}
