//! The Metal kernels in the emulator: their threadgroup memory, offsets past 32 bits, and what they
//! leave out. The tests for every device run there too.
#![cfg(feature = "emulator")]
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod common;

use common::{Plain, Qkv, assert_close, attend, download, normal, shape, to_bytes, upload};
use mlx_flash_attn::abi::table::{APPLE_THREADGROUP_BYTES, PREFILL};
use mlx_flash_attn::attention::oracle::{self, Inputs, Precision, Values};
use mlx_flash_attn::attention::tolerance::compare;
use mlx_flash_attn::attention::{MaskSpec, Problem, ProblemBuilder, QueryOffset, Role, Strides};
use mlx_flash_attn::ops::Operands;
use mlx_flash_attn::ops::flash_attn_prefill_blk::{
    BlkParams, alloc_blk_buffer, dispatch_flash_attn_prefill_blk,
};
use mlx_flash_attn::{
    DType, DeviceKind, EmulatorCounters, EmulatorOptions, KernelRegistry, MTLSize, MlxBuffer,
    MlxDevice,
};

/// The emulator, or a word about why it is not there.
fn emulator(check: bool) -> Option<MlxDevice> {
    let options = EmulatorOptions {
        check,
        ..EmulatorOptions::default()
    };
    MlxDevice::emulator(options)
        .inspect_err(|error| eprintln!("SKIPPED: {error}"))
        .ok()
}

/// The CPU, and the emulator where it opens.
fn cpu_and_emulator() -> Vec<MlxDevice> {
    let cpu = MlxDevice::open(DeviceKind::Cpu).unwrap();
    std::iter::once(cpu).chain(emulator(false)).collect()
}

#[test]
fn threadgroup_memory_is_what_the_table_says() {
    let Some(device) = emulator(false) else {
        return;
    };
    let mut registry = KernelRegistry::new();
    let mut largest = (0, "");
    for v in PREFILL {
        let pipeline = registry
            .get_pipeline(v.kernel, device.metal_device())
            .unwrap();
        let bytes = usize::try_from(pipeline.static_threadgroup_memory_length()).unwrap();
        assert_eq!(bytes, v.shared_bytes, "{}", v.kernel);
        assert!(bytes <= APPLE_THREADGROUP_BYTES, "{}: {bytes}", v.kernel);
        largest = largest.max((bytes, v.kernel));
    }
    let (bytes, kernel) = largest;
    eprintln!("most threadgroup memory: {bytes} of {APPLE_THREADGROUP_BYTES} bytes, {kernel}");
}

/// Whether this machine can spare `bytes` for a buffer of which a few pages are touched.
fn has_room_for(bytes: usize) -> bool {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free = info
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemAvailable:")?
                .split_whitespace()
                .next()
        })
        .and_then(|kib| kib.parse::<usize>().ok());
    let room = free.is_some_and(|kib| kib * 1024 > bytes + (1 << 30));
    if !room {
        eprintln!("SKIPPED: {bytes} bytes of memory are not known to be free");
    }
    room
}

/// A buffer whose rows of `width` values lie `stride` elements apart; the rest is never touched.
fn sparse(
    device: &MlxDevice,
    rows: &[f32],
    width: usize,
    stride: usize,
    dtype: DType,
) -> MlxBuffer {
    let elements = (rows.len() / width - 1) * stride + width;
    let size = dtype.size_of();
    let mut buffer = device
        .alloc_buffer(elements * size, dtype, vec![elements])
        .unwrap();
    let bytes = buffer.as_mut_slice::<u8>().unwrap();
    for (i, row) in rows.chunks(width).enumerate() {
        let start = i * stride * size;
        bytes[start..start + width * size].copy_from_slice(&to_bytes(row, dtype));
    }
    buffer
}

