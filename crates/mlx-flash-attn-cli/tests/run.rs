//! `run`: the main job, and what it leaves.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::process::Stdio;

use common::{File, assert_keys, json_lines, program, real_input, run, tensor};
use safetensors::tensor::Dtype;

#[test]
fn the_main_job_on_real_data() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.safetensors");
    let ran = run([
        "run".as_ref(),
        "-i".as_ref(),
        real_input().as_os_str(),
        "-o".as_ref(),
        out.as_os_str(),
        "--check".as_ref(),
        "--lse".as_ref(),
    ]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("relative error") && ran.stdout.contains("tolerance"));
    let (dtype, shape, bytes) = tensor(&out, "o");
    assert_eq!((dtype, shape), (Dtype::BF16, vec![1, 12, 79, 64]));
    assert!(bytes.iter().any(|b| *b != 0));
    let (dtype, shape, bytes) = tensor(&out, "lse");
    assert_eq!((dtype, shape), (Dtype::F32, vec![1, 12, 79]));
    let finite = |x: &[u8]| f32::from_le_bytes([x[0], x[1], x[2], x[3]]).is_finite();
    assert!(bytes.chunks(4).all(finite));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// Options, and a file that they fit.
#[test]
fn every_option_passes_the_check() {
    let (q, kv) = ([2, 4, 20, 64], [2, 2, 37, 64]);
    let plain = File::qkv(q, kv);
    let in_dtype = |dtype| {
        let file = File::default().with("q", dtype, &q);
        file.with("k", dtype, &kv).with("v", dtype, &kv)
    };
    let cases: Vec<(File, &[&str])> = vec![
        (plain.clone(), &[]),
        (plain.clone(), &["--causal", "--q-offset", "bottom-right"]),
        (plain.clone(), &["--causal", "--q-offset", "-5", "--lse"]),
        (plain.clone(), &["--causal", "--q-offset=17", "--window=9"]),
        (plain.clone(), &["--window", "1", "--q-offset", "0"]),
        (
            plain.clone(),
            &[
                "--window=5",
                "--window-right",
                "2",
                "--q-offset=bottom-right",
            ],
        ),
        (plain.clone(), &["--window-right", "0", "--q-offset", "0"]),
        (plain.clone(), &["--key-len", "20", "--causal", "--lse"]),
        (
            plain.clone().with("mask", Dtype::F16, &[2, 1, 1, 30]),
            &["--key-len", "30", "--lse"],
        ),
        (plain.clone(), &["--softcap", "2.5", "--scale", "-0.3"]),
        (
            in_dtype(Dtype::F16),
            &["--causal", "--q-offset", "0", "--device", "cpu"],
        ),
        (in_dtype(Dtype::F32), &["--lse"]),
        (
            plain.clone().with("mask", Dtype::F32, &[20, 37]),
            &["--causal", "--q-offset", "bottom-right"],
        ),
        (plain.clone().with("mask", Dtype::BOOL, &[20, 37]), &[]),
        (
            plain.clone().with("mask", Dtype::BF16, &[2, 1, 20, 37]),
            &[],
        ),
        (
            plain.clone().with("mask", Dtype::F16, &[1, 4, 20, 37]),
            &["--lse"],
        ),
        (plain.clone().with("mask", Dtype::F32, &[1, 37]), &[]),
        (plain.clone().with("mask", Dtype::U8, &[2, 4, 1, 37]), &[]),
        (
            plain.clone().with("mask", Dtype::BOOL, &[1, 4, 20, 37]),
            &[],
        ),
        (plain.clone().with("sinks", Dtype::F32, &[4]), &["--lse"]),
        (
            plain.clone().with("alibi_slopes", Dtype::F32, &[4]),
            &["--causal", "--q-offset", "bottom-right"],
        ),
    ];
    let dir = tempfile::tempdir().unwrap();
    let [input, output] = ["in", "out"].map(|name| dir.path().join(name));
    for (file, options) in cases {
        file.write(&input);
        let mut command = program();
        command.args(["run", "--check", "--json", "-i"]).arg(&input);
        let ran = command.arg("-o").arg(&output).args(options).output();
        let ran = ran.unwrap();
        let stdout = String::from_utf8(ran.stdout.clone()).unwrap();
        assert_eq!(ran.status.code(), Some(0), "{options:?}: {ran:?}");
        let lines = json_lines(&stdout);
        assert_eq!(lines.len(), 1);
        assert_keys(&lines[0], &["device", "ms", "check"]);
        let check = lines[0]["check"].as_object().unwrap();
        let keys = [
            "rel_fro",
            "rel_tolerance",
            "max_abs",
            "tolerance",
            "lse_error",
            "lse_tolerance",
            "ok",
        ];
        assert_keys(check, &keys);
        assert_eq!(check["ok"], true);
        assert_eq!(tensor(&output, "o").1, q);
    }
}

