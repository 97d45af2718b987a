#![doc = include_str!("../README.md")]
#![cfg_attr(
    not(all(unix, any(target_arch = "x86_64", target_arch = "aarch64"))),
    allow(dead_code)
)]

mod dispatch;
mod error;
#[cfg(all(unix, any(target_arch = "x86_64", target_arch = "aarch64")))]
mod lex;
mod options;
mod reflect;
#[cfg(all(unix, any(target_arch = "x86_64", target_arch = "aarch64")))]
mod translate;

#[cfg(all(unix, any(target_arch = "x86_64", target_arch = "aarch64")))]
mod native;
#[cfg(not(all(unix, any(target_arch = "x86_64", target_arch = "aarch64"))))]
#[path = "absent.rs"]
mod native;

pub use dispatch::{Binding, Constant, Counters, Dispatch};
pub use error::{Error, Fault, FaultKind, Result};
pub use native::{Library, find_compiler, kept_in_memory};
pub use options::{CompileOptions, DispatchOptions, Limits};
pub use reflect::{AddressSpace, ArgumentInfo, ArgumentKind, ConstantInfo, KernelInfo};
