//! What the examples share: where the weights are, which device, progress.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};

/// candle's devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum On {
    Cpu,
    Cuda,
    Metal,
}

/// Options of every example.
#[derive(Debug, Clone, Args)]
pub(crate) struct Common {
    /// candle's device; other than the CPU they take the feature of that name.
    #[arg(long, value_enum, env = "MLX_FLASH_DEVICE", default_value = "cpu")]
    pub(crate) device: On,
    /// Where `scripts/fetch-models` put the weights.
    #[arg(long, value_name = "DIR", env = "MLX_FLASH_MODELS")]
    pub(crate) models: Option<PathBuf>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

impl Common {
    pub(crate) fn device(&self) -> Result<Device> {
        let device = match self.device {
            On::Cpu => Ok(Device::Cpu),
            On::Cuda => Device::new_cuda(0),
            On::Metal => Device::new_metal(0),
        };
        device.with_context(|| format!("the device {:?} cannot be opened", self.device))
    }

    /// A file of a model.
    pub(crate) fn file(&self, model: &str, name: &str) -> Result<PathBuf> {
        file(self.models.as_deref(), model, name)
    }

    /// A sign of life for work of unknown length.
    pub(crate) fn spinner(&self, what: &str) -> ProgressBar {
        let bar = self.styled(
            ProgressBar::new_spinner(),
            "{spinner} {msg}, {elapsed}",
            what,
        );
        bar.enable_steady_tick(Duration::from_millis(100));
        bar
    }

    /// A bar over `len` steps, with an estimate of the time left.
    pub(crate) fn bar(&self, len: usize, what: &str) -> ProgressBar {
        let template = "{msg} [{bar:30}] {pos}/{len}, {eta} left";
        let bar = self.styled(ProgressBar::new(len as u64), template, what);
        bar.enable_steady_tick(Duration::from_millis(200));
        bar
    }

    fn styled(&self, bar: ProgressBar, template: &str, what: &str) -> ProgressBar {
        if self.json {
            return ProgressBar::hidden();
        }
        bar.set_message(what.to_owned());
        match ProgressStyle::with_template(template) {
            Ok(style) => bar.with_style(style.progress_chars("=> ")),
            Err(_) => bar,
        }
    }
}

/// A file of a model, in the folder given or in the repository's cache.
pub(crate) fn file(folder: Option<&Path>, model: &str, name: &str) -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let cache = root.join(".cache/models");
    let path = folder.unwrap_or(&cache).join(model).join(name);
    ensure!(
        path.is_file(),
        "there is no {}; `scripts/fetch-models {model}` installs it, or --models says where it is",
        path.display()
    );
    Ok(path)
}

/// The device that tests run on: `MLX_FLASH_DEVICE`, `cpu` where it is not set.
#[cfg(test)]
pub(crate) fn tested() -> Device {
    let name = std::env::var("MLX_FLASH_DEVICE").unwrap_or_else(|_| "cpu".into());
    let device = match name.as_str() {
        "cpu" => Ok(Device::Cpu),
        "cuda" => Device::new_cuda(0),
        "metal" => Device::new_metal(0),
        _ => panic!("MLX_FLASH_DEVICE: expected cpu, cuda or metal, got {name}"),
    };
    device.unwrap_or_else(|error| panic!("MLX_FLASH_DEVICE={name}: {error}"))
}
