//! A device that refuses everything: what a device must say, and no more.

use std::any::Any;
use std::sync::Arc;

use super::command::Work;
use super::kind::DeviceKind;
use super::{Backend, Done, Memory, Pending, Step};
use crate::attention::Problem;
use crate::error::{MlxError, Result, Unsupported};

/// The device.
#[derive(Debug)]
pub(crate) struct Nothing;

const WHY: &str = "it has no kernels";

impl Backend for Nothing {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Nothing
    }

    fn name(&self) -> String {
        "a device without kernels".into()
    }

    fn details(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }

    fn allocate(&self, bytes: usize) -> Result<Arc<dyn Memory>> {
        Err(MlxError::BufferAllocationError { bytes })
    }

    fn supports(&self, _problem: &Problem) -> std::result::Result<(), Unsupported> {
        Err(Unsupported::new(self.kind().name(), "attention", WHY))
    }

    fn prepare(&self, work: &Work) -> Result<Box<dyn Any + Send + Sync>> {
        Err(Unsupported::new(self.kind().name(), work.name(), WHY).into())
    }

    fn submit(&self, _steps: Vec<Step>) -> Arc<dyn Pending> {
        Arc::new(Done(Err(MlxError::CommandBufferError(WHY.into()))))
    }
}

#[cfg(test)]
mod tests {
    use crate::attention::{Problem, Shape};
    use crate::{DType, DeviceKind, MlxDevice};

    #[test]
    fn everything_is_refused() {
        let device = MlxDevice::open(DeviceKind::Nothing).unwrap();
        let shape = Shape {
            batch: 1,
            heads: 1,
            kv_heads: 1,
            query_len: 2,
            key_len: 2,
            qk_dim: 64,
            v_dim: 64,
        };
        let problem = Problem::builder(DType::F32, shape).build().unwrap();
        let refusal = device.supports(&problem).unwrap_err().to_string();
        assert_eq!(
            refusal,
            "the nothing device does not support attention: it has no kernels"
        );
        assert!(device.alloc_buffer(4, DType::F32, vec![1]).is_err());
    }
}
