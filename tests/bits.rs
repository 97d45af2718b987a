//! What must be the same bits: for any number of threads, with tile classes or without, on a view or
//! a copy, in either layout, with a bool mask or the additive mask that says the same, and each time.
//! On the CPU for every instruction set of this machine, elsewhere for the device as it opens. On CUDA
//! the kernel depends on alignment and lengths, and bits are the same where the kernel is.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{
    Plain, Qkv, assert_close, attend, bytes, classify, commit, devices, download, normal, output,
    seen, shape, tiles, to_bytes, upload, upload_guarded,
};
use mlx_flash_attn::attention::{Layout, MaskSpec, Problem, QueryOffset};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{CpuOptions, DType, DeviceKind, Isa, MlxBuffer, MlxDevice};

const DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];
const DIMS: [usize; 4] = [64, 80, 256, 512];

fn cpu(isa: Isa, threads: usize) -> MlxDevice {
    MlxDevice::cpu(CpuOptions {
        isa: Some(isa),
        threads: Some(threads),
    })
    .unwrap()
}

/// The CPU once for each instruction set, and whatever else opens.
fn all_devices() -> Vec<MlxDevice> {
    let isas = Isa::ALL.into_iter().filter(|isa| isa.is_available());
    let others = devices()
        .into_iter()
        .filter(|d| d.kind() != DeviceKind::Cpu);
    isas.map(|isa| cpu(isa, 2)).chain(others).collect()
}

/// Every device with every dtype and several head dims that it serves.
fn each(test: impl Fn(&MlxDevice, &str, DType, usize)) {
    for device in all_devices() {
        for (dtype, dim) in DTYPES.into_iter().flat_map(|t| DIMS.map(|d| (t, d))) {
            let problem = Problem::builder(dtype, shape([1, 1, 1], (1, 1), dim)).build();
            if device.supports(&problem.unwrap()).is_ok() {
                test(
                    &device,
                    &format!("{} {dtype} d{dim}", device.name()),
                    dtype,
                    dim,
                );
            }
        }
    }
}

/// A mask of -inf and biases whose tiles are of every class: free, masked, mixed.
fn blocky_mask(ql: usize, kl: usize, biases: bool) -> Vec<f32> {
    let noise = normal(77, ql * kl, DType::BF16);
    (0..ql * kl)
        .map(|c| {
            let (i, j) = (c / kl, c % kl);
            match (i / 40 + j / 80) % 3 {
                0 => f32::NEG_INFINITY,
                1 => 0.0,
                _ if c % 4 == 0 => f32::NEG_INFINITY,
                _ if biases => noise[c],
                _ => 0.0,
            }
        })
        .collect()
}

/// Everything at once: grouped heads, batches, an offset, a window, a softcap, sinks, slopes, a
/// mask, the log-sum-exp. Gives the bits of both outputs.
fn rich(device: &MlxDevice, dtype: DType, dim: usize) -> (Vec<u8>, Vec<u8>) {
    let data = Qkv::new(31, dtype, shape([2, 2, 1], (41, 150), dim));
    let cells = blocky_mask(41, 150, true);
    let mask = upload(device, &cells, DType::BF16, &[41, 150]);
    let floats = |x: &[f32]| upload(device, x, DType::F32, &[x.len()]);
    let (sinks, slopes) = (floats(&[0.5, -1.0]), floats(&[0.5, 0.1]));
    let problem = data
        .builder()
        .mask(MaskSpec::plane(DType::BF16, 150))
        .causal(true)
        .query_offset(QueryOffset::BottomRight)
        .window(130)
        .softcap(3.0)
        .sinks(true)
        .alibi(true)
        .lse(true)
        .build()
        .unwrap();
    let [q, k, v, out] = data.buffers(device);
    let lse = output(device, 2 * 2 * 41, DType::F32);
    let operands = Operands {
        mask: Some(&mask),
        sinks: Some(&sinks),
        alibi_slopes: Some(&slopes),
        lse: Some(&lse),
        ..Operands::new(&q, &k, &v, &out)
    };
    attend(device, &problem, &operands);
    (bytes(&out), bytes(&lse))
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        for (dtype, dim) in DTYPES.into_iter().flat_map(|t| DIMS.map(|d| (t, d))) {
            let one = rich(&cpu(isa, 1), dtype, dim);
            for threads in [2, 7] {
                assert!(
                    one == rich(&cpu(isa, threads), dtype, dim),
                    "{isa} {dtype} d{dim}: {threads} threads"
                );
            }
        }
    }
}

