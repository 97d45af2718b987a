//! Without any one of their barriers the prefill kernels are rejected.

use super::*;

/// Every barrier of a text: its line, its call, and the text without it.
fn removals(text: &str) -> Vec<(usize, String, String)> {
    let mut found = Vec::new();
    for call in ["threadgroup_barrier(", "simdgroup_barrier("] {
        for (at, _) in text.match_indices(call) {
            let line_start = text[..at].rfind('\n').map_or(0, |n| n + 1);
            let end = at + text[at..].find(';').unwrap();
            if text[line_start..at].contains("//") {
                continue;
            }
            let line = text[..at].matches('\n').count() + 1;
            let without = format!("{}(void)0{}", &text[..at], &text[end..]);
            found.push((line, text[at..end].to_owned(), without));
        }
    }
    found.sort_by_key(|(line, ..)| *line);
    found
}

/// The prefill text with these instantiations alone, so that it compiles in little time.
fn only(stems: &[&str]) -> String {
    let kept = |line: &&str| sources::stem_of(line).is_none_or(|stem| stems.contains(&stem));
    sources::PREFILL_TEXT
        .lines()
        .filter(kept)
        .flat_map(|line| [line, "\n"])
        .collect()
}

#[test]
#[ignore = "compiles a text for each barrier: scripts/test --all"]
fn a_kernel_without_any_one_barrier_is_rejected() {
    // One for each scheme: P apart or in the place of S, 32 rows or 8, four simdgroups or eight.
    let cases: Vec<Prefill> = [
        ("flash_attn_prefill_bf16_d64", None),
        ("flash_attn_prefill_f32_d64", None),
        ("flash_attn_prefill_f32_d256", None),
        ("flash_attn_prefill_f16_d512", Some(4)),
        ("flash_attn_prefill_f16_d512", Some(8)),
    ]
    .into_iter()
    .map(|(kernel, nsg)| Prefill {
        variant: table::by_name(kernel).unwrap(),
        nsg,
        full: false,
        poison: true,
        foreign: true,
    })
    .collect();
    let text = only(&["bf16_d64", "f32_d64", "f32_d256", "f16_d512"]);
    let devices: Vec<_> = [None]
        .into_iter()
        .chain(SEEDS.map(Some))
        .filter_map(|seed| device(true, seed))
        .collect();
    if devices.is_empty() {
        return;
    }
    let run = |text: &str, case: &Prefill| -> Vec<Result<Vec<u8>>> {
        let text: &'static str = Box::leak(text.to_owned().into_boxed_str());
        let mut registry = KernelRegistry::new();
        // SAFETY: the emulator watches every access of a text that is not the crate's, and a text that
        // lacks a barrier reads and writes where ours does.
        unsafe { registry.register_foreign_source(case.variant.kernel, text) };
        devices.iter().map(|d| case.run(d, &mut registry)).collect()
    };
    for case in &cases {
        for result in run(&text, case) {
            assert!(result.is_ok(), "{}: {:?}", case.name(), result.err());
        }
    }
    let offset = text.find("// Tiled attention").unwrap();
    let before = text[..offset].matches('\n').count();
    let mut unseen = Vec::new();
    let mut count = 0;
    for (line, call, without) in removals(&text) {
        // A barrier that only kernels with P in the place of S have.
        let in_place = text.lines().nth(line - 1).unwrap().contains("IN_PLACE");
        // The one before another pass, over whose Q that writes. At bf16 and head dim 64 what the others
        // still read lies in the padding of Q's first row, which nothing writes.
        let before_pass = text.lines().nth(line).unwrap().contains("return false");
        for case in &cases {
            if in_place && case.variant.dtype != DType::F32
                || before_pass && case.variant.kernel == "flash_attn_prefill_bf16_d64"
            {
                continue;
            }
            count += 1;
            let faults: Vec<String> = run(&without, case)
                .into_iter()
                .filter_map(|r| r.err().map(|e| e.to_string()))
                .collect();
            let place = format!("{} | prefill.metal:{} | {call}", case.name(), line - before);
            let seen = format!("{} of {}", faults.len(), devices.len());
            match faults.first() {
                Some(fault) => eprintln!("{place} | {seen} | {}", brief(fault)),
                None => unseen.push(place),
            }
        }
    }
    assert!(unseen.is_empty(), "not seen: {unseen:#?}");
    assert!(count > 0);
    // Were there others, they would need a case here.
    for (file, text) in &texts()[1..] {
        assert_eq!(removals(text).len(), 0, "{file} has barriers");
    }
}

/// What a fault says, from the threadgroup on.
fn brief(fault: &str) -> &str {
    fault
        .find("thread (")
        .map_or(fault, |at| &fault[at..])
        .trim()
}
