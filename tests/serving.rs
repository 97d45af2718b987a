//! Many sequences in one call: lengths of their own, pages, packed queries over either. Each sequence's rows are those of a
//! call of its own over dense keys, bit for bit on the CPU, whatever lies in rows, pages and table entries that are not its.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/sequences.rs"]
mod sequences;

use common::{
    BUILDS, assert_close, attend, bytes, devices, distance, download, normal, output, upload,
};
use mlx_flash_attn::attention::oracle::{self, Inputs, Precision, Values};
use mlx_flash_attn::attention::tolerance::relative_bound;
use mlx_flash_attn::attention::{MaskSpec, ProblemBuilder, QueryOffset};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{DType, DeviceKind, MlxDevice, MlxError};
use sequences::{Batch, Form, HEADS, Place, integers, values};

/// Each device that serves the form gives each sequence what it has alone; the CPU serves all.
fn agrees(batch: &Batch, form: Form) {
    for device in devices() {
        let Some(got) = batch.together(&device, form) else {
            assert!(device.kind() != DeviceKind::Cpu, "{form:?}");
            continue;
        };
        for (b, (got, want)) in got.iter().zip(batch.alone(&device, form)).enumerate() {
            let what = || {
                format!(
                    "{} {} d{} {form:?}: sequence {b}",
                    device.kind(),
                    batch.dtype,
                    batch.dim
                )
            };
            if device.kind() == DeviceKind::Cpu {
                assert!(*got == want, "{}", what());
            } else if !want.is_empty() {
                let [got, want] = [got, &want].map(|x| values(x, &device, batch.dtype));
                let want: Vec<f64> = want.into_iter().map(f64::from).collect();
                assert!(
                    distance(&got, &want) <= 2.0 * relative_bound(batch.dtype),
                    "{}",
                    what()
                );
            }
        }
    }
}

const PLACES: [Place; 7] = [
    Place::Dense { room: 0 },
    Place::Dense { room: 9 },
    Place::Pages {
        size: 1,
        rows_first: false,
    },
    Place::Pages {
        size: 4,
        rows_first: true,
    },
    Place::Pages {
        size: 16,
        rows_first: false,
    },
    Place::Pages {
        size: 64,
        rows_first: true,
    },
    Place::Pages {
        size: 1024,
        rows_first: false,
    },
];

/// Every place with every bound; dtype, head dim and kind of lengths take turns.
fn every_form(lengths: &[(usize, usize)], packed_queries: bool) {
    let kinds = [
        (DType::F32, 64),
        (DType::BF16, 128),
        (DType::F16, 80),
        (DType::BF16, 512),
        (DType::F32, 40),
    ];
    // Of wide heads a few keys do.
    let long = lengths.iter().any(|(_, keys)| *keys > 1000);
    let kinds = kinds.into_iter().filter(|(_, dim)| !long || *dim < 128);
    let batches: Vec<_> = kinds
        .map(|(dtype, dim)| Batch::new(3, dtype, dim, lengths))
        .collect();
    for (n, place) in PLACES.into_iter().enumerate() {
        for (m, build) in BUILDS.into_iter().enumerate() {
            let form = Form {
                place,
                packed_queries,
                lengths_on_device: (n + m) % 2 == 1,
                build,
            };
            agrees(&batches[(n + 2 * m) % batches.len()], form);
        }
    }
}

#[test]
fn decode_of_sequences_of_any_length() {
    every_form(&[(1, 130), (1, 1), (1, 0), (1, 77), (1, 64)], false);
}

#[test]
fn decode_over_keys_in_chunks() {
    every_form(&[(1, 1300), (1, 3), (1, 1025)], false);
}

#[test]
fn few_and_many_queries_of_sequences_of_any_length() {
    every_form(&[(21, 300), (21, 21), (21, 0)], false);
    every_form(&[(3, 300), (3, 5)], false);
}

