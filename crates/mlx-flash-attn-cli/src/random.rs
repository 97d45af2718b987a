//! Reproducible random numbers for inputs; nothing here needs to be unguessable.

/// SplitMix64 (Steele, Lea and Flood 2014).
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Nearly uniform in `0..n`, which must not be empty.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        let high = u128::from(self.next()) * n as u128;
        (high >> 64) as usize
    }

    /// Nearly normal, with mean 0 and variance 1: the sum of four uniform numbers, which is cheap
    /// enough for gigabytes.
    pub(crate) fn normal(&mut self) -> f32 {
        let bits = self.next();
        let sum: f32 = [0, 16, 32, 48]
            .map(|shift| ((bits >> shift) & 0xFFFF) as f32)
            .iter()
            .sum();
        // Each has mean 32767.5 and variance (2^32 - 1) / 12.
        (sum - 131_070.0) * (3.0f32.sqrt() / 65_536.0)
    }
}

#[cfg(test)]
mod tests {
    use super::Random;

    #[test]
    fn mean_and_variance() {
        let mut random = Random::new(1);
        let n = 100_000;
        let xs: Vec<f64> = (0..n).map(|_| f64::from(random.normal())).collect();
        let mean = xs.iter().sum::<f64>() / f64::from(n);
        let variance = xs.iter().map(|x| x * x).sum::<f64>() / f64::from(n);
        assert!((0..n).all(|_| random.below(3) < 3));
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02);
    }
}
