//! Wrong command lines and wrong files: each ends with status 2 and a message that names the
//! culprit, and leaves nothing behind.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;

use common::{File, assert_refused, assert_run_refused, program, run, words};
use safetensors::tensor::Dtype;

#[test]
fn wrong_command_lines() {
    let cases = [
        ("", "Usage"),
        ("frobnicate", "frobnicate"),
        ("run", "--input"),
        ("run -i x.safetensors", "--output"),
        ("run -i x -o y --window 0", "--window"),
        ("run -i x -o y --window -3", "--window"),
        ("run -i x -o y --softcap -1", "--softcap"),
        ("run -i x -o y --softcap 0", "--softcap"),
        ("run -i x -o y --softcap inf", "--softcap"),
        ("run -i x -o y --scale nan", "--scale"),
        ("run -i x -o y --scale 1e39", "--scale"),
        ("run -i x -o y --q-offset 3000000000", "--q-offset"),
        ("run -i x -o y --q-offset top", "--q-offset"),
        ("run -i x -o y --layout columns", "--layout"),
        ("run -i x -o y --device tpu", "--device"),
        ("run -i x -o y --unknown", "--unknown"),
        ("verify --device abacus", "--device"),
        ("verify --quick --device cpu --only d65-", "--only"),
        (
            "verify --quick --device cpu --only d65- --part 2/3",
            "--only",
        ),
        ("bench", "--shape"),
        ("bench --shape 1,8,2,128,64", "got 5"),
        ("bench --shape 1,8,2,128,128,64,1", "got 7"),
        ("bench --shape 1,8,3,128,128,64", "HKV (3)"),
        ("bench --shape 1,8,2,0,128,64", "SQ"),
        ("bench --shape 1,8,2,128,-1,64", "SK"),
        ("bench --shape 1,8,2,128,1e3,64", "SK"),
        ("bench --shape 1,8,2,128,99999999999999999999,64", "SK"),
        ("bench --shape 1,8,2,128,128,65", "head_dim"),
        (
            "bench --shape 2147483647,2147483647,1,2147482624,1,64",
            "overflow",
        ),
        ("bench --shape 1,1,1,8,8,64 --dtype int8", "--dtype"),
        ("bench --shape 1,1,1,8,8,64 --window 0", "--window"),
        (
            "bench --shape 1,1,1,8,8,64 --plot /no/such/folder/a.svg",
            "/no/such/folder",
        ),
        ("devices --quick", "--quick"),
        ("run -i x -o y --window-right -1", "--window-right"),
        ("run -i x -o y --key-len 0", "--key-len"),
        ("bench --shape 1,1,1,8,8,64 --mask int8", "--mask"),
        ("bench --shape 1,1,1,8,8,64 --mask f32 --mask-axes x", "bhq"),
        ("bench --shape 1,1,1,8,8,64 --mask-axes b", "--mask"),
        (
            "bench --shape 1,1,1,8,8,64 --key-capacity 7",
            "key_capacity",
        ),
        ("bench --shape 1,1,1,8,8,64 --kv f16", "K and V"),
        ("bench --shape 1,1,1,8,8,48 --kv q8_0", "whole blocks"),
        ("bench --shape 1,1,1,8,8,64 --kv q5_0", "--kv"),
        (
            "bench --shape 1,1,1,8,8,64 --cu-seqlens-q 0,8",
            "--cu-seqlens-k",
        ),
        (
            "bench --shape 1,1,1,8,8,64 --cu-seqlens-q 0,9 --cu-seqlens-k 0,8",
            "cu_seqlens_q",
        ),
        (
            "bench --shape 2,1,1,8,8,64 --cu-seqlens-q 0,8 --cu-seqlens-k 0,8",
            "expected B 1",
        ),
        ("bench --shape 1,1,1,8,8,64 --paged 24", "--paged"),
        (
            "bench --shape 1,1,1,8,8,64 --paged 4 --key-capacity 9",
            "--key-capacity",
        ),
        ("bench --shape 2,1,1,8,8,64 --lengths 8", "--lengths"),
        ("bench --shape 2,1,1,8,8,64 --lengths 8,9", "SK = 8"),
        ("bench --shape 2,1,1,8,8,64 --lengths 8,x", "--lengths"),
        (
            "bench --shape 2,1,1,8,8,64 --lengths 8,8 --cu-seqlens-q 0,8",
            "expected B 1",
        ),
        (
            "bench --shape 1,1,1,8,8,64 --paged 4 --cu-seqlens-q 0,9",
            "at most 8 rows",
        ),
        (
            "bench --shape 1,1,1,8,8,64 --cu-seqlens-q 0,6,4 --cu-seqlens-k 0,4,8",
            "never fall",
        ),
        ("tiles --sq 128", "--sk"),
        // Positions count from the corner that the caller names.
        ("tiles --sq 128 --sk 256 --causal", "--q-offset"),
        ("tiles --sq 0 --sk 128", "--sq"),
        ("tiles --sq 128 --sk 2147483648", "--sk"),
        ("tiles --sq 128 --sk 128 --head-dim 100", "--head-dim"),
        ("tiles --sq 128 --sk 128 --window 0", "--window"),
        ("tiles --sq 8 --sk 8 --svg /no/such/folder/a.svg", "folder"),
    ];
    for (line, culprit) in cases {
        let ran = words(line);
        if line.is_empty() {
            // The one case that answers with help.
            assert_eq!(ran.code, Some(2));
            assert!(ran.stderr.contains(culprit) && ran.stdout.is_empty());
        } else {
            assert_refused(&ran, culprit, line);
        }
    }
}

