//! Commands and options.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use mlx_flash_attn::attention::{QueryOffset, Shape};

use crate::args::{self, DTypeArg, DeviceArgs, FormatArg, LayoutArg, MaskArg, MaskAxes, Numbers};
use crate::score::ScoreArgs;

/// Exact flash attention on this machine's devices: compute it, check it, measure it.
///
/// Results go to stdout, messages to stderr. Exit status: 0 done, 1 a check failed, 2 bad input.
#[derive(Debug, Parser)]
#[command(name = "mlx-flash-attn", version, propagate_version = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

// Each command is described by its options' own text.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Run(RunArgs),
    Verify(VerifyArgs),
    Bench(BenchArgs),
    Devices(DevicesArgs),
    Tiles(TilesArgs),
    #[cfg(feature = "cuda")]
    Images(ImagesArgs),
}

/// Compile CUDA kernels ahead, for machines that have a driver and no compiler.
///
/// Needs NVRTC and no GPU. The file is for this version of the program and of the library:
/// MLX_FLASH_CUDA_IMAGES names it where they run, or `include_bytes!` puts it in a program.
#[cfg(feature = "cuda")]
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  mlx-flash-attn images --arch sm_90a --only 'D=128 ' -o images.bin")]
pub(crate) struct ImagesArgs {
    /// GPUs to compile for, such as sm_80 (and 8.6, 8.9) or sm_90a; repeatable
    #[arg(long, value_name = "ARCH", required = true)]
    pub(crate) arch: Vec<String>,
    /// Take kernels whose names hold this text, and those of no head dim; repeatable [default: all]
    #[arg(long, value_name = "TEXT")]
    pub(crate) only: Vec<String>,
    /// File to write; it appears whole or not at all
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// Print one JSON object: images, bytes, file_bytes
    #[arg(long)]
    pub(crate) json: bool,
}

/// Compute attention over the tensors of a safetensors file.
///
/// The file holds `q` [B,H,qL,D], `k` and `v` [B,Hkv,kL,D] in BF16, F16 or F32 (seq-major: [B,L,H,D]).
/// It may hold:
///
/// - `mask` [qL|1,kL] or [B|1,H|1,qL|1,kL]: BOOL or U8 (true or not 0: the key is visible), or BF16,
///   F16 or F32 (added to the scaled scores; -inf hides a key);
///
/// - `sinks` F32 [H], `alibi_slopes` F32 [H] (-slope * distance is added);
///
/// - `cu_seqlens_q` and `cu_seqlens_k` [n+1] (I32, U32, I64 or U64): n packed sequences, `q`
///   [rows,H,D], `k` and `v` [rows,Hkv,D]; B is then 1, kL in a mask that of the longest sequence,
///   and rows past the last boundary are padding: not read, zeros in the output;
///
/// - `key_lengths` [B] (I32 or U32): of the kL rows of sequence b, the first key_lengths[b] are keys;
///
/// - `block_table` I32 [B,P]: `k` and `v` are pages [pages,Hkv,page_size,D] (seq-major:
///   [pages,page_size,Hkv,D]), and row j of sequence b lies in slot j % page_size of page
///   block_table[b,j / page_size]; kL is P * page_size.
///
/// With either of the last two, `cu_seqlens_q` alone packs the queries of B = n sequences.
///
/// The output file holds `o` in q's dtype and layout.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlx-flash-attn run -i qkv.safetensors -o out.safetensors --causal --check
  mlx-flash-attn run -i cache.safetensors -o out.safetensors --key-len 300 --causal --q-offset bottom-right")]
