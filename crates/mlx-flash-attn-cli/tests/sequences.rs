//! Sequences that differ: a number of keys for each, pages, queries packed over either.

#![allow(clippy::unwrap_used)]

mod common;

use common::{File, assert_run_refused, program, tensor};
use safetensors::tensor::Dtype;

const LENGTHS: [u32; 3] = [20, 7, 0];
const ROW: usize = 64 * 2;

/// K and V `[3, 2, 20, 64]` with the first rows of each sequence as its keys; NaN is in the others.
fn of_lengths(lengths_dtype: Dtype) -> File {
    let shape = [3, 2, 20, 64];
    let mut file = File::qkv([3, 4, 5, 64], shape);
    for name in ["k", "v"] {
        let mut bytes = file.bytes(name).to_vec();
        for (n, row) in bytes.chunks_mut(ROW).enumerate() {
            if n % 20 >= LENGTHS[n / 40] as usize {
                row.copy_from_slice(&half::bf16::NAN.to_le_bytes().repeat(64));
            }
        }
        file = file.with_bytes(name, Dtype::BF16, &shape, bytes);
    }
    let lengths = LENGTHS.iter().flat_map(|n| n.to_le_bytes()).collect();
    file.with_bytes("key_lengths", lengths_dtype, &[3], lengths)
}

/// The same keys in pages of 8 as these tables name them; NaN is in all other slots.
fn in_pages(file: &File, head_major: bool) -> File {
    let table = [5, 0, 3, 2, -1, -1, i32::MAX, -1, 9];
    let mut paged = file.clone();
    for name in ["k", "v"] {
        let mut pool = half::bf16::NAN.to_le_bytes().repeat(6 * 2 * 8 * 64);
        for (b, h, j) in (0..120).map(|n| (n / 40, n / 20 % 2, n % 20)) {
            if j >= LENGTHS[b] as usize {
                continue;
            }
            let (page, slot) = (table[b * 3 + j / 8] as usize, j % 8);
            let to = match head_major {
                true => (page * 2 + h) * 8 + slot,
                false => (page * 8 + slot) * 2 + h,
            };
            let from = (b * 2 + h) * 20 + j;
            let row = &file.bytes(name)[from * ROW..][..ROW];
            pool[to * ROW..][..ROW].copy_from_slice(row);
        }
        let shape = if head_major {
            [6, 2, 8, 64]
        } else {
            [6, 8, 2, 64]
        };
        paged = paged.with_bytes(name, Dtype::BF16, &shape, pool);
    }
    let table = table.iter().flat_map(|page| page.to_le_bytes()).collect();
    paged.with_bytes("block_table", Dtype::I32, &[3, 3], table)
}

/// Q of 3 sequences `[3, H, 5, D]` as rows `[15, H, D]`, which packed queries and seq-major ones share.
fn rows_of_q(file: &File) -> Vec<u8> {
    let row = |b: usize, i: usize, h: usize| (b * 4 + h) * 5 + i;
    let each = (0..60).map(|n| row(n / 20, n / 4 % 5, n % 4));
    each.flat_map(|at| file.bytes("q")[at * ROW..][..ROW].to_vec())
        .collect()
}

