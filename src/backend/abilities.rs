//! Which forms of a problem a device's kernels take, beside the rows of its table: one value a device, one
//! check and one wording of each refusal for all of them.

use super::kind::DeviceKind;
use crate::attention::{Format, KeyLengths, Keys, Problem, ScoreStep, Shape};
use crate::error::Unsupported;

/// The forms that a device's kernels take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Abilities {
    /// Rows of V and O of another width than rows of Q and K.
    pub(crate) v_dim: bool,
    /// K and V of another element type than Q.
    pub(crate) kv_dtype: bool,
    /// Whether it takes K and V in blocks of this format.
    pub(crate) block_format: fn(Format) -> bool,
    /// V in another format than K.
    pub(crate) formats_differ: bool,
    /// K and V in pages.
    pub(crate) pages: bool,
    /// Packed queries over keys that are not packed.
    pub(crate) queries_packed_alone: bool,
    /// A number of keys for each sequence, from the host.
    pub(crate) host_lengths: bool,
    /// The same from a buffer of the device.
    pub(crate) device_lengths: bool,
    /// Whether it takes this step of a score.
    pub(crate) score_step: fn(&ScoreStep) -> bool,
}

impl Abilities {
    /// One head dim and one element type for Q, K, V and O, all keys dense or all packed, and the steps of a
    /// score that every device takes.
    pub(crate) const ALIKE: Self = Self {
        v_dim: false,
        kv_dtype: false,
        block_format: |_| false,
        formats_differ: false,
        pages: false,
        queries_packed_alone: false,
        host_lengths: false,
        device_lengths: false,
        score_step: |step| {
            matches!(
                step,
                ScoreStep::Scale(_) | ScoreStep::Softcap(_) | ScoreStep::Mask(_) | ScoreStep::Alibi
            )
        },
    };

    /// Refuses the first form of the problem that is not among these.
    pub(crate) fn check(
        self,
        device: DeviceKind,
        problem: &Problem,
    ) -> std::result::Result<(), Unsupported> {
        let refusal = self
            .elements(problem)
            .or_else(|| self.rows(problem))
            .or_else(|| self.scores(problem));
        match refusal {
            Some((what, reason)) => Err(Unsupported::new(device.name(), what, reason)),
            None => Ok(()),
        }
    }

    /// The first width or element format of the problem that the device does not take, and the reason.
    fn elements(&self, problem: &Problem) -> Option<(String, &'static str)> {
        let Shape { qk_dim, v_dim, .. } = problem.shape();
        if !self.v_dim && qk_dim != v_dim {
            return Some((
                format!("v_dim {v_dim} beside qk_dim {qk_dim}"),
                "its kernels take one head dim for Q, K, V and O",
            ));
        }
        let dtype = problem.dtype();
        for (name, format) in [("K", problem.key_format()), ("V", problem.value_format())] {
            match format {
                Format::Plain(kv_dtype) if !self.kv_dtype && kv_dtype != dtype => {
                    return Some((
                        format!("{name} of {kv_dtype} under {dtype} queries"),
                        "its kernels take one element type for Q, K and V",
                    ));
                }
                Format::Plain(_) => {}
                _ if !(self.block_format)(format) => {
                    return Some((
                        format!("{name} of {format}"),
                        "its kernels read no such blocks; dequantise them into f32, f16 or bf16",
                    ));
                }
                _ => {}
            }
        }
        let mixed = !self.formats_differ && problem.key_format() != problem.value_format();
        mixed.then(|| {
            (
                format!(
                    "K of {} beside V of {}",
                    problem.key_format(),
                    problem.value_format()
                ),
                "its kernels take one format for both",
            )
        })
    }

    /// The first way in which the problem's keys lie or are counted that the device does not take, and the
    /// reason.
    fn rows(&self, problem: &Problem) -> Option<(String, &'static str)> {
        let packed_queries = problem.cu_seqlens_q().is_some();
        let packed_keys = matches!(problem.keys(), Keys::Packed(_));
        let refused = |what: &str, reason| Some((what.to_string(), reason));
        match (problem.keys(), problem.key_lengths()) {
            (Keys::Paged(_), _) if !self.pages => refused(
                "K and V in pages",
                "its kernels read rows at strides; gather the pages",
            ),
            (_, KeyLengths::Host(_)) if !self.host_lengths => refused(
                "a number of keys for each sequence",
                "its kernels take one kL; hide the rest with a boolean mask",
            ),
            (_, KeyLengths::Device) if !self.device_lengths => refused(
                "a number of keys from a buffer of the device",
                "its kernels take kL from the host",
            ),
            _ if packed_queries && !packed_keys && !self.queries_packed_alone => refused(
                "packed queries over keys that are not packed",
                "its kernels take both packed; pack K and V, too",
            ),
            _ => None,
        }
    }

    /// The first step of the problem's scores that the device does not take, and the reason.
    fn scores(&self, problem: &Problem) -> Option<(String, &'static str)> {
        let step = problem.score_steps().find(|s| !(self.score_step)(s))?;
        Some((
            format!("the score's step `{}`", step.name()),
            "its kernels have no such step",
        ))
    }
}
