//! `images`: CUDA kernels compiled ahead, in one file.

use anyhow::{Context, Result, ensure};
use mlx_flash_attn::cuda::{compile_images, pack_images, trust_images};

use crate::cli::ImagesArgs;
use crate::files::Target;
use crate::json::ImagesLine;
use crate::output::{Results, Status};
use crate::progress;

/// The variable that names a file of images. The program reads it; the library does not.
const VARIABLE: &str = "MLX_FLASH_CUDA_IMAGES";

/// Lets CUDA devices take the images of the file that the user names, if there is one.
#[allow(unsafe_code)]
pub(crate) fn trust_named() -> Result<()> {
    let Some(path) = std::env::var_os(VARIABLE).filter(|path| !path.is_empty()) else {
        return Ok(());
    };
    let path = std::path::PathBuf::from(path);
    let named = || format!("{VARIABLE}: {}", path.display());
    let bytes = std::fs::read(&path).with_context(named)?;
    // SAFETY: whoever runs the program says by the variable that `images` wrote the file, and could
    // name another program as well.
    unsafe { trust_images(bytes) }.with_context(named)
}

pub(crate) fn execute(args: &ImagesArgs, results: &mut Results) -> Result<Status> {
    let target = Target::new(&args.output, &[])?;
    let select = |name: &str| {
        let any = args.only.is_empty() || !name.contains("D=");
        any || args.only.iter().any(|text| name.contains(text))
    };
    let mut images = Vec::new();
    for arch in &args.arch {
        let bar = progress::bar(1, arch, args.json);
        let compiled = compile_images(arch, select, |done, all| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        });
        bar.finish_and_clear();
        images.extend(compiled?);
    }
    ensure!(!images.is_empty(), "--only: no kernel has such a name");
    let file = pack_images(&images);
    target.write(&file)?;
    let line = ImagesLine {
        images: images.len(),
        bytes: images.iter().map(|image| image.cubin.len()).sum(),
        file_bytes: file.len(),
    };
    if args.json {
        results.json(&line)?;
    } else {
        results.line(format!(
            "{} images, {:.1} MB, in {:.1} MB",
            line.images,
            line.bytes as f64 / 1e6,
            line.file_bytes as f64 / 1e6
        ))?;
    }
    Ok(Status::Done)
}