#[test]
fn one_row_over_many_keys_gives_the_same_bits_for_any_number_of_threads() {
    // Decode is where splitting the keys over threads tempts.
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        for dtype in DTYPES {
            let data = Qkv::new(32, dtype, shape([1, 2, 1], (1, 5_000), 64));
            let problem = data.builder().build().unwrap();
            let one = data.run(&cpu(isa, 1), &problem).0;
            for threads in [2, 7] {
                let many = data.run(&cpu(isa, threads), &problem).0;
                assert!(one == many, "{isa} {dtype}: {threads} threads");
            }
        }
    }
}

#[test]
fn every_run_gives_the_same_bits() {
    each(|device, what, dtype, dim| {
        let first = rich(device, dtype, dim);
        assert!(first == rich(device, dtype, dim), "{what}");
    });
}

#[test]
fn what_was_asked_before_changes_no_bit() {
    each(|device, what, dtype, dim| {
        // All take one kernel with the same constants.
        let asked = [(37, 75, 0.2), (37, 75, 0.1), (41, 77, 0.2)].map(|(ql, kl, scale)| {
            let data = Qkv::new(40, dtype, shape([1, 2, 1], (ql, kl), dim));
            let problem = data.builder().causal(true).scale(scale).build().unwrap();
            let alone = data.run(device, &problem).0;
            (data, problem, alone)
        });
        for n in [0, 0, 1, 2, 0, 1, 1] {
            let (data, problem, alone) = &asked[n];
            let [q, k, v, out] = data.buffers(device);
            let operands = Operands::new(&q, &k, &v, &out);
            commit(device, |e| ops::attention(e, problem, &operands));
            assert!(*alone == bytes(&out), "{what}: problem {n}");
        }
    });
}

#[test]
fn tile_classes_change_no_bit() {
    each(|device, what, dtype, dim| {
        for causal in [false, true] {
            let data = Qkv::new(33, dtype, shape([1, 2, 1], (90, 200), dim));
            let mask = upload(device, &blocky_mask(90, 200, true), DType::BF16, &[90, 200]);
            let blk = classify(device, &mask, &tiles(90, 200, dim as u32));
            let classes = bytes(&blk);
            for class in [0, 1, 2] {
                assert!(classes.contains(&class), "{what}: no tile of class {class}");
            }
            let builder = || {
                data.builder()
                    .mask(MaskSpec::plane(DType::BF16, 200))
                    .causal(causal)
            };
            let plain = builder().build().unwrap();
            let classed = builder().tile_classes(true).build().unwrap();
            let without = data.run_masked(device, &plain, &mask).0;
            let [q, k, v, out] = data.buffers(device);
            let operands = Operands {
                mask: Some(&mask),
                tile_classes: Some(&blk),
                ..Operands::new(&q, &k, &v, &out)
            };
            attend(device, &classed, &operands);
            assert!(without == bytes(&out), "{what} causal {causal}");
        }
    });
}

