//! Attention on the CPU (plain loops, until the tiled kernels arrive).
#![allow(clippy::undocumented_unsafe_blocks, unsafe_op_in_unsafe_fn)]
use super::isa::Isa;
use super::job::Job;
use crate::DType;
unsafe fn load(p: *const u8, dt: DType, i: usize) -> f32 {
    unsafe {
        match dt {
            DType::F32 => *p.cast::<f32>().add(i),
            DType::F16 => (*p.cast::<half::f16>().add(i)).to_f32(),
            DType::BF16 => (*p.cast::<half::bf16>().add(i)).to_f32(),
            _ => f32::from(*p.add(i)),
        }
    }
}
pub(crate) fn run(job: &Job<'_>, _isa: Isa, _threads: usize) {
    let (p, at) = (job.problem, &job.at);
    let sh = p.shape();
    let d = sh.head_dim;
    for b in 0..sh.batch {
        let s = p.sequence(b);
        for h in 0..sh.heads {
            for i in 0..s.query_len {
                let hk = h / p.group();
                let mut sc: Vec<(usize, f32)> = vec![];
                for j in s.visibility.keys(i as i64, s.key_len) {
                    unsafe {
                        let mut dot = 0f32;
                        for x in 0..d {
                            dot += load(at.q, p.dtype(), p.q_at(&s, h, i) + x)
                                * load(at.k, p.kv_dtype(), p.k_at(&s, hk, j) + x);
                        }
                        let mut x = dot * p.scale();
                        if let Some(c) = p.softcap() {
                            x = c * (x / c).tanh();
                        }
                        if let Some(m) = p.mask() {
                            let c = load(at.mask, m.dtype, p.mask_at(&s, h, i) + j);
                            if m.is_bool() {
                                if c == 0.0 {
                                    continue;
                                }
                            } else {
                                x += c;
                            }
                        }
                        if p.has_alibi() {
                            x -= *at.alibi_slopes.add(h)
                                * ((i as i64 + s.visibility.q_offset - j as i64).abs() as f32);
                        }
                        if x > f32::NEG_INFINITY {
                            sc.push((j, x));
                        }
                    }
                }
                let sink = if p.has_sinks() {
                    unsafe { *at.sinks.add(h) }
                } else {
                    f32::NEG_INFINITY
                };
                let m = sc.iter().fold(sink, |m, x| m.max(x.1));
                let sum: f32 = sc.iter().map(|x| (x.1 - m).exp()).sum::<f32>()
                    + if p.has_sinks() { (sink - m).exp() } else { 0.0 };
                let mut o = vec![0f32; d];
                for (j, x) in &sc {
                    let w = (x - m).exp() / sum;
                    for (y, o) in o.iter_mut().enumerate() {
                        *o += w * unsafe { load(at.v, p.kv_dtype(), p.v_at(&s, hk, *j) + y) };
                    }
                }
                for (y, o) in o.iter().enumerate() {
                    let w = p.o_at(&s, h, i) + y;
                    unsafe {
                        match p.dtype() {
                            DType::F32 => *at.o.cast::<f32>().add(w) = *o,
                            DType::F16 => {
                                *at.o.cast::<half::f16>().add(w) = half::f16::from_f32(*o)
                            }
                            _ => *at.o.cast::<half::bf16>().add(w) = half::bf16::from_f32(*o),
                        }
                    }
                }
                if p.has_lse() {
                    unsafe {
                        *at.lse.add(p.lse_at(&s, h, i)) = if sc.is_empty() {
                            f32::NEG_INFINITY
                        } else {
                            m + sum.ln()
                        }
                    }
                }
            }
        }
    }
}
