//! What a caller asks for, as plain numbers, and the problem that this is.

use mlx_flash_attn::attention::{MaskSpec, Problem, QueryOffset, Role, Shape, Strides};
use mlx_flash_attn::{DType, MlxError};

/// Declares the struct and a text of it, `name type` a field, from which the caller makes its twin.
macro_rules! request {
    ($($(#[$meta:meta])* $field:ident: $kind:ident,)*) => {
        /// One attention call. Addresses are of device memory, 0 where there is no such operand; sizes
        /// and strides are in elements, and -1 stands for none.
        #[repr(C)]
        #[derive(Debug, Clone, Copy)]
        pub struct Request { $($(#[$meta])* pub $field: $kind,)* }

        /// The fields in their order, with a null at the end.
        pub(crate) const FIELDS: &str =
            concat!($(stringify!($field), " ", stringify!($kind), "\n",)* "\0");
    };
}

request! {
    /// Element type of Q, K, V and O: 1 f32, 2 f16, 3 bf16.
    dtype: i64,
    /// Batch size.
    batch: i64,
    /// Query heads.
    heads: i64,
    /// Key/value heads.
    kv_heads: i64,
    /// Query length.
    query_len: i64,
    /// Key length.
    key_len: i64,
    /// Head dimension.
    head_dim: i64,
    /// Whether keys after a row's position are hidden.
    causal: i64,
    /// Position of query row 0 among the keys.
    query_offset: i64,
    /// Keys of the window, a row's own included.
    window: i64,
    /// Keys after a row's position that it sees.
    window_right: i64,
    /// Scale of the scores; 0 for the default, 1 / sqrt(D).
    scale: f64,
    /// Softcap; 0 for none.
    softcap: f64,
    /// Q.
    q: u64,
    /// K.
    k: u64,
    /// V.
    v: u64,
    /// O, written.
    out: u64,
    /// Log-sum-exp `[B, H, qL]` in f32, written.
    lse: u64,
    /// Sink logits `[H]` in f32.
    sinks: u64,
    /// ALiBi slopes `[H]` in f32.
    slopes: u64,
    /// The mask.
    mask: u64,
    /// Element type of the mask: as `dtype`, or 4 for bool.
    mask_dtype: i64,
    /// A byte for each class tile of the mask.
    classes: u64,
    /// Whether a launch computes the classes before the attention.
    classify: i64,
    /// Strides of Q.
    q_batch: i64,
    /// Of heads.
    q_head: i64,
    /// Of rows.
    q_row: i64,
    /// Strides of K.
    k_batch: i64,
    /// Of heads.
    k_head: i64,
    /// Of rows.
    k_row: i64,
    /// Strides of V.
    v_batch: i64,
    /// Of heads.
    v_head: i64,
    /// Of rows.
    v_row: i64,
    /// Strides of O.
    out_batch: i64,
    /// Of heads.
    out_head: i64,
    /// Of rows.
    out_row: i64,
    /// Strides of the mask; 0 broadcasts.
    mask_batch: i64,
    /// Of heads.
    mask_head: i64,
    /// Of rows.
    mask_row: i64,
}

/// A size, which is not negative.
pub(crate) fn size(what: &str, n: i64) -> Result<usize, MlxError> {
    usize::try_from(n)
        .map_err(|_| MlxError::InvalidArgument(format!("{what}: expected a size, got {n}")))
}

pub(crate) fn dtype(code: i64) -> Result<DType, MlxError> {
    match code {
        1 => Ok(DType::F32),
        2 => Ok(DType::F16),
        3 => Ok(DType::BF16),
        4 => Ok(DType::U8),
        _ => Err(MlxError::InvalidArgument(format!(
            "dtype: expected 1 to 4, got {code}"
        ))),
    }
}

impl Request {
    /// The problem that this states.
    pub(crate) fn problem(&self) -> Result<Problem, MlxError> {
        let head_dim = size("head_dim", self.head_dim)?;
        let shape = Shape {
            batch: size("batch", self.batch)?,
            heads: size("heads", self.heads)?,
            kv_heads: size("kv_heads", self.kv_heads)?,
            query_len: size("query_len", self.query_len)?,
            key_len: size("key_len", self.key_len)?,
            qk_dim: head_dim,
            v_dim: head_dim,
        };
        let mut builder = Problem::builder(dtype(self.dtype)?, shape)
            .causal(self.causal != 0)
            .query_offset(QueryOffset::At(self.query_offset))
            .sinks(self.sinks != 0)
            .alibi(self.slopes != 0)
            .lse(self.lse != 0);
        for (role, [batch, head, seq]) in [
            (Role::Query, [self.q_batch, self.q_head, self.q_row]),
            (Role::Key, [self.k_batch, self.k_head, self.k_row]),
            (Role::Value, [self.v_batch, self.v_head, self.v_row]),
            (Role::Output, [self.out_batch, self.out_head, self.out_row]),
        ] {
            let strides = Strides {
                batch: size("stride", batch)?,
                head: size("stride", head)?,
                seq: size("stride", seq)?,
            };
            builder = builder.strides(role, strides);
        }
        if self.window >= 0 {
            builder = builder.window(bound(self.window)?);
        }
        if self.window_right >= 0 {
            builder = builder.window_right(bound(self.window_right)?);
        }
        if self.scale != 0.0 {
            builder = builder.scale(self.scale as f32);
        }
        if self.softcap != 0.0 {
            builder = builder.softcap(self.softcap as f32);
        }
        if self.mask != 0 {
            let mask = MaskSpec {
                dtype: dtype(self.mask_dtype)?,
                batch_stride: size("mask stride", self.mask_batch)?,
                head_stride: size("mask stride", self.mask_head)?,
                row_stride: size("mask stride", self.mask_row)?,
            };
            builder = builder.mask(mask).tile_classes(self.classes != 0);
        }
        builder.build()
    }

    /// The address of an operand, 0 where there is none.
    pub(crate) fn address(&self, role: Role) -> u64 {
        match role {
            Role::Query => self.q,
            Role::Key => self.k,
            Role::Value => self.v,
            Role::Output => self.out,
            Role::Mask => self.mask,
            Role::TileClasses => self.classes,
            Role::Sinks => self.sinks,
            Role::AlibiSlopes => self.slopes,
            Role::Lse => self.lse,
            // Dense keys alone can be asked for.
            Role::BlockTable | Role::KeyLengths => 0,
        }
    }
}

fn bound(n: i64) -> Result<usize, MlxError> {
    usize::try_from(n).map_err(|_| MlxError::InvalidArgument(format!("window: {n} is too far")))
}
