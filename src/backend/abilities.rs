//! Which forms of a problem a device's kernels take, beside the rows of its table: one value a device, one
//! check and one wording of each refusal for all of them.

use super::DeviceKind;
use crate::attention::{Problem, Shape};
use crate::error::Unsupported;

/// The forms that a device's kernels take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Abilities {
    /// Rows of V and O of another width than rows of Q and K.
    pub(crate) v_dim: bool,
    /// K and V of another element type than Q.
    pub(crate) kv_dtype: bool,
}

impl Abilities {
    /// One head dim and one element type for Q, K, V and O.
    pub(crate) const ALIKE: Self = Self {
        v_dim: false,
        kv_dtype: false,
    };

    /// Refuses the first form of the problem that is not among these.
    pub(crate) fn check(
        self,
        device: DeviceKind,
        problem: &Problem,
    ) -> std::result::Result<(), Unsupported> {
        let Shape { qk_dim, v_dim, .. } = problem.shape();
        if !self.v_dim && qk_dim != v_dim {
            return Err(Unsupported::new(
                device.name(),
                format!("v_dim {v_dim} beside qk_dim {qk_dim}"),
                "its kernels take one head dim for Q, K, V and O",
            ));
        }
        let (dtype, kv_dtype) = (problem.dtype(), problem.kv_dtype());
        if !self.kv_dtype && dtype != kv_dtype {
            return Err(Unsupported::new(
                device.name(),
                format!("{kv_dtype} keys and values under {dtype} queries"),
                "its kernels take one element type for Q, K and V",
            ));
        }
        Ok(())
    }
}
