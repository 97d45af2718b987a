//! Arbitrary dispatches: any kernel with any constants, buffers and params may fail, never crash.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use mlx_flash_attn::abi::bindings::names;
use mlx_flash_attn::abi::params::{AttnExtraParamsGpu, AttnMaskParamsGpu, AttnParamsGpu};
use mlx_flash_attn::abi::params::{BlkParamsGpu, MaskFillParamsGpu, VecParamsGpu};
use mlx_flash_attn::abi::table::PREFILL;
use mlx_flash_attn::encoder::{KernelArg, MTLSize, as_bytes};
use mlx_flash_attn::{CpuOptions, DType, KernelRegistry, MlxBuffer, MlxDevice};

#[path = "../../tests/common/mod.rs"]
#[allow(unused)]
mod common;
#[path = "../../tests/common/wild.rs"]
#[allow(unused)]
mod wild;

use wild::Source;

thread_local! {
    static CPU: MlxDevice = {
        let options = CpuOptions::from_env().expect("a known instruction set");
        MlxDevice::cpu(CpuOptions { threads: Some(1), ..options }).expect("a CPU")
    };
    static REGISTRY: RefCell<KernelRegistry> = RefCell::new(KernelRegistry::new());
}

/// A dispatch under construction.
struct Raw {
    kernel: &'static str,
    buffers: Vec<(u64, MlxBuffer, u64)>,
    bytes: Vec<(u64, Vec<u8>)>,
}

fuzz_target!(|data: &[u8]| {
    CPU.with(|cpu| REGISTRY.with_borrow_mut(|registry| run(&mut Source(data), cpu, registry)));
});

fn run(s: &mut Source<'_>, cpu: &MlxDevice, registry: &mut KernelRegistry) {
    let others = [
        names::MASK_FILL,
        names::BLK,
        names::VEC_F32,
        names::VEC_F16,
        names::VEC_REDUCE,
    ];
    let prefill = !s.rarely(3);
    let kernel = match prefill {
        true => PREFILL[usize::from(s.byte()) % PREFILL.len()].kernel,
        false => s.pick(&others),
    };
    let mut raw = Raw {
        kernel,
        buffers: Vec::new(),
        bytes: Vec::new(),
    };
    let (mut bools, mut ints) = (Vec::new(), Vec::new());
    for index in [200, 201, 300, 301, 302, 303, 306, 307, 308, 311, 312] {
        if s.rarely(3) {
            bools.push((index, true));
        }
    }
    for index in [309, 310, 322, 400, 401] {
        if let Some(value) = s.some(3, |s| int(s, 4)) {
            ints.push((index, value));
        }
    }
    match prefill {
        true => prefill_args(s, cpu, &mut raw),
        false => other_args(s, cpu, &mut raw),
    }
    spoil(s, &mut raw);
    // Rows of keys that share memory may be as many as the params say: not wrong, only endless.
    if endless(&raw) {
        return;
    }
    let Ok(pipeline) =
        registry.get_pipeline_with_constants(raw.kernel, cpu.metal_device(), &bools, &ints)
    else {
        return;
    };
    let buffers = raw.buffers.iter().map(|(i, b, offset)| match offset {
        0 => (*i, KernelArg::Buffer(b)),
        _ => (*i, KernelArg::BufferWithOffset(b, *offset)),
    });
    let bytes = raw.bytes.iter().map(|(i, b)| (*i, KernelArg::Bytes(b)));
    let args: Vec<_> = buffers.chain(bytes).collect();
    let size = MTLSize::new(s.word(), u64::from(s.byte()), 1);
    let mut encoder = cpu.command_encoder().expect("an encoder");
    encoder.encode_threadgroups_with_args(pipeline, &args, size, size);
    // Twice: hazards of a dispatch with itself.
    if s.flag() {
        encoder.encode_threadgroups_with_args(pipeline, &args, size, size);
    }
    let _ = encoder.commit_and_wait();
}

fn int(s: &mut Source<'_>, small: u8) -> i32 {
    match s.byte() {
        0..=239 => i32::from(s.below(small)),
        240..=247 => s.word() as i32,
        _ => s.pick(&[-1, i32::MAX, i32::MIN, 4096]),
    }
}

/// A buffer whose last bytes are not far from the allocation's end, so that reads past it show.
fn buffer(s: &mut Source<'_>, cpu: &MlxDevice, elements: usize, dtype: DType) -> MlxBuffer {
    let elements = match s.byte() {
        0..=223 => elements,
        224..=239 => elements.saturating_sub(1 + usize::from(s.byte())),
        _ => usize::from(s.byte()) * 16,
    };
    let elements = elements.clamp(1, 1 << 16);
    let front = usize::from(s.below(4));
    let bytes = (elements + front) * dtype.size_of();
    let mut whole = cpu
        .alloc_buffer(bytes, dtype, vec![elements + front])
        .expect("a buffer");
    let fill = s.byte();
    whole
        .as_mut_slice::<u8>()
        .expect("the only handle")
        .fill(fill & 0x3f);
    whole.slice_view((front * dtype.size_of()) as u64, elements)
}

