//! Wrong uses of devices, buffers, registries and the oracle.

use mlx_flash_attn::attention::oracle::{self, Inputs, Precision, Values};
use mlx_flash_attn::{CpuOptions, DType, Isa, KernelRegistry, MlxDevice};

use crate::world::{Row, builder, row};

fn unit<T>(_: T) {}

pub(crate) fn rows() -> Vec<Row> {
    let mut rows = vec![
        row("a buffer of no bytes", &["byte_len", "0"], |w| {
            w.device.alloc_buffer(0, DType::F32, vec![]).map(unit)
        }),
        row(
            "a shape that does not fit",
            &["byte_len", "[3, 3]", "35 bytes"],
            |w| w.device.alloc_buffer(35, DType::F32, vec![3, 3]).map(unit),
        ),
        row("a shape that overflows", &["byte_len", "bf16"], |w| {
            w.device
                .alloc_buffer(usize::MAX, DType::BF16, vec![usize::MAX, usize::MAX])
                .map(unit)
        }),
        row("more memory than there is", &["bytes"], |w| {
            w.device
                .alloc_buffer(isize::MAX as usize - 64, DType::U8, vec![1])
                .map(unit)
        })
        .gives("BufferAllocationError"),
        row(
            "elements of another size",
            &["data", "2-byte", "4-byte"],
            |w| {
                w.device
                    .buffer_from_slice(&[1.0f32], DType::BF16, vec![1])
                    .map(unit)
            },
        ),
        row(
            "a slice shorter than its shape",
            &["byte_len", "8 bytes"],
            |w| {
                w.device
                    .buffer_from_slice(&[1.0f32; 2], DType::F32, vec![3])
                    .map(unit)
            },
        ),
        row(
            "a slice off its alignment",
            &["buffer", "4 bytes", "byte 2"],
            |w| {
                w.buffer(DType::BF16, &[8])
                    .slice_view(2, 4)
                    .as_slice::<f32>()
                    .map(unit)
            },
        ),
        row(
            "a slice of half an element",
            &["buffer", "4-byte", "6 bytes"],
            |w| w.buffer(DType::BF16, &[3]).as_slice::<u32>().map(unit),
        ),
        row(
            "a mutable slice beside a clone",
            &["only handle", "one of 2"],
            |w| {
                let mut buffer = w.device.alloc_buffer(4, DType::U8, vec![4])?;
                let _clone = buffer.clone();
                buffer.as_mut_slice::<u8>().map(unit)
            },
        ),
        row("a mutable slice beside a view", &["only handle"], |w| {
            let mut buffer = w.device.alloc_buffer(4, DType::U8, vec![4])?;
            let _view = buffer.slice_view(2, 1);
            buffer.as_mut_slice::<u8>().map(unit)
        }),
        row(
            "a view past the end",
            &["slice_view", "8 bytes", "byte 6"],
            |w| {
                w.buffer(DType::BF16, &[4])
                    .slice_view(6, 2)
                    .as_slice::<u16>()
                    .map(unit)
            },
        ),
        row("a view of too many elements", &["slice_view"], |w| {
            w.buffer(DType::BF16, &[4])
                .slice_view(0, usize::MAX)
                .as_slice::<u16>()
                .map(unit)
        }),
        row(
            "a view from the end of all bytes",
            &["slice_view", "18446744073709551615"],
            |w| {
                w.buffer(DType::BF16, &[4])
                    .slice_view(u64::MAX, 1)
                    .as_slice::<u16>()
                    .map(unit)
            },
        ),
        row("an unknown kernel", &["flash_attn_prefill_bf16_d65"], |w| {
            let device = w.device.metal_device();
            w.registry
                .get_pipeline("flash_attn_prefill_bf16_d65", device)
                .map(unit)
        })
        .gives("KernelNotFound"),
        row("an unknown kernel with bool constants", &["nothing"], |w| {
            let (device, constants) = (w.device.metal_device(), [(300, true)]);
            w.registry
                .get_pipeline_with_bool_constants("nothing", device, &constants)
                .map(unit)
        })
        .gives("KernelNotFound"),
        row(
            "an unknown kernel with constants",
            &["kernel not found"],
            |w| {
                let device = w.device.metal_device();
                w.registry
                    .get_pipeline_with_constants("", device, &[], &[(322, 8)])
                    .map(unit)
            },
        )
        .gives("KernelNotFound"),
        row(
            "a text that is no kernel",
            &["mine", "could not be built"],
            |w| {
                w.registry.register_source("mine", "this is no kernel");
                w.registry
                    .get_pipeline("mine", w.device.metal_device())
                    .map(unit)
            },
        )
        .gives("ShaderCompilationError"),
        row("no thread", &["threads", "at least 1"], |_| {
            MlxDevice::cpu(CpuOptions {
                isa: None,
                threads: Some(0),
            })
            .map(unit)
        }),
        row(
            "an oracle without its mask",
            &["mask", "99 elements", "none"],
            |_| {
                use mlx_flash_attn::attention::MaskSpec;
                let problem = builder().mask(MaskSpec::plane(DType::F32, 11)).build()?;
                let x = vec![0.0f32; 2 * 9 * 64];
                let v = Values::F32(&x);
                let inputs = Inputs::new(v, v, v);
                oracle::attention(&problem, &inputs, Precision::Exact).map(unit)
            },
        ),
        row("oracle operands of integers", &["u16"], |_| {
            Values::from_bytes(DType::U16, &[0, 0]).map(unit)
        })
        .gives("UnsupportedDtype"),
        row(
            "oracle operands of half an element",
            &["operand bytes"],
            |_| Values::from_bytes(DType::F32, &[0; 6]).map(unit),
        ),
        row(
            "a registry of another text",
            &["kernel not found: ghost"],
            |w| {
                KernelRegistry::default()
                    .get_pipeline("ghost", w.device.metal_device())
                    .map(unit)
            },
        )
        .gives("KernelNotFound"),
    ];
    // No machine has both.
    for (name, isa) in [("neon", Isa::Neon), ("avx512", Isa::Avx512Bf16)] {
        if !isa.is_available() {
            let call = move |_: &mut crate::world::World| {
                MlxDevice::cpu(CpuOptions {
                    isa: Some(isa),
                    threads: None,
                })
                .map(unit)
            };
            rows.push(
                row(name, &["is not available", "best instruction set"], call)
                    .gives("DeviceUnavailable"),
            );
        }
    }
    rows
}
