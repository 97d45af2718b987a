//! Right kernels: what the language has, and that results do not depend on how they are run.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

mod common;

use common::{bytes_mut, bytes_of, library, noise, run, ways};
use half::{bf16, f16};
use msl_emulator::{
    AddressSpace, ArgumentKind, Binding, CompileOptions, Dispatch, DispatchOptions, Error, Library,
};

const SOURCE: &str = include_str!("kernels/basic.metal");

fn open() -> Option<Library> {
    library("basic.metal", SOURCE)
}

#[test]
fn saxpy() {
    let Some(lib) = open() else { return };
    let x = noise(1000, 1);
    let y0 = noise(1000, 2);
    let mut params = Vec::new();
    params.extend_from_slice(&2.5f32.to_ne_bytes());
    params.extend_from_slice(&1000u32.to_ne_bytes());
    params.extend_from_slice(&[0; 24]);
    for options in ways() {
        let mut y = y0.clone();
        let dispatch = Dispatch::new("saxpy")
            .bind(0, Binding::read_only(bytes_of(&x)))
            .bind(1, Binding::read_write(bytes_mut(&mut y)))
            .bytes(2, params.clone())
            .threadgroups([4, 1, 1])
            .threads([256, 1, 1]);
        let counters = run(&lib, dispatch, &options).unwrap();
        assert!((0..1000).all(|i| y[i] == 2.5 * x[i] + y0[i]));
        if options.check {
            assert_eq!(
                (counters.device_bytes_read, counters.device_bytes_written),
                (1024 * 4 + 1000 * 12, 4000)
            );
        }
    }
    // A binding smaller than what is passed by reference.
    let mut y = y0.clone();
    let dispatch = Dispatch::new("saxpy")
        .bind(0, Binding::read_only(bytes_of(&x)))
        .bind(1, Binding::read_write(bytes_mut(&mut y)))
        .bytes(2, &params[..8]);
    assert!(matches!(
        run(&lib, dispatch, &DispatchOptions::default()),
        Err(Error::Binding { index: 2, .. })
    ));
}

#[test]
fn raw_memory_bound_twice() {
    let Some(lib) = open() else { return };
    // x and y are views of one allocation, bound read-only as a whole and writable in part.
    let mut memory: Vec<f32> = (0..128).map(|i| i as f32).collect();
    let (ptr, len) = (memory.as_mut_ptr().cast::<u8>(), memory.len() * 4);
    let mut params = Vec::from(1.0f32.to_ne_bytes());
    params.extend_from_slice(&64u32.to_ne_bytes());
    params.extend_from_slice(&[0; 24]);
    for options in ways() {
        memory
            .iter_mut()
            .enumerate()
            .for_each(|(i, v)| *v = i as f32);
        let dispatch = Dispatch::new("saxpy")
            .bind(0, Binding::raw(ptr, len, false))
            .bind(1, Binding::raw(ptr.wrapping_add(256), 256, true))
            .bytes(2, params.clone())
            .threads([64, 1, 1]);
        run(&lib, dispatch, &options).unwrap();
        assert!((0..64).all(|i| memory[i] == i as f32 && memory[64 + i] == (2 * i + 64) as f32));
    }
}

#[test]
fn function_constants() {
    let Some(lib) = open() else { return };
    let names: Vec<(&str, u32)> = lib
        .constants()
        .iter()
        .map(|c| (c.name.as_str(), c.index))
        .collect();
    assert_eq!(names, [("negate", 0), ("bias", 1), ("steps", 2)]);
    let extra = [10.0f32; 4];
    for options in ways() {
        for (negate, steps, want) in [
            (false, None, 1.5),
            (false, Some(3), 3.5),
            (true, Some(2), 7.5),
        ] {
            let mut out = [0.0f32; 4];
            let mut dispatch = Dispatch::new("constants")
                .constant(0, negate)
                .constant(1, 0.5)
                .bind(0, Binding::read_write(bytes_mut(&mut out)))
                .threads([4, 1, 1]);
            if let Some(steps) = steps {
                dispatch = dispatch.constant(2, steps);
            }
            if negate {
                dispatch = dispatch.bind(1, Binding::read_only(bytes_of(&extra)));
            }
            run(&lib, dispatch, &options).unwrap();
            assert_eq!(out, [want; 4]);
        }
    }
    let mut out = [0.0f32; 4];
    let dispatch = Dispatch::new("constants")
        .constant(0, true)
        .constant(1, 0.5)
        .bind(0, Binding::read_write(bytes_mut(&mut out)));
    let e = run(&lib, dispatch, &DispatchOptions::default()).unwrap_err();
    assert!(matches!(e, Error::MissingBinding { index: 1, .. }), "{e}");
}

