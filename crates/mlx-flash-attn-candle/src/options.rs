//! What a caller can ask for besides Q, K and V.

use candle_core::Tensor;
use mlx_flash_attn::attention::{Layout, QueryOffset};

/// A mask, by what its cells mean.
///
/// Any shape that broadcasts to `[B, H, qL, kL]` (packed: `[H, total_q, longest kL]`), whatever the
/// layout, on the device of Q. It is read in place, broadcast or not, unless its keys are not
/// contiguous or a variant below says otherwise.
#[derive(Debug, Clone)]
pub enum Mask {
    /// Integers: a query sees the keys whose cells are not 0. Other integers than u8 are copied.
    Attend(Tensor),
    /// Integers: the keys whose cells are not 0 are hidden, which is what candle's models write.
    /// Copied, as large as it is before it broadcasts.
    Hide(Tensor),
    /// Floats, added to the scaled scores; `-inf`, and no finite number, hides a key. f64 is copied.
    Add(Tensor),
}

/// What attention is asked to do; the default is plain, full attention.
///
/// ```
/// use mlx_flash_attn_candle::{Options, QueryOffset};
///
/// // A chunk, or a single token, after everything that the cache already holds.
/// let options = Options {
///     causal: true,
///     window: Some(512),
///     offset: Some(QueryOffset::BottomRight),
///     ..Options::default()
/// };
/// ```
#[derive(Debug, Clone)]
pub struct Options {
    /// Order of Q, K, V and the output: `[B, H, L, D]` (head-major, the default) or `[B, L, H, D]`.
    pub layout: Layout,
    /// Score scale; `1 / sqrt(D)` when not given.
    pub scale: Option<f32>,
    /// Caps scores, `s = c * tanh(s / c)`, after the scale and before any mask.
    pub softcap: Option<f32>,
    /// Hides keys after each query's own position.
    pub causal: bool,
    /// Where query row 0 stands among the keys: with `BottomRight` the last query sees the last key,
    /// as a cache wants it, with `At(0)` the first query stands at the first key. A causal bound, a
    /// window or ALiBi over a number of keys other than that of queries needs the choice; elsewhere
    /// it changes nothing.
    pub offset: Option<QueryOffset>,
    /// A query sees exactly this many keys up to and including its own position.
    pub window: Option<usize>,
    /// A query sees at most this many keys after its own position (encoders).
    pub window_right: Option<usize>,
    /// A mask, which says by its variant what its cells mean.
    pub mask: Option<Mask>,
    /// A sink logit for each head, `[H]`, which joins the softmax's denominator.
    pub sinks: Option<Tensor>,
    /// An ALiBi slope for each head, `[H]`: `-slope * distance` is added to the score.
    pub alibi_slopes: Option<Tensor>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            layout: Layout::HeadMajor,
            scale: None,
            softcap: None,
            causal: false,
            offset: None,
            window: None,
            window_right: None,
            mask: None,
            sinks: None,
            alibi_slopes: None,
        }
    }
}