fn prefill_args(s: &mut Source<'_>, cpu: &MlxDevice, raw: &mut Raw) {
    let Some(variant) = PREFILL.iter().find(|v| v.kernel == raw.kernel) else {
        return;
    };
    let d = variant.head_dim as i64;
    let b = i64::from(1 + s.below(2));
    let group = i64::from(1 + s.below(2));
    let hkv = i64::from(1 + s.below(2));
    let h = hkv * group;
    let (ql, kl) = (i64::from(1 + s.below(40)), i64::from(1 + s.below(80)));
    let strides = |heads: i64, len: i64, seq_major: bool| match seq_major {
        false => [heads * len * d, len * d, d],
        true => [heads * len * d, d, heads * d],
    };
    let (q_major, k_major) = (s.flag(), s.flag());
    let params = AttnParamsGpu {
        b: b as i32,
        h: h as i32,
        d: d as i32,
        ql: ql as i32,
        kl: kl as i32,
        gqa_factor: group as i32,
        scale: s.float(true),
        softcapping: s.float(true),
        nq: int(s, 4),
        nk: int(s, 4),
        nq_aligned: int(s, 4),
        nk_aligned: int(s, 4),
        ql_rem: int(s, 4),
        kl_rem: int(s, 4),
        ql_off: int(s, 40).wrapping_sub(20),
        _pad: 0,
        q_strides: strides(h, ql, q_major),
        k_strides: strides(hkv, kl, k_major),
        v_strides: strides(hkv, kl, k_major),
        o_strides: strides(h, ql, q_major),
    };
    let mask = AttnMaskParamsGpu {
        m_strides: s.pick(&[[0, 0, kl], [h * ql * kl, ql * kl, kl], [kl, 0, 0]]),
    };
    let extra = AttnExtraParamsGpu {
        window: int(s, 40),
        window_right: int(s, 40),
        bottom_right: int(s, 2),
        _pad: 0,
        lse_strides: [h * ql, ql],
    };
    let dtypes = [DType::BF16, DType::F16, DType::F32, DType::U8];
    let mask_dtype = s.pick(&dtypes);
    let elements = |n: i64| n as usize;
    let operands = [
        (0, b * h * ql * d, variant.dtype),
        (1, b * hkv * kl * d, variant.dtype),
        (2, b * hkv * kl * d, variant.dtype),
        (3, b * h * ql * d, variant.dtype),
        (6, b * h * ql * kl, mask_dtype),
        (7, (ql / 8 + 1) * (kl / 16 + 1), DType::U8),
        (9, h, DType::F32),
        (10, h, DType::F32),
        (11, b * h * ql, DType::F32),
    ];
    for (index, n, dtype) in operands {
        raw.buffers
            .push((index, buffer(s, cpu, elements(n), dtype), 0));
    }
    let mut cu = |len: i64| -> Vec<u8> {
        let mut at = 0u32;
        let mut all = vec![0u32];
        for _ in 0..b {
            at += u32::from(s.byte()) % (len as u32 + 2);
            all.push(at);
        }
        bytemuck::cast_slice(&all).to_vec()
    };
    let (cu_q, cu_k) = (cu(ql), cu(kl));
    raw.bytes.extend([
        (4, as_bytes(&params).to_vec()),
        (5, as_bytes(&mask).to_vec()),
        (8, as_bytes(&extra).to_vec()),
        (12, cu_q),
        (13, cu_k),
    ]);
}

fn other_args(s: &mut Source<'_>, cpu: &MlxDevice, raw: &mut Raw) {
    let (rows, keys) = (1 + u32::from(s.below(40)), 1 + u32::from(s.below(80)));
    let cells = (rows * keys) as usize;
    match raw.kernel {
        names::MASK_FILL => {
            let params = MaskFillParamsGpu {
                seq_len_q: rows,
                seq_len_k: keys,
                window: int(s, 40) as u32,
                causal: int(s, 2) as u32,
                q_abs_offset: int(s, 100) as u32,
            };
            raw.buffers.push((0, buffer(s, cpu, cells, DType::BF16), 0));
            raw.bytes.push((1, as_bytes(&params).to_vec()));
        }
        names::BLK => {
            let params = BlkParamsGpu {
                seq_len_q: rows,
                seq_len_k: keys,
                nq: int(s, 9) as u32,
                nk: int(s, 9) as u32,
                row_stride: i64::from(keys) * i64::from(!s.rarely(4)),
            };
            raw.buffers.push((0, buffer(s, cpu, cells, DType::BF16), 0));
            raw.buffers.push((1, buffer(s, cpu, cells, DType::U8), 0));
            raw.bytes.push((2, as_bytes(&params).to_vec()));
        }
        _ => {
            let kv_heads = 1 + u32::from(s.below(2));
            let params = VecParamsGpu {
                num_heads: kv_heads * (1 + u32::from(s.below(3))),
                num_kv_heads: kv_heads,
                head_dim: s.pick(&[32, 64, 80, 96, 128, 192, 256, 512, 0, 1, 63]),
                kv_seq_len: keys,
                kv_capacity: keys + u32::from(s.below(4)),
                kv_start: u32::from(s.below(100)),
                scale: s.float(true),
                softcap: s.float(true),
                splits: s.pick(&[32, 1, 0, 33]),
                _pad: 0,
            };
            let (heads, d) = (params.num_heads as usize, params.head_dim as usize);
            let cache = (kv_heads * params.kv_capacity) as usize * d;
            let kv = if raw.kernel == names::VEC_F16 {
                DType::F16
            } else {
                DType::F32
            };
            let partials = heads * 32 * (d + 2);
            let f32 = DType::F32;
            let operands: &[(u64, usize, DType)] = match raw.kernel {
                names::VEC_REDUCE => &[(0, partials, f32), (1, heads * d, f32)],
                _ => &[
                    (0, heads * d, f32),
                    (1, cache, kv),
                    (2, cache, kv),
                    (3, partials, f32),
                ],
            };
            for (index, n, dtype) in operands {
                raw.buffers.push((*index, buffer(s, cpu, *n, *dtype), 0));
            }
            let index = if raw.kernel == names::VEC_REDUCE {
                2
            } else {
                4
            };
            raw.bytes.push((index, as_bytes(&params).to_vec()));
        }
    }
}