#[test]
fn reductions() {
    let Some(lib) = open() else { return };
    let (rows, n) = (7usize, 1000usize);
    let x = noise(rows * n, 5);
    let h: Vec<f16> = x.iter().map(|&v| f16::from_f32(v)).collect();
    for options in ways() {
        for threads in [32, 96, 256] {
            let mut out = vec![0.0f32; rows];
            let dispatch = Dispatch::new("row_sum")
                .bind(0, Binding::read_only(bytes_of(&x)))
                .bind(1, Binding::read_write(bytes_mut(&mut out)))
                .bytes(2, (n as u32).to_ne_bytes())
                .threadgroups([rows as u32, 1, 1])
                .threads([threads, 1, 1]);
            run(&lib, dispatch, &options).unwrap();
            for (r, got) in out.iter().enumerate() {
                let want: f64 = x[r * n..(r + 1) * n].iter().map(|&v| f64::from(v)).sum();
                assert!((f64::from(*got) - want).abs() < 1e-4);
            }
        }
        let mut out = vec![f16::ZERO; rows];
        let dispatch = Dispatch::new("row_max")
            .bind(0, Binding::read_only(bytes_of(&h)))
            .bind(1, Binding::read_write(bytes_mut(&mut out)))
            .bytes(2, (n as u32).to_ne_bytes())
            .threadgroup_memory(0, 128 * 2)
            .threadgroups([rows as u32, 1, 1])
            .threads([128, 1, 1]);
        let counters = run(&lib, dispatch, &options).unwrap();
        for (r, got) in out.iter().enumerate() {
            let want = h[r * n..(r + 1) * n]
                .iter()
                .fold(f16::NEG_INFINITY, |a, &b| a.max(b));
            assert_eq!(*got, want);
        }
        assert_eq!(counters.threadgroup_barriers, 7 * rows as u64);
    }
}

#[test]
fn simd_functions() {
    let Some(lib) = open() else { return };
    for options in ways() {
        let mut out = vec![0u32; 32 * 24];
        let dispatch = Dispatch::new("simd_functions")
            .bind(0, Binding::read_write(bytes_mut(&mut out)))
            .threads([32, 1, 1]);
        run(&lib, dispatch, &options).unwrap();
        for (l, got) in out.chunks(24).enumerate() {
            let l = l as u32;
            let quad = l & !3;
            let want = [
                496,
                93,
                5,
                l ^ 5,
                31 - l,
                7,
                if l >= 2 { l - 2 } else { l },
                if l < 30 { l + 2 } else { l },
                l * (l + 1) / 2,
                l * l.saturating_sub(1) / 2,
                1,
                0,
                0xaaaa_aaaa,
                4 * quad + 6,
                l ^ 1,
                u32::MAX,
                2,
                (l ^ 1) + 3,
                if l < 28 { l + 4 } else { 100 },
                9,
                0,
                quad + 3,
                u32::from(l == 0),
                64,
            ];
            assert_eq!(got, want, "lane {l}");
        }
    }
}

