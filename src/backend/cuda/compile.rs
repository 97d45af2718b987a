//! From a row of the table to an image: from the disk where it is there, else from the compiler.

use rayon::prelude::*;

use super::cache::{Cache, Hash};
use super::images::{Images, Key};
use super::nvrtc::Nvrtc;
use super::spec::Spec;
use super::table::Capability;
use crate::error::{MlxError, Result};

/// An image, and what the compiler said where it was asked.
#[derive(Debug, Clone)]
pub(crate) struct Compiled {
    pub(crate) cubin: Vec<u8>,
    pub(crate) log: Option<String>,
}

/// The options that `spec` is compiled with for `arch`.
fn options(spec: &Spec, arch: &str) -> Vec<String> {
    let mut options = vec![
        format!("--gpu-architecture={arch}"),
        "--std=c++17".into(),
        "-default-device".into(),
        "--ptxas-options=-v".into(),
        // Each text takes what it needs of what they share.
        "-diag-suppress=177".into(),
    ];
    if spec.flush {
        options.push("--ftz=true".into());
    }
    options.extend(
        spec.macros
            .iter()
            .map(|(name, value)| format!("-D{name}={value}")),
    );
    options
}

/// What the compiler is asked for: the GPU's own architecture, or the newest that it knows of the same
/// major version, whose images run there too.
pub(super) fn arch(nvrtc: &Nvrtc, gpu: Capability) -> Result<String> {
    let own = gpu.0 * 10 + gpu.1;
    let known = nvrtc.archs();
    if known.is_empty() || known.contains(&own) {
        return Ok(gpu.arch());
    }
    let near = known
        .iter()
        .copied()
        .filter(|a| a / 10 == gpu.0 && *a < own);
    near.max().map(|arch| format!("sm_{arch}")).ok_or_else(|| {
        let (major, minor) = nvrtc.version();
        MlxError::DeviceUnavailable {
            device: "cuda".into(),
            reason: format!(
                "NVRTC {major}.{minor} ({}) does not know compute capability {}.{}; install a newer one",
                nvrtc.path().display(),
                gpu.0,
                gpu.1
            ),
        }
    })
}

/// Stands for a text and its options.
fn hash(source: &str, options: &[String]) -> Hash {
    options.iter().fold(
        Hash::new()
            .part(env!("CARGO_PKG_VERSION").as_bytes())
            .part(source.as_bytes()),
        |hash, option| hash.part(option.as_bytes()),
    )
}

/// What the image of `spec` for `arch` is found by among images compiled ahead, whichever compiler
/// made them.
pub(crate) fn key(spec: &Spec, arch: &str) -> Key {
    hash(&spec.parts.concat(), &options(spec, arch)).id()
}

/// Stands for a kernel's text, told from the texts of other kernels.
pub(crate) fn text_id(spec: &Spec) -> String {
    Hash::new().part(spec.parts.concat().as_bytes()).hex()
}

/// Stands for all that decides what a compiler makes of `spec` for `arch`: text and options. Unlike
/// [`key`] it does not change with the crate's version.
pub(crate) fn fingerprint(spec: &Spec, arch: &str) -> String {
    let text = Hash::new().part(spec.parts.concat().as_bytes());
    options(spec, arch)
        .iter()
        .fold(text, |hash, option| hash.part(option.as_bytes()))
        .hex()
}

/// The image of `spec` among those compiled ahead: for this GPU, or for an older one of the same major
/// version, whose images run on it too.
pub(super) fn ahead(images: &Images, spec: &Spec, gpu: Capability) -> Result<Option<Vec<u8>>> {
    for minor in (0..=gpu.1).rev() {
        let arch = Capability(gpu.0, minor).arch();
        if let Some(image) = images.find(&key(spec, &arch))? {
            return Ok(Some(image));
        }
    }
    Ok(None)
}

/// The image of `spec` for `arch`.
pub(crate) fn compile(nvrtc: &Nvrtc, spec: &Spec, arch: &str, cache: bool) -> Result<Compiled> {
    let source = spec.parts.concat();
    let options = options(spec, arch);
    let cache = cache.then(Cache::from_env).flatten();
    let key = {
        let (major, minor) = nvrtc.version();
        hash(&source, &options)
            .part(format!("{major}.{minor}").as_bytes())
            .hex()
    };
    if let Some(cubin) = cache.as_ref().and_then(|cache| cache.load(&key)) {
        return Ok(Compiled { cubin, log: None });
    }
    let image = nvrtc.compile(&spec.name(), &source, &options)?;
    if let Some(cache) = cache {
        cache.store(&key, &image.cubin);
    }
    Ok(Compiled {
        cubin: image.cubin,
        log: Some(image.log),
    })
}

/// What `work` gives for each item, in order, worked on by all cores; the first error otherwise.
pub(crate) fn in_parallel<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&T) -> Result<R> + Sync + Send,
) -> Result<Vec<R>> {
    items.par_iter().map(work).collect()
}
