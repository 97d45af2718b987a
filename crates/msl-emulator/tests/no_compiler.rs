//! Without a compiler the error says so. Alone in its file: it changes the environment.
#![allow(missing_docs, clippy::panic)]

use msl_emulator::{CompileOptions, Error, Library, find_compiler};

#[test]
fn no_compiler() {
    // SAFETY: the only test of this process, before any thread that reads the environment.
    unsafe { std::env::set_var("MSL_EMULATOR_CXX", "/no/such/compiler") };
    assert!(matches!(find_compiler(), Err(Error::NoCompiler(_))));
    match Library::compile("kernel void k() {}", &CompileOptions::default()) {
        Err(e @ Error::NoCompiler(_)) => assert!(e.to_string().contains("/no/such/compiler")),
        other => panic!("{other:?}"),
    }
}
