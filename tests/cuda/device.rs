//! The device itself: what is missing, host views, threads, texts that are none of this crate.

use mlx_flash_attn::encoder::{KernelArg, MTLSize, as_bytes};
use mlx_flash_attn::ops::Operands;
use mlx_flash_attn::{CpuOptions, DType, DeviceKind, KernelRegistry, MlxDevice, MlxError};

use crate::common::{Qkv, attend, bytes, download, shape, upload};
use crate::{BF16, cuda, upload_bytes};

#[test]
fn a_device_that_is_not_there_says_why() {
    match MlxDevice::open(DeviceKind::Cuda) {
        Ok(device) => assert_eq!(device.kind(), DeviceKind::Cuda),
        Err(MlxError::DeviceUnavailable { device, reason }) => {
            assert_eq!(device, "cuda");
            assert!(reason.len() > 20, "{reason}");
            assert!(!reason.contains("MLX_FLASH_CUDA_IMAGES"), "{reason}");
        }
        Err(other) => panic!("{other}"),
    }
    let far = MlxDevice::cuda(1_000_000).unwrap_err();
    assert!(matches!(far, MlxError::DeviceUnavailable { .. }), "{far}");
    // Other devices take no CUDA objects.
    let cpu = MlxDevice::cpu(CpuOptions::default()).unwrap();
    // SAFETY: refused before the address is looked at.
    let wrapped = unsafe { cpu.cuda_wrap(256, 4, DType::F32, vec![1]) };
    assert!(matches!(wrapped, Err(MlxError::InvalidArgument(_))));
    let mut encoder = cpu.command_encoder().unwrap();
    // SAFETY: refused before the stream is looked at.
    let encoded = unsafe { encoder.encode_into_stream(std::ptr::null_mut()) };
    assert!(matches!(encoded, Err(MlxError::InvalidArgument(_))));
    assert!(cpu.cuda_warm_up(&[]).is_err());
}

/// The driver trusts an image's contents, so a safe function may not load what a variable names.
#[test]
fn safe_code_loads_no_images_that_the_environment_names() {
    let program = std::env::current_exe().unwrap();
    let test = "device::a_device_that_is_not_there_says_why";
    let ran = std::process::Command::new(program)
        .args(["--exact", test])
        .env("MLX_FLASH_CUDA_IMAGES", "/no/such/file")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
fn memory_that_is_not_there_is_an_error_and_the_device_goes_on() {
    let Some(device) = cuda() else { return };
    let bytes = 1usize << 45;
    let error = device
        .alloc_buffer(bytes, DType::U8, vec![bytes])
        .unwrap_err();
    assert_eq!(error, MlxError::BufferAllocationError { bytes });
    let buffer = device.alloc_buffer(4096, DType::U8, vec![4096]).unwrap();
    assert!(buffer.as_slice::<u8>().unwrap().iter().all(|x| *x == 0));
}

#[test]
fn host_views_follow_the_device_and_the_device_follows_them() {
    let Some(device) = cuda() else { return };
    let data = Qkv::new(1, BF16, shape([1, 2, 1], (33, 70), 64));
    let problem = data.builder().build().unwrap();
    let [q, k, mut v, mut out] = data.buffers(&device);
    attend(&device, &problem, &Operands::new(&q, &k, &v, &out));
    let first = bytes(&out);
    // What the host writes over an output is there, until the device writes it again.
    out.as_mut_slice::<u8>().unwrap().fill(7);
    assert!(bytes(&out).iter().all(|x| *x == 7));
    attend(&device, &problem, &Operands::new(&q, &k, &v, &out));
    assert_eq!(bytes(&out), first);
    // Twice the values give twice the output, exactly.
    let doubled: Vec<f32> = data.v.iter().map(|x| 2.0 * x).collect();
    v = upload(&device, &doubled, BF16, &[doubled.len()]);
    attend(&device, &problem, &Operands::new(&q, &k, &v, &out));
    let once = download(&upload_bytes(&device, &first));
    assert!(download(&out).iter().zip(once).all(|(a, b)| *a == 2.0 * b));
    // The seed's callers write through the address.
    let at = out.contents_ptr().cast::<u8>();
    // SAFETY: the buffer has more than one byte, and no command uses it.
    unsafe { at.write(0x55) };
    assert_eq!(bytes(&out)[0], 0x55);
}

/// Devices are told apart, not only their kinds: one stream knows nothing of another's commands.
#[test]
fn memory_and_pipelines_of_another_device_are_refused() {
    let (Some(ours), Some(theirs)) = (cuda(), cuda()) else {
        return;
    };
    // A second GPU, where there is one, as well as the same one opened twice.
    for theirs in [Some(theirs), MlxDevice::cuda(1).ok()]
        .into_iter()
        .flatten()
    {
        let one = MTLSize::new(1, 1, 1);
        let refused = |pipeline_of: &MlxDevice, memory_of: &MlxDevice| {
            let mut registry = KernelRegistry::new();
            let handle = pipeline_of.metal_device();
            let name = "flash_attn_prefill_mask_fill_bf16";
            let pipeline = registry.get_pipeline(name, handle).unwrap();
            let mask = memory_of.alloc_buffer(4, BF16, vec![2]).unwrap();
            let params = [1u32, 2, 0, 1, 0];
            let args = [
                (0, KernelArg::Buffer(&mask)),
                (1, KernelArg::Bytes(as_bytes(&params))),
            ];
            let mut encoder = ours.command_encoder().unwrap();
            encoder.encode_threadgroups_with_args(pipeline, &args, one, one);
            encoder.commit_and_wait()
        };
        refused(&ours, &ours).unwrap();
        for error in [refused(&ours, &theirs), refused(&theirs, &ours)] {
            let error = error.unwrap_err();
            assert!(matches!(error, MlxError::InvalidArgument(_)), "{error}");
        }
    }
}

#[test]
fn many_threads_share_a_device() {
    let Some(device) = cuda() else { return };
    let data = Qkv::new(7, BF16, shape([1, 2, 2], (64, 64), 64));
    let problem = data.builder().build().unwrap();
    let (want, _) = data.run(&device, &problem);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..10 {
                    assert_eq!(data.run(&device, &problem).0, want);
                }
            });
        }
    });
}

#[test]
fn other_texts_are_refused() {
    let Some(device) = cuda() else { return };
    let mut registry = KernelRegistry::new();
    registry.register_source("theirs", "__global__ void theirs() {}");
    let error = registry
        .get_pipeline("theirs", device.metal_device())
        .unwrap_err();
    assert!(
        matches!(error, MlxError::ShaderCompilationError { .. }),
        "{error}"
    );
}
