//! The lines that `--json` prints. Keys are stable: new ones are added, none is renamed.

use mlx_flash_attn::attention::Shape;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

/// One line of `run`.
#[derive(Debug, Serialize)]
pub(crate) struct RunLine {
    pub(crate) device: &'static str,
    pub(crate) ms: f64,
    /// Null when no check was asked for.
    pub(crate) check: Option<CheckLine>,
}

/// The check of `run`. A number that is not finite is null.
#[derive(Debug, Serialize)]
pub(crate) struct CheckLine {
    pub(crate) rel_fro: f64,
    pub(crate) rel_tolerance: f64,
    pub(crate) max_abs: f64,
    pub(crate) tolerance: f64,
    /// Of the log-sum-exp; null where there is none, and where it is not finite.
    pub(crate) lse_error: Option<f64>,
    pub(crate) lse_tolerance: Option<f64>,
    pub(crate) ok: bool,
}

/// The line of `verify`.
#[derive(Debug, Serialize)]
pub(crate) struct VerifyLine {
    pub(crate) device: &'static str,
    pub(crate) cases: usize,
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
}

/// One line of `bench`.
#[derive(Debug, Serialize)]
pub(crate) struct BenchLine {
    pub(crate) device: &'static str,
    pub(crate) dtype: &'static str,
    /// B, H, Hkv, Sq, Sk, D.
    pub(crate) shape: [usize; 6],
    pub(crate) causal: bool,
    pub(crate) window: Option<usize>,
    pub(crate) ms_median: f64,
    pub(crate) ms_min: f64,
    pub(crate) ms_max: f64,
    pub(crate) tflops: f64,
    /// What the device was measured to reach with nothing else to do; null where unknown.
    pub(crate) peak_tflops: Option<f64>,
    /// `tflops / peak_tflops`.
    pub(crate) share: Option<f64>,
    /// What else was asked for, by the names of its options; nothing where nothing was.
    #[serde(flatten)]
    pub(crate) asked: Map<String, Value>,
}

/// B, H, Hkv, Sq, Sk, D.
pub(crate) fn sizes(shape: Shape) -> [usize; 6] {
    [
        shape.batch,
        shape.heads,
        shape.kv_heads,
        shape.query_len,
        shape.key_len,
        shape.qk_dim,
    ]
}

/// One line of `devices`.
#[derive(Debug, Serialize)]
pub(crate) struct DeviceLine {
    pub(crate) device: &'static str,
    pub(crate) available: bool,
    /// Whether `--device auto` takes it.
    pub(crate) default: bool,
    pub(crate) name: Option<String>,
    #[serde(serialize_with = "in_order")]
    pub(crate) details: Vec<(&'static str, String)>,
    /// Why it is not available.
    pub(crate) reason: Option<String>,
}

/// The line of `tiles`.
#[derive(Debug, Serialize)]
pub(crate) struct TilesLine {
    pub(crate) sq: usize,
    pub(crate) sk: usize,
    pub(crate) causal: bool,
    pub(crate) window: Option<usize>,
    /// Only where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) window_right: Option<usize>,
    pub(crate) q_offset: i64,
    pub(crate) head_dim: usize,
    /// Query rows and keys of a tile.
    pub(crate) tile: [usize; 2],
    pub(crate) skipped: u64,
    pub(crate) masked: u64,
    pub(crate) free: u64,
    /// Skipped tiles as a share of all.
    pub(crate) saved: f64,
}

/// Pairs as an object, in their own order.
fn in_order<S: Serializer>(pairs: &[(&str, String)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(pairs.iter().map(|(name, value)| (name, value)))
}

/// The line of `images`.
#[cfg(feature = "cuda")]
#[derive(Debug, Serialize)]
pub(crate) struct ImagesLine {
    pub(crate) images: usize,
    /// Of the images themselves.
    pub(crate) bytes: usize,
    pub(crate) file_bytes: usize,
}
