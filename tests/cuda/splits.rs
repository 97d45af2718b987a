//! Few queries over many keys, which are cut into parts.

use mlx_flash_attn::attention::tolerance::relative_bound;
use mlx_flash_attn::attention::{Problem, QueryOffset};
use mlx_flash_attn::ops::Operands;
use mlx_flash_attn::{CpuOptions, DType, MlxDevice};

use crate::common::{Qkv, attend, bytes, download, output, shape, upload};
use crate::{BF16, cuda, distance, record};

#[test]
fn the_same_bits_each_time_with_and_without_splits() {
    let Some(device) = cuda() else { return };
    for (dtype, ql, kl, dim) in [
        (BF16, 1, 9_001, 128),
        (DType::F16, 3, 5_000, 256),
        (BF16, 2, 3_000, 512),
        (DType::F32, 1, 4_097, 64),
        (BF16, 700, 700, 128),
    ] {
        let data = Qkv::new(2, dtype, shape([1, 4, 2], (ql, kl), dim));
        let problem = data
            .builder()
            .causal(true)
            .query_offset(QueryOffset::BottomRight);
        let problem = problem.build().unwrap();
        let (first, got) = data.run(&device, &problem);
        for _ in 0..5 {
            assert_eq!(
                data.run(&device, &problem).0,
                first,
                "{dtype} {ql} {kl} {dim}"
            );
        }
        let cpu = MlxDevice::cpu(CpuOptions::default()).unwrap();
        let (_, want) = data.run(&cpu, &problem);
        let off = distance(&got, &want);
        assert!(
            off < 2.0 * relative_bound(dtype),
            "{dtype} {ql} {kl} {dim}: {off}"
        );
    }
}

/// Dispatches of one command have one memory for the results of their parts.
#[test]
fn splits_of_one_command_keep_to_themselves() {
    let Some(device) = cuda() else { return };
    let runs: Vec<_> = (0..9)
        .map(|i| {
            let (rows, keys) = ([1, 9, 3][i % 3], 9_000 - 500 * i);
            let data = Qkv::new(20 + i as u64, BF16, shape([1, 4, 2], (rows, keys), 128));
            let problem = if rows == 3 {
                Problem::varlen(BF16, 4, 2, 128, &[0, 1, 3], &[0, 2_000, keys as u32])
            } else {
                data.builder()
            };
            let problem = problem.build().unwrap();
            let want = data.run(&device, &problem).0;
            (problem, data.buffers(&device), want)
        })
        .collect();
    let mut encoder = device.command_encoder().unwrap();
    for (problem, buffers, _) in &runs {
        record(&mut encoder, problem, buffers);
    }
    encoder.commit_and_wait().unwrap();
    for (i, (_, buffers, want)) in runs.iter().enumerate() {
        assert!(bytes(&buffers[3]) == *want, "dispatch {i}");
    }
}

#[test]
fn few_queries_over_many_keys_keep_sinks_masks_and_the_log_sum_exp() {
    let Some(device) = cuda() else { return };
    let cpu = MlxDevice::cpu(CpuOptions::default()).unwrap();
    let s = shape([2, 4, 2], (2, 6_000), 128);
    let data = Qkv::new(3, BF16, s);
    let problem = data
        .builder()
        .softcap(5.0)
        .sinks(true)
        .lse(true)
        .alibi(true);
    let problem = problem
        .window(4_000)
        .query_offset(QueryOffset::BottomRight)
        .causal(true);
    let problem = problem.build().unwrap();
    let run = |device: &MlxDevice| {
        let [q, k, v, out] = data.buffers(device);
        let sinks = upload(device, &[0.5, -1.0, 2.0, 0.0], DType::F32, &[4]);
        let slopes = upload(device, &[0.01, 0.001, 0.0, 0.1], DType::F32, &[4]);
        let lse = output(device, 2 * 4 * 2, DType::F32);
        let operands = Operands {
            sinks: Some(&sinks),
            alibi_slopes: Some(&slopes),
            lse: Some(&lse),
            ..Operands::new(&q, &k, &v, &out)
        };
        attend(device, &problem, &operands);
        (download(&out), download(&lse))
    };
    let ((got, got_lse), (want, want_lse)) = (run(&device), run(&cpu));
    assert!(distance(&got, &want) < 2.0 * relative_bound(BF16));
    assert!(distance(&got_lse, &want_lse) < 1e-5);
}
