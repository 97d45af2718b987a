//! Kernels compiled ahead of their first use, and images without a compiler.

use std::time::Instant;

use mlx_flash_attn::cuda::{compile_images, pack_images};
use mlx_flash_attn::{DType, MlxDevice, MlxError};

use crate::common::{Qkv, shape};
use crate::{BF16, cuda, record};

#[test]
fn kernels_are_compiled_ahead_and_timing_is_the_gpus() {
    let Some(device) = cuda() else { return };
    let data = Qkv::new(6, DType::F16, shape([1, 8, 8], (2_048, 2_048), 96));
    let problem = data.builder().build().unwrap();
    device.cuda_warm_up([&problem, &problem]).unwrap();
    let buffers = data.buffers(&device);
    let mut encoder = device.command_encoder().unwrap();
    let mut last = 0.0;
    for _ in 0..3 {
        let begun = Instant::now();
        record(&mut encoder, &problem, &buffers);
        let (start, end) = encoder.commit_wait_with_gpu_time().unwrap();
        let whole = begun.elapsed().as_secs_f64();
        assert!(
            start >= last && end > start && end - start < whole,
            "{start} {end} {whole}"
        );
        last = end;
    }
}

#[test]
fn images_compiled_ahead_give_the_same_bits_and_torn_ones_an_error() {
    if cuda().is_none() {
        return;
    }
    // As the device with images is opened.
    let device = MlxDevice::cuda(0).unwrap();
    let data = Qkv::new(14, BF16, shape([1, 2, 1], (300, 300), 64));
    let problem = data.builder().causal(true).build().unwrap();
    let want = data.run(&device, &problem).0;
    let arch = device
        .details()
        .into_iter()
        .find(|(name, _)| *name == "compute capability")
        .map(|(_, value)| {
            if value == "9.0" {
                "sm_90a".into()
            } else {
                format!("sm_{}", value.replace('.', ""))
            }
        });
    let causal = |name: &str| name.contains("D=64 ") && !name.contains("VARLEN=1");
    let images = compile_images(&arch.unwrap(), causal, |_, _| ()).unwrap();
    let file = pack_images(&images);
    // SAFETY: written by `pack_images`.
    let ahead = unsafe { MlxDevice::cuda_with_images(0, file.clone()) }.unwrap();
    assert!(data.run(&ahead, &problem).0 == want);
    let cut = file[..file.len() - 1].to_vec();
    // SAFETY: refused before an image is looked at.
    let error = unsafe { MlxDevice::cuda_with_images(0, cut) }.unwrap_err();
    assert!(matches!(error, MlxError::InvalidArgument { .. }), "{error}");
}