/// A device that this build lacks: the message names the feature to build with.
#[test]
fn devices_that_are_not_in_this_build() {
    let mut absent = Vec::new();
    if !cfg!(feature = "cuda") {
        absent.push(("cuda", "--features cuda"));
    }
    if !cfg!(feature = "emulator") {
        absent.push(("emulator", "--features emulator"));
    }
    if !cfg!(target_vendor = "apple") {
        absent.push(("metal", "Apple"));
    }
    for (device, remedy) in absent {
        for line in [
            "run -i x -o y --device",
            "verify --device",
            "bench --shape 1,1,1,8,8,64 --device",
        ] {
            assert_refused(&words(&format!("{line} {device}")), remedy, line);
        }
        let mut command = program();
        command.args(["bench", "--shape", "1,1,1,8,8,64"]);
        let output = command.env("MLX_FLASH_DEVICE", device).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{device}");
        assert!(stderr.contains(remedy), "{stderr}");
    }
}

/// No machine has both kinds of GPU.
#[test]
fn devices_that_are_not_here() {
    let listed = common::json_lines(&words("devices --json").stdout);
    let absent = listed
        .iter()
        .filter(|line| line["available"] == false)
        .filter_map(|line| line["device"].as_str())
        .find(|name| ["metal", "cuda"].contains(name))
        .unwrap();
    for line in [
        "run -i x -o y --device",
        "verify --device",
        "bench --shape 1,1,1,8,8,64 --device",
    ] {
        assert_refused(&words(&format!("{line} {absent}")), absent, line);
    }
}

/// More memory than there is: told where the system says how much that is.
#[cfg(target_os = "linux")]
#[test]
fn a_benchmark_too_large_for_memory_is_refused() {
    let line = "bench --shape 1,1,1,2147482624,2147482624,512 --dtype f32";
    assert_refused(&words(line), "memory", line);
}

#[test]
fn wrong_devices_in_the_environment() {
    for (variable, value) in [
        ("MLX_FLASH_DEVICE", "abacus"),
        ("MLX_FLASH_CPU_ISA", "mmx"),
        ("MLX_FLASH_THREADS", "0"),
    ] {
        let mut command = program();
        command.args(["bench", "--shape", "1,1,1,8,8,32"]);
        if variable != "MLX_FLASH_DEVICE" {
            command.args(["--device", "cpu"]);
        }
        let output = command.env(variable, value).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{variable}");
        assert!(stderr.contains(variable), "{stderr}");
    }
}