/// Runs the problem and holds the result against the oracle; K serves as V too.
fn check(
    device: &MlxDevice,
    problem: &Problem,
    q: &MlxBuffer,
    kv: &MlxBuffer,
    mask: Option<&MlxBuffer>,
) {
    let (dtype, rows) = (
        problem.dtype(),
        problem.operand(Role::Output).unwrap().elements,
    );
    let out = common::output(device, rows, dtype);
    let operands = Operands {
        mask,
        ..Operands::new(q, kv, kv, &out)
    };
    attend(device, problem, &operands);
    let got: Vec<f64> = download(&out).into_iter().map(f64::from).collect();
    // Read in place: a copy would touch every page of a sparse buffer.
    let (q, kv) = (q.read().unwrap(), kv.read().unwrap());
    let cells = mask.map(|m| (m.dtype(), m.read().unwrap()));
    let inputs = Inputs {
        mask: cells
            .as_ref()
            .map(|(dtype, cells)| Values::from_bytes(*dtype, cells).unwrap()),
        ..Inputs::new(
            Values::from_bytes(dtype, &q).unwrap(),
            Values::from_bytes(dtype, &kv).unwrap(),
            Values::from_bytes(dtype, &kv).unwrap(),
        )
    };
    let exact = oracle::attention(problem, &inputs, Precision::Exact).unwrap();
    let naive = oracle::attention(problem, &inputs, Precision::Naive).unwrap();
    let verdict = compare(problem, &got, &exact, &naive);
    assert!(verdict.ok, "{}: {verdict:?}", device.kind());
}

#[test]
fn elements_past_two_to_the_31_are_reached() {
    // Row 15, of a whole block of 8 rows, and row 16, of the last one, lie past 2^31 elements.
    let (keys, dim, stride) = (17, 32, 150_994_944);
    assert!(15 * stride > 1 << 31);
    if !has_room_for(keys * stride * 2) {
        return;
    }
    let dtype = DType::BF16;
    let q = normal(1, 3 * dim, dtype);
    let kv = normal(2, keys * dim, dtype);
    let far = Strides {
        batch: keys * stride,
        head: keys * stride,
        seq: stride,
    };
    let problem = Problem::builder(dtype, shape([1, 1, 1], (3, keys), dim))
        .strides(Role::Key, far)
        .strides(Role::Value, far)
        .build()
        .unwrap();
    for device in cpu_and_emulator() {
        let q = upload(&device, &q, dtype, &[q.len()]);
        let kv = sparse(&device, &kv, dim, stride, dtype);
        check(&device, &problem, &q, &kv, None);
    }
}

#[test]
fn mask_cells_past_two_to_the_32_are_reached() {
    let (rows, keys, dim, stride) = (6, 40, 32, (1 << 30) + 3);
    if !has_room_for(rows * stride) {
        return;
    }
    let data = Qkv::new(3, DType::F16, shape([1, 1, 1], (rows, keys), dim));
    let cells: Vec<f32> = (0..rows * keys)
        .map(|c| f32::from(u8::from(c * c % 7 < 3)))
        .collect();
    let mask = MaskSpec {
        dtype: DType::U8,
        batch_stride: 0,
        head_stride: 0,
        row_stride: stride,
    };
    let problem = data.builder().mask(mask).build().unwrap();
    for device in cpu_and_emulator() {
        let q = upload(&device, &data.q, data.dtype, &[data.q.len()]);
        let kv = upload(&device, &data.k, data.dtype, &[data.k.len()]);
        let mask = sparse(&device, &cells, keys, stride, DType::U8);
        check(&device, &problem, &q, &kv, Some(&mask));
    }
}