pub(crate) struct RunArgs {
    /// Safetensors file with `q`, `k`, `v`
    #[arg(short, long, value_name = "FILE")]
    pub(crate) input: PathBuf,
    /// Safetensors file to write; it appears whole or not at all
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    #[command(flatten)]
    pub(crate) score: ScoreArgs,
    /// Position of query row 0 among the keys, or `bottom-right` for kL - qL; needed where qL differs
    /// from kL and a bound or ALiBi counts positions
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = args::query_offset)]
    pub(crate) q_offset: Option<QueryOffset>,
    /// Take the first N rows of k and v alone as keys: a cache with room for more. `key_lengths` in the file says so
    /// for each sequence
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = args::size)]
    pub(crate) key_len: Option<usize>,
    /// Order of the axes of q, k, v and o
    #[arg(long, value_enum, default_value_t = LayoutArg::HeadMajor)]
    pub(crate) layout: LayoutArg,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// Write the log-sum-exp of each row too: `lse` F32 [B,H,qL], packed [H,rows]
    #[arg(long)]
    pub(crate) lse: bool,
    /// Compare with the float64 reference (slow); exit with 1 if over the tolerance
    #[arg(long)]
    pub(crate) check: bool,
    /// Print one JSON object: device, ms, check {rel_fro, rel_tolerance, max_abs, tolerance, lse_error,
    /// lse_tolerance, ok}
    #[arg(long)]
    pub(crate) json: bool,
}

/// Check a device against the float64 reference.
///
/// Runs the contract as a matrix of head dims, dtypes, masks and layouts and prints what passed.
/// Operands are surrounded by values that no kernel may read. A case that the device has no kernel
/// for is counted as skipped. Exits with 1 if a case failed.
#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// Run a sample of the matrix
    #[arg(long)]
    pub(crate) quick: bool,
    /// Run each case a second time with NaN, infinities and huge numbers in keys and values that rows do
    /// not see; rows must keep their bits. Counted as a case of its own
    #[arg(long)]
    pub(crate) poison: bool,
    /// Run every Nth case, from the Kth on, so that N runs cover all
    #[arg(long, value_name = "K/N", default_value = "1/1", value_parser = args::part)]
    pub(crate) part: (usize, usize),
    /// Run the cases whose name has this text, such as `f32-d` or `d128-`: the matrix and `--digests` name them
    #[arg(long, value_name = "TEXT")]
    pub(crate) only: Option<String>,
    /// Write a hash of each case's results and its name to this file, a line each: two builds that give the
    /// same bits write the same file
    #[arg(long, value_name = "FILE")]
    pub(crate) digests: Option<std::path::PathBuf>,
    /// Print one JSON object: device, cases, passed, failed, skipped
    #[arg(long)]
    pub(crate) json: bool,
}

/// Measure attention on random inputs of given shapes.
///
/// Each shape is warmed up, then run for at least a second; on a GPU its own clock counts. TFLOP/s
/// counts 4*D operations for each pair of a query and a key within the bounds; a mask hides none of
/// them.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlx-flash-attn bench --shape 1,32,8,4096,4096,128 --shape 1,32,8,1,4096,128 --causal
  mlx-flash-attn bench --shape 4,32,8,1,4096,128 --mask bool --mask-axes b --key-capacity 8192
  mlx-flash-attn bench --shape 1,32,8,300,300,128 --cu-seqlens-q 0,100,300 --cu-seqlens-k 0,100,300
  mlx-flash-attn bench --shape 4,32,8,1,4096,128 --paged 16 --lengths 4096,1000,17,300 --kv q8_0")]
