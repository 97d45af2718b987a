//! What the tests share.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr
)]

use msl_emulator::{CompileOptions, Counters, Dispatch, DispatchOptions, Error, Fault, Library};

/// Compiles a program, or says loudly that there is no compiler.
pub(crate) fn library(name: &str, source: &str) -> Option<Library> {
    match Library::compile(source, &CompileOptions::named(name)) {
        Ok(library) => Some(library),
        Err(Error::NoCompiler(why)) => {
            eprintln!("SKIPPED: no clang++ ({why})");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

pub(crate) fn run(
    library: &Library,
    mut dispatch: Dispatch<'_>,
    options: &DispatchOptions,
) -> Result<Counters, Error> {
    // SAFETY: the texts are part of this crate, and bindings are slices.
    unsafe { library.dispatch(&mut dispatch, options) }
}

/// The ways in which a right kernel must give the same.
pub(crate) fn ways() -> Vec<DispatchOptions> {
    let plain = DispatchOptions::default();
    vec![
        plain.clone().threads(1),
        plain.clone(),
        plain.clone().shuffle(1),
        plain.shuffle(12345),
        DispatchOptions::checked(),
        DispatchOptions::checked().shuffle(7),
    ]
}

pub(crate) fn fault(result: Result<Counters, Error>) -> Fault {
    match result {
        Ok(_) => panic!("the kernel was not rejected"),
        Err(e) => e
            .fault()
            .unwrap_or_else(|| panic!("not a fault: {e}"))
            .clone(),
    }
}

/// The line of `source` that has `mark`.
pub(crate) fn line_of(source: &str, mark: &str) -> u32 {
    let found: Vec<usize> = source
        .lines()
        .enumerate()
        .filter(|(_, l)| l.contains(mark))
        .map(|(i, _)| i + 1)
        .collect();
    assert_eq!(found.len(), 1, "{mark} is on lines {found:?}");
    found[0] as u32
}

pub(crate) fn bytes_of<T: Copy>(values: &[T]) -> &[u8] {
    // SAFETY: the tests pass numbers, which have no padding.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

pub(crate) fn bytes_mut<T: Copy>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and every bit pattern is a number.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// Small numbers that differ, the same every time.
pub(crate) fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).max(1);
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        })
        .collect()
}