#[test]
fn views_and_copies_give_the_same_bits() {
    each(|device, what, dtype, dim| {
        let data = Qkv::new(34, dtype, shape([1, 2, 2], (37, 75), dim));
        let problem = data.builder().causal(true).build().unwrap();
        // One kernel for all: what it keeps of one call must not be taken for one at other addresses.
        let run = |[q, k, v]: &[MlxBuffer; 3], out: &MlxBuffer| {
            let operands = Operands::new(q, k, v, out);
            commit(device, |e| ops::attention(e, &problem, &operands));
        };
        let copies = [&data.q, &data.k, &data.v].map(|x| upload(device, x, dtype, &[x.len()]));
        let out = output(device, data.q.len(), dtype);
        run(&copies, &out);
        let aligned = bytes(&out);
        let mut unaligned = None;
        for guard in [1, 3, 40, 129] {
            let views =
                [&data.q, &data.k, &data.v].map(|x| upload_guarded(device, x, dtype, guard));
            let out = upload_guarded(device, &data.q, dtype, guard);
            run(&views, &out);
            // On CUDA rows that lie on 16 bytes have kernels of their own.
            let expected = if device.kind() == DeviceKind::Cuda && guard % 8 != 0 {
                let want = data.plain(&Plain::new(&|_, i, j| seen(j <= i)));
                assert_close(what, &download(&out), &want, dtype);
                unaligned.get_or_insert_with(|| bytes(&out))
            } else {
                &aligned
            };
            assert!(
                *expected == bytes(&out),
                "{what}: views {guard} elements in"
            );
        }
    });
}

fn seq_major(x: &[f32], heads: usize, len: usize, dim: usize) -> Vec<f32> {
    (0..len)
        .flat_map(|i| (0..heads).map(move |h| (h, i)))
        .flat_map(|(h, i)| x[(h * len + i) * dim..][..dim].to_vec())
        .collect()
}

#[test]
fn both_layouts_give_the_same_bits() {
    each(|device, what, dtype, dim| {
        let (heads, kv_heads, ql, kl) = (4, 2, 37, 75);
        let data = Qkv::new(35, dtype, shape([1, heads, kv_heads], (ql, kl), dim));
        let head_major = data
            .run(device, &data.builder().causal(true).build().unwrap())
            .1;
        let moved = Qkv {
            q: seq_major(&data.q, heads, ql, dim),
            k: seq_major(&data.k, kv_heads, kl, dim),
            v: seq_major(&data.v, kv_heads, kl, dim),
            ..data
        };
        let problem = moved
            .builder()
            .causal(true)
            .layout(Layout::SeqMajor)
            .build()
            .unwrap();
        let got = moved.run(device, &problem).0;
        let want = to_bytes(&seq_major(&head_major, heads, ql, dim), dtype);
        assert!(got == want, "{what}");
    });
}

#[test]
fn a_bool_mask_and_its_additive_twin_give_the_same_bits() {
    each(|device, what, dtype, dim| {
        let data = Qkv::new(36, dtype, shape([1, 2, 1], (45, 100), dim));
        let additive = blocky_mask(45, 100, false);
        let bools: Vec<f32> = additive
            .iter()
            .map(|x| f32::from(u8::from(*x == 0.0)))
            .collect();
        let mut results = Vec::new();
        for (mask_dtype, cells) in [
            (DType::U8, &bools),
            (dtype, &additive),
            (DType::F32, &additive),
        ] {
            let mask = upload(device, cells, mask_dtype, &[45, 100]);
            let spec = MaskSpec::plane(mask_dtype, 100);
            let problem = data.builder().mask(spec).build().unwrap();
            results.push(data.run_masked(device, &problem, &mask).0);
        }
        assert!(results[0] == results[1], "{what}: bool and own dtype");
        assert!(results[1] == results[2], "{what}: own dtype and f32");
    });
}

/// Whether the device's kernels with a mask and those without keep scores in different units: CUDA's for other GPUs than
/// Hopper.
fn another_unit(device: &MlxDevice) -> bool {
    let details = device.details();
    let kernels = details
        .iter()
        .find(|(name, _)| name.starts_with("kernels for"));
    kernels.is_some_and(|(_, capability)| capability != "9.0")
}

#[test]
fn a_mask_of_zeros_changes_no_bit() {
    each(|device, what, dtype, dim| {
        let data = Qkv::new(37, dtype, shape([1, 1, 1], (33, 50), dim));
        let none = data.run(device, &data.builder().build().unwrap()).0;
        let zeros = vec![0.0; 33 * 50];
        let mask = upload(device, &zeros, dtype, &[33, 50]);
        let problem = data
            .builder()
            .mask(MaskSpec::plane(dtype, 50))
            .build()
            .unwrap();
        let (zeros, values) = data.run_masked(device, &problem, &mask);
        if another_unit(device) {
            let want = data.plain(&Plain::new(&|_, _, _| seen(true)));
            assert_close(what, &values, &want, dtype);
        } else {
            assert!(none == zeros, "{what}");
        }
    });
}