pub(crate) struct BenchArgs {
    /// Batch, query heads, key/value heads, query length, key length, head dim; repeatable
    #[arg(
        long,
        value_name = "B,H,HKV,SQ,SK,D",
        required = true,
        allow_hyphen_values = true,
        value_parser = args::shape
    )]
    pub(crate) shape: Vec<Shape>,
    /// Element type of inputs and output
    #[arg(long, value_enum, default_value_t = DTypeArg::Bf16)]
    pub(crate) dtype: DTypeArg,
    /// How k and v are stored, where that differs from q: f16 under f32, or blocks
    #[arg(long, value_enum, alias = "kv-dtype")]
    pub(crate) kv: Option<FormatArg>,
    /// Order of the axes of q, k, v and o
    #[arg(long, value_enum, default_value_t = LayoutArg::HeadMajor)]
    pub(crate) layout: LayoutArg,
    #[command(flatten)]
    pub(crate) score: ScoreArgs,
    /// Position of query row 0 among the keys, or `bottom-right` for SK - SQ: the last query sees the
    /// last key, as in decoding and chunked prefill
    #[arg(
        long,
        value_name = "N",
        default_value = "bottom-right",
        allow_hyphen_values = true,
        value_parser = args::query_offset
    )]
    pub(crate) q_offset: QueryOffset,
    /// Give a mask of this type, with random cells
    #[arg(long, value_enum, value_name = "TYPE")]
    pub(crate) mask: Option<MaskArg>,
    /// Axes of the mask besides that of the keys: letters of `bhq`, or `none`; it broadcasts over the
    /// others
    #[arg(
        long,
        value_name = "AXES",
        default_value = "q",
        requires = "mask",
        value_parser = MaskAxes::parse
    )]
    pub(crate) mask_axes: MaskAxes,
    /// Give each head a sink logit
    #[arg(long)]
    pub(crate) sinks: bool,
    /// Give each head an ALiBi slope: 2^(-8 h / H) for the heads h from 1 to H
    #[arg(long)]
    pub(crate) alibi: bool,
    /// Write the log-sum-exp too
    #[arg(long)]
    pub(crate) lse: bool,
    /// Rows that k and v have room for, at least SK: a cache that is not full
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = args::size)]
    pub(crate) key_capacity: Option<usize>,
    /// Lay k and v in pages of N keys, which a block table in random order names
    #[arg(
        long,
        value_name = "N",
        allow_hyphen_values = true,
        conflicts_with_all = ["key_capacity", "cu_seqlens_k"],
        value_parser = args::page_size
    )]
    pub(crate) paged: Option<usize>,
    /// Number of keys of each of the B sequences, at most SK
    #[arg(
        long,
        value_name = "N,N,...",
        conflicts_with = "cu_seqlens_k",
        value_parser = Numbers::parse
    )]
    pub(crate) lengths: Option<Numbers>,
    /// Pack sequences with these boundaries among the SQ rows of q; B is 1, or with --paged or --lengths their
    /// number
    #[arg(
        long,
        value_name = "0,N,...",
        conflicts_with = "layout",
        value_parser = Numbers::parse
    )]
    pub(crate) cu_seqlens_q: Option<Numbers>,
    /// Their boundaries among the SK rows of k and v
    #[arg(
        long,
        value_name = "0,N,...",
        requires = "cu_seqlens_q",
        conflicts_with = "key_capacity",
        value_parser = Numbers::parse
    )]
    pub(crate) cu_seqlens_k: Option<Numbers>,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// Print one JSON object a shape: device, dtype, shape, causal, window, ms_median, ms_min,
    /// ms_max, tflops, peak_tflops, share, and what else was asked for
    #[arg(long)]
    pub(crate) json: bool,
    /// Draw the results
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) plot: Option<PathBuf>,
}

/// List the devices and what each can do.
#[derive(Debug, Args)]
pub(crate) struct DevicesArgs {
    /// Print one JSON object a device: device, available, default, name, details, reason
    #[arg(long)]
    pub(crate) json: bool,
}

/// Draw which tiles of the score matrix are skipped, free of mask, or masked.
///
/// The tile is that of the kernels for the head dim. Skipped tiles are neither loaded nor computed.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  mlx-flash-attn tiles --sq 1024 --sk 1024 --causal --window 256 --svg tiles.svg")]
pub(crate) struct TilesArgs {
    /// Query length
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = args::size)]
    pub(crate) sq: usize,
    /// Key length
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = args::size)]
    pub(crate) sk: usize,
    /// Hide keys after a query's own position
    #[arg(long)]
    pub(crate) causal: bool,
    /// Show a query exactly N keys up to and including its own position
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = args::size)]
    pub(crate) window: Option<usize>,
    /// Show a query at most N keys after its own position
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = args::window_right)]
    pub(crate) window_right: Option<usize>,
    /// Position of query row 0 among the keys, or `bottom-right` for SK - SQ; needed with a bound
    /// where SQ differs from SK
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = args::query_offset)]
    pub(crate) q_offset: Option<QueryOffset>,
    /// Head dimension, which decides the tile
    #[arg(long, value_name = "D", default_value = "64", allow_hyphen_values = true, value_parser = args::head_dim)]
    pub(crate) head_dim: usize,
    /// Print the counts as one JSON object instead of the picture
    #[arg(long)]
    pub(crate) json: bool,
    /// Draw the picture to a file
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn options_are_consistent() {
        super::Cli::command().debug_assert();
    }
}
