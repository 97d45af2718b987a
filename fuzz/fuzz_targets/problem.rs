//! Problems from arbitrary bytes: building never panics, and what runs agrees with the oracle.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use mlx_flash_attn::{CpuOptions, KernelRegistry, MlxDevice};

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/common/wild.rs"]
mod wild;

thread_local! {
    static CPU: MlxDevice = {
        let options = CpuOptions::from_env().expect("a known instruction set");
        MlxDevice::cpu(CpuOptions { threads: Some(1), ..options }).expect("a CPU")
    };
    static REGISTRY: RefCell<KernelRegistry> = RefCell::new(KernelRegistry::new());
}

fuzz_target!(|data: &[u8]| {
    let mut source = wild::Source(data);
    let is_wild = source.flag();
    let problem = wild::Wild::read(&mut source, is_wild);
    CPU.with(|cpu| {
        REGISTRY.with_borrow_mut(|registry| wild::check(&problem, cpu, registry, 50_000))
    });
});
