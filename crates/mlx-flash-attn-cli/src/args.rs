//! Values of options, parsed and checked: a wrong one is refused before anything is read.

#[cfg(feature = "cuda")]
use anyhow::bail;
use clap::{Args, ValueEnum};
use mlx_flash_attn::attention::{Format, HEAD_DIMS, Layout, QueryOffset, Shape};
use mlx_flash_attn::{DType, DeviceKind, MlxDevice};

/// Largest size or offset that a problem takes.
const MAX: u64 = i32::MAX as u64;

/// `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DeviceArg {
    /// What MLX_FLASH_DEVICE names, else the best of Metal, CUDA and CPU.
    Auto,
    /// This machine's processors.
    Cpu,
    /// An Apple GPU.
    Metal,
    /// An NVIDIA GPU.
    Cuda,
    /// The Metal kernels, run on this machine's processors.
    Emulator,
}

/// Which device, and how it is opened.
#[derive(Debug, Clone, Args)]
pub(crate) struct DeviceArgs {
    /// Device to compute on
    #[arg(long, value_enum, default_value_t = DeviceArg::Auto)]
    device: DeviceArg,
    /// Kernels of a CUDA device: `own`, `portable`, `hopper`, or those of another GPU, such as `sm_86`
    #[arg(long, value_name = "KERNELS")]
    #[cfg(feature = "cuda")]
    kernels: Option<mlx_flash_attn::CudaKernels>,
}

impl DeviceArgs {
    /// Opens the device.
    pub(crate) fn open(&self) -> anyhow::Result<MlxDevice> {
        #[cfg(feature = "cuda")]
        if let Some(kernels) = self.kernels {
            if self.device != DeviceArg::Cuda {
                bail!("--kernels: expected --device cuda");
            }
            let options = mlx_flash_attn::CudaOptions {
                kernels,
                ..mlx_flash_attn::CudaOptions::from_env()?
            };
            return Ok(MlxDevice::cuda_with(options)?);
        }
        self.device.open()
    }
}

impl DeviceArg {
    fn open(self) -> anyhow::Result<MlxDevice> {
        let kind = match self {
            Self::Auto => return Ok(MlxDevice::new()?),
            Self::Cpu => DeviceKind::Cpu,
            Self::Metal => DeviceKind::Metal,
            Self::Cuda => DeviceKind::Cuda,
            Self::Emulator => DeviceKind::Emulator,
        };
        Ok(MlxDevice::open(kind)?)
    }
}

/// `--layout`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LayoutArg {
    /// [B, H, L, D].
    HeadMajor,
    /// [B, L, H, D].
    SeqMajor,
}

impl LayoutArg {
    pub(crate) fn other(self) -> Self {
        match self {
            Self::HeadMajor => Self::SeqMajor,
            Self::SeqMajor => Self::HeadMajor,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::HeadMajor => "head-major",
            Self::SeqMajor => "seq-major",
        }
    }

    pub(crate) fn axes(self) -> &'static str {
        match self {
            Self::HeadMajor => "[B, H, L, D]",
            Self::SeqMajor => "[B, L, H, D]",
        }
    }
}

impl From<LayoutArg> for Layout {
    fn from(layout: LayoutArg) -> Self {
        match layout {
            LayoutArg::HeadMajor => Self::HeadMajor,
            LayoutArg::SeqMajor => Self::SeqMajor,
        }
    }
}

/// `--dtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DTypeArg {
    /// bfloat16.
    Bf16,
    /// IEEE-754 binary16.
    F16,
    /// IEEE-754 binary32.
    F32,
}

impl From<DTypeArg> for DType {
    fn from(dtype: DTypeArg) -> Self {
        match dtype {
            DTypeArg::Bf16 => Self::BF16,
            DTypeArg::F16 => Self::F16,
            DTypeArg::F32 => Self::F32,
        }
    }
}

/// `--kv`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FormatArg {
    /// bfloat16.
    Bf16,
    /// IEEE-754 binary16.
    F16,
    /// IEEE-754 binary32.
    F32,
    /// GGML's blocks of 32 signed bytes.
    #[value(name = "q8_0")]
    Q8_0,
    /// GGML's blocks of 32 halves of a byte.
    #[value(name = "q4_0")]
    Q4_0,
}

