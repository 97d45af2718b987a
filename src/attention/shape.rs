//! The sizes of a problem.

/// Every width of a row of Q, K, V or O that some device serves, ascending.
pub const HEAD_DIMS: [usize; 12] = [32, 40, 48, 64, 72, 80, 96, 112, 128, 192, 256, 512];

/// The sizes of a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Batch size B.
    pub batch: usize,
    /// Query heads H.
    pub heads: usize,
    /// Key/value heads Hkv; divides H (GQA, MQA).
    pub kv_heads: usize,
    /// Query length qL.
    pub query_len: usize,
    /// Key/value length kL.
    pub key_len: usize,
    /// Elements of a row of Q and of K.
    pub qk_dim: usize,
    /// Elements of a row of V and of O; mostly `qk_dim`.
    pub v_dim: usize,
}

impl Shape {
    /// The head dimension D, where rows of Q, K, V and O all have it.
    pub const fn head_dim(&self) -> Option<usize> {
        if self.qk_dim == self.v_dim {
            Some(self.qk_dim)
        } else {
            None
        }
    }
}
