//! What the integration tests share.
#![allow(dead_code, clippy::unwrap_used, clippy::print_stderr)]

use mlx_flash_attn::{DeviceKind, MlxDevice};

/// Every device that opens here. The others are named on stderr, so that a skip is seen.
pub(crate) fn devices() -> Vec<MlxDevice> {
    let mut open = Vec::new();
    for kind in DeviceKind::ALL {
        match MlxDevice::open(kind) {
            Ok(device) => open.push(device),
            Err(error) => eprintln!("SKIPPED on {kind}: {error}"),
        }
    }
    assert!(
        open.iter().any(|d| d.kind() == DeviceKind::Cpu),
        "the CPU opens everywhere"
    );
    open
}
