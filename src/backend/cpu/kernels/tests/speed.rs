//! Times of the shapes that the kernels are judged by. Not a check: run it in a release build with
//! `--ignored --nocapture`. `SPEED=Abf16,C` picks rows and `THREADS=1` sets the threads.

use std::io::Write;
use std::time::Instant;

use super::harness::{Data, build, isas, shape};
use crate::DType;
use crate::attention::{MaskSpec, Problem};
use crate::backend::cpu::kernels::Team;

#[test]
#[ignore = "a measurement"]
fn judged_shapes() {
    let rows = [
        ("A", 1, (16, 8), 1024, 256, true, 0),
        ("B", 1, (16, 8), 1024, 256, false, 0),
        ("C", 1, (8, 8), 512, 512, false, 0),
        ("D", 4, (12, 12), 512, 64, false, 0),
        ("E", 1, (32, 8), 2048, 128, true, 0),
        ("F", 1, (12, 12), 128, 64, false, 0),
        ("G", 1, (16, 8), 2048, 256, true, 256),
    ];
    let threads = std::env::var("THREADS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(2);
    let wanted = std::env::var("SPEED").unwrap_or_default();
    let only = |name: &str| wanted.is_empty() || wanted.split(',').any(|w| w == name);
    for (name, batch, heads, len, dim, causal, window) in rows {
        for dtype in [DType::BF16, DType::F32, DType::F16] {
            if !only(name) && !only(&format!("{name}{dtype}")) {
                continue;
            }
            let mut builder =
                Problem::builder(dtype, shape(batch, heads, (len, len), dim)).causal(causal);
            if window > 0 {
                builder = builder.window(window);
            }
            let data = Data::new(build(builder), 1);
            for isa in isas().filter(|isa| isas().count() == 1 || isa.name() != "portable") {
                if isa.name().ends_with("bf16") && dtype != DType::BF16 {
                    continue;
                }
                let (ms, least) = data.time(isa, threads, if name == "F" { 2000 } else { 15 });
                let gflops = data.problem.flops() / ms / 1e6;
                writeln!(
                    std::io::stderr(),
                    "{name} {dtype} {isa}: median {ms:.3} ms, least {least:.3}, {gflops:.0} GF/s"
                )
                .unwrap();
            }
        }
    }
}

/// Scores far apart, whose probabilities are too small for normal numbers, against scores of deviation
/// 1, in turns: `cargo test --release --lib far_apart -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn scores_far_apart_take_no_longer() {
    let rounds = 25;
    let sizes = shape(1, (8, 8), (512, 512), 64);
    for dtype in [DType::BF16, DType::F32, DType::F16] {
        let problem = || Problem::builder(dtype, sizes);
        let plain = Data::new(build(problem()), 1);
        let spread = Data::new(build(problem().scale(36.0 / 8.0)), 1);
        let mut bloom = Data::new(build(problem().alibi(true)), 1);
        bloom.set_slopes(|h| (-(h as f32 + 1.0)).exp2());
        let mut bias = Data::new(build(problem().mask(MaskSpec::plane(DType::F32, 512))), 1);
        bias.set_mask(|_, i, j| -(i.abs_diff(j) as f64));
        let mut mild = bias.clone();
        mild.set_mask(|_, i, j| ((i * 7 + j * 3) % 11) as f64 / 10.0);
        let forms = [
            ("plain", &plain),
            ("spread of 36", &spread),
            ("BLOOM slopes", &bloom),
            ("bias of 0 to 1", &mild),
            ("bias of -|i - j|", &bias),
        ];
        for isa in isas() {
            if isa.name().ends_with("bf16") && dtype != DType::BF16 {
                continue;
            }
            let mut times = vec![vec![]; forms.len()];
            for _ in 0..rounds {
                for (times, (_, data)) in times.iter_mut().zip(&forms) {
                    times.push(data.time(isa, 1, 1).0);
                }
            }
            for times in &mut times {
                times.sort_by(f64::total_cmp);
            }
            let (median, least) = (times[0][rounds / 2], times[0][0]);
            for ((name, _), times) in forms.iter().zip(&times) {
                writeln!(
                    std::io::stderr(),
                    "{isa} {dtype} {name}: median {:.2} ms, {:.2} of plain; least {:.2}, {:.2} of plain",
                    times[rounds / 2],
                    times[rounds / 2] / median,
                    times[0],
                    times[0] / least
                )
                .unwrap();
            }
        }
    }
}

impl Data {
    /// Median and least milliseconds of one run on `threads` threads.
    fn time(&self, isa: crate::backend::cpu::isa::Isa, threads: usize, runs: usize) -> (f64, f64) {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        self.with_job(|job| {
            pool.install(|| {
                let mut times: Vec<f64> = (0..runs + 2)
                    .map(|_| {
                        let start = Instant::now();
                        super::super::run(
                            job,
                            isa,
                            Team {
                                pool: None,
                                threads,
                            },
                        )
                        .unwrap();
                        start.elapsed().as_secs_f64() * 1e3
                    })
                    .skip(2)
                    .collect();
                times.sort_by(f64::total_cmp);
                (times[runs / 2], times[0])
            })
        })
    }
}