#[test]
fn wrong_tensors() {
    let (q, kv) = ([2, 4, 8, 64], [2, 2, 9, 64]);
    let good = File::qkv(q, kv);
    let bf = Dtype::BF16;
    let cases: Vec<(&str, File, &str, &[&str])> = vec![
        ("no k", good.clone().without("k"), "", &["`k`", "`q`, `v`"]),
        ("no tensors", File::default(), "", &["`q`", "no tensors"]),
        (
            "rank 3",
            good.clone().with("q", bf, &[4, 8, 64]),
            "",
            &["`q`", "rank 4", "[4, 8, 64]"],
        ),
        (
            "rank 5",
            good.clone().with("v", bf, &[1, 2, 2, 9, 64]),
            "",
            &["`v`", "rank 4"],
        ),
        (
            "integers",
            good.clone().with("q", Dtype::I32, &q),
            "",
            &["`q`", "BF16 or F16 or F32", "I32"],
        ),
        (
            "float64",
            File::default()
                .with("q", Dtype::F64, &q)
                .with("k", Dtype::F64, &kv)
                .with("v", Dtype::F64, &kv),
            "",
            &["`q`", "F64"],
        ),
        (
            "k in another dtype",
            good.clone().with("k", Dtype::F32, &kv),
            "",
            &["`k`", "BF16", "F32"],
        ),
        (
            "v in another dtype",
            good.clone().with("v", Dtype::F16, &kv),
            "",
            &["`v`", "F16"],
        ),
        (
            "another batch size",
            good.clone().with("k", bf, &[1, 2, 9, 64]),
            "",
            &["`k`", "batch size 2", "found 1"],
        ),
        (
            "another head dim",
            good.clone().with("k", bf, &[2, 2, 9, 32]),
            "",
            &["`k`", "head dim 64", "found 32"],
        ),
        (
            "v unlike k",
            good.clone().with("v", bf, &[2, 2, 10, 64]),
            "",
            &["`v`", "[2, 2, 9, 64]", "[2, 2, 10, 64]"],
        ),
        (
            "heads that do not divide",
            File::qkv([2, 4, 8, 64], [2, 3, 9, 64]),
            "",
            &["`k`", "divides the 4", "found 3"],
        ),
        (
            "a head dim without kernels",
            File::qkv([1, 1, 8, 36], [1, 1, 8, 36]),
            "",
            &["head_dim", "36"],
        ),
        (
            "the other layout",
            File::qkv([2, 8, 4, 64], [2, 9, 2, 64]),
            "",
            &["`k`", "--layout seq-major"],
        ),
        (
            "the other layout, told by the mask",
            File::qkv(q, [2, 4, 9, 64]).with("mask", bf, &[8, 9]),
            "--layout seq-major",
            &["--layout head-major"],
        ),
        (
            "a mask of one key",
            good.clone().with("mask", bf, &[8, 1]),
            "",
            &["`mask`", "[8 or 1, 9]", "[8, 1]"],
        ),
        (
            "a mask for another batch size",
            good.clone().with("mask", bf, &[3, 1, 8, 9]),
            "",
            &["`mask`", "[2 or 1, 4 or 1, 8 or 1, 9]"],
        ),
        (
            "a mask of rank 3",
            good.clone().with("mask", bf, &[4, 8, 9]),
            "",
            &["`mask`", "[4, 8, 9]"],
        ),
        (
            "a mask of integers",
            good.clone().with("mask", Dtype::I64, &[8, 9]),
            "",
            &["`mask`", "BOOL", "I64"],
        ),
        (
            "a sink for each kv head",
            good.clone().with("sinks", Dtype::F32, &[2]),
            "",
            &["`sinks`", "[4]", "[2]"],
        ),
        (
            "slopes of another number",
            good.clone().with("alibi_slopes", Dtype::F32, &[4, 1]),
            "",
            &["`alibi_slopes`", "[4]", "[4, 1]"],
        ),
        (
            "positions that count from no named corner",
            good.clone().with("alibi_slopes", Dtype::F32, &[4]),
            "",
            &[
                "--q-offset bottom-right",
                "--q-offset 0",
                "8 queries",
                "9 keys",
            ],
        ),
        (
            "a causal bound from no named corner",
            good.clone(),
            "--causal",
            &["--q-offset bottom-right", "--q-offset 0"],
        ),
        (
            "more keys than rows",
            good.clone(),
            "--key-len 10",
            &["--key-len", "at most the 9 rows", "10"],
        ),
        (
            "packed sequences of rank 4",
            good.clone().with("cu_seqlens_q", Dtype::I32, &[2]).with(
                "cu_seqlens_k",
                Dtype::I32,
                &[2],
            ),
            "",
            &["`q`", "rank 3", "[rows, H, D]"],
        ),
        (
            "boundaries of queries alone",
            good.clone().with("cu_seqlens_q", Dtype::I32, &[2]),
            "",
            &["`cu_seqlens_k`", "with `cu_seqlens_q`"],
        ),
        (
            "boundaries of floats",
            good.clone().with("cu_seqlens_q", Dtype::F32, &[2]).with(
                "cu_seqlens_k",
                Dtype::I32,
                &[2],
            ),
            "",
            &["`cu_seqlens_q`", "U32", "F32"],
        ),
        (
            "half-precision sinks",
            good.clone().with("sinks", bf, &[4]),
            "",
            &["`sinks`", "F32", "BF16"],
        ),
    ];
    for (what, file, options, culprits) in cases {
        let dir = tempfile::tempdir().unwrap();
        let input = dir.path().join("in.safetensors");
        file.write(&input);
        for culprit in culprits {
            assert_run_refused(&input, options, culprit, what);
        }
    }
}

