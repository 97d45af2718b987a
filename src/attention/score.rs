//! What happens to a score `<q, k>`, step by step: the one list of modifiers. A new one is a step here with
//! its formula and its setter; a device that does not name it among its abilities refuses it.

use super::mask::MaskSpec;
use crate::error::{MlxError, Result};

/// One step of a score, in the order in which steps are taken.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum ScoreStep {
    /// `s * scale`.
    Scale(f32),
    /// `c * tanh(s / c)`.
    Softcap(f32),
    /// `s + mask[q, k]`; a boolean mask hides and adds nothing.
    Mask(MaskSpec),
    /// `s - slope * |p - k|`, `p` being the query's position.
    Alibi,
}

/// What the steps add at one pair of query and key.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    /// The mask's cell; 0 without an additive mask.
    pub(super) mask: f64,
    /// The head's slope.
    pub(super) slope: f64,
    /// Keys between the query's position and the key.
    pub(super) distance: f64,
}

impl ScoreStep {
    /// Name for messages.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Scale(_) => "scale",
            Self::Softcap(_) => "softcap",
            Self::Mask(_) => "mask",
            Self::Alibi => "alibi",
        }
    }

    /// The score after this step; `round` follows each operation.
    pub(super) fn apply(&self, s: f64, terms: &Terms, round: impl Fn(f64) -> f64) -> f64 {
        match self {
            Self::Scale(scale) => round(s * f64::from(*scale)),
            Self::Softcap(c) => {
                let c = f64::from(*c);
                round(c * round(round(s / c).tanh()))
            }
            Self::Mask(mask) if mask.is_bool() => s,
            Self::Mask(_) => round(s + terms.mask),
            Self::Alibi => round(s - round(terms.slope * terms.distance)),
        }
    }
}

/// The modifiers of a problem's scores.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Score {
    /// `1 / sqrt(D)` until it is given.
    pub(super) scale: Option<f32>,
    pub(super) softcap: Option<f32>,
    pub(super) mask: Option<MaskSpec>,
    pub(super) alibi: bool,
}

impl Score {
    /// The steps, in order.
    pub(super) fn steps(&self) -> impl Iterator<Item = ScoreStep> {
        [
            self.scale.map(ScoreStep::Scale),
            self.softcap.map(ScoreStep::Softcap),
            self.mask.map(ScoreStep::Mask),
            self.alibi.then_some(ScoreStep::Alibi),
        ]
        .into_iter()
        .flatten()
    }

    /// Checks the numbers, with the scale of `qk_dim` where none is given.
    pub(super) fn check(mut self, qk_dim: usize) -> Result<Self> {
        let scale = self.scale.unwrap_or(1.0 / (qk_dim as f32).sqrt());
        if !scale.is_finite() {
            return Err(MlxError::expected("scale", "a finite number", scale));
        }
        self.scale = Some(scale);
        // Scores are divided by it: a subnormal one would make that infinite.
        match self.softcap.filter(|c| !(c.is_normal() && *c > 0.0)) {
            Some(c) => Err(MlxError::expected("softcap", "a normal number above 0", c)),
            None => Ok(self),
        }
    }
}
