//! `verify`, `bench`, `devices` and `tiles`: their results for machines and for people.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{assert_keys, json_lines, run, words};

#[test]
fn devices_as_json() {
    let ran = words("devices --json");
    assert_eq!(ran.code, Some(0));
    let lines = json_lines(&ran.stdout);
    let names: Vec<_> = lines
        .iter()
        .map(|l| l["device"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["cpu", "metal", "cuda", "emulator"]);
    for line in &lines {
        assert_keys(
            line,
            &[
                "device",
                "available",
                "default",
                "name",
                "details",
                "reason",
            ],
        );
        // A device is there and has a name, or is not and has a reason.
        assert_eq!(line["available"], line["name"].is_string());
        assert_eq!(line["available"], line["reason"].is_null());
    }
    assert_eq!(lines[0]["available"], true);
    assert_eq!(lines.iter().filter(|l| l["default"] == true).count(), 1);
}

#[test]
fn devices_for_people() {
    let ran = words("devices");
    assert_eq!(ran.code, Some(0));
    for name in ["cpu", "metal", "cuda", "emulator", "default"] {
        assert!(ran.stdout.contains(name), "{}", ran.stdout);
    }
}

#[test]
fn verify_as_json_and_for_people() {
    let ran = words("verify --quick --device cpu --json");
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let lines = json_lines(&ran.stdout);
    assert_eq!(lines.len(), 1);
    assert_keys(
        &lines[0],
        &["device", "cases", "passed", "failed", "skipped"],
    );
    assert_eq!(lines[0]["device"], "cpu");
    assert_eq!(lines[0]["cases"], lines[0]["passed"]);
    assert!(lines[0]["cases"].as_u64() >= Some(100));

    let ran = words("verify --quick --device cpu");
    let last = ran.stdout.lines().last().unwrap();
    let cases = &lines[0]["cases"];
    assert_eq!(
        last,
        format!("{cases} cases: {cases} passed, 0 failed, 0 skipped")
    );
    assert!(ran.stderr.is_empty(), "{}", ran.stderr);
}

#[test]
fn verify_only_some_cases() {
    let counted = |only: &str| {
        let ran = words(&format!("verify --quick --device cpu --json --only {only}"));
        assert_eq!(ran.code, Some(0), "{ran:?}");
        json_lines(&ran.stdout)[0]["cases"].as_u64().unwrap()
    };
    let [f16, narrow] = ["f16-d", "f16-d32-"].map(counted);
    assert!(0 < narrow && narrow < f16, "{narrow} of {f16}");
}

#[test]
fn bench_as_json() {
    let ran = words(
        "bench --shape 1,2,1,16,24,32 --shape 2,1,1,1,8,64 --dtype f16 --causal --window 7 \
         --device cpu --json",
    );
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let lines = json_lines(&ran.stdout);
    assert_eq!(lines.len(), 2);
    for (line, shape) in lines
        .iter()
        .zip([[1, 2, 1, 16, 24, 32], [2, 1, 1, 1, 8, 64]])
    {
        assert_keys(
            line,
            &[
                "device",
                "dtype",
                "shape",
                "causal",
                "window",
                "ms_median",
                "ms_min",
                "ms_max",
                "tflops",
                "peak_tflops",
                "share",
            ],
        );
        let number = |key: &str| line[key].as_f64().unwrap();
        assert_eq!(line["shape"], serde_json::json!(shape));
        assert_eq!(
            (&line["device"], &line["dtype"]),
            (&"cpu".into(), &"f16".into())
        );
        assert_eq!(
            (&line["causal"], &line["window"]),
            (&true.into(), &7.into())
        );
        assert!(0.0 < number("ms_min") && number("ms_min") <= number("ms_median"));
        assert!(number("ms_median") <= number("ms_max"));
    }
    // Every one of the 16 rows of each of 2 heads sees its last 7 keys.
    let flops = 4.0 * 32.0 * 2.0 * 16.0 * 7.0;
    let (tflops, ms) = (&lines[0]["tflops"], &lines[0]["ms_median"]);
    let counted = tflops.as_f64().unwrap() * 1e12 * ms.as_f64().unwrap() * 1e-3;
    assert!((counted / flops - 1.0).abs() < 1e-9, "{counted} {flops}");
}

/// Everything that the library can do can be measured; what was asked for is in the line.
#[test]
fn bench_takes_what_the_library_takes() {
    let keys = [
        "device",
        "dtype",
        "shape",
        "causal",
        "window",
        "ms_median",
        "ms_min",
        "ms_max",
        "tflops",
        "peak_tflops",
        "share",
    ];
    let dense = "--dtype f32 --kv f16 --layout seq-major --window 3 --window-right 2 --q-offset 4 \
                 --softcap 5 --scale 0.5 --mask bool --mask-axes bh --sinks --alibi --lse \
                 --key-capacity 40 --shape 2,4,2,16,24,32";
    let packed = "--mask f16 --cu-seqlens-q 0,4,12 --cu-seqlens-k 0,0,20 --shape 1,2,1,16,24,32";
    let paged = "--paged 4 --lengths 20,0 --shape 2,2,1,1,24,32";
    let chunks = "--paged 8 --cu-seqlens-q 0,1,12 --shape 2,2,1,12,24,32";
    let mut lines = Vec::new();
    for (options, more) in [
        (
            dense,
            &[
                "kv",
                "layout",
                "window_right",
                "q_offset",
                "softcap",
                "scale",
                "mask",
                "sinks",
                "alibi",
                "lse",
                "key_capacity",
            ][..],
        ),
        (packed, &["mask", "cu_seqlens_q", "cu_seqlens_k"]),
        (paged, &["paged", "lengths"]),
        (chunks, &["paged", "cu_seqlens_q"]),
    ] {
        let ran = words(&format!("bench --device cpu --json {options}"));
        assert_eq!(ran.code, Some(0), "{ran:?}");
        let line = json_lines(&ran.stdout).remove(0);
        assert_keys(&line, &[&keys, more].concat());
        assert!(line["ms_median"].as_f64() > Some(0.0));
        lines.push(line);
    }
    let line = &lines[1];
    assert_eq!(line["shape"], serde_json::json!([1, 2, 1, 16, 24, 32]));
    assert_eq!(line["mask"], "f16 q");
    // 8 queries over 20 keys, as the first sequence has no keys; one over 20; 12 over 24.
    for (line, pairs) in lines[1..].iter().zip([8.0 * 20.0, 20.0, 12.0 * 24.0]) {
        let counted = line["tflops"].as_f64().unwrap() * line["ms_median"].as_f64().unwrap() * 1e9;
        assert!(
            (counted / (4.0 * 32.0 * 2.0 * pairs) - 1.0).abs() < 1e-9,
            "{counted} {pairs}"
        );
    }
}

#[test]
fn bench_for_people_with_a_plot() {
    let dir = tempfile::tempdir().unwrap();
    let plot = dir.path().join("plot.svg");
    let args = "bench --shape 1,2,2,8,8,32 --shape 1,1,1,8,8,32 --device cpu --plot";
    let ran = run(args
        .split_whitespace()
        .map(AsRef::<std::ffi::OsStr>::as_ref)
        .chain([plot.as_os_str()]));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("TFLOP/s") && ran.stdout.contains("1,2,2,8,8,32"));
    let svg = std::fs::read_to_string(plot).unwrap();
    let texts = well_formed(&svg);
    for expected in ["1,2,2,8,8,32", "TFLOP/s", "CPU", "bf16"] {
        assert!(texts.iter().any(|t| t.contains(expected)), "{texts:?}");
    }
    assert_eq!(svg.matches("class=\"bar\"").count(), 2);
}

