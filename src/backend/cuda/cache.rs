//! Images on disk. A file is written whole under another name and then renamed, and carries a
//! checksum, so that a crash or a second writer leaves either no file or a right one; a torn file is
//! the same as none.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// `off`, or the folder to use instead of the user's cache folder.
const VARIABLE: &str = "MLX_FLASH_CUDA_CACHE";
const MAGIC: &[u8; 8] = b"MLXCUBN1";

/// FNV-1a over 128 bits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hash(u128);

impl Hash {
    pub(super) fn new() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }

    /// Takes a part, told apart from its neighbours by its length.
    pub(super) fn part(self, bytes: &[u8]) -> Self {
        self.bytes(&(bytes.len() as u64).to_le_bytes()).bytes(bytes)
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        for byte in bytes {
            self.0 ^= u128::from(*byte);
            self.0 = self
                .0
                .wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
        self
    }

    pub(super) fn id(self) -> [u8; 16] {
        self.0.to_le_bytes()
    }

    pub(super) fn hex(self) -> String {
        format!("{:032x}", self.0)
    }
}

/// A folder of images.
#[derive(Debug, Clone)]
pub(super) struct Cache(PathBuf);

impl Cache {
    /// The folder that the environment gives; `None` where there is none or it is switched off.
    pub(super) fn from_env() -> Option<Self> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        match variable(VARIABLE) {
            Some(value) if value == "off" || value == "0" => None,
            Some(folder) => Some(Self(folder.into())),
            None => variable("XDG_CACHE_HOME")
                .map(PathBuf::from)
                .or_else(|| variable("HOME").map(|home| PathBuf::from(home).join(".cache")))
                .or_else(|| variable("LOCALAPPDATA").map(PathBuf::from))
                .map(|folder| Self(folder.join("mlx-flash-attn").join("cuda"))),
        }
    }

    fn path(&self, key: &str) -> PathBuf {
        self.0.join(format!("{key}.cubin"))
    }

    /// The image of a key, if it is there and whole.
    pub(super) fn load(&self, key: &str) -> Option<Vec<u8>> {
        let bytes = std::fs::read(self.path(key)).ok()?;
        let (head, image) = bytes.split_at_checked(MAGIC.len() + 16)?;
        let right = head.starts_with(MAGIC) && head.ends_with(&checksum(key, image));
        right.then(|| image.to_vec())
    }

    /// Keeps an image. What cannot be written is compiled again another time.
    pub(super) fn store(&self, key: &str, image: &[u8]) {
        let _ = self.try_store(key, image);
    }

    fn try_store(&self, key: &str, image: &[u8]) -> std::io::Result<()> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        std::fs::create_dir_all(&self.0)?;
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let temporary = self.0.join(format!("{key}.{}.{n}.tmp", std::process::id()));
        let written = write(&temporary, key, image)
            .and_then(|()| std::fs::rename(&temporary, self.path(key)));
        if written.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
        written
    }
}

fn write(path: &Path, key: &str, image: &[u8]) -> std::io::Result<()> {
    let mut file = std::fs::File::create_new(path)?;
    file.write_all(MAGIC)?;
    file.write_all(&checksum(key, image))?;
    file.write_all(image)?;
    file.sync_all()
}

fn checksum(key: &str, image: &[u8]) -> [u8; 16] {
    Hash::new().part(key.as_bytes()).part(image).id()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> Cache {
        let folder = format!("mlx-flash-cache-{name}-{}", std::process::id());
        Cache(std::env::temp_dir().join(folder))
    }

    #[test]
    fn what_was_stored_is_loaded_and_a_torn_file_is_not() {
        let cache = scratch("torn");
        assert_eq!(cache.load("k"), None);
        cache.store("k", b"an image");
        assert_eq!(cache.load("k").as_deref(), Some(&b"an image"[..]));
        let whole = std::fs::read(cache.path("k")).unwrap();
        for len in 0..whole.len() {
            std::fs::write(cache.path("k"), &whole[..len]).unwrap();
            assert_eq!(cache.load("k"), None, "{len} bytes");
        }
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            std::fs::write(cache.path("k"), flipped).unwrap();
            assert_eq!(cache.load("k"), None, "byte {at}");
        }
        // A file of another key is not taken either.
        std::fs::write(cache.path("other"), &whole).unwrap();
        assert_eq!(cache.load("other"), None);
        std::fs::remove_dir_all(&cache.0).unwrap();
    }

    #[test]
    fn writers_side_by_side_leave_one_whole_file() {
        let cache = scratch("many");
        let images: Vec<Vec<u8>> = (0..8u8).map(|i| vec![i; 50_000]).collect();
        std::thread::scope(|scope| {
            for image in &images {
                scope.spawn(|| {
                    for _ in 0..5 {
                        cache.store("k", image);
                        assert!(cache.load("k").is_some());
                    }
                });
            }
        });
        assert!(images.contains(&cache.load("k").unwrap()));
        let left = std::fs::read_dir(&cache.0).unwrap().count();
        assert_eq!(left, 1);
        std::fs::remove_dir_all(&cache.0).unwrap();
    }

    #[test]
    fn parts_are_told_apart() {
        let two = Hash::new().part(b"ab").part(b"c").hex();
        assert_ne!(two, Hash::new().part(b"a").part(b"bc").hex());
    }
}