#[test]
fn vectors() {
    let Some(lib) = open() else { return };
    let h: Vec<f16> = [0.5, 1.5, -1.0, 2.0]
        .into_iter()
        .map(f16::from_f32)
        .collect();
    for options in ways() {
        let mut o = [[0.0f32; 4]; 8];
        let dispatch = Dispatch::new("vectors")
            .bind(0, Binding::read_write(bytes_mut(&mut o)))
            .bind(1, Binding::read_only(bytes_of(&h)));
        let counters = run(&lib, dispatch, &options).unwrap();
        // a is (1.5, 0.5, 0, 4) after its swizzles.
        assert_eq!(o[0], [8.0 + 1.5, 0.5, 1.0 + 0.5, 3.0 + 1.0]);
        assert_eq!(o[1], [1.5, 0.5, 0.0, 2.5]);
        let bf = |v: f32| bf16::from_f32(v).to_f32();
        assert_eq!(o[2], [127.0, bf(1.003_906_3), bf(3.333_333_3), 8.0]);
        assert_eq!(o[3], [2.5, 1.5, 1.0, 10.0]);
        let x = f16::from_f32(0.333);
        let widened = f16::from_f32(f16::from_f32(x.to_f32() * x.to_f32()).to_f32() + 1.0).to_f32();
        assert_eq!(o[4][0], bf(bf(1.75 * 1.75) + 1.0));
        assert_eq!(o[4][1], widened);
        assert!((o[4][2] - 0.5f32.exp2()).abs() < 1e-6 && (o[4][3] - 0.5f32.tanh()).abs() < 1e-6);
        assert_eq!(o[5], [2.25 + 0.25 + 16.0, 0.5, 1.0, 1.0]);
        assert_eq!(o[6], [2.0, 4.0, 6.0, 8.0]);
        assert_eq!(o[7], [1.0, 2.0, 3.0, 65504.0]);
        assert_eq!(counters.exp2_calls, 2);
    }
}

#[test]
fn atomics() {
    let Some(lib) = open() else { return };
    for options in ways() {
        let mut total = [0u32];
        let mut sum = [0.0f32];
        let dispatch = Dispatch::new("count_atomic")
            .bind(0, Binding::read_write(bytes_mut(&mut total)))
            .bind(1, Binding::read_write(bytes_mut(&mut sum)))
            .threadgroups([9, 1, 1])
            .threads([64, 1, 1]);
        run(&lib, dispatch, &options).unwrap();
        assert_eq!((total[0], sum[0]), (576, 288.0));
    }
}

#[test]
fn reflection() {
    let Some(lib) = open() else { return };
    let k = lib.kernel("constants").unwrap();
    assert_eq!(k.required_constants, ["negate", "bias"]);
    let ArgumentKind::Buffer {
        index,
        space,
        is_const,
        gate,
    } = &k.arguments[1].kind
    else {
        panic!()
    };
    assert_eq!(
        (*index, *space, *is_const, gate.as_deref()),
        (1, AddressSpace::Device, true, Some("negate"))
    );
    assert_eq!(
        k.arguments[2].kind,
        ArgumentKind::BuiltIn("thread_position_in_grid".into())
    );
    let k = lib.kernel("row_sum").unwrap();
    assert_eq!((k.max_threads, k.threadgroup_bytes), (Some(256), 128));
    assert!(k.required_constants.is_empty());
}

fn rejected(source: &str) -> Option<String> {
    match Library::compile(source, &CompileOptions::named("bad.metal")) {
        Ok(_) => panic!("compiled"),
        Err(Error::NoCompiler(why)) => {
            eprintln!("SKIPPED: no clang++ ({why})");
            None
        }
        Err(e) => Some(e.to_string()),
    }
}

#[test]
fn faulty_text_names_its_line() {
    let cases = [
        (
            "kernel void k(device float* o [[buffer(0)]]) {\n  threadgroup float t[4];\n  device float* p = t;\n}",
            "bad.metal:3:",
        ),
        (
            "void f(device float* p);\nkernel void k(constant float* c [[buffer(0)]]) {\n\n  f(c);\n}",
            "bad.metal:4:",
        ),
        (
            "kernel void k(constant float* c [[buffer(0)]]) {\n  c[0] = 1;\n}",
            "bad.metal:2:",
        ),
        (
            "kernel void k(device float* o [[buffer(0)]]) {\n  o[0] = missing;\n}",
            "bad.metal:2:",
        ),
        (
            "kernel void k(device float* o [[buffer(0)]]) {\n\n  double d = 1;\n}",
            "bad.metal:3:",
        ),
        (
            "constant int n [[function_constant(0)]];\nkernel void k(device float* o [[buffer(0)]]) {\n  float a[n];\n}",
            "bad.metal:3:",
        ),
        ("void f() {\n  threadgroup float t[4];\n}", "bad.metal:2:"),
        (
            "kernel void k(device float* o [[buffer(40)]]) {}",
            "bad.metal:1:",
        ),
        (
            "#include <metal_stdlib>\nusing namespace metal;\nkernel void k(device float* o [[buffer(0)]]) {\n  thread float* p = o;\n}",
            "bad.metal:4:",
        ),
    ];
    for (source, place) in cases {
        let Some(message) = rejected(source) else {
            return;
        };
        assert!(message.contains(place), "{source}\n{message}");
    }
}

