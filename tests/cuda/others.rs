//! The kernels of GPUs that are not here, on the one that is.

use mlx_flash_attn::attention::HEAD_DIMS;
use mlx_flash_attn::{CudaOptions, DType, MlxDevice};

use crate::common::{Plain, Qkv, assert_close, seen, shape};
use crate::cuda;

/// Few rows, as many as a tile of few rows has, and many; at head dim 128 the results of 32 rows once lay past the end of
/// the shared memory that GPUs with 99 KB were asked for.
#[test]
fn kernels_for_less_shared_memory_give_the_same() {
    if cuda().is_none() {
        return;
    }
    for kernels in ["portable", "sm_80", "sm_86"].map(|name| name.parse().unwrap()) {
        let options = CudaOptions::from_env().unwrap();
        let device = MlxDevice::cuda_with(CudaOptions { kernels, ..options }).unwrap();
        for (head_dim, rows) in HEAD_DIMS
            .into_iter()
            .flat_map(|d| [(d, 7), (d, 30), (d, 70)])
        {
            let data = Qkv::new(21, DType::F16, shape([1, 2, 1], (rows, 300), head_dim));
            let want = data.plain(&Plain::new(&|_, _, _| seen(true)));
            let (_, got) = data.run(&device, &data.builder().build().unwrap());
            assert_close(
                &format!("{kernels:?} {head_dim} {rows}"),
                &got,
                &want,
                DType::F16,
            );
        }
    }
}