/// Two sequences and an empty one, in tensors with room for more; what lies past them is NaN.
fn packed() -> File {
    let nan = |rows: usize| half::bf16::NAN.to_le_bytes().repeat(rows * 2 * 64);
    let plain = File::default()
        .with("q", Dtype::BF16, &[12, 4, 64])
        .with("k", Dtype::BF16, &[30, 2, 64])
        .with("v", Dtype::BF16, &[30, 2, 64]);
    let longer = |file: File, name, rows: usize, heads: usize, more: usize| {
        let bytes = [plain.bytes(name), &nan(more * heads / 2)].concat();
        file.with_bytes(name, Dtype::BF16, &[rows + more, heads, 64], bytes)
    };
    let file = longer(File::default(), "q", 12, 4, 4);
    let file = longer(longer(file, "k", 30, 2, 6), "v", 30, 2, 6);
    let cu = |numbers: &[i64]| numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    let narrow = |numbers: &[i32]| numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    file.with_bytes("cu_seqlens_q", Dtype::I64, &[4], cu(&[0, 5, 5, 12]))
        .with_bytes("cu_seqlens_k", Dtype::I32, &[4], narrow(&[0, 10, 10, 30]))
}

#[test]
fn packed_sequences_pass_the_check_and_padding_is_zero() {
    let dir = tempfile::tempdir().unwrap();
    let [input, output] = ["in", "out"].map(|name| dir.path().join(name));
    let cases: [(File, &[&str]); 3] = [
        (packed(), &[]),
        (packed(), &["--causal", "--q-offset", "bottom-right"]),
        (packed().with("mask", Dtype::F32, &[1, 4, 1, 20]), &[]),
    ];
    for (file, options) in cases {
        file.write(&input);
        let mut command = program();
        command.args(["run", "--check", "--lse", "-i"]).arg(&input);
        let ran = command.arg("-o").arg(&output).args(options).output();
        let ran = ran.unwrap();
        assert_eq!(ran.status.code(), Some(0), "{options:?}: {ran:?}");
        let (_, shape, bytes) = tensor(&output, "o");
        assert_eq!(shape, [16, 4, 64]);
        let (used, padding) = bytes.split_at(12 * 4 * 64 * 2);
        assert!(padding.iter().all(|x| *x == 0));
        assert!(used.chunks(2).any(|x| x != [0, 0]));
        let (_, shape, bytes) = tensor(&output, "lse");
        assert_eq!(shape, [4, 16]);
        for (n, x) in bytes.chunks(4).enumerate() {
            let x = f32::from_le_bytes(x.try_into().unwrap());
            assert_eq!(x == f32::NEG_INFINITY, n % 16 >= 12, "{n}: {x}");
        }
    }
}

#[test]
fn empty_work_gives_empty_tensors_or_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let [input, output] = ["in", "out"].map(|name| dir.path().join(name));
    let none = |file: File, name| file.with_bytes(name, Dtype::I32, &[3], vec![0; 12]);
    let files = [
        (File::qkv([0, 4, 3, 64], [0, 2, 5, 64]), vec![0, 4, 3]),
        (File::qkv([2, 4, 0, 64], [2, 2, 5, 64]), vec![2, 4, 0]),
        (File::qkv([2, 4, 3, 64], [2, 2, 0, 64]), vec![2, 4, 3]),
        (
            none(none(packed(), "cu_seqlens_q"), "cu_seqlens_k"),
            vec![4, 16],
        ),
    ];
    for (file, lse) in files {
        file.write(&input);
        let mut command = program();
        command.args(["run", "--check", "--lse", "--causal", "-i"]);
        let ran = command.arg(&input).arg("-o").arg(&output).output().unwrap();
        assert_eq!(ran.status.code(), Some(0), "{lse:?}: {ran:?}");
        let (_, shape, bytes) = tensor(&output, "o");
        assert_eq!(shape, tensor(&input, "q").1);
        assert!(bytes.iter().all(|x| *x == 0));
        let (_, shape, bytes) = tensor(&output, "lse");
        assert_eq!(shape, lse);
        let hidden = f32::NEG_INFINITY.to_le_bytes();
        assert!(bytes.chunks(4).all(|x| x == hidden));
    }
}

/// Past `--key-len` nothing is read: the cache has NaN there.
#[test]
fn rows_past_the_key_length_are_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let [input, output] = ["in", "out"].map(|name| dir.path().join(name));
    let (used, room) = (5, 9);
    let file = File::qkv([1, 1, 3, 32], [1, 1, used, 32]);
    let mut longer = file.clone();
    for name in ["k", "v"] {
        let rest = half::bf16::NAN.to_le_bytes().repeat((room - used) * 32);
        let bytes = [file.bytes(name), &rest].concat();
        longer = longer.with_bytes(name, Dtype::BF16, &[1, 1, room, 32], bytes);
    }
    let mut outputs = Vec::new();
    for (file, options) in [(&file, &[][..]), (&longer, &["--key-len", "5"])] {
        file.write(&input);
        let mut command = program();
        command.args(["run", "-i"]).arg(&input).arg("-o");
        let ran = command.arg(&output).args(options).output().unwrap();
        assert_eq!(ran.status.code(), Some(0), "{ran:?}");
        outputs.push(tensor(&output, "o"));
    }
    assert_eq!(outputs[0], outputs[1]);
}