#[test]
fn more_rows_than_16_bits_count_are_served() {
    let (rows, tail, keys, dim, dtype) = (65_570, 70, 40, 32, DType::BF16);
    let q = normal(4, rows * dim, dtype);
    let kv = normal(5, keys * dim, dtype);
    let problem = |rows| {
        Problem::builder(dtype, shape([1, 1, 1], (rows, keys), dim))
            .causal(true)
            .query_offset(QueryOffset::BottomRight)
            .build()
            .unwrap()
    };
    for device in cpu_and_emulator() {
        let kv = upload(&device, &kv, dtype, &[kv.len()]);
        let all = upload(&device, &q, dtype, &[q.len()]);
        let out = common::output(&device, q.len(), dtype);
        attend(
            &device,
            &problem(rows),
            &Operands::new(&all, &kv, &kv, &out),
        );
        let got = download(&out);
        // Bottom-right: only the last rows see keys, and the last rows alone are the same problem.
        let (before, last) = got.split_at((rows - tail) * dim);
        assert!(before.iter().all(|x| *x == 0.0), "{}", device.kind());
        let view = all.slice_view(((rows - tail) * dim * 2) as u64, tail * dim);
        check(&device, &problem(tail), &view, &kv, None);
        let few = common::output(&device, tail * dim, dtype);
        attend(
            &device,
            &problem(tail),
            &Operands::new(&view, &kv, &kv, &few),
        );
        if device.kind() == DeviceKind::Emulator {
            // Rows do not mix, so it is the same bits wherever a tile begins.
            assert_eq!(last, download(&few));
        } else {
            let few: Vec<f64> = download(&few).into_iter().map(f64::from).collect();
            common::assert_close("the last rows", last, &few, dtype);
        }
    }
}

/// What the emulator counts for one head of 256 x 256 at head dim 64, checked.
fn counted(
    device: &MlxDevice,
    with: impl Fn(ProblemBuilder) -> ProblemBuilder,
) -> EmulatorCounters {
    let data = Qkv::new(6, DType::BF16, shape([1, 1, 1], (256, 256), 64));
    device.take_emulator_counters();
    data.run(device, &with(data.builder()).build().unwrap());
    device.take_emulator_counters().unwrap()
}

#[test]
fn what_is_ruled_out_is_not_loaded() {
    let Some(device) = emulator(true) else {
        return;
    };
    let full = counted(&device, |b| b);
    // 8 tiles of 32 rows by 8 chunks of 32 keys, of 2 x 4 x 4 x 8 multiplies.
    assert_eq!(full.matrix_multiplies, 64 * 256);
    let causal = counted(&device, |b| b.causal(true));
    let below = counted(&device, |b| {
        b.window_right(0).query_offset(QueryOffset::At(-32))
    });
    let window = |w| counted(&device, |b| b.causal(true).window(w));
    // The diagonal and before; before it; the diagonal and two chunks back, or one.
    let (two, one) = (window(64), window(32));
    for (chunks, counters) in [(36, &causal), (28, &below), (21, &two), (15, &one)] {
        assert_eq!(counters.matrix_multiplies, chunks * 256);
    }
    // Each chunk left out is 32 rows of K and of V not read.
    let chunk = 2 * 32 * 64 * 2;
    let saved = |more: &EmulatorCounters, less: &EmulatorCounters| {
        more.device_bytes_read - less.device_bytes_read
    };
    assert_eq!(saved(&full, &causal), 28 * chunk);
    assert_eq!(saved(&two, &one), 6 * chunk);
}

#[test]
fn masked_tiles_are_not_loaded() {
    let Some(device) = emulator(true) else {
        return;
    };
    let data = Qkv::new(7, DType::BF16, shape([1, 1, 1], (64, 256), 64));
    // The last three quarters of the keys are hidden.
    let cells: Vec<f32> = (0..64 * 256)
        .map(|c| if c % 256 < 64 { 0.0 } else { f32::NEG_INFINITY })
        .collect();
    let mask = upload(&device, &cells, DType::BF16, &[64, 256]);
    let run = |given: bool| {
        let problem = data.builder().mask(MaskSpec::plane(DType::BF16, 256));
        let problem = problem.tile_classes(given).build().unwrap();
        let classes = given.then(|| {
            let params = BlkParams {
                seq_len_q: 64,
                seq_len_k: 256,
                bq: 32,
                bk: 16,
            };
            let classes = alloc_blk_buffer(&device, &params).unwrap();
            let mut registry = KernelRegistry::new();
            common::commit(&device, |encoder| {
                dispatch_flash_attn_prefill_blk(
                    encoder,
                    &device,
                    &mut registry,
                    &mask,
                    &classes,
                    &params,
                )
            });
            classes
        });
        let [q, k, v, out] = data.buffers(&device);
        let operands = Operands {
            mask: Some(&mask),
            tile_classes: classes.as_ref(),
            ..Operands::new(&q, &k, &v, &out)
        };
        device.take_emulator_counters();
        attend(&device, &problem, &operands);
        (
            common::bytes(&out),
            device.take_emulator_counters().unwrap(),
        )
    };
    let ((whole, all), (skipping, few)) = (run(false), run(true));
    assert_eq!(whole, skipping);
    assert_eq!(few.matrix_multiplies * 4, all.matrix_multiplies);
    // K and V of the hidden chunks, and all of the mask: tiles of zeros do without it.
    let unread = 2 * 6 * (2 * 32 * 64 * 2) + 64 * 256 * 2;
    let saved = all.device_bytes_read - few.device_bytes_read;
    assert!(saved <= unread && saved + 8_192 > unread, "{saved}");
}