#[test]
fn strides_and_capacity_change_no_bit() {
    each(|device, what, dtype, dim| {
        let (kl, capacity) = (50, 90);
        let data = Qkv::new(38, dtype, shape([1, 2, 2], (20, kl), dim));
        let dense = data.run(device, &data.builder().build().unwrap()).0;
        let spread = |x: &[f32]| -> Vec<f32> {
            let heads = x.chunks(kl * dim);
            heads
                .flat_map(|head| [head, &vec![f32::NAN; (capacity - kl) * dim]].concat())
                .collect()
        };
        let roomy = Qkv {
            k: spread(&data.k),
            v: spread(&data.v),
            q: data.q.clone(),
            ..data
        };
        let problem = data.builder().key_capacity(capacity).build().unwrap();
        assert!(dense == roomy.run(device, &problem).0, "{what}");
    });
}

#[test]
fn packed_sequences_give_the_bits_of_each_alone() {
    each(|device, what, dtype, dim| {
        let lengths = [(5usize, 9usize), (40, 70), (1, 33)];
        let alone: Vec<Qkv> = lengths
            .iter()
            .enumerate()
            .map(|(n, l)| Qkv::new(40 + n as u64, dtype, shape([1, 1, 1], *l, dim)))
            .collect();
        let mut cu = (vec![0u32], vec![0u32]);
        for (q, k) in lengths {
            cu.0.push(cu.0[cu.0.len() - 1] + q as u32);
            cu.1.push(cu.1[cu.1.len() - 1] + k as u32);
        }
        let join = |part: &dyn Fn(&Qkv) -> Vec<f32>| alone.iter().flat_map(part).collect();
        let packed = Qkv {
            dtype,
            shape: alone[0].shape,
            q: join(&|x| x.q.clone()),
            k: join(&|x| x.k.clone()),
            v: join(&|x| x.v.clone()),
        };
        let problem = Problem::varlen(dtype, 1, 1, dim, &cu.0, &cu.1)
            .causal(true)
            .query_offset(QueryOffset::BottomRight)
            .build()
            .unwrap();
        let (together, values) = packed.run(device, &problem);
        if device.kind() == DeviceKind::Cuda {
            // Kernels are chosen by the longest of the sequences there.
            let want: Vec<f64> = alone
                .iter()
                .flat_map(|one| {
                    let offset = one.shape.key_len - one.shape.query_len;
                    one.plain(&Plain::new(&|_, i, j| seen(j <= i + offset)))
                })
                .collect();
            return assert_close(what, &values, &want, dtype);
        }
        let each_alone: Vec<u8> = alone
            .iter()
            .flat_map(|one| {
                let problem = one
                    .builder()
                    .causal(true)
                    .query_offset(QueryOffset::BottomRight);
                one.run(device, &problem.build().unwrap()).0
            })
            .collect();
        assert!(together == each_alone, "{what}");
    });
}

#[test]
fn a_replayed_capture_gives_the_bits_of_the_call() {
    for device in all_devices() {
        let data = Qkv::new(39, DType::BF16, shape([1, 2, 1], (20, 50), 64));
        let problem = data.builder().build().unwrap();
        let direct = data.run(&device, &problem).0;
        let [q, k, v, out] = data.buffers(&device);
        let mut encoder = device.command_encoder().unwrap();
        encoder.start_capture();
        ops::attention(&mut encoder, &problem, &Operands::new(&q, &k, &v, &out)).unwrap();
        let nodes = encoder.take_capture().unwrap();
        encoder.replay(&nodes).unwrap();
        encoder.commit_and_wait().unwrap();
        assert!(direct == bytes(&out), "{}", device.name());
    }
}