#[test]
fn sequences_of_any_length_over_dense_and_paged_keys_give_the_same() {
    let dense = of_lengths(Dtype::U32);
    let q = rows_of_q(&dense);
    let seq_major = in_pages(&dense, false).with_bytes("q", Dtype::BF16, &[3, 5, 4, 64], q.clone());
    let cu: Vec<u8> = [0i32, 5, 10, 15]
        .iter()
        .flat_map(|n| n.to_le_bytes())
        .collect();
    let packed = |file: File| {
        file.with_bytes("q", Dtype::BF16, &[15, 4, 64], q.clone())
            .with_bytes("cu_seqlens_q", Dtype::I32, &[4], cu.clone())
    };
    let cases = [
        (dense.clone(), "head-major"),
        (of_lengths(Dtype::I32), "head-major"),
        (in_pages(&dense, true), "head-major"),
        (seq_major, "seq-major"),
        (packed(dense.clone()), "head-major"),
        (packed(in_pages(&dense, true)), "head-major"),
        (packed(in_pages(&dense, false)), "seq-major"),
    ];
    let dir = tempfile::tempdir().unwrap();
    let [input, output] = ["in", "out"].map(|name| dir.path().join(name));
    let mut outputs = Vec::new();
    for (n, (file, layout)) in cases.into_iter().enumerate() {
        file.write(&input);
        let mut command = program();
        command.args(["run", "--device", "cpu", "--check", "--lse", "--causal"]);
        command.args(["--q-offset", "bottom-right", "--layout", layout]);
        let ran = command
            .arg("-i")
            .arg(&input)
            .arg("-o")
            .arg(&output)
            .output();
        let ran = ran.unwrap();
        assert_eq!(ran.status.code(), Some(0), "{n}: {ran:?}");
        let (_, shape, bytes) = tensor(&output, "o");
        // Head-major outputs in the order of the others.
        let rows = match shape.as_slice() {
            [3, 4, 5, 64] => {
                rows_of_q(&File::default().with_bytes("q", Dtype::BF16, &shape, bytes))
            }
            _ => bytes,
        };
        assert_eq!(tensor(&output, "lse").1.iter().product::<usize>(), 60);
        outputs.push(rows);
    }
    assert!(outputs[0].iter().any(|byte| *byte != 0));
    for (n, rows) in outputs.iter().enumerate() {
        assert!(*rows == outputs[0], "{n}");
    }
}

/// What a file says of sequences that differ.
#[test]
fn wrong_sequences() {
    let lengths = |numbers: &[i32]| numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    let dense = File::qkv([2, 4, 8, 64], [2, 2, 16, 64]);
    let of = |numbers: &[i32]| {
        let shape = [numbers.len()];
        let dense = dense.clone();
        dense.with_bytes("key_lengths", Dtype::I32, &shape, lengths(numbers))
    };
    let table = |pages: &[i32]| {
        let paged = File::qkv([2, 4, 8, 64], [3, 2, 8, 64]);
        let shape = [2, pages.len() / 2];
        paged.with_bytes("block_table", Dtype::I32, &shape, lengths(pages))
    };
    let cases: Vec<(&str, File, &[&str])> = vec![
        (
            "a length too few",
            of(&[3]),
            &["`key_lengths`", "2 sequences", "found 1"],
        ),
        (
            "more than there are rows",
            of(&[3, 17]),
            &["`key_lengths`", "16 keys", "17"],
        ),
        ("a length below 0", of(&[3, -1]), &["`key_lengths`", "-1"]),
        (
            "lengths of another dtype",
            dense.clone().with("key_lengths", Dtype::I64, &[2]),
            &["`key_lengths`", "I32 or U32", "I64"],
        ),
        (
            "a table of one axis",
            table(&[0, 1]).with("block_table", Dtype::I32, &[2]),
            &["`block_table`", "rank 2", "[2]"],
        ),
        (
            "a table of another dtype",
            table(&[0, 1]).with("block_table", Dtype::U32, &[2, 1]),
            &["`block_table`", "I32", "U32"],
        ),
        (
            "a table for another batch size",
            table(&[0, 1]).with("block_table", Dtype::I32, &[1, 2]),
            &["`block_table`", "2 sequences", "found 1"],
        ),
        (
            "no page of the pool",
            table(&[0, 3]),
            &["block_table", "below 3"],
        ),
        (
            "pages of an odd size",
            table(&[0, 1]).with("k", Dtype::BF16, &[3, 2, 9, 64]).with(
                "v",
                Dtype::BF16,
                &[3, 2, 9, 64],
            ),
            &["`k`", "power of two", "found 9"],
        ),
        (
            "lengths beside packed keys",
            of(&[3, 3]).with("cu_seqlens_q", Dtype::I32, &[3]).with(
                "cu_seqlens_k",
                Dtype::I32,
                &[3],
            ),
            &["`key_lengths`", "`cu_seqlens_k`"],
        ),
    ];
    for (what, file, culprits) in cases {
        let dir = tempfile::tempdir().unwrap();
        let input = dir.path().join("in.safetensors");
        file.write(&input);
        for culprit in culprits {
            assert_run_refused(&input, "--device cpu", culprit, what);
        }
    }
}
