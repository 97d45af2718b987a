//! GGML's blocks, written out plainly: as its reference quantisation rounds, and as it reads them.

use half::f16;

use crate::attention::Format;

/// Elements of a block.
pub(super) const BLOCK: usize = 32;

/// The bytes of a block of elements. One that holds NaN or an infinity has it for its scale, which reaches every
/// element; larger elements than a block can hold become the largest.
pub(super) fn encode(format: Format, x: &[f32]) -> Vec<u8> {
    let spoiled = x.iter().find(|x| !x.is_finite()).copied();
    // The element of largest magnitude has the end of the range that keeps its sign in q4_0.
    let far = x.iter().fold(0.0f32, |far, x| match x.abs() > far.abs() {
        true => *x,
        false => far,
    });
    let most = f16::MAX.to_f32();
    let scale = match format {
        Format::Q8_0 => far.abs() / 127.0,
        _ => far / -8.0,
    };
    let scale = scale.clamp(-most, most);
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let mut block = f16::from_f32(spoiled.unwrap_or(scale))
        .to_le_bytes()
        .to_vec();
    match format {
        Format::Q8_0 => {
            block.extend(
                x.iter()
                    .map(|x| (x * inverse).round().clamp(-127.0, 127.0) as i8 as u8),
            );
        }
        _ => {
            let half = |x: f32| (x * inverse + 8.5).clamp(0.0, 15.0) as u8;
            block.extend((0..BLOCK / 2).map(|i| half(x[i]) | half(x[i + BLOCK / 2]) << 4));
        }
    }
    block
}

/// The elements of a block.
pub(super) fn decode(format: Format, block: &[u8]) -> [f32; BLOCK] {
    let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
    let bytes = &block[2..];
    std::array::from_fn(|i| {
        let element = match format {
            Format::Q8_0 => f32::from(bytes[i] as i8),
            _ if i < BLOCK / 2 => f32::from(bytes[i] & 15) - 8.0,
            _ => f32::from(bytes[i - BLOCK / 2] >> 4) - 8.0,
        };
        scale * element
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::Random;

    const FORMATS: [Format; 2] = [Format::Q8_0, Format::Q4_0];

    #[test]
    fn what_a_block_stands_for_gives_the_block_again() {
        let mut random = Random::new(1);
        for format in FORMATS {
            for _ in 0..1000 {
                let size = random.normal().exp() as f32;
                let x: Vec<f32> = (0..BLOCK).map(|_| size * random.normal() as f32).collect();
                let block = encode(format, &x);
                assert_eq!(block.len(), format.block_bytes());
                let stands_for = decode(format, &block);
                assert_eq!(encode(format, &stands_for), block);
                let far = x.iter().fold(0.0f32, |far, x| far.max(x.abs()));
                // Half a step, and what the scale loses in f16; q4_0 has no step at the far end but one.
                let steps = if format == Format::Q8_0 { 127.0 } else { 8.0 };
                let allowed = far / steps * if format == Format::Q8_0 { 0.6 } else { 1.01 };
                let close = |(x, y): (&f32, &f32)| (x - y).abs() <= allowed;
                assert!(x.iter().zip(&stands_for).all(close));
            }
        }
    }

    #[test]
    fn what_is_not_finite_or_too_large_stays_so() {
        for format in FORMATS {
            let with = |bad: f32| {
                let mut x = [1.0; BLOCK];
                x[7] = bad;
                decode(format, &encode(format, &x))
            };
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                assert!(with(bad).iter().all(|x| !x.is_finite()));
            }
            assert!(with(f32::MAX)[7] > 5.0e5 && with(-f32::MAX)[7] < -4.0e5);
            assert_eq!(decode(format, &encode(format, &[0.0; BLOCK])), [0.0; BLOCK]);
        }
    }
}
