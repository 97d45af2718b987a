//! What a caller can ask for besides Q, K and V.

use candle_core::Tensor;
use mlx_flash_attn::attention::{Layout, QueryOffset};

/// What attention is asked to do; the default is plain, full attention.
///
/// ```
/// use mlx_flash_attn_candle::Options;
///
/// let options = Options { causal: true, window: Some(512), ..Options::default() };
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
    /// Where query row 0 stands among the keys. `BottomRight`, the default, lets the last query see
    /// the last key, as a cache wants it: a chunk or a token comes after all that K already holds.
    pub offset: QueryOffset,
    /// A query sees exactly this many keys up to and including its own position.
    pub window: Option<usize>,
    /// A query sees at most this many keys after its own position (encoders).
    pub window_right: Option<usize>,
    /// A mask of any shape that broadcasts to `[B, H, qL, kL]` (packed: `[H, total_q, longest kL]`),
    /// whatever the layout, on the device of Q. Floats of any width are added to the scores, `-inf`
    /// hiding a key; integers are boolean, nonzero attending. It is read in place, broadcast or not,
    /// except where its keys are not contiguous or its dtype is neither bf16, f16, f32 nor u8.
    pub mask: Option<Tensor>,
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
            offset: QueryOffset::BottomRight,
            window: None,
            window_right: None,
            mask: None,
            sinks: None,
            alibi_slopes: None,
        }
    }
}