impl From<FormatArg> for Format {
    fn from(format: FormatArg) -> Self {
        match format {
            FormatArg::Bf16 => Self::Plain(DType::BF16),
            FormatArg::F16 => Self::Plain(DType::F16),
            FormatArg::F32 => Self::Plain(DType::F32),
            FormatArg::Q8_0 => Self::Q8_0,
            FormatArg::Q4_0 => Self::Q4_0,
        }
    }
}

/// `--mask` of `bench`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum MaskArg {
    /// Booleans, every other key visible on average.
    Bool,
    /// bfloat16, added.
    Bf16,
    /// IEEE-754 binary16, added.
    F16,
    /// IEEE-754 binary32, added.
    F32,
}

impl From<MaskArg> for DType {
    fn from(mask: MaskArg) -> Self {
        match mask {
            MaskArg::Bool => Self::U8,
            MaskArg::Bf16 => Self::BF16,
            MaskArg::F16 => Self::F16,
            MaskArg::F32 => Self::F32,
        }
    }
}

/// Which axes a mask has besides that of the keys; it broadcasts over the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MaskAxes {
    pub(crate) batch: bool,
    pub(crate) heads: bool,
    pub(crate) queries: bool,
}

impl MaskAxes {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut axes = Self {
            batch: false,
            heads: false,
            queries: false,
        };
        for letter in text.chars().filter(|_| text != "none") {
            let axis = match letter {
                'b' => &mut axes.batch,
                'h' => &mut axes.heads,
                'q' => &mut axes.queries,
                _ => return Err("expected letters of `bhq`, or `none`".into()),
            };
            if std::mem::replace(axis, true) {
                return Err(format!("`{letter}` is there twice"));
            }
        }
        Ok(axes)
    }

    /// Sizes of a mask over `[B, H, qL, kL]`.
    pub(crate) fn of(self, [batch, heads, queries, keys]: [usize; 4]) -> [usize; 4] {
        let or_one = |own: bool, size| if own { size } else { 1 };
        [
            or_one(self.batch, batch),
            or_one(self.heads, heads),
            or_one(self.queries, queries),
            keys,
        ]
    }
}

impl std::fmt::Display for MaskAxes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let axes = [(self.batch, "b"), (self.heads, "h"), (self.queries, "q")];
        let letters: String = axes.iter().filter(|a| a.0).map(|a| a.1).collect();
        f.write_str(if letters.is_empty() { "none" } else { &letters })
    }
}

/// Boundaries of packed sequences, or lengths; what they must be is checked with the problem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Numbers(pub(crate) Vec<u32>);

impl Numbers {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let numbers = text.split(',').map(|part| part.trim().parse().ok());
        numbers
            .collect::<Option<_>>()
            .map(Self)
            .ok_or_else(|| "expected whole numbers with commas, such as 0,100,164".into())
    }
}

/// A finite number.
pub(crate) fn finite(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(x) if x.is_finite() => Ok(x),
        _ => Err("expected a finite number".into()),
    }
}

/// A finite number above 0.
pub(crate) fn positive(text: &str) -> Result<f32, String> {
    finite(text)
        .ok()
        .filter(|x| *x > 0.0)
        .ok_or_else(|| "expected a finite number above 0".into())
}

/// A size of at least 1.
pub(crate) fn size(text: &str) -> Result<usize, String> {
    let expected = || format!("expected a whole number from 1 to {MAX}");
    let size = text.parse::<u64>().map_err(|_| expected())?;
    usize::try_from(size)
        .ok()
        .filter(|_| (1..=MAX).contains(&size))
        .ok_or_else(expected)
}

/// Keys of a page.
pub(crate) fn page_size(text: &str) -> Result<usize, String> {
    size(text)
        .ok()
        .filter(|n| n.is_power_of_two() && *n <= 1024)
        .ok_or_else(|| "expected a power of two from 1 to 1024".into())
}

/// A number of keys after a query's own, which may be none.
pub(crate) fn window_right(text: &str) -> Result<usize, String> {
    text.parse::<usize>()
        .ok()
        .filter(|keys| *keys as u64 <= MAX)
        .ok_or_else(|| format!("expected a whole number from 0 to {MAX}"))
}

/// `K/N`: the Kth of N parts, from 1.
pub(crate) fn part(text: &str) -> Result<(usize, usize), String> {
    text.split_once('/')
        .and_then(|(k, n)| Some((k.parse().ok()?, n.parse().ok()?)))
        .filter(|(k, n)| (1..=*n).contains(k))
        .ok_or_else(|| "expected K/N with K from 1 to N, such as 1/4".into())
}

