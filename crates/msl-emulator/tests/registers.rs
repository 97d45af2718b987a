//! What of a kernel would stay in memory, and what of a text is compiled.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

mod common;

use common::library;
use msl_emulator::{CompileOptions, Constant, Error, Library, kept_in_memory};

/// Sums eight matrices in a loop, which `HINT` unrolls or leaves rolled.
const LOOP: &str = r#"
#include <metal_stdlib>
using namespace metal;
constant int passes [[function_constant(0)]];

template <typename T>
kernel void total(device const T* x [[buffer(0)]], device T* y [[buffer(1)]]) {
  simdgroup_matrix<T, 8, 8> sums[8];
  HINT
  for (int i = 0; i < 8; ++i) { simdgroup_load(sums[i], x + i * 64); }
  for (int pass = 0; pass < passes; ++pass) {
    HINT
    for (int i = 0; i < 8; ++i) { simdgroup_multiply_accumulate(sums[i], sums[i], sums[i], sums[i]); }
  }
  HINT
  for (int i = 0; i < 8; ++i) { simdgroup_store(sums[i], y + i * 64); }
}
template [[host_name("total_f32")]] [[kernel]] decltype(total<float>) total<float>;
template [[host_name("total_bf16")]] [[kernel]] decltype(total<bfloat>) total<bfloat>;
"#;

fn in_memory(hint: &str) -> Option<Vec<(String, Vec<String>)>> {
    let hint = format!("_Pragma(\"clang loop unroll({hint})\")");
    let options = CompileOptions::named("total.metal").define("HINT", hint);
    match kept_in_memory(LOOP, &options, &[(0, Constant::Int(3))]) {
        Ok(found) => Some(found),
        Err(Error::NoCompiler(why)) => {
            eprintln!("SKIPPED: no clang++ ({why})");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn an_array_of_matrices_stays_in_memory_where_its_loops_are_rolled() {
    let (Some(rolled), Some(unrolled)) = (in_memory("disable"), in_memory("full")) else {
        return;
    };
    let names: Vec<&str> = rolled.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["total_f32", "total_bf16"]);
    assert!(
        rolled
            .iter()
            .all(|(_, v)| v.iter().any(|v| v.contains("sums"))),
        "{rolled:?}"
    );
    assert!(unrolled.is_empty(), "{unrolled:?}");
}

#[test]
fn only_the_kernels_that_are_named_are_compiled() {
    let text = LOOP.replace("HINT", "");
    let Some(all) = library("total.metal", &text) else {
        return;
    };
    assert_eq!(all.kernels().len(), 2);
    let one = CompileOptions::named("total.metal").kernel("total_bf16");
    let one = Library::compile(&text, &one).unwrap();
    assert_eq!(one.kernels().len(), 1);
    assert!(one.kernel("total_bf16").is_ok() && one.kernel("total_f32").is_err());
    let none = CompileOptions::named("total.metal").kernel("total_f16");
    let error = Library::compile(&text, &none).unwrap_err().to_string();
    assert!(
        error.contains("total_f16") && error.contains("total_bf16"),
        "{error}"
    );
}

#[test]
fn the_elements_of_a_matrix_are_no_vector_of_two() {
    let text = "#include <metal_stdlib>\nusing namespace metal;\n\
                kernel void k(device const float2* x [[buffer(0)]]) {\n\
                simdgroup_float8x8 m;\nm.thread_elements() = x[0];\n}";
    match Library::compile(text, &CompileOptions::named("whole.metal")) {
        Err(Error::NoCompiler(why)) => eprintln!("SKIPPED: no clang++ ({why})"),
        Err(e) => assert!(e.to_string().contains("whole.metal:5:"), "{e}"),
        Ok(_) => panic!("compiled"),
    }
}