/// NaN, infinities and the largest finite numbers in the rows `keys` of K and V.
fn poisoned(data: &Qkv, keys: std::ops::Range<usize>) -> Qkv {
    let dim = data.shape.qk_dim;
    let top = if data.dtype == DType::F16 {
        65504.0
    } else {
        3.3e38
    };
    let bad = [f32::NAN, f32::INFINITY, -top, f32::NEG_INFINITY, top];
    let spoil = |values: &[f32]| {
        let mut values = values.to_vec();
        for (i, x) in values[keys.start * dim..keys.end * dim]
            .iter_mut()
            .enumerate()
        {
            *x = common::round(bad[(i + i / dim) % bad.len()], data.dtype);
        }
        values
    };
    Qkv {
        dtype: data.dtype,
        shape: data.shape,
        q: data.q.clone(),
        k: spoil(&data.k),
        v: spoil(&data.v),
    }
}

#[test]
fn hidden_keys_add_nothing_whatever_bits_they_hold() {
    let Some(device) = emulator(false) else {
        return;
    };
    let (rows, keys) = (37, 117);
    let bad = 90..keys;
    for (dtype, dim) in [
        (DType::F16, 64),
        (DType::BF16, 80),
        (DType::F32, 256),
        (DType::F16, 512),
    ] {
        let data = Qkv::new(5, dtype, shape([1, 1, 1], (rows, keys), dim));
        let spoiled = poisoned(&data, bad.clone());
        for form in ["causal", "window", "bool", "additive"] {
            let position = |i: usize| i + keys - rows;
            let sees = |i: usize, j: usize| match form {
                "causal" => j <= position(i),
                "window" => j <= position(i) && position(i) - j < 20,
                _ => i != 9 && (i % 2 == 1 || !bad.contains(&j)),
            };
            let run = |data: &Qkv| {
                let causal = data.builder().causal(true);
                let causal = causal.query_offset(QueryOffset::BottomRight);
                let mask = |seen: f32, hidden: f32, dtype| {
                    let cell = |c| {
                        if sees(c / keys, c % keys) {
                            seen
                        } else {
                            hidden
                        }
                    };
                    let cells: Vec<f32> = (0..rows * keys).map(cell).collect();
                    let mask = upload(&device, &cells, dtype, &[rows, keys]);
                    let problem = data.builder().mask(MaskSpec::plane(dtype, keys));
                    data.run_masked(&device, &problem.build().unwrap(), &mask)
                };
                match form {
                    "causal" => data.run(&device, &causal.build().unwrap()),
                    "window" => data.run(&device, &causal.window(20).build().unwrap()),
                    "bool" => mask(1.0, 0.0, DType::U8),
                    _ => mask(0.0, f32::NEG_INFINITY, DType::F16),
                }
            };
            let ((clean, _), (got, values)) = (run(&data), run(&spoiled));
            let row_bytes = dim * dtype.size_of();
            for i in 0..rows {
                let what = format!("{dtype} {dim} {form} row {i}");
                let sees_bad = bad.clone().any(|j| sees(i, j));
                let bytes = i * row_bytes..(i + 1) * row_bytes;
                let row = &values[i * dim..(i + 1) * dim];
                if sees_bad {
                    assert!(row.iter().any(|x| !x.is_finite()), "{what}");
                } else {
                    assert_eq!(got[bytes.clone()], clean[bytes], "{what}");
                }
            }
        }
    }
}

