//! Images compiled ahead, many in one file, for machines that have a driver and no compiler.
//!
//! The file is [`MAGIC`], then for each image its key, the bytes that follow, and these: a checksum
//! and the image, deflated.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::{Read, Write};
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use flate2::Compression;
use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;

use super::cache::Hash;
use crate::error::{MlxError, Result};

const MAGIC: &[u8; 8] = b"MLXIMGS1";

/// Stands for a text and the options that it was compiled with.
pub(crate) type Key = [u8; 16];

/// A file's images, each unpacked when it is asked for.
pub(crate) struct Images {
    bytes: Cow<'static, [u8]>,
    places: HashMap<Key, Range<usize>>,
}

/// Those that the program trusts for every device that it opens.
static TRUSTED: RwLock<Option<Arc<Images>>> = RwLock::new(None);

/// Gives every device that is opened from now on these images.
///
/// # Safety
/// They are what NVRTC made: the driver trusts an image's contents.
pub(crate) unsafe fn trust(images: Images) {
    *TRUSTED.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(images));
}

/// What [`trust`] was given last.
pub(super) fn trusted() -> Option<Arc<Images>> {
    TRUSTED
        .read()
        .unwrap_or_else(PoisonError::into_inner)
        .clone()
}

fn broken(what: &str) -> MlxError {
    MlxError::expected("images", "a file of compiled images", what)
}

impl Images {
    pub(crate) fn read(bytes: Cow<'static, [u8]>) -> Result<Self> {
        let mut places = HashMap::new();
        let mut rest = bytes
            .strip_prefix(MAGIC)
            .ok_or_else(|| broken("something else"))?;
        while !rest.is_empty() {
            let cut = || broken("one that is cut off");
            let (key, after) = rest.split_first_chunk::<16>().ok_or_else(cut)?;
            let (len, after) = after.split_first_chunk::<8>().ok_or_else(cut)?;
            let len = usize::try_from(u64::from_le_bytes(*len)).map_err(|_| cut())?;
            let start = bytes.len() - after.len();
            rest = after.get(len..).ok_or_else(cut)?;
            places.insert(*key, start..start + len);
        }
        Ok(Self { bytes, places })
    }

    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// The image of this key, if it is there.
    ///
    /// # Errors
    /// `InvalidArgument` where it is there and not what was written.
    pub(super) fn find(&self, key: &Key) -> Result<Option<Vec<u8>>> {
        let Some(place) = self.places.get(key) else {
            return Ok(None);
        };
        let torn = || broken("one with an image that is not as it was written");
        let packed = self.bytes.get(place.clone()).ok_or_else(torn)?;
        let (sum, packed) = packed.split_first_chunk::<16>().ok_or_else(torn)?;
        let mut image = Vec::new();
        DeflateDecoder::new(packed)
            .read_to_end(&mut image)
            .map_err(|_| torn())?;
        if *sum == checksum(key, &image) {
            Ok(Some(image))
        } else {
            Err(torn())
        }
    }

    /// The file that [`Self::read`] reads.
    pub(crate) fn write<'a>(images: impl IntoIterator<Item = (Key, &'a [u8])>) -> Vec<u8> {
        let mut file = MAGIC.to_vec();
        for (key, image) in images {
            let mut packed =
                DeflateEncoder::new(checksum(&key, image).to_vec(), Compression::best());
            // The checksum goes before what is deflated. Writing to memory cannot fail.
            let packed = packed
                .write_all(image)
                .and_then(|()| packed.finish())
                .unwrap_or_default();
            file.extend_from_slice(&key);
            file.extend_from_slice(&(packed.len() as u64).to_le_bytes());
            file.extend_from_slice(&packed);
        }
        file
    }
}

fn checksum(key: &Key, image: &[u8]) -> [u8; 16] {
    Hash::new().part(key).part(image).id()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> Vec<u8> {
        Images::write([([1; 16], &b"an image, an image"[..]), ([2; 16], b"")])
    }

    #[test]
    fn what_was_written_is_found_under_its_key() {
        let images = Images::read(two().into()).unwrap();
        assert_eq!(images.len(), 2);
        let found = images.find(&[1; 16]).unwrap();
        assert_eq!(found.as_deref(), Some(&b"an image, an image"[..]));
        assert_eq!(images.find(&[2; 16]).unwrap().as_deref(), Some(&b""[..]));
        assert_eq!(images.find(&[3; 16]).unwrap(), None);
    }

    #[test]
    fn a_file_that_is_cut_or_changed_is_refused_or_lacks_the_image() {
        let whole = two();
        for len in 0..whole.len() {
            let cut = Images::read(whole[..len].to_vec().into());
            let lost = cut.is_ok_and(|images| images.len() == 2);
            assert!(!lost, "{len} bytes");
        }
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 0x55;
            let same = Images::read(changed.into()).is_ok_and(|images| {
                let image = |n| images.find(&[n; 16]).ok().flatten();
                image(1).as_deref() == Some(b"an image, an image") && image(2).is_some()
            });
            assert!(!same, "byte {at}");
        }
    }
}
