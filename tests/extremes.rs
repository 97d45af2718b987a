//! Finite inputs at the ends of their ranges never give a NaN.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Plain, Qkv, assert_close, devices, distance, seen, shape, upload};
use mlx_flash_attn::DType;
use mlx_flash_attn::attention::MaskSpec;

const DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

#[test]
fn scores_that_overflow_give_no_nan() {
    for device in devices() {
        for dtype in DTYPES {
            // Products that f32 holds, times a scale that it does not.
            let size = if dtype == DType::F16 { 1.0e4 } else { 1.0e18 };
            for (size, scale) in [(1.0, f32::MAX), (size, 1.0e31)] {
                let mut data = Qkv::new(1, dtype, shape([1, 1, 1], (9, 40), 64));
                let sized = |x: f32| common::round(x.signum() * size, dtype);
                data.q.iter_mut().for_each(|x| *x = sized(*x));
                data.k.iter_mut().for_each(|x| *x = sized(*x));
                let problem = data.builder().scale(scale).build().unwrap();
                let (_, got) = data.run(&device, &problem);
                let what = format!("{} {dtype} {size} {scale}", device.kind());
                assert!(got.iter().all(|x| x.is_finite()), "{what}");
            }
        }
    }
}

#[test]
fn values_near_the_end_of_the_range_come_out() {
    // Tiles sum weighted values before they divide, so some headroom is theirs.
    for device in devices() {
        for (dtype, top) in [
            (DType::BF16, 5.0e36),
            (DType::F16, 6.0e4),
            (DType::F32, 5.0e36),
        ] {
            let mut data = Qkv::new(2, dtype, shape([1, 1, 1], (5, 33), 64));
            data.v
                .iter_mut()
                .for_each(|x| *x = common::round(x.signum() * top, dtype));
            let want = data.plain(&Plain::new(&|_, _, _| seen(true)));
            let (_, got) = data.run(&device, &data.builder().build().unwrap());
            let scaled: Vec<f32> = got.iter().map(|x| x / top).collect();
            let want: Vec<f64> = want.iter().map(|x| x / f64::from(top)).collect();
            assert_close(&format!("{dtype}"), &scaled, &want, dtype);
        }
    }
}

#[test]
fn the_largest_finite_biases_decide_and_give_no_nan() {
    for device in devices() {
        for (dtype, big) in [
            (DType::F32, 3.0e38f32),
            (DType::BF16, 3.0e38),
            (DType::F16, 6.0e4),
        ] {
            let data = Qkv::new(3, DType::F32, shape([1, 1, 1], (4, 40), 64));
            // All as low as can be; all as high; one key high; one key low.
            for (base, odd) in [(-big, -big), (big, big), (-big, big), (0.0, -big)] {
                let cells: Vec<f32> = (0..4 * 40)
                    .map(|c| if c % 40 == 7 { odd } else { base })
                    .collect();
                let mask = upload(&device, &cells, dtype, &[4, 40]);
                let problem = data
                    .builder()
                    .mask(MaskSpec::plane(dtype, 40))
                    .build()
                    .unwrap();
                let (_, got) = data.run_masked(&device, &problem, &mask);
                let what = format!("{dtype} {base} {odd}");
                assert!(got.iter().all(|x| x.is_finite()), "{what}");
                if base != odd {
                    let want = data.plain(&Plain::new(&|_, _, j| seen((j == 7) == (odd > 0.0))));
                    assert!(
                        distance(&got, &want) < 1e-5,
                        "{what}: {}",
                        distance(&got, &want)
                    );
                }
            }
        }
    }
}
