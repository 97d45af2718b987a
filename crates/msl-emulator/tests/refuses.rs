//! What is refused before anything runs.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod common;

use common::{bytes_mut, bytes_of, library, run};
use msl_emulator::{Binding, CompileOptions, Dispatch, DispatchOptions, Error, Library};

const SOURCE: &str = include_str!("kernels/faulty.metal");

fn open() -> Option<Library> {
    library("faulty.metal", SOURCE)
}

#[test]
fn threadgroup_memory_over_the_limit() {
    let Some(lib) = open() else { return };
    for check in [false, true] {
        let mut out = vec![0.0f32; 64];
        let dispatch =
            Dispatch::new("too_much_memory").bind(0, Binding::read_write(bytes_mut(&mut out)));
        let mut options = DispatchOptions::default();
        options.check = check;
        let e = run(&lib, dispatch, &options).unwrap_err();
        assert!(matches!(e, Error::Limit { .. }));
        let e = e.to_string();
        assert!(
            e.contains("too_much_memory")
                && e.contains("`tile`")
                && e.contains("32784")
                && e.contains("32768"),
            "{e}"
        );
    }
}

#[test]
fn missing_binding() {
    let Some(lib) = open() else { return };
    for options in [DispatchOptions::default(), DispatchOptions::checked()] {
        let e = run(&lib, Dispatch::new("read_past_end"), &options).unwrap_err();
        assert!(matches!(e, Error::MissingBinding { index: 0, .. }));
        assert!(
            e.to_string().contains("read_past_end") && e.to_string().contains("`in`"),
            "{e}"
        );
    }
}

#[test]
fn unset_constant() {
    let Some(lib) = open() else { return };
    let mut out = vec![0.0f32; 1];
    let dispatch =
        Dispatch::new("unset_constant").bind(0, Binding::read_write(bytes_mut(&mut out)));
    let e = run(&lib, dispatch, &DispatchOptions::default()).unwrap_err();
    assert!(matches!(e, Error::UnsetConstant { index: 0, .. }));
    assert!(
        e.to_string().contains("unset_constant") && e.to_string().contains("`wanted`"),
        "{e}"
    );
    let dispatch = Dispatch::new("unset_constant")
        .constant(0, 3)
        .bind(0, Binding::read_write(bytes_mut(&mut out)));
    assert!(matches!(
        run(&lib, dispatch, &DispatchOptions::default()),
        Err(Error::ConstantType { .. })
    ));
}

#[test]
fn too_many_threads() {
    let Some(lib) = open() else { return };
    for (threads, allowed) in [([65, 1, 1], "64"), ([32, 32, 2], "1024")] {
        let mut out = vec![0.0f32; 4096];
        let dispatch = Dispatch::new("small_groups")
            .bind(0, Binding::read_write(bytes_mut(&mut out)))
            .threads(threads);
        let e = run(&lib, dispatch, &DispatchOptions::default()).unwrap_err();
        assert!(matches!(e, Error::Limit { .. }));
        assert!(
            e.to_string().contains("small_groups") && e.to_string().contains(allowed),
            "{e}"
        );
    }
}

#[test]
fn unknown_kernel() {
    let Some(lib) = open() else { return };
    let e = run(
        &lib,
        Dispatch::new("in_helper"),
        &DispatchOptions::default(),
    )
    .unwrap_err();
    assert!(matches!(e, Error::UnknownKernel { .. }));
    assert!(e.to_string().contains("in_helper_float"), "{e}");
}

const GATED: &str = r"#include <metal_stdlib>
constant bool a [[function_constant(0)]];
constant int b [[function_constant(1)]];
constant bool either = a || b > 2;
namespace inner { constant bool both = a && either; }
struct Bias { float first; float second; };
kernel void gated(
    device float* out [[buffer(0)]],
    constant Bias& bias [[buffer(1), function_constant(either)]],
    device const float* more [[buffer(2), function_constant(both)]]) {
  out[0] = either ? bias.second : 1.0f;
  if (inner::both) { out[0] += more[0]; }
}";

#[test]
fn missing_binding_behind_a_derived_constant() {
    let Some(lib) = library("gated.metal", GATED) else {
        return;
    };
    let ways = [DispatchOptions::default(), DispatchOptions::checked()];
    // (a, b), what is bound, and the index that lacks a binding.
    let cases = [
        (false, 2, 0, Ok(1.0f32)),
        (false, 3, 0, Err(1)),
        (false, 3, 1, Ok(5.0)),
        (true, 0, 0, Err(1)),
        (true, 0, 1, Err(2)),
        (true, 0, 2, Ok(12.0)),
    ];
    for (options, (a, b, bound, want)) in ways.iter().flat_map(|w| cases.map(|c| (w, c))) {
        let mut out = [0.0f32; 1];
        let mut dispatch = Dispatch::new("gated")
            .constant(0, a)
            .constant(1, b)
            .bind(0, Binding::read_write(bytes_mut(&mut out)));
        if bound >= 1 {
            dispatch = dispatch.bytes(1, bytes_of(&[4.0f32, 5.0]));
        }
        if bound >= 2 {
            dispatch = dispatch.bytes(2, bytes_of(&[7.0f32]));
        }
        match (run(&lib, dispatch, options), want) {
            (Ok(_), Ok(want)) => assert_eq!(out, [want]),
            (Err(Error::MissingBinding { index, .. }), Err(want)) => assert_eq!(index, want),
            (got, want) => panic!("{got:?} instead of {want:?}"),
        }
    }
    let short = Dispatch::new("gated")
        .constant(0, false)
        .constant(1, 9)
        .bytes(0, [0; 4])
        .bytes(1, [0; 4]);
    let e = run(&lib, short, &DispatchOptions::default()).unwrap_err();
    assert!(matches!(e, Error::Binding { index: 1, .. }), "{e}");
}

#[test]
fn a_gate_that_is_no_function_constant() {
    let text = GATED.replace("function_constant(either)", "function_constant(neither)");
    match Library::compile(&text, &CompileOptions::named("gated.metal")) {
        Err(Error::NoCompiler(_)) => {}
        Err(e @ Error::Text { .. }) => assert!(e.to_string().contains("`neither`"), "{e}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_absent_argument_by_reference_is_not_read_ahead_of_its_constant() {
    let text = "#include <metal_stdlib>\nusing namespace metal;\n\
                constant bool given [[function_constant(0)]];\n\
                struct Params { long a; long b; };\n\
                kernel void pick(device float* out [[buffer(0)]],\n\
                constant Params& p [[buffer(1), function_constant(given)]]) {\n\
                out[0] = float(given ? p.b : 3);\n}";
    let Some(lib) = library("pick.metal", text) else {
        return;
    };
    for options in [DispatchOptions::default(), DispatchOptions::checked()] {
        let mut out = [0.0f32; 1];
        let dispatch = Dispatch::new("pick")
            .constant(0, false)
            .bind(0, Binding::read_write(bytes_mut(&mut out)));
        run(&lib, dispatch, &options).unwrap();
        assert_eq!(out, [3.0]);
    }
}
