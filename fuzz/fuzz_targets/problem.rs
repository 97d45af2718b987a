//! Problems from arbitrary bytes: building never panics, and what runs agrees with the oracle.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mlx_flash_attn::{CpuOptions, MlxDevice};

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/common/wild.rs"]
mod wild;

thread_local! {
    static CPU: MlxDevice = {
        let options = CpuOptions::from_env().expect("a known instruction set");
        MlxDevice::cpu(CpuOptions { threads: Some(1), ..options }).expect("a CPU")
    };
}

fuzz_target!(|data: &[u8]| {
    let mut source = wild::Source(data);
    let is_wild = source.flag();
    let problem = wild::Wild::read(&mut source, is_wild);
    CPU.with(|cpu| wild::check(&problem, cpu, 50_000));
});
