//! Empty work is work: without batches or queries there is nothing to write, without keys every row is
//! zero with a log-sum-exp of -inf.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Qkv, attend, devices, download, normal, output, shape, upload};
use mlx_flash_attn::attention::{MaskSpec, Problem, ProblemBuilder, QueryOffset, Role};
use mlx_flash_attn::ops::Operands;
use mlx_flash_attn::{DType, MlxBuffer, MlxDevice};

/// A buffer for an operand: poisoned where it is written, without bytes where it has no elements.
fn operand(device: &MlxDevice, problem: &Problem, role: Role) -> Option<MlxBuffer> {
    let spec = problem.operand(role)?;
    Some(match (spec.elements, spec.dtype) {
        (0, DType::F32) => device
            .buffer_from_slice::<f32>(&[], spec.dtype, vec![0])
            .unwrap(),
        (0, DType::U8) => device
            .buffer_from_slice::<u8>(&[], spec.dtype, vec![0])
            .unwrap(),
        (0, _) => device
            .buffer_from_slice::<u16>(&[], spec.dtype, vec![0])
            .unwrap(),
        (n, dtype) if role.is_output() => output(device, n, dtype),
        (n, dtype) => upload(device, &normal(7, n, dtype), dtype, &[n]),
    })
}

/// Runs a problem of no keys or no rows, and holds what it wrote against zero and -inf.
fn check(what: &str, builder: ProblemBuilder) {
    let problem = builder.lse(true).build().unwrap();
    for device in devices() {
        let made = Role::ALL.map(|role| operand(&device, &problem, role));
        let at = |role: Role| made[role as usize].as_ref();
        let [q, k, v, out] =
            [Role::Query, Role::Key, Role::Value, Role::Output].map(|role| at(role).unwrap());
        let operands = Operands {
            mask: at(Role::Mask),
            tile_classes: at(Role::TileClasses),
            sinks: at(Role::Sinks),
            alibi_slopes: at(Role::AlibiSlopes),
            lse: at(Role::Lse),
            ..Operands::new(q, k, v, out)
        };
        attend(&device, &problem, &operands);
        let what = format!("{what} on {}", device.kind());
        let (o, lse) = (download(out), download(operands.lse.unwrap()));
        assert_eq!(
            o.len(),
            problem.operand(Role::Output).unwrap().elements,
            "{what}"
        );
        assert!(o.iter().all(|x| *x == 0.0), "{what}");
        assert!(lse.iter().all(|x| *x == f32::NEG_INFINITY), "{what}");
    }
}

fn dense(batch: usize, lengths: (usize, usize)) -> ProblemBuilder {
    Problem::builder(DType::F16, shape([batch, 4, 2], lengths, 64))
}

#[test]
fn no_batches_are_served() {
    check("no batch", dense(0, (5, 7)));
    check("no batch, causal", dense(0, (5, 7)).causal(true));
}

#[test]
fn no_queries_are_served() {
    check("no queries", dense(2, (0, 7)));
    check(
        "no queries, a window",
        dense(2, (0, 7)).window(2).sinks(true),
    );
}

#[test]
fn no_keys_give_zeros() {
    check("no keys", dense(2, (5, 0)));
    check("one query, no keys", dense(3, (1, 0)));
    let all = dense(2, (5, 0))
        .causal(true)
        .query_offset(QueryOffset::BottomRight)
        .window(3)
        .alibi(true)
        .softcap(5.0)
        .sinks(true)
        .key_capacity(16);
    check("no keys, with everything", all.clone());
    check(
        "and a mask",
        all.clone().mask(MaskSpec::plane(DType::U8, 0)),
    );
    check(
        "and classes",
        all.mask(MaskSpec::plane(DType::F16, 0)).tile_classes(true),
    );
    let wide = shape([1, 2, 1], (40, 0), 256);
    check(
        "f16 keys under f32",
        Problem::builder(DType::F32, wide).kv_dtype(DType::F16),
    );
    check("neither", dense(2, (0, 0)));
}

#[test]
fn packed_sequences_that_are_all_empty_are_served() {
    let packed = |q: &[u32], k: &[u32]| Problem::varlen(DType::BF16, 4, 2, 128, q, k);
    check("no sequence", packed(&[0], &[0]));
    check("no row at all", packed(&[0, 0, 0], &[0, 0, 0]));
    check("no query", packed(&[0, 0, 0], &[0, 3, 5]));
    check("no key", packed(&[0, 3, 3, 40], &[0, 0, 0, 0]));
    let sinks = packed(&[0, 3, 40], &[0, 0, 0]).sinks(true).alibi(true);
    check("no key, with sinks", sinks.causal(true));
    check(
        "a sequence without queries beside one without keys",
        packed(&[0, 0, 9], &[0, 7, 7]),
    );
}

#[test]
fn rows_between_the_rows_of_a_keyless_output_stay_as_they_are() {
    for device in devices() {
        let data = Qkv::new(3, DType::F32, shape([1, 2, 1], (4, 1), 32));
        let [q, k, v, _] = data.buffers(&device);
        let gapped = mlx_flash_attn::attention::Strides {
            batch: 0,
            head: 4 * 40,
            seq: 40,
        };
        let problem = Problem::builder(DType::F32, shape([1, 2, 1], (4, 0), 32))
            .strides(Role::Output, gapped)
            .build()
            .unwrap();
        let out = output(&device, 8 * 40, DType::F32);
        // K and V have rows, none of which belong to the problem.
        attend(&device, &problem, &Operands::new(&q, &k, &v, &out));
        for row in download(&out).chunks(40) {
            assert!(row[..32].iter().all(|x| *x == 0.0), "{}", device.kind());
            assert!(row[32..].iter().all(|x| x.is_nan()), "{}", device.kind());
        }
    }
}