#[test]
fn a_class_holds_for_exactly_its_tile() {
    let Some(device) = emulator(false) else {
        return;
    };
    let (rows, keys) = (70, 150);
    for (dtype, dim) in [(DType::F32, 64), (DType::F16, 128), (DType::F32, 256)] {
        let data = Qkv::new(6, dtype, shape([1, 1, 1], (rows, keys), dim));
        let across = keys.div_ceil(16);
        let classes: Vec<f32> = (0..rows.div_ceil(32) * across)
            .map(|t| (t % 3) as f32)
            .collect();
        let cells: Vec<f32> = (0..rows * keys).map(|c| (c % 5) as f32).collect();
        let mask = upload(&device, &cells, DType::F32, &[rows, keys]);
        let blk = upload(&device, &classes, DType::U8, &[classes.len()]);
        let problem = data.builder().mask(MaskSpec::plane(DType::F32, keys));
        let problem = problem.tile_classes(true).build().unwrap();
        let [q, k, v, out] = data.buffers(&device);
        let operands = Operands {
            mask: Some(&mask),
            tile_classes: Some(&blk),
            ..Operands::new(&q, &k, &v, &out)
        };
        attend(&device, &problem, &operands);
        let want = data.plain(&Plain::new(
            &|_, i, j| match classes[i / 32 * across + j / 16] as u8 {
                0 => None,
                1 => Some(f64::from(cells[i * keys + j])),
                _ => Some(0.0),
            },
        ));
        let what = format!("{dtype} {dim}");
        assert_close(&what, &download(&out), &want, dtype);
    }
}

#[test]
fn a_library_is_found_by_its_text_and_not_by_its_address() {
    let Some(device) = emulator(false) else {
        return;
    };
    let text = |value: &str| {
        format!(
            "#include <metal_stdlib>\nkernel void fill(device float* o [[buffer(0)]], uint i \
             [[thread_position_in_grid]]) {{ o[i] = {value}; }}\n"
        )
    };
    // A text that lies where another has lain: here the first bytes of a longer one.
    let long: &'static str = Box::leak((text("1.0f") + &text("2.0f")).into_boxed_str());
    let short = &long[..text("1.0f").len()];
    let build = |text: &'static str| {
        let mut registry = KernelRegistry::new();
        // SAFETY: no dispatch is encoded with this text.
        unsafe { registry.register_foreign_source("fill", text) };
        registry
            .get_pipeline("fill", device.metal_device())
            .map(|_| ())
    };
    assert!(build(short).is_ok());
    // Two kernels of one name: no program, whatever was built from the same address.
    assert!(build(long).is_err());
}

#[test]
fn a_foreign_kernel_gets_no_threadgroup_memory_that_it_does_not_declare() {
    let Some(device) = emulator(false) else {
        return;
    };
    let text = "#include <metal_stdlib>\nkernel void fill(device float* o [[buffer(0)]], uint i \
                [[thread_position_in_threadgroup]]) { o[i & 3] = 1.0f; }\n";
    let mut registry = KernelRegistry::new();
    // SAFETY: every dispatch below binds four elements, and the kernel writes no others.
    unsafe { registry.register_foreign_source("fill", text) };
    let pipeline = registry
        .get_pipeline("fill", device.metal_device())
        .unwrap();
    let out = device.alloc_buffer(16, DType::F32, vec![4]).unwrap();
    let run = |shared: &[(u64, u64)]| {
        let (one, four) = (MTLSize::new(1, 1, 1), MTLSize::new(4, 1, 1));
        let mut encoder = device.command_encoder().unwrap();
        encoder.encode_threadgroups_with_shared(pipeline, &[(0, &out)], shared, one, four);
        encoder.commit_and_wait()
    };
    let error = run(&[(0, 64)]).unwrap_err().to_string();
    assert!(
        error.contains("fill") && error.contains("threadgroup memory"),
        "{error}"
    );
    assert_eq!(download(&out), [0.0; 4]);
    run(&[]).unwrap();
    assert_eq!(download(&out), [1.0; 4]);
}
