//! Options that say what happens to a score, the same for `run` and `bench`.

use anyhow::{Result, bail};
use clap::Args;
use mlx_flash_attn::DType;
use mlx_flash_attn::attention::{MaskSpec, ProblemBuilder, QueryOffset};

use crate::args;

/// Scale, cap and bounds.
#[derive(Debug, Args)]
pub(crate) struct ScoreArgs {
    /// Hide keys after a query's own position
    #[arg(long)]
    pub(crate) causal: bool,
    /// Show a query exactly N keys up to and including its own position
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = args::size)]
    pub(crate) window: Option<usize>,
    /// Show a query at most N keys after its own position
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = args::window_right)]
    pub(crate) window_right: Option<usize>,
    /// Cap scores: s = X * tanh(s / X)
    #[arg(long, value_name = "X", allow_hyphen_values = true, value_parser = args::positive)]
    pub(crate) softcap: Option<f32>,
    /// Multiply scores by X [default: 1/sqrt(D)]
    #[arg(long, value_name = "X", allow_hyphen_values = true, value_parser = args::finite)]
    pub(crate) scale: Option<f32>,
}

impl ScoreArgs {
    pub(crate) fn apply(&self, builder: ProblemBuilder) -> ProblemBuilder {
        let mut builder = builder.causal(self.causal);
        if let Some(window) = self.window {
            builder = builder.window(window);
        }
        if let Some(keys) = self.window_right {
            builder = builder.window_right(keys);
        }
        if let Some(softcap) = self.softcap {
            builder = builder.softcap(softcap);
        }
        if let Some(scale) = self.scale {
            builder = builder.scale(scale);
        }
        builder
    }

    /// Whether a key is visible or not by its distance from the query.
    pub(crate) fn bounded(&self) -> bool {
        self.causal || self.window.is_some() || self.window_right.is_some()
    }
}

/// The offset that was asked for. Where positions count, sequences of other numbers of queries than
/// of keys need one: there is no default that nobody would be surprised by.
pub(crate) fn offset(
    asked: Option<QueryOffset>,
    positions_count: bool,
    lengths: impl IntoIterator<Item = (usize, usize)>,
) -> Result<QueryOffset> {
    let differ = |&(queries, keys): &(usize, usize)| queries != keys && queries > 0 && keys > 0;
    match (asked, lengths.into_iter().find(differ)) {
        (Some(offset), _) => Ok(offset),
        (None, Some((queries, keys))) if positions_count => bail!(
            "--q-offset: expected a choice, as {queries} queries stand among {keys} keys and positions \
             count: `--q-offset bottom-right` lets the last query see the last key, `--q-offset 0` puts \
             the first query at the first key"
        ),
        _ => Ok(QueryOffset::default()),
    }
}

/// A dense mask `[B|1, H|1, qL|1, kL]` over `queries` rows.
pub(crate) fn mask_spec(dtype: DType, shape: [usize; 4]) -> MaskSpec {
    let spec = MaskSpec::broadcast(dtype, shape);
    match shape {
        [_, _, 1, _] => MaskSpec {
            row_stride: 0,
            ..spec
        },
        _ => spec,
    }
}
