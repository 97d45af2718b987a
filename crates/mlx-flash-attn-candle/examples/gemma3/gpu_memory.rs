//! Memory that work takes on a GPU.

use anyhow::Result;
use candle_core::Device;

/// What `work` gives, and the most bytes that the GPU held meanwhile above those before: looked at again
/// and again, for there are several allocators. `None` on other devices.
#[cfg(feature = "cuda")]
pub(crate) fn peak<T>(
    device: &Device,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, Option<usize>)> {
    use std::sync::mpsc::{RecvTimeoutError, channel};
    use std::time::Duration;

    let Device::Cuda(cuda) = device else {
        return Ok((work()?, None));
    };
    device.synchronize()?;
    let context = cuda.cuda_stream().context().clone();
    let (before, _) = context.mem_get_info()?;
    // Closed when the work ends, however it does.
    let (working, ended) = channel::<()>();
    std::thread::scope(|scope| {
        let watcher = scope.spawn(move || {
            let mut least = before;
            while ended.recv_timeout(Duration::from_micros(50)) == Err(RecvTimeoutError::Timeout) {
                if let Ok((free, _)) = context.mem_get_info() {
                    least = least.min(free);
                }
            }
            least
        });
        let result = work();
        drop(working);
        let least = watcher.join().ok();
        Ok((result?, least.map(|least| before - least)))
    })
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn peak<T>(_: &Device, work: impl FnOnce() -> Result<T>) -> Result<(T, Option<usize>)> {
    Ok((work()?, None))
}
