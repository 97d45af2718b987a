//! Commands that are prepared once and replayed over other counts of keys, held against the oracle and
//! against encoding them anew.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod common;

use mlx_flash_attn::attention::oracle::{self, Inputs, Precision, Values};
use mlx_flash_attn::attention::tolerance::compare;
use mlx_flash_attn::attention::{MaskSpec, Problem, ProblemBuilder, QueryOffset};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{DType, MlxDevice};

use common::{Qkv, attend, bytes, devices, download, shape, to_bytes, upload};

/// Rows that a cache has room for: whole tiles, so that the first kernel is one that takes no other.
const ROOM: usize = 160;

/// Lengths on and off tiles, growing and shrinking.
const LENGTHS: [usize; 6] = [64, 1, 97, ROOM, 128, 33];

/// What a form is called, and what it adds to a problem.
type Form = (&'static str, fn(ProblemBuilder) -> ProblemBuilder);

const FORMS: [Form; 4] = [
    ("plain", |b| b),
    ("causal and a window", |b| b.causal(true).window(40)),
    ("softcap and ALiBi", |b| b.softcap(5.0).alibi(true)),
    ("a row of a mask", |b| {
        b.mask(MaskSpec {
            dtype: DType::F32,
            batch_stride: 0,
            head_stride: 0,
            row_stride: 0,
        })
    }),
];

/// Keys and values of a full cache, and one query of each head.
struct Cache {
    data: Qkv,
    mask: Vec<f32>,
    slopes: Vec<f32>,
}

impl Cache {
    fn new(dtype: DType, query_len: usize, dim: usize) -> Self {
        let data = Qkv::new(21, dtype, shape([2, 4, 2], (query_len, ROOM), dim));
        let hidden = |j: usize| {
            if j % 7 == 3 {
                f32::NEG_INFINITY
            } else {
                (j % 5) as f32
            }
        };
        Self {
            mask: (0..ROOM).map(hidden).collect(),
            slopes: vec![0.5, 0.25, 0.125, 0.0625],
            data,
        }
    }

    fn problem(&self, key_len: usize, form: &Form) -> Problem {
        let shape = mlx_flash_attn::attention::Shape {
            key_len,
            ..self.data.shape
        };
        let builder = Problem::builder(self.data.dtype, shape)
            .query_offset(QueryOffset::BottomRight)
            .key_capacity(ROOM);
        form.1(builder).build().unwrap()
    }

    /// A cache of which `len` rows are filled: the rest is NaN, which no row may see.
    fn filled(&self, full: &[f32], len: usize) -> Vec<u8> {
        let dim = self.data.shape.qk_dim;
        let row = |i: usize| i / dim % ROOM;
        let elements = full.iter().enumerate();
        let elements: Vec<f32> = elements
            .map(|(i, x)| if row(i) < len { *x } else { f32::NAN })
            .collect();
        to_bytes(&elements, self.data.dtype)
    }

    /// Compares with the oracle over the same lengths.
    fn check(&self, what: &str, problem: &Problem, got: &[f32]) {
        let Self { data, mask, slopes } = self;
        let bytes = [&data.q, &data.k, &data.v].map(|x| to_bytes(x, data.dtype));
        let [q, k, v] = bytes
            .each_ref()
            .map(|b| Values::from_bytes(data.dtype, b).unwrap());
        let inputs = Inputs {
            mask: problem.mask().map(|_| Values::F32(mask)),
            alibi_slopes: problem.has_alibi().then_some(slopes),
            ..Inputs::new(q, k, v)
        };
        let reference = |precision| oracle::attention(problem, &inputs, precision).unwrap();
        let (exact, naive) = (reference(Precision::Exact), reference(Precision::Naive));
        let got: Vec<f64> = got.iter().map(|x| f64::from(*x)).collect();
        let compared = compare(problem, &got, &exact, &naive);
        assert!(compared.ok, "{what}: {compared:?}");
    }

    fn replay(&self, device: &MlxDevice, form: &Form) {
        let [q, k, v, out] = self.data.buffers(device);
        let mask = upload(device, &self.mask, DType::F32, &[ROOM]);
        let slopes = upload(device, &self.slopes, DType::F32, &[4]);
        let problem = self.problem(ROOM, form);
        let operands = Operands {
            mask: problem.mask().map(|_| &mask),
            alibi_slopes: problem.has_alibi().then_some(&slopes),
            ..Operands::new(&q, &k, &v, &out)
        };
        let mut command = device
            .prepare_command(|encoder| ops::attention(encoder, &problem, &operands))
            .unwrap();
        let mut encoder = device.command_encoder().unwrap();
        for len in LENGTHS {
            let what = format!("{} on {}, {len} keys", form.0, device.kind());
            let problem = self.problem(len, form);
            for (buffer, full) in [(&k, &self.data.k), (&v, &self.data.v)] {
                let filled = self.filled(full, len);
                buffer.write::<u8>().unwrap().copy_from_slice(&filled);
            }
            command.set_key_len(len).unwrap();
            encoder.replay_prepared(&command).unwrap();
            encoder.commit_and_wait().unwrap();
            let replayed = bytes(&out);
            self.check(&what, &problem, &download(&out));
            attend(device, &problem, &operands);
            assert_eq!(replayed, bytes(&out), "{what}: encoded anew");
        }
        let error = command.set_key_len(ROOM + 1).unwrap_err().to_string();
        assert!(error.contains("1 to 160"), "{error}");
    }
}

#[test]
fn replays_over_other_lengths_give_what_the_oracle_gives() {
    for device in devices() {
        for form in &FORMS {
            // Decode, and a few rows at once, whose kernels differ on a GPU.
            for (dtype, rows) in [(DType::F32, 1), (DType::BF16, 1), (DType::F16, 40)] {
                Cache::new(dtype, rows, 64).replay(&device, form);
            }
        }
    }
}

/// All attentions of a command, such as those of a model's layers, get the length.
#[test]
fn every_attention_of_a_command_gets_the_length() {
    for device in devices() {
        let cache = Cache::new(DType::F32, 1, 64);
        let [q, k, v, first] = cache.data.buffers(&device);
        let [.., second] = cache.data.buffers(&device);
        let problem = cache.problem(ROOM, &FORMS[0]);
        let mut command = device
            .prepare_command(|encoder| {
                ops::attention(encoder, &problem, &Operands::new(&q, &k, &v, &first))?;
                // Reads what the one before writes.
                ops::attention(encoder, &problem, &Operands::new(&first, &k, &v, &second))
            })
            .unwrap();
        command.set_key_len(31).unwrap();
        let mut encoder = device.command_encoder().unwrap();
        encoder.replay_prepared(&command).unwrap();
        encoder.commit_and_wait().unwrap();
        let replayed = [bytes(&first), bytes(&second)];
        let short = cache.problem(31, &FORMS[0]);
        attend(&device, &short, &Operands::new(&q, &k, &v, &first));
        attend(&device, &short, &Operands::new(&first, &k, &v, &second));
        assert_eq!(replayed, [bytes(&first), bytes(&second)]);
    }
}
