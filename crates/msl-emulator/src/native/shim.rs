//! The C++ headers that stand in for `metal_stdlib`.

use std::path::{Path, PathBuf};

use super::cache;
use crate::error::Result;

const FILES: [(&str, &str); 17] = [
    ("base.h", include_str!("../../shim/base.h")),
    ("bfloat.h", include_str!("../../shim/bfloat.h")),
    ("vector.h", include_str!("../../shim/vector.h")),
    ("math.h", include_str!("../../shim/math.h")),
    ("limits.h", include_str!("../../shim/limits.h")),
    ("abi.h", include_str!("../../shim/abi.h")),
    ("worker.h", include_str!("../../shim/worker.h")),
    ("fiber.h", include_str!("../../shim/fiber.h")),
    ("sync.h", include_str!("../../shim/sync.h")),
    ("check.h", include_str!("../../shim/check.h")),
    ("simd.h", include_str!("../../shim/simd.h")),
    ("matrix_core.h", include_str!("../../shim/matrix_core.h")),
    ("matrix.h", include_str!("../../shim/matrix.h")),
    ("atomic.h", include_str!("../../shim/atomic.h")),
    ("opaque.h", include_str!("../../shim/opaque.h")),
    ("entry.h", include_str!("../../shim/entry.h")),
    ("metal.h", include_str!("../../shim/metal.h")),
];

/// What a program may include; all mean the same here.
const STANDARD: [&str; 17] = [
    "metal_stdlib",
    "metal_array",
    "metal_atomic",
    "metal_common",
    "metal_compute",
    "metal_geometric",
    "metal_integer",
    "metal_limits",
    "metal_math",
    "metal_matrix",
    "metal_numeric",
    "metal_packing",
    "metal_relational",
    "metal_simdgroup",
    "metal_simdgroup_matrix",
    "metal_types",
    "metal_type_traits",
];

const MACROS: &str = include_str!("../../shim/prelude_macros.h");

/// Folders with the headers, for the preprocessing pass and for the others.
pub(crate) struct Headers {
    pub(crate) macros: PathBuf,
    pub(crate) shim: PathBuf,
}

/// A number that changes with the text of the shim.
pub(crate) fn fingerprint() -> u128 {
    let mut hash = cache::Hash::new();
    for (name, text) in FILES {
        hash.add(name.as_bytes());
        hash.add(text.as_bytes());
    }
    hash.add(MACROS.as_bytes());
    hash.value()
}

/// Writes the headers to the cache, unless they are there.
pub(crate) fn headers(cache: &Path) -> Result<Headers> {
    let root = cache.join(format!("shim-{:032x}", fingerprint()));
    let headers = Headers {
        macros: root.join("std"),
        shim: root.join("cxx"),
    };
    if root.join("complete").exists() {
        return Ok(headers);
    }
    cache::make_dir(&headers.macros)?;
    cache::make_dir(&headers.shim)?;
    for name in STANDARD {
        cache::write(&headers.macros.join(name), MACROS.as_bytes())?;
    }
    for (name, text) in FILES {
        cache::write(&headers.shim.join(name), text.as_bytes())?;
    }
    cache::write(&root.join("complete"), b"")?;
    Ok(headers)
}