#[test]
fn chunks_of_prompts_beside_tokens() {
    every_form(&[(1, 90), (40, 200), (0, 10), (7, 7), (2, 0)], true);
}

/// What a sequence gets does not depend on how its keys are held, where the pages lie, who knows the lengths, or what the
/// other sequences of the batch are.
#[test]
fn bits_do_not_depend_on_place_pages_or_neighbours() {
    let plain = |place, lengths_on_device, build| Form {
        place,
        packed_queries: false,
        lengths_on_device,
        build,
    };
    for (dtype, dim, queries) in [
        (DType::F32, 64, 1),
        (DType::BF16, 128, 1),
        (DType::F16, 80, 40),
        (DType::F32, 40, 40),
    ] {
        let batch = |step, others: [usize; 2]| {
            let lengths = [250, others[0], others[1]].map(|keys| (queries, keys));
            let batch = Batch::new(7, dtype, dim, &lengths);
            Batch { step, ..batch }
        };
        // A softcap alone has kernels of its own on CUDA, but not over pages.
        for build in [BUILDS[0], BUILDS[2], BUILDS[3]] {
            for device in devices() {
                let first = |batch: &Batch, form: Form| {
                    batch.together(&device, form).unwrap().swap_remove(0)
                };
                let dense = plain(PLACES[0], false, build);
                let want = first(&batch(5, [77, 1]), dense);
                for (n, place) in PLACES.into_iter().enumerate() {
                    let form = plain(place, n % 2 == 0, build);
                    for (step, others) in [(5, [77, 1]), (7, [77, 1]), (3, [0, 250])] {
                        let got = first(&batch(step, others), form);
                        assert!(
                            got == want,
                            "{} {dtype} d{dim} {form:?} {others:?}",
                            device.kind()
                        );
                    }
                }
            }
        }
    }
}

/// Where a row sees a key of a table entry that names no page, this is an error on the CPU, and page 0 stands for it on a
/// GPU. Where no row does, the entry may hold anything.
#[test]
fn an_entry_that_names_no_page_is_an_error_or_page_0_where_a_key_is_seen() {
    let batch = Batch::new(5, DType::F32, 64, &[(1, 40)]);
    let windowed = |b: ProblemBuilder| {
        b.causal(true)
            .window(8)
            .query_offset(QueryOffset::BottomRight)
    };
    let form = Form {
        place: Place::Pages {
            size: 4,
            rows_first: false,
        },
        packed_queries: false,
        lengths_on_device: false,
        build: windowed,
    };
    let pool = batch.pool(form.place);
    let problem = batch.problem(form, &pool);
    let (pages, table) = pool.pages.unwrap();
    let run = |device: &MlxDevice, entry: usize, page: i32| {
        let mut table = table.clone();
        table[entry] = page;
        let buffer = |x: &[f32]| upload(device, x, DType::F32, &[x.len()]);
        let (q, k, v) = (buffer(&batch.data[0][0]), buffer(&pool.k), buffer(&pool.v));
        let out = output(device, HEADS * 64, DType::F32);
        let table = integers(device, &table, DType::I32);
        let operands = Operands {
            block_table: Some(&table),
            ..Operands::new(&q, &k, &v, &out)
        };
        let mut encoder = device.command_encoder().unwrap();
        ops::attention(&mut encoder, &problem, &operands).unwrap();
        encoder.commit_and_wait().map(|()| bytes(&out))
    };
    for device in devices() {
        if device.supports(&problem).is_err() {
            continue;
        }
        // The window shows keys 32 to 39: entries 8 and 9.
        let want = run(&device, 9, table[9]).unwrap();
        for hidden in [-1, i32::MAX] {
            assert_eq!(run(&device, 7, hidden).unwrap(), want);
        }
        for wrong in [-1, i32::MAX, i32::try_from(pages.count).unwrap()] {
            let ran = run(&device, 8, wrong);
            if device.kind() != DeviceKind::Cpu {
                assert_eq!(ran, run(&device, 8, 0), "{wrong}");
                continue;
            }
            let error = ran.unwrap_err();
            assert!(
                matches!(
                    error,
                    MlxError::InvalidArgument(_) | MlxError::CommandBufferError(_)
                ),
                "{error}"
            );
            assert!(error.to_string().contains("block_table"), "{error}");
        }
    }
}