/// A head dimension that has kernels.
pub(crate) fn head_dim(text: &str) -> Result<usize, String> {
    text.parse::<usize>()
        .ok()
        .filter(|dim| HEAD_DIMS.contains(dim))
        .ok_or_else(|| format!("expected one of {HEAD_DIMS:?}"))
}

/// A position of query row 0 among the keys, or `bottom-right`.
pub(crate) fn query_offset(text: &str) -> Result<QueryOffset, String> {
    if text == "bottom-right" {
        return Ok(QueryOffset::BottomRight);
    }
    text.parse::<i32>()
        .map(|offset| QueryOffset::At(offset.into()))
        .map_err(|_| "expected a whole number of at most 31 bits, or `bottom-right`".into())
}

/// `B,H,HKV,SQ,SK,D`.
pub(crate) fn shape(text: &str) -> Result<Shape, String> {
    let names = ["B", "H", "HKV", "SQ", "SK", "D"];
    let parts: Vec<&str> = text.split(',').collect();
    if parts.len() != names.len() {
        return Err(format!(
            "expected 6 numbers B,H,HKV,SQ,SK,D, got {}",
            parts.len()
        ));
    }
    let mut sizes = [0; 6];
    for ((slot, part), name) in sizes.iter_mut().zip(parts).zip(names) {
        *slot = size(part.trim()).map_err(|e| format!("{name}: {e}, got `{part}`"))?;
    }
    let [batch, heads, kv_heads, query_len, key_len, head_dim] = sizes;
    if heads % kv_heads != 0 {
        return Err(format!("H ({heads}) must be divisible by HKV ({kv_heads})"));
    }
    Ok(Shape {
        batch,
        heads,
        kv_heads,
        query_len,
        key_len,
        qk_dim: head_dim,
        v_dim: head_dim,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(finite("-0.5"), Ok(-0.5));
        for bad in ["nan", "inf", "1e39", "x", ""] {
            assert!(finite(bad).is_err(), "{bad}");
        }
        assert_eq!(positive("30"), Ok(30.0));
        for bad in ["0", "-1", "1e-60", "nan"] {
            assert!(positive(bad).is_err(), "{bad}");
        }
        assert_eq!(size("2147483647"), Ok(2_147_483_647));
        assert_eq!(page_size("16"), Ok(16));
        for bad in ["0", "24", "2048", "x"] {
            assert!(page_size(bad).is_err(), "{bad}");
        }
        for bad in ["0", "-1", "2147483648", "99999999999999999999", "1.5"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn mask_axes_and_boundaries() {
        let sizes = [2, 4, 8, 16];
        for (text, expected) in [
            ("none", [1, 1, 1, 16]),
            ("q", [1, 1, 8, 16]),
            ("bq", [2, 1, 8, 16]),
            ("qhb", [2, 4, 8, 16]),
        ] {
            let axes = MaskAxes::parse(text).unwrap();
            assert_eq!(axes.of(sizes), expected, "{text}");
        }
        assert!(MaskAxes::parse("qq").is_err() && MaskAxes::parse("k").is_err());
        assert_eq!(Numbers::parse("0, 3,7"), Ok(Numbers(vec![0, 3, 7])));
        for bad in ["", "0,x", "0,-1", "0,4294967296"] {
            assert!(Numbers::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(window_right("0"), Ok(0));
        assert!(window_right("-1").is_err() && window_right("2147483648").is_err());
    }

    #[test]
    fn offsets() {
        assert_eq!(query_offset("-3"), Ok(QueryOffset::At(-3)));
        assert_eq!(query_offset("bottom-right"), Ok(QueryOffset::BottomRight));
        assert!(query_offset("3000000000").is_err());
        assert!(query_offset("top").is_err());
    }

    #[test]
    fn shapes() {
        let s = shape("1, 8,2,100,200,64").unwrap();
        assert_eq!((s.heads, s.kv_heads, s.key_len), (8, 2, 200));
        for (bad, culprit) in [
            ("1,8,2,100,64", "got 5"),
            ("1,8,2,100,200,64,", "got 7"),
            ("1,8,3,100,200,64", "divisible"),
            ("1,8,2,0,200,64", "SQ"),
            ("1,8,2,100,x,64", "SK"),
            ("1,8,2,100,200,-64", "D:"),
        ] {
            assert!(shape(bad).unwrap_err().contains(culprit), "{bad}");
        }
    }
}