#[test]
fn tiles_are_drawn_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tiles.svg");
    let args = "tiles --sq 128 --sk 128 --causal --svg";
    let ran = run(args
        .split_whitespace()
        .map(AsRef::<std::ffi::OsStr>::as_ref)
        .chain([file.as_os_str()]));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    // 4 x 8 tiles of 32 x 16.
    for row in ["++......\n", "##++....\n", "####++..\n", "######++\n"] {
        assert!(ran.stdout.contains(row), "{}", ran.stdout);
    }
    assert!(ran.stdout.contains("work saved: 37.5 %"), "{}", ran.stdout);
    let texts = well_formed(&std::fs::read_to_string(file).unwrap());
    assert!(texts.iter().any(|t| t.contains("work saved: 37.5 %")));
}

#[test]
fn tiles_as_json() {
    let ran = words("tiles --sq 128 --sk 128 --causal --json");
    assert_eq!(ran.code, Some(0));
    let lines = json_lines(&ran.stdout);
    assert_eq!(lines.len(), 1);
    assert_keys(
        &lines[0],
        &[
            "sq", "sk", "causal", "window", "q_offset", "head_dim", "tile", "skipped", "masked",
            "free", "saved",
        ],
    );
    let counts = ["skipped", "masked", "free"].map(|key| lines[0][key].as_u64().unwrap());
    assert_eq!(counts, [12, 8, 12]);
    assert_eq!(lines[0]["saved"], 0.375);
}

#[test]
fn tiles_of_huge_problems_fit_the_screen() {
    let ran = words("tiles --sq 1000000 --sk 1000000 --window 4096 --causal --head-dim 512");
    assert_eq!(ran.code, Some(0));
    assert!(ran.stdout.lines().all(|line| line.chars().count() <= 100));
    assert!(ran.stdout.lines().count() < 60);
}

/// Checks that elements nest and attributes are quoted, and gives the texts.
fn well_formed(svg: &str) -> Vec<String> {
    let mut open: Vec<&str> = Vec::new();
    let mut texts = Vec::new();
    let mut rest = svg;
    while let Some(start) = rest.find('<') {
        let text = rest[..start].trim();
        if open.is_empty() {
            assert!(text.is_empty(), "text outside the root: {text}");
        } else if !text.is_empty() {
            assert!(
                !text.contains('>') || open.last() == Some(&"style"),
                "{text}"
            );
            texts.push(text.to_owned());
        }
        let end = start + rest[start..].find('>').expect("an open tag");
        let tag = &rest[start + 1..end];
        assert!(tag.matches('"').count().is_multiple_of(2), "<{tag}>");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "</{name}>");
        } else if !tag.ends_with('/') {
            open.push(tag.split_whitespace().next().unwrap());
        }
        for number in tag.split('"').skip(1).step_by(2) {
            assert!(
                !number.contains("NaN") && !number.contains("inf"),
                "<{tag}>"
            );
        }
        rest = &rest[end + 1..];
    }
    assert!(open.is_empty() && rest.trim().is_empty());
    assert!(svg.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\""));
    texts
}
