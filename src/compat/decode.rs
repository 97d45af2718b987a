//! A decode step of the named entry point, as a problem.

use crate::attention::{Layout, Problem, QueryOffset, Shape};
use crate::dtype::DType;
use crate::error::Result;

/// One f32 query a head, at the last of the valid keys of a cache `[Hkv, capacity, D]`.
#[derive(Debug, Clone, Copy)]
pub(super) struct DecodeStep {
    pub(super) heads: u32,
    pub(super) kv_heads: u32,
    pub(super) head_dim: u32,
    /// Valid keys.
    pub(super) key_len: u32,
    /// Rows that K and V have room for.
    pub(super) capacity: u32,
    pub(super) kv_dtype: DType,
    pub(super) scale: f32,
    /// 0: none.
    pub(super) softcap: f32,
    /// Keys up to the query's own that are visible.
    pub(super) window: Option<u32>,
}

impl DecodeStep {
    /// The problem; its log-sum-exp is asked for, since partial results are joined by it.
    pub(super) fn problem(&self) -> Result<Problem> {
        let shape = Shape {
            batch: 1,
            heads: self.heads as usize,
            kv_heads: self.kv_heads as usize,
            query_len: 1,
            key_len: self.key_len as usize,
            qk_dim: self.head_dim as usize,
            v_dim: self.head_dim as usize,
        };
        let mut builder = Problem::builder(DType::F32, shape)
            .kv_dtype(self.kv_dtype)
            .layout(Layout::HeadMajor)
            .key_capacity(self.capacity as usize)
            .query_offset(QueryOffset::BottomRight)
            .scale(self.scale)
            .lse(true);
        if self.softcap != 0.0 {
            builder = builder.softcap(self.softcap);
        }
        if let Some(window) = self.window {
            builder = builder.window(window as usize);
        }
        builder.refuse_empty().build()
    }
}
