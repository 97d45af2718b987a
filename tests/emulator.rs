//! The Metal kernels in the emulator: their threadgroup memory, offsets past 32 bits, and what they
//! leave out. The tests for every device run there too.
#![cfg(feature = "emulator")]
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod common;

use common::{Qkv, attend, download, normal, shape, to_bytes, upload};
use mlx_flash_attn::attention::oracle::{self, Inputs, Precision, Values};
use mlx_flash_attn::attention::tolerance::compare;
use mlx_flash_attn::attention::variant::{APPLE_THREADGROUP_BYTES, PREFILL};
use mlx_flash_attn::attention::{MaskSpec, Problem, ProblemBuilder, QueryOffset, Role, Strides};
use mlx_flash_attn::ops::Operands;
use mlx_flash_attn::ops::flash_attn_prefill_blk::{
    BlkParams, alloc_blk_buffer, dispatch_flash_attn_prefill_blk,
};
use mlx_flash_attn::{
    DType, DeviceKind, EmulatorCounters, EmulatorOptions, KernelRegistry, MlxBuffer, MlxDevice,
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
    let inputs = Inputs {
        q: Values::from_bytes(dtype, q.as_slice().unwrap()).unwrap(),
        k: Values::from_bytes(dtype, kv.as_slice().unwrap()).unwrap(),
        v: Values::from_bytes(dtype, kv.as_slice().unwrap()).unwrap(),
        mask: mask.map(|m| Values::from_bytes(m.dtype(), m.as_slice().unwrap()).unwrap()),
        sinks: None,
        alibi_slopes: None,
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