#[test]
fn wrong_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let good = path("good.safetensors");
    File::qkv([1, 1, 4, 32], [1, 1, 4, 32]).write(&good);
    let bytes = fs::read(&good).unwrap();
    let mut swollen = bytes.clone();
    swollen.push(0);
    let mut endless = bytes.clone();
    endless[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let contents: [(&str, &[u8]); 7] = [
        ("empty", b""),
        ("text", b"this is no safetensors file at all"),
        ("cut within the header's length", &bytes[..5]),
        ("cut within the header", &bytes[..40]),
        ("cut within the data", &bytes[..bytes.len() - 1]),
        ("a byte too many", &swollen),
        ("a header without end", &endless),
    ];
    for (what, contents) in contents {
        let input = path("wrong.safetensors");
        fs::write(&input, contents).unwrap();
        assert_run_refused(&input, "", "wrong.safetensors", what);
        assert_run_refused(&input, "", "not a safetensors file", what);
    }
    assert_run_refused(&path("missing"), "", "missing", "a missing file");
    let folder = path("folder");
    fs::create_dir(&folder).unwrap();
    assert_run_refused(&folder, "", "cannot read", "a folder");
}

#[test]
fn wrong_outputs() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in.safetensors");
    File::qkv([1, 1, 4, 32], [1, 1, 4, 32]).write(&input);
    let before = fs::read(&input).unwrap();
    let cases = [
        (dir.path().join("no/such/out"), "there is no folder"),
        (dir.path().to_owned(), "folder"),
        (input.clone(), "never overwritten"),
        (dir.path().join("./in.safetensors"), "never overwritten"),
        (input.join("out"), "folder"),
    ];
    for (output, culprit) in cases {
        let ran = run([
            "run".as_ref(),
            "-i".as_ref(),
            input.as_os_str(),
            "-o".as_ref(),
            output.as_os_str(),
        ]);
        assert_refused(&ran, culprit, &output.display().to_string());
    }
    assert_eq!(fs::read(&input).unwrap(), before);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}