/// A template for several types, bfloat twice among them, with `at` as the source's space.
fn copies(space: &str) -> String {
    format!(
        "#include <metal_stdlib>
using namespace metal;
template <typename T, bool twice>
inline T scaled({space} const T* p, float by) {{ return T(float(p[0]) * by + float(twice ? p[1] : T(0))); }}
template <typename T, bool twice>
kernel void copy(device const T* x [[buffer(0)]], device T* y [[buffer(1)]]) {{
  threadgroup T t[2];
  t[0] = x[0];
  t[1] = x[1] * T(2.0f);
  t[1] += t[0];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[0] = scaled<T, twice>(t, 3.0f);
}}
#define COPY(T) template [[host_name(#T)]] [[kernel]] decltype(copy<T, false>) copy<T, false>; \\
  template [[host_name(#T \"_twice\")]] [[kernel]] decltype(copy<T, true>) copy<T, true>;
COPY(float)
COPY(half)
COPY(bfloat)
"
    )
}

#[test]
fn bfloat_behind_every_address_space() {
    let text = copies("threadgroup");
    let lib = match Library::compile(&text, &CompileOptions::named("copies.metal")) {
        Err(Error::NoCompiler(why)) => return eprintln!("SKIPPED: no clang++ ({why})"),
        other => other.unwrap(),
    };
    for (kernel, want) in [("bfloat", 4.5f32), ("bfloat_twice", 8.0)] {
        let x = [1.5f32, 1.0].map(|v| (v.to_bits() >> 16) as u16);
        let mut y = [0u16];
        let dispatch = Dispatch::new(kernel)
            .bind(0, Binding::read_only(bytes_of(&x)))
            .bind(1, Binding::read_write(bytes_mut(&mut y)));
        run(&lib, dispatch, &DispatchOptions::checked()).unwrap();
        assert_eq!(f32::from_bits(u32::from(y[0]) << 16), want);
    }
    // The wrong space is refused for each type, at the call's line.
    for space in ["device", "constant"] {
        let message = rejected(&copies(space)).unwrap();
        for ty in ["float", "half", "bfloat"] {
            let note = format!("'copy<{ty}, true>'");
            assert!(message.contains(&note), "{ty}: {message}");
        }
        assert!(message.contains("bad.metal:12:"), "{message}");
        assert!(!message.contains("__fp16"), "{message}");
    }
}

#[test]
fn macros_and_namespaces() {
    let source = r#"
#include <metal_stdlib>
#define NAME(x) "fill_" #x
namespace inner {
struct Point { float2 at; float w; float area() const { return at.x * at.y * w; } };
template <typename T, int N>
METAL_FUNC T twice(T v) { return v * T(N); }
template <typename T, typename U = float>
[[kernel]] void fill(device T* out [[buffer(0)]], constant inner::Point& p, uint i [[thread_position_in_grid]]) {
  out[i] = twice<T, 2>(T(p.area())) + T(SHIFT);
}
template [[host_name(NAME(float))]] [[kernel]] void fill<float>(device float*, constant inner::Point&, uint);
}
template [[host_name(NAME(int))]] [[kernel]] decltype(inner::fill<int, half>) inner::fill<int, half>;
"#;
    let options = CompileOptions::default().define("SHIFT", "5");
    let lib = match Library::compile(source, &options) {
        Err(Error::NoCompiler(why)) => return eprintln!("SKIPPED: no clang++ ({why})"),
        other => other.unwrap(),
    };
    let mut out = [0.0f32; 3];
    let mut ints = [0i32; 3];
    let p = [2.0f32, 3.0, 0.5, 0.0];
    for options in ways() {
        let dispatch = Dispatch::new("fill_float")
            .bind(0, Binding::read_write(bytes_mut(&mut out)))
            .bytes(1, bytes_of(&p))
            .threads([3, 1, 1]);
        run(&lib, dispatch, &options).unwrap();
        let dispatch = Dispatch::new("fill_int")
            .bind(0, Binding::read_write(bytes_mut(&mut ints)))
            .bytes(1, bytes_of(&p))
            .threads([3, 1, 1]);
        run(&lib, dispatch, &options).unwrap();
        assert_eq!((out, ints), ([11.0; 3], [11; 3]));
    }
}
