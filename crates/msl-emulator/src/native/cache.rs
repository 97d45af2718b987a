//! Files on disk, named by a hash of what they were made from.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};

/// FNV-1a over 128 bits: stable across releases and machines, which the standard hasher is not.
pub(crate) struct Hash(u128);

impl Hash {
    pub(crate) fn new() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }

    /// Adds a field; its length keeps neighbours apart.
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        for &b in (bytes.len() as u64).to_le_bytes().iter().chain(bytes) {
            self.0 =
                (self.0 ^ u128::from(b)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
    }

    pub(crate) fn value(&self) -> u128 {
        self.0
    }
}

/// The cache folder: `MSL_EMULATOR_CACHE`, else one in the user's cache folder, else a temporary one.
pub(crate) fn dir() -> Result<PathBuf> {
    let var = |name: &str| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let dir = var("MSL_EMULATOR_CACHE").unwrap_or_else(|| {
        let user = if cfg!(target_os = "macos") {
            var("HOME").map(|h| h.join("Library/Caches"))
        } else {
            var("XDG_CACHE_HOME").or_else(|| var("HOME").map(|h| h.join(".cache")))
        };
        user.unwrap_or_else(std::env::temp_dir).join("msl-emulator")
    });
    make_dir(&dir)?;
    Ok(dir)
}

pub(crate) fn make_dir(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(|e| Error::io(path, e))
}

/// A name next to `path` that no other process or thread uses.
pub(crate) fn temporary(path: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.{n}.tmp", std::process::id()));
    path.with_file_name(name)
}

/// Writes a file so that others see all of it or nothing.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let tmp = temporary(path);
    std::fs::write(&tmp, bytes).map_err(|e| Error::io(&tmp, e))?;
    publish(&tmp, path)
}

/// Moves a finished temporary file to its place.
pub(crate) fn publish(tmp: &Path, path: &Path) -> Result<()> {
    std::fs::rename(tmp, path).map_err(|e| Error::io(path, e))
}

/// Makes the file at `path` unless it is there; threads of this process that want the same file
/// wait for the first.
pub(crate) fn make_once(path: &Path, make: impl FnOnce() -> Result<()>) -> Result<()> {
    static MAKING: Mutex<BTreeMap<PathBuf, Arc<Mutex<()>>>> = Mutex::new(BTreeMap::new());
    if path.exists() {
        return Ok(());
    }
    let mut making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let mine = Arc::clone(making.entry(path.to_owned()).or_default());
    drop(making);
    let held = mine.lock().unwrap_or_else(PoisonError::into_inner);
    let result = if path.exists() { Ok(()) } else { make() };
    drop(held);
    result
}