/// A mask of each batch entry, sinks, slopes and the log-sum-exp, over pages and lengths from the device.
#[test]
fn masks_sinks_and_slopes_follow_each_length() {
    for queries in [1, 5, 30] {
        let batch = Batch::new(
            9,
            DType::F32,
            64,
            &[(queries, 150), (queries, 33), (queries, 0)],
        );
        let form = Form {
            place: Place::Pages {
                size: 8,
                rows_first: false,
            },
            packed_queries: false,
            lengths_on_device: true,
            build: |b| {
                b.causal(true)
                    .query_offset(QueryOffset::BottomRight)
                    .mask(MaskSpec {
                        batch_stride: HEADS * 150,
                        head_stride: 150,
                        row_stride: 0,
                        ..MaskSpec::plane(DType::F32, 150)
                    })
                    .sinks(true)
                    .alibi(true)
                    .lse(true)
            },
        };
        let pool = batch.pool(form.place);
        let problem = batch.problem(form, &pool);
        let (_, table) = pool.pages.unwrap();
        let q: Vec<f32> = batch.data.iter().flat_map(|[q, ..]| q.clone()).collect();
        let mut mask = normal(10, 3 * HEADS * 150, DType::F32);
        mask.iter_mut()
            .step_by(7)
            .for_each(|x| *x = f32::NEG_INFINITY);
        let (sinks, slopes) = ([0.5, -1.0, 2.0, 0.0], [0.5, 0.25, 0.125, 0.0625]);
        let lengths = [150, 33, 0];
        let want = oracle::attention(
            &problem,
            &Inputs {
                mask: Some(Values::F32(&mask)),
                sinks: Some(&sinks),
                alibi_slopes: Some(&slopes),
                block_table: Some(&table),
                key_lengths: Some(&lengths),
                ..Inputs::new(Values::F32(&q), Values::F32(&pool.k), Values::F32(&pool.v))
            },
            Precision::Exact,
        )
        .unwrap();
        for device in devices() {
            if device.supports(&problem).is_err() {
                assert!(device.kind() != DeviceKind::Cpu);
                continue;
            }
            let buffer = |x: &[f32]| upload(&device, x, DType::F32, &[x.len()]);
            let (q, k, v, mask) = (buffer(&q), buffer(&pool.k), buffer(&pool.v), buffer(&mask));
            let (sinks, slopes) = (buffer(&sinks), buffer(&slopes));
            let (table, lengths) = (
                integers(&device, &table, DType::I32),
                integers(&device, &lengths, DType::U32),
            );
            let rows = 3 * HEADS * queries;
            let (out, lse) = (
                output(&device, rows * 64, DType::F32),
                output(&device, rows, DType::F32),
            );
            let operands = Operands {
                mask: Some(&mask),
                sinks: Some(&sinks),
                alibi_slopes: Some(&slopes),
                lse: Some(&lse),
                block_table: Some(&table),
                key_lengths: Some(&lengths),
                ..Operands::new(&q, &k, &v, &out)
            };
            attend(&device, &problem, &operands);
            let what = format!("{} {queries} queries", device.kind());
            assert_close(&what, &download(&out), &want.o, DType::F32);
            for (got, want) in download(&lse).iter().zip(&want.lse) {
                let (got, want) = (f64::from(*got), *want);
                assert!(
                    got == want || (got - want).abs() < 1e-4,
                    "{what}: {got} for {want}"
                );
            }
        }
    }
}