#[test]
fn without_a_check_there_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let [input, output] = ["in", "out"].map(|name| dir.path().join(name));
    File::qkv([1, 1, 3, 32], [1, 1, 3, 32]).write(&input);
    let ran = run([
        "run".as_ref(),
        "--json".as_ref(),
        "-i".as_ref(),
        input.as_os_str(),
        "-o".as_ref(),
        output.as_os_str(),
    ]);
    let lines = json_lines(&ran.stdout);
    assert_keys(&lines[0], &["device", "ms", "check"]);
    assert!(lines[0]["check"].is_null() && lines[0]["ms"].as_f64() >= Some(0.0));
}

/// A check that can fail: no output is within tolerance of a reference that is not a number.
#[test]
fn a_failed_check_exits_with_1() {
    let dir = tempfile::tempdir().unwrap();
    let [input, output] = ["in", "out"].map(|name| dir.path().join(name));
    let shape = [1, 1, 2, 32];
    let nan = half::bf16::NAN.to_le_bytes().repeat(64);
    File::qkv(shape, shape)
        .with_bytes("v", Dtype::BF16, &shape, nan)
        .write(&input);
    let ran = run([
        "run".as_ref(),
        "--check".as_ref(),
        "--json".as_ref(),
        "-i".as_ref(),
        input.as_os_str(),
        "-o".as_ref(),
        output.as_os_str(),
    ]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert_eq!(json_lines(&ran.stdout)[0]["check"]["ok"], false);
    assert!(ran.stderr.contains("tolerance"), "{ran:?}");
}

#[test]
fn layouts_hold_the_same_numbers() {
    let (batch, heads, len, dim) = (2, 3, 10, 32);
    let dir = tempfile::tempdir().unwrap();
    let [head, seq, out] = ["head", "seq", "out"].map(|name| dir.path().join(name));
    let file = File::qkv([batch, heads, len, dim], [batch, heads, len, dim]);
    file.write(&head);
    // [B, H, L, D] to [B, L, H, D] and back, for rows of D bf16.
    let swap = |bytes: &[u8], a: usize, b: usize| -> Vec<u8> {
        let row = dim * 2;
        let rows: Vec<&[u8]> = bytes.chunks(row).collect();
        let mut swapped = Vec::with_capacity(bytes.len());
        for n in 0..batch {
            for j in 0..b {
                for i in 0..a {
                    swapped.extend_from_slice(rows[(n * a + i) * b + j]);
                }
            }
        }
        swapped
    };
    let shape = [batch, len, heads, dim];
    let mut swapped = File::default();
    for name in ["q", "k", "v"] {
        let bytes = swap(&tensor(&head, name).2, heads, len);
        swapped = swapped.with_bytes(name, Dtype::BF16, &shape, bytes);
    }
    swapped.write(&seq);
    let mut outputs = Vec::new();
    for (input, layout) in [(&head, "head-major"), (&seq, "seq-major")] {
        let mut command = program();
        command.args(["run", "--causal", "--layout", layout, "-i"]);
        let status = command.arg(input).arg("-o").arg(&out).output().unwrap();
        assert!(status.status.success(), "{status:?}");
        outputs.push(tensor(&out, "o"));
    }
    assert_eq!(outputs[1].1, shape);
    assert_eq!(swap(&outputs[1].2, len, heads), outputs[0].2);
}

#[test]
fn a_tensor_that_nothing_reads_is_named_and_harmless() {
    let dir = tempfile::tempdir().unwrap();
    let [input, output] = ["in", "out"].map(|name| dir.path().join(name));
    let file = File::qkv([1, 1, 3, 32], [1, 1, 3, 32]);
    file.with("attn_mask", Dtype::F32, &[3, 3]).write(&input);
    let mut command = program();
    command.args(["run", "-i"]).arg(&input).arg("-o");
    let ran = command.arg(&output).output().unwrap();
    assert_eq!(ran.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&ran.stderr).contains("`attn_mask`"));
}

/// `... | head` closes the pipe early; that is no failure.
#[test]
fn a_closed_pipe_is_no_failure() {
    for args in [
        &["tiles", "--sq", "2000", "--sk", "2000", "--causal"][..],
        &["devices", "--json"],
        &["--help"],
    ] {
        let mut command = program();
        command.args(args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}: {output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
    }
}
