//! What is refused before anything runs.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{bytes_mut, library, run};
use msl_emulator::{Binding, Dispatch, DispatchOptions, Error, Library};

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