/// Breaks some of a dispatch: bytes of params, missing, doubled and overlapping bindings, offsets.
fn spoil(s: &mut Source<'_>, raw: &mut Raw) {
    for _ in 0..s.below(4) {
        match s.below(8) {
            0..=3 if !raw.bytes.is_empty() => {
                let which = usize::from(s.byte()) % raw.bytes.len();
                let bytes = &mut raw.bytes[which].1;
                if !bytes.is_empty() {
                    // A whole word, so that sizes and strides change and not only their low bits.
                    let words = (bytes.len() / 4).max(1);
                    let at = usize::from(s.byte()) % words * 4;
                    let value = s
                        .pick(&[0, 1, -1, i32::MAX, i32::MIN, 64, 63, 65])
                        .to_ne_bytes();
                    let end = (at + 4).min(bytes.len());
                    bytes[at..end].copy_from_slice(&value[..end - at]);
                }
            }
            4 if !raw.bytes.is_empty() => {
                let which = usize::from(s.byte()) % raw.bytes.len();
                let len = usize::from(s.byte());
                raw.bytes[which].1.resize(len, 0);
            }
            5 if !raw.buffers.is_empty() => {
                let which = usize::from(s.byte()) % raw.buffers.len();
                match s.below(4) {
                    0 => drop(raw.buffers.remove(which)),
                    1 => raw.buffers[which].2 = u64::from(s.byte()),
                    2 => {
                        let copy = raw.buffers[usize::from(s.byte()) % raw.buffers.len()]
                            .1
                            .clone();
                        raw.buffers[which].1 = copy;
                    }
                    _ => raw.buffers[which].0 = u64::from(s.below(16)),
                }
            }
            6 if !raw.buffers.is_empty() => {
                let which = usize::from(s.byte()) % raw.buffers.len();
                let (offset, n) = (s.word() >> s.below(64), usize::from(s.byte()) * 64);
                raw.buffers[which].1 = raw.buffers[which].1.subview(offset, n);
            }
            _ => {}
        }
    }
}

/// Whether the sizes in the params ask for more work than a fuzzer waits for.
fn endless(raw: &Raw) -> bool {
    let bytes = |index| {
        raw.bytes
            .iter()
            .find(|(i, _)| *i == index)
            .map(|(_, b)| b.as_slice())
    };
    let word = |bytes: &[u8], at: usize| {
        let word = bytes
            .get(at * 4..at * 4 + 4)
            .and_then(|b| b.try_into().ok());
        word.map_or(0, i32::from_ne_bytes)
    };
    let large = |n: i32| n > 4096;
    let cu = [12, 13].into_iter().filter_map(bytes);
    let boundaries = cu.flat_map(|b| (0..b.len() / 4).map(move |i| word(b, i)));
    let sizes: &[usize] = match raw.kernel {
        names::MASK_FILL | names::BLK => &[0, 1],
        names::VEC_F32 | names::VEC_F16 | names::VEC_REDUCE => &[3, 4],
        _ => &[0, 1, 3, 4],
    };
    let params = match raw.kernel {
        names::MASK_FILL => 1,
        names::BLK | names::VEC_REDUCE => 2,
        _ => 4,
    };
    let is_large = bytes(params).is_some_and(|b| sizes.iter().any(|i| large(word(b, *i))));
    // BLK's lengths are unsigned: what is negative here is huge there.
    let is_negative = raw.kernel == names::BLK
        && bytes(params).is_some_and(|b| sizes.iter().any(|i| word(b, *i) < 0));
    is_large || is_negative || boundaries.into_iter().any(large)
}
