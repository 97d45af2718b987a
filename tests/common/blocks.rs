//! GGML's blocks, written out plainly: as its reference quantisation rounds, and as it reads them.

use half::f16;
use mlx_flash_attn::DType;
use mlx_flash_attn::attention::Format;

/// Rows in blocks of `format`, as f16, or as f32.
pub(crate) fn quantise(format: Format, x: &[f32]) -> Vec<u8> {
    match format {
        Format::Q8_0 => x.chunks_exact(32).flat_map(q8_0).collect(),
        Format::Q4_0 => x.chunks_exact(32).flat_map(q4_0).collect(),
        Format::Plain(DType::F16) => x
            .iter()
            .flat_map(|x| f16::from_f32(*x).to_le_bytes())
            .collect(),
        _ => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

/// What the blocks stand for.
pub(crate) fn dequantise(format: Format, bytes: &[u8]) -> Vec<f32> {
    let scale = |block: &[u8]| f16::from_le_bytes([block[0], block[1]]).to_f32();
    let blocks = bytes.chunks_exact(format.block_bytes());
    match format {
        Format::Q8_0 => blocks
            .flat_map(|b| (0..32).map(move |i| scale(b) * f32::from(b[2 + i] as i8)))
            .collect(),
        Format::Q4_0 => blocks
            .flat_map(|b| {
                (0..32).map(move |i| {
                    let byte = b[2 + i % 16];
                    let half = if i < 16 { byte & 15 } else { byte >> 4 };
                    scale(b) * (f32::from(half) - 8.0)
                })
            })
            .collect(),
        Format::Plain(DType::F16) => bytes.chunks_exact(2).map(scale).collect(),
        _ => bytes
            .chunks_exact(4)
            .map(|x| f32::from_le_bytes(x.try_into().unwrap()))
            .collect(),
    }
}

fn q8_0(x: &[f32]) -> Vec<u8> {
    let most = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let scale = most / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let mut block = f16::from_f32(scale).to_le_bytes().to_vec();
    block.extend(x.iter().map(|x| (x * inverse).round() as i8 as u8));
    block
}

fn q4_0(x: &[f32]) -> Vec<u8> {
    let far = x
        .iter()
        .fold(0.0f32, |far, x| if x.abs() > far.abs() { *x } else { far });
    let scale = far / -8.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let half = |x: f32| ((x * inverse + 8.5) as i8).clamp(0, 15) as u8;
    let mut block = f16::from_f32(scale).to_le_bytes().to_vec();
    block.extend((0..16).map(|i| half(x[i]) | half(x[i + 16]) << 4));
    block
}
