//! What the driver and a worker tell each other: one JSON object a line, first the worker's
//! [`Reply`] with its `version`, then one reply to each [`Request`].

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What a worker is asked for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub(crate) enum Request {
    /// Get ready for a row; forget the one before.
    Load(Load),
    /// Run a variant `warm` times without and `iters` times with a look at the clock.
    Time {
        variant: usize,
        warm: usize,
        iters: usize,
    },
    /// Write the variant's last output, f32 `[B, H, Sq, D]`, as raw bytes.
    Output { variant: usize, path: PathBuf },
}

/// A row, and where its inputs are.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Load {
    /// A safetensors file with `q_f32`, `k_f32`, `v_f32` and so on for each of `dtypes`, head-major.
    pub(crate) path: PathBuf,
    /// `[B, H, Hkv, Sq, Sk, D]`.
    pub(crate) shape: [usize; 6],
    pub(crate) causal: bool,
    pub(crate) window: Option<usize>,
    pub(crate) dtypes: Vec<String>,
    /// Variants that take longer than this for one run are not worth waiting for.
    pub(crate) limit_s: f64,
}

/// What a worker answers; what was not asked for is absent.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Reply {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) version: Option<String>,
    /// What can be timed, in the order of the numbers in requests.
    pub(crate) variants: Vec<Variant>,
    /// What cannot, and why.
    pub(crate) skipped: Vec<String>,
    /// Nanoseconds of each timed run.
    pub(crate) ns: Vec<u64>,
}

/// One way of a peer to compute a row.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Variant {
    pub(crate) name: String,
    pub(crate) dtype: String,
}
